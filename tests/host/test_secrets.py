"""Parameters, the YAML dump and error messages show no secret."""

from __future__ import annotations

import pytest

from dvpo_service.host.secrets import flatten, mask, mask_message, mask_uri


@pytest.mark.parametrize("key", ["hf_token", "db.password", "API_KEY", "api-key", "client_secret", "aws_access_key_id"])
def test_strings_under_secret_keys_are_masked(key):
    assert mask({"tags": {key: "hunter2", "team": "rl"}}) == {"tags": {key: "***", "team": "rl"}}


def test_numbers_and_absent_values_are_no_secrets():
    tree = {"max_new_tokens": 16, "hf_token": None, "token": ""}
    assert mask(tree) == tree


def test_a_section_that_names_a_secret_is_masked_whole():
    assert mask({"secrets": {"a": "x", "b": ["y", 3]}}) == {"secrets": {"a": "***", "b": ["***", 3]}}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:hunter2@host:5000/x", "https://***@host:5000/x"),
        ("postgresql://me:hun@ter2@host/db", "postgresql://***@host/db"),
        ("https://host/x?user=a&api_key=hunter2&b=1", "https://host/x?user=a&api_key=***&b=1"),
        ("https://acc.blob/x?sv=1&sig=hunter2", "https://acc.blob/x?sv=1&sig=***"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
    ],
)
def test_credentials_in_uris(uri, shown):
    assert mask_uri(uri) == shown
    assert mask({"mlflow_uri": uri}) == {"mlflow_uri": shown}


def test_the_password_is_masked_however_a_library_writes_it():
    message = mask_message("auth failed for me with 'hun ter2' (hun%20ter2)", "http://me:hun%20ter2@host")
    assert "ter2" not in message


def test_flatten_gives_dotted_keys():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, "x"], "e": None}) == {
        "a.b": "1",
        "a.c": "{}",
        "d": '[1, "x"]',
        "e": "None",
    }
