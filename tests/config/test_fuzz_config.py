"""Any input is either a config that survives a round trip through YAML, or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.cluster.placement import plan_bundles
from dvpo_service.config import Config, load_config, shipped_configs, to_yaml
from dvpo_service.config.load import known_keys
from dvpo_service.errors import ConfigError

KEYS = sorted(known_keys())
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "auto", "dvpo", "grpo", "calibrated", "0.5", "1e-3", "~", "[", "{a", "ü", "a: b"]),
    st.text(max_size=8),
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=5
)
overrides = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), values).map(lambda kv: f"{kv[0]}={json.dumps(kv[1])}"),
        st.tuples(st.sampled_from(KEYS), st.text(max_size=12)).map("=".join),
        st.text(max_size=20),
    ),
    min_size=1,
    max_size=4,
)
fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(config: Config, tmp_path: Path) -> None:
    assert plan_bundles(config)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert to_yaml(load_config(str(again))) == to_yaml(config)


def line(error: ConfigError) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert "Traceback" not in text


@fuzz
@given(st.sampled_from(sorted(shipped_configs())), overrides)
def test_overrides(tmp_path: Path, name: str, given_overrides: list[str]) -> None:
    try:
        config = load_config(name, given_overrides)
    except ConfigError as error:
        line(error)
        return
    check(config, tmp_path)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from([*Config.model_fields, "extends", "modle"]),
        values | st.dictionaries(st.sampled_from([k.rpartition(".")[2] for k in KEYS]), values, max_size=4),
        max_size=5,
    )
)
def test_files(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        config = load_config(str(path))
    except ConfigError as error:
        line(error)
        return
    check(config, tmp_path)


@fuzz
@given(st.binary(max_size=200))
def test_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    line(caught.value)
