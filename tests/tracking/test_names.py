"""Whatever splits, tags and runs are called, MLflow takes it, and different names stay different."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils import validation

from dvpo_service.config import load_config
from dvpo_service.errors import TrackingError
from dvpo_service.tracking.names import check_model_name, safe_experiment, safe_name, safe_run_name, safe_text
from dvpo_service.tracking.tracker import Tracker
from tune_sweeps.grid import GRIDS
from tune_sweeps.records import Sweep
from tune_sweeps.tracking import open_parent

AWKWARD = [
    *(
        "aime@24",
        "test(1)",
        "a@b",
        "a_b",
        "a b",
        "ü漢",
        "a//b",
        "/a",
        "a/",
        "a/../b",
        "..",
        ".",
        "",
        "/",
        "a\nb",
        "a\n",
    ),
    *(
        "x" * 400,
        "x" * 399 + "y",
        "m" * 120 + "/" + "n" * 200,
        "50%",
        "why?",
        "a:b",
        "module:name",
        "😀",
        "~",
        "-",
        "\\",
    ),
]


def accepted(name: str) -> None:
    validation._validate_metric(name, 1.0, 0, 0)
    validation._validate_tag(name, "value")
    validation._validate_param(name, "value")
    assert len(name) <= 250


@pytest.mark.parametrize("name", AWKWARD)
def test_every_name_is_taken_and_stays_itself_once_it_is_safe(name: str) -> None:
    for whole in (name, f"eval/{name}/accuracy"):
        accepted(safe_name(whole))
        assert safe_name(safe_name(whole)) == safe_name(whole)


def test_names_that_look_alike_stay_different() -> None:
    names = {f"eval/{name}/accuracy" for name in [*AWKWARD, "aime_24", "aime(24", "test_1_", "test[1]", "a/_/b"]}
    assert len({safe_name(name) for name in names}) == len(names)


def test_plain_names_are_untouched() -> None:
    for name in ("reward/mean", "critic/coverage/0.1", "algorithm.dvpo_loss_weights.cvar", "mlflow.parentRunId", "a b"):
        assert safe_name(name) == name
    assert safe_name("eval/aime@24/accuracy").startswith("eval/aime_24-")


@given(st.text(max_size=300))
def test_any_text_makes_a_name(name: str) -> None:
    accepted(safe_name(name))
    validation._validate_experiment_name(safe_experiment(name))
    assert len(safe_run_name(name)) <= 250
    assert "\0" not in safe_run_name(name)
    safe_text(name, 20).encode()


@given(st.text("a@_()/.", min_size=1, max_size=8), st.text("a@_()/.", min_size=1, max_size=8))
def test_different_names_never_meet(one: str, other: str) -> None:
    assert (safe_name(one) == safe_name(other)) == (one == other)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "..", "x" * 300])
def test_a_name_that_the_registry_refuses_is_told(name: str) -> None:
    with pytest.raises(TrackingError, match="cannot name a registered model"):
        check_model_name(name)
    check_model_name("my policy (2)")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


def test_a_run_and_a_sweep_with_such_names_are_logged_whole(tmp_path, empty_store) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    splits = ["aime@24", "aime_24", "a//b", "..", "test(1)"]
    tree = {
        "data.val_files": {name: "val.jsonl" for name in splits},
        "tracking.tags": {"a@b": "x" * 9000, "a_b": "2", "..": "3", "": "4"},
        "tracking.run_name": "r" * 300 + "/\n@",
        "tracking.experiment": "e" * 600,
        "data.train_files": ["t" * 7000],
    }
    config = load_config("demo")
    updates = {
        "data": config.data.model_copy(
            update={"val_files": {n: ["v"] for n in splits}, "train_files": tree["data.train_files"]}
        ),
        "tracking": config.tracking.model_copy(
            update={key: tree[f"tracking.{key}"] for key in ("tags", "run_name", "experiment")}
        ),
    }
    config = config.model_copy(update=updates)
    tracker = Tracker(tmp_path / "run", config)
    tracker.log(0, {f"eval/{name}/accuracy": i / 10 for i, name in enumerate(splits)})
    tracker.finish("FINISHED", {"held_out_after": {**{name: 0.5 for name in splits}, "failed": None}})
    client = MlflowClient(tracking_uri=tracker.tracking_uri)
    run = client.get_run(tracker.run_id)
    assert [run.data.metrics[safe_name(f"eval/{name}/accuracy")] for name in splits] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert all(run.data.metrics[safe_name(f"held_out/after/{name}")] == 0.5 for name in splits)
    assert run.data.tags[safe_name("a@b")] == "x" * 7997 + "..."
    assert run.data.tags["a_b"] == "2"
    assert len({safe_name(f"data.val_files.{name}") for name in splits} & set(run.data.params)) == len(splits)
    assert run.info.run_name.startswith("rrr")

    sweep = Sweep(tmp_path / ("s@" + "w" * 240), GRIDS["forms"], "c" * 9000, [], [0], None, None)
    config = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"mlflow_uri": tracker.tracking_uri})}
    )
    _, parent = open_parent(config, sweep)
    assert client.get_run(parent).data.tags["config"].startswith("ccc")
