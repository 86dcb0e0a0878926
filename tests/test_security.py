"""The promises of docs/security.md: nothing is unpickled, data names no code, no secret is shown, no port is open."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.rollouts.reward import RewardWorker, Work
from dvpo_service.config import Config, load_config, to_yaml
from dvpo_service.config.exposure import dashboard_warning, serving_warning, warnings_of
from dvpo_service.config.serve import ServeConfig
from dvpo_service.data.dataset import load_prompts
from dvpo_service.errors import ConfigError, TrackingError
from dvpo_service.host.failure import describe
from dvpo_service.host.secrets import MaskingFormatter, mask_override
from dvpo_service.tracking.store import tracking_uri
from tests.builders import make_config
from tests.ports import listening
from tune_sweeps.grid import GRIDS
from tune_sweeps.records import Sweep, read_sweep, save_sweep

ROOT = Path(__file__).parents[1]
SECRET = "hunter2-and-more"
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
# Calls by the end of their dotted name. FileSystemReader (torch.distributed.checkpoint) unpickles metadata.
CALLS = {
    *("torch.load", "np.load", "numpy.load", "read_pickle", "FileSystemReader", "torch.hub.load", "jit.load"),
    *("yaml.load", "yaml.load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"),
    *("os.system", "os.popen", "eval", "exec", "__import__"),
}
# Files that may import a module by name: the reward function of the config, and one of three benchmarks.
IMPORTERS = {"dvpo_service/rewards/scoring.py", "dvpo_service/registry/plugins.py", "dvpo_service/cli.py"}


def suspects(tree: ast.AST) -> Iterator[str]:
    """Yield the imports and calls that could run code from outside the repository."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            bare = isinstance(node.func, ast.Name)
            if any(name == c or (name.endswith("." + c) and c not in ("eval", "exec")) for c in CALLS):
                yield name
            elif name.rpartition(".")[2] == "import_module":
                yield "import_module"
            elif name.endswith("extractall") and not bare and not _says(node, "filter", "data"):
                yield "extractall without filter='data'"
            yield from (k for k in ("shell", "trust_remote_code", "allow_pickle") if _says(node, k, True))


def _says(call: ast.Call, key: str, value: Any) -> bool:
    return any(k.arg == key and isinstance(k.value, ast.Constant) and k.value.value == value for k in call.keywords)


def sources() -> list[Path]:
    return [p for folder in ("dvpo_service", "actors", "tune_sweeps", "scripts") for p in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from cloudpickle import loads", "import torch; torch.load(p)", "np.load(p)", "eval(text)"),
        *("yaml.load(text, yaml.Loader)", "yaml.unsafe_load(text)", "importlib.import_module(name)", "exec(text)"),
        *("tar.extractall(p)", "subprocess.run(c, shell=True)", "AutoModel.from_pretrained(p, trust_remote_code=True)"),
        *("dcp.FileSystemReader(p)", "pd.read_pickle(p)", "__import__(name)", "np.memmap(p, allow_pickle=True)"),
    ],
)
def test_the_search_sees(code: str) -> None:
    assert list(suspects(ast.parse(code)))


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    assert len(sources()) > 100
    uses = [(str(p.relative_to(ROOT)), s) for p in sources() for s in suspects(ast.parse(p.read_text()))]
    assert {(p, s) for p, s in uses if not (s == "import_module" and p in IMPORTERS)} == set()
    assert {p for p, s in uses if s == "import_module"} == IMPORTERS


def test_data_cannot_name_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    (tmp_path / "evil_rewards.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = "evil_rewards:score"
    row = {
        "prompt": [{"role": "user", "content": name}],
        "reward_model": {"style": name, "ground_truth": name, "function": name},
        **dict.fromkeys(("data_source", "function", "reward", "reward_fn", "extra_info", "ability"), name),
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    [prompt] = load_prompts([tmp_path / "a.jsonl"], name="x").prompts
    work = Work(["2"], prompt.answer, [0], prompt.source, prompt.row, prompt.messages)
    [[result]] = RewardWorker(config.reward).score(0, [work])
    assert (result.value, result.error) == (0.0, None)
    assert "evil_rewards" not in sys.modules


def test_everything_is_on_loopback_by_default() -> None:
    assert ServeConfig().host == "127.0.0.1"
    assert "--host 127.0.0.1" in (ROOT / "Makefile").read_text()


@pytest.mark.e2e
def test_a_cluster_started_here_listens_on_loopback_only() -> None:
    import ray

    from actors.cluster.connect import connected

    with connected(make_config("unused")):
        ray.get(ray.remote(lambda: None).remote(), timeout=60)
        addresses = listening(psutil.Process())
        assert len(addresses) > 3
        assert {address for address, _ in addresses} == {"127.0.0.1"}
        # Another user of this machine, or someone who gets in through a port of Serve's, still needs the token.
        gcs = ray.get_runtime_context().gcs_address
        stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        joining = [sys.executable, "-c", f"from ray._raylet import GcsClient; GcsClient(address='{gcs}')"]
        refused = subprocess.run(joining, env=stranger, capture_output=True, text=True, timeout=60)
        assert refused.returncode != 0
        assert "InvalidAuthToken" in refused.stderr
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_what_is_opened_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)

    def warnings(uri: str | None = None, **model: Any) -> list[str]:
        config = make_config("m", tracking={"mlflow_uri": uri})
        return warnings_of(config.model_copy(update={"model": config.model.model_copy(update=model)}))

    assert (
        warnings()
        == warnings(f"http://me:{SECRET}@127.0.0.1")
        == warnings(f"https://me:{SECRET}@host")
        == warnings("http://h")
        == []
    )
    [line] = warnings(f"http://me:{SECRET}@host")
    assert "readable over plain http" in line
    assert SECRET not in line
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert len(warnings("http://host")) == 1
    assert make_config("m").model.trust_remote_code is False
    assert "runs here, with your rights" in warnings(trust_remote_code=True)[0]

    assert serving_warning("127.0.0.1", with_key=False) is None
    assert "anyone who reaches 0.0.0.0" in str(serving_warning("0.0.0.0", with_key=False))
    assert "readable over plain http" in str(serving_warning("0.0.0.0", with_key=True))
    assert dashboard_warning(None) is dashboard_warning("127.0.0.1:8265") is dashboard_warning("[::1]:8265") is None
    assert "can run code" in str(dashboard_warning("10.0.0.1:8265"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert dashboard_warning("10.0.0.1:8265") is None


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config with a secret in a URI and in a tag; the secret is in the environment too."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    tracking = {"mlflow_uri": f"http://me:{SECRET}@host:5000", "tags": {"hf_token": SECRET, "team": "rl"}}
    return make_config("m", tracking=tracking)


def test_no_secret_in_a_dumped_config_which_still_loads(
    secretive: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(secretive))
    assert SECRET not in (tmp_path / "config.yaml").read_text()
    again = load_config(str(tmp_path / "config.yaml"))
    assert again.tracking.tags == {"hf_token": "***", "team": "rl"}
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="its password is masked"):
        tracking_uri(again, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(secretive.tracking.mlflow_uri))
    assert tracking_uri(again, tmp_path) == secretive.tracking.mlflow_uri


def test_no_secret_in_a_sweeps_record(tmp_path: Path) -> None:
    overrides = [f"tracking.mlflow_uri=http://me:{SECRET}@host", f"tracking.tags.hf_token={SECRET}", "trainer.seed=1"]
    grid = next(iter(GRIDS.values()))
    save_sweep(Sweep(tmp_path, grid, "demo", overrides, [0], None, f"http://me:{SECRET}@host"))
    assert SECRET not in (tmp_path / "sweep.json").read_text()
    assert read_sweep(tmp_path).overrides == [mask_override(o) for o in overrides]
    assert mask_override("trainer.seed=1") == "trainer.seed=1"


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.tags=http://me:{SECRET}@h",
        f"hf_token={SECRET}",
        f"tracking.tags.token=[{SECRET}]",
        f"a..token={SECRET}",
    ],
)
def test_no_secret_in_a_config_error(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    message, _ = describe(caught.value)
    assert SECRET not in message


def test_no_secret_in_an_error_or_a_log(secretive: Config, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError(f"401 for {secretive.tracking.mlflow_uri}?api_key={SECRET}, header Bearer {SECRET}")
    line, code = describe(error)
    assert (SECRET in line, code) == (False, 1)
    handler = logging.StreamHandler()
    handler.setFormatter(MaskingFormatter("%(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise error
    except RuntimeError:
        logger.exception("failed with %s", SECRET)
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert SECRET not in text
