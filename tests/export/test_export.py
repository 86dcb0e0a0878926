"""An export holds the trainer's weights, from a checkpoint written by any number of ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dvpo_service.config import to_yaml
from dvpo_service.errors import CheckpointError
from dvpo_service.export.export import describe, export, open_export, writing
from dvpo_service.export.states import newest, run_config
from dvpo_service.models.base import save_base
from dvpo_service.models.critic import DistributionalCritic
from dvpo_service.models.fixed_sequences import record, recorded
from dvpo_service.models.load import load_causal_lm, load_tokenizer
from dvpo_service.runs.integrity import read_record, write_record
from tests.builders import make_config
from tests.export.conftest import STEP


def same(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


RANKS = pytest.mark.parametrize("fixture", ["trained", "trained_on_two"])


@RANKS
def test_a_checkpoint_becomes_the_policy_and_critic_that_were_trained(
    fixture: str, request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path
) -> None:
    trained: Path = request.getfixturevalue(fixture)
    done = export(trained, tmp_path / "out")
    assert done == open_export(tmp_path / "out")
    assert (done.step, done.mlflow_run_id) == (STEP, "run-7")
    policy = load_causal_lm(str(done.folder)).state_dict()
    assert same(policy, load_file(trained / "live" / "policy-state.safetensors"))
    assert not torch.equal(policy["lm_head.weight"], load_causal_lm(str(tiny_model)).state_dict()["lm_head.weight"])
    assert done.critic is not None
    critic = DistributionalCritic.from_pretrained(done.critic)
    assert same(critic.state_dict(), load_file(trained / "live" / "critic-state.safetensors"))
    assert load_tokenizer(str(done.folder))("12+7=") == load_tokenizer(str(tiny_model))("12+7=")


def test_the_base_models_generation_config_is_kept(run: Path, tmp_path: Path) -> None:
    """Chat models end responses at tokens that only the generation config names."""
    file = run / "base" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [1, 2]}))
    done = export(run, tmp_path / "out")
    assert load_causal_lm(str(done.folder)).generation_config.eos_token_id == [1, 2]  # type: ignore[union-attr]


@RANKS
def test_the_end_of_training_writes_the_same_weights(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trained: Path = request.getfixturevalue(fixture)
    done = export(trained, tmp_path / "out")
    live = load_causal_lm(str(trained / "live" / "policy")).state_dict()
    assert same(live, load_causal_lm(str(done.folder)).state_dict())
    first = DistributionalCritic.from_pretrained(trained / "live" / "critic")
    second = DistributionalCritic.from_pretrained(tmp_path / "out/critic")
    assert first.spec == second.spec
    assert same(first.state_dict(), second.state_dict())
    at_the_end, now = recorded(trained / "live" / "policy"), recorded(done.folder)
    assert at_the_end
    assert now
    assert at_the_end.token_ids == now.token_ids
    record(load_causal_lm(str(done.folder)), load_tokenizer(str(done.folder)), tmp_path)
    loaded = recorded(tmp_path)
    assert loaded
    assert max(loaded.difference(at_the_end.log_probs), loaded.difference(now.log_probs)) < 1e-5


def test_a_critic_says_what_its_atoms_mean(trained: Path) -> None:
    critic = DistributionalCritic.from_pretrained(trained / "live" / "critic")
    spec = critic.spec
    assert (spec.num_heads, spec.num_quantiles, spec.width) == (3, 20, 32)
    assert (spec.quantile_levels, spec.alpha, spec.beta, spec.estimator) == ("midpoint", 0.1, 0.1, "dvpo")
    torch.testing.assert_close(spec.levels(), (torch.arange(20) + 0.5) / 20)
    assert not critic.training
    assert {p.dtype for p in critic.parameters()} == {torch.float32}


def test_newest_is_the_last_whole_state(run: Path, tmp_path: Path) -> None:
    checkpoints = run / "checkpoints"
    first = checkpoints / "step-000003"
    assert newest(run) == (3, first)
    assert newest(first) == (3, first)
    (checkpoints / "step-000009" / "policy").mkdir(parents=True)  # torn: it has no state.json
    (checkpoints / ".step-000010.tmp").mkdir()
    assert newest(run) == (3, first)
    policy = export(run, run / "policy").folder
    assert newest(run) == (3, policy), "at equal steps the one that is exported already"
    assert newest(policy) == (3, policy)
    later = Path(shutil.copytree(first, checkpoints / "step-000008"))
    (later / "state.json").write_text(json.dumps({"state": {"step": 8}}))
    assert newest(run) == (8, later), "a run that went on is beyond its last policy/"


def test_an_export_is_copied_as_it_is(trained: Path, tmp_path: Path) -> None:
    first = export(trained, tmp_path / "first")
    assert export(first.folder, first.folder) == first
    second = export(first.folder, tmp_path / "below" / "second")
    assert second.step == first.step
    files = [p.relative_to(first.folder) for p in first.folder.rglob("*") if p.is_file()]
    assert files
    assert all((first.folder / f).read_bytes() == (second.folder / f).read_bytes() for f in files)


def test_an_export_replaces_an_older_one_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    out = export(trained, tmp_path / "out").folder
    (out / "stale").write_text("")
    export(trained, out)
    assert not (out / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(CheckpointError, match=r"mine exists and is no export; choose another folder"):
        export(trained, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"
    with writing(tmp_path / "mine", own=True) as folder:  # a run's own policy/ of an older version
        (folder / "new").write_text("")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["new"]


def test_an_export_that_fails_leaves_what_was_there(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out").folder
    before = (out / "model.safetensors").read_bytes()
    shard = next((run / "checkpoints/step-000003/estimator").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(
        CheckpointError,
        match=r"3 is damaged: estimator/.* has 1000 bytes.*; export another checkpoint",
    ):
        export(run, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"], "nothing half-made is left beside it"


@pytest.mark.parametrize("part", ["policy", "estimator"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_shard_that_is_missing_is_noticed(part: str, which: int, trained_on_two: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_on_two, tmp_path / "run"))
    files = sorted((run / "checkpoints/step-000003" / part).glob("*.safetensors"))
    assert len(files) == 2
    files[which].unlink()
    with pytest.raises(CheckpointError, match=f"step-000003 is damaged: {part}/.* is missing"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_critic_exports_none(run: Path, tmp_path: Path) -> None:
    config = run_config(run)
    algorithm = config.algorithm.model_copy(update={"adv_estimator": "grpo"})
    (run / "config.yaml").write_text(to_yaml(config.model_copy(update={"algorithm": algorithm})))
    checkpoint = run / "checkpoints/step-000003"
    shutil.rmtree(checkpoint / "estimator")
    record, files = read_record(checkpoint)
    write_record(checkpoint, record, {name: sums for name, sums in files.items() if name.startswith("policy/")})
    done = export(run, tmp_path / "out")
    assert done.critic is None
    assert not (done.folder / "critic").exists()
    with pytest.raises(CheckpointError, match="out/critic: no such folder; a run without a critic exports none"):
        DistributionalCritic.from_pretrained(done.folder / "critic")


def test_a_scalar_critic_is_one_head_of_one_atom(tied: Path, tmp_path: Path) -> None:
    done = export(tied, tmp_path / "out")
    assert done.critic is not None
    critic = DistributionalCritic.from_pretrained(done.critic)
    assert (critic.spec.num_heads, critic.spec.num_quantiles, critic.spec.estimator) == (1, 1, "gae")
    assert critic.spec.levels().tolist() == [0.5]
    assert same(critic.state_dict(), load_file(tied / "live/critic-state.safetensors"))
    assert "the value, the mean of the return" in (done.folder / "README.md").read_text()


def test_folders_that_are_no_source(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds nothing to export: no whole checkpoint"):
        export(tiny_model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        newest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no export: there is no export\.json"):
        open_export(tiny_model)
    alone = shutil.copytree(trained / "checkpoints/step-000003", tmp_path / "far" / "checkpoints" / "step-000003")
    with pytest.raises(CheckpointError, match=r"far is no run directory and no export: there is no config\.yaml"):
        export(Path(alone), tmp_path / "out")
    shutil.copy(trained / "config.yaml", tmp_path / "far")
    with pytest.raises(CheckpointError, match=r"far: no base/config\.json"):
        export(Path(alone), tmp_path / "out")


def test_a_critic_folder_that_is_wrong_says_how(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is not that of a critic"):
        DistributionalCritic.from_pretrained(tiny_model)
    critic = Path(shutil.copytree(trained / "live" / "critic", tmp_path / "critic"))
    tree = json.loads((critic / "config.json").read_text())
    (critic / "config.json").write_text(json.dumps(tree | {"num_quantiles": 7}))
    with pytest.raises(CheckpointError, match=r"the weights are not those of its config: .*size mismatch"):
        DistributionalCritic.from_pretrained(critic)
    (critic / "config.json").write_text(json.dumps(tree | {"backbone": {"model_type": "no-such"}}))
    with pytest.raises(CheckpointError, match=r"config\.json describes no critic that can be built: .*no-such"):
        DistributionalCritic.from_pretrained(critic)
    shutil.copy(trained / "live" / "critic" / "config.json", critic)
    weights = critic / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        DistributionalCritic.from_pretrained(critic)


def test_an_output_layer_that_is_the_embedding_is_saved_and_exported_once(tied: Path, tmp_path: Path) -> None:
    """Most small models have such an output layer."""
    done = export(tied, tmp_path / "out")
    exported = load_causal_lm(str(done.folder)).state_dict()
    assert torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    assert same(exported, load_causal_lm(str(tied / "live" / "policy")).state_dict())
    assert "lm_head.weight" not in load_file(done.folder / "model.safetensors")
    before = load_file(tied.parent / "model" / "model.safetensors")
    after = load_file(done.folder / "model.safetensors")
    assert not same(before, after), "it was trained"


def test_the_base_is_kept_without_weights(tiny_model: Path, tmp_path: Path) -> None:
    save_base(str(tiny_model), tmp_path)
    save_base(str(tiny_model), tmp_path)  # a run that continues
    assert not list((tmp_path / "base").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in (tmp_path / "base").iterdir()) < 100_000


def test_the_export_gives_away_no_secret_and_its_card_no_path(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = export(trained, tmp_path / "out")
    text = "".join(f.read_text() for f in done.folder.rglob("*") if f.suffix in (".md", ".yaml", ".json"))
    assert "hush" not in text
    card = (done.folder / "README.md").read_text()
    assert not re.search(r"/(tmp|home|work|root)\b", card)
    assert str(tmp_path) not in card
    assert str(tiny_model) not in card


def test_describe_says_where_the_folder_comes_from(tiny_model: Path, tmp_path: Path) -> None:
    describe(tmp_path, tmp_path, make_config(tiny_model), 5, None)
    assert open_export(tmp_path).step == 5
    assert open_export(tmp_path).mlflow_run_id is None
    assert "The run has measured none." in (tmp_path / "README.md").read_text()


def test_exported_files_follow_the_umask(tmp_path: Path) -> None:
    """Libraries that write weights through temporary files leave them readable by their owner alone."""
    before = os.umask(0o022)
    try:
        with writing(tmp_path / "out") as folder:
            (folder / "critic").mkdir()
            for name in ("model.safetensors", "critic/model.safetensors"):
                (folder / name).touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {f.stat().st_mode & 0o777 for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert modes == {0o644}


def test_a_folder_that_is_not_there_is_told_with_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "demo" / "policy").mkdir(parents=True)
    (tmp_path / "demo" / "policy" / "export.json").write_text('{"step": 1}')
    (tmp_path / "demo" / "checkpoints" / "step-000075").mkdir(parents=True)
    (tmp_path / "demo" / "checkpoints" / "step-000075" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"dmeo: there is no such folder\. Did you mean .*/demo\?"):
        newest(tmp_path / "dmeo")
    with pytest.raises(CheckpointError, match=r"step-000050: there is no such folder\. Did you mean .*/step-000075\?"):
        newest(tmp_path / "demo" / "checkpoints" / "step-000050")
    with pytest.raises(CheckpointError, match=r"nowhere/x: there is no such folder\. .* holds demo"):
        newest(tmp_path / "nowhere" / "x")
