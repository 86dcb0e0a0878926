"""What a run may not change when it continues: recorded in every checkpoint, compared before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dvpo_service.commands.warmstart import base_model_folder
from dvpo_service.config import Config, RewardConfig
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.splits import Data
from dvpo_service.errors import CheckpointError

FIXED = ("adv_estimator", "n_heads", "n_quantiles", "critic_hidden_dim")  # keys of algorithm
VALIDATION = "data.val_files."
SAMPLE = 1 << 20  # bytes of a weights file that are hashed at each of its ends


def identity(config: Config, data: Data) -> dict[str, str]:
    """Return what makes two runs the same run, by the config key that decides it.

    Values are the settings themselves, or hashes of what the setting names: prompts and answers, and a model's config,
    tokenizer and weights (their sizes, first and last MiB). Moving or renaming a file changes nothing.
    """
    values = {f"algorithm.{key}": str(getattr(config.algorithm, key)) for key in FIXED}
    # Without adapters there is no entry, as there was none in earlier versions.
    pools = {"policy": config.policy, "critic": config.critic}
    values |= {f"{name}.lora": pool.lora.model_dump_json() for name, pool in pools.items() if pool.lora}
    values["reward.function"] = _reward(config.reward)
    values |= _model(config)
    values["data.train_files"] = _hash_of_prompts(data.train)
    values["data.train_files (columns)"] = _hash_of_rows(data.train)
    values |= {VALIDATION + name: _hash_of_prompts(split) for name, split in data.held_out.items()}
    return values | {f"{VALIDATION}{name} (columns)": _hash_of_rows(split) for name, split in data.held_out.items()}


def check_identity(before: Mapping[str, str], now: Mapping[str, str], checkpoint: str) -> None:
    """Raise CheckpointError, with the keys, when ``now`` is not the run that ``checkpoint`` was written by.

    A validation split that is new, or is no longer evaluated, is no other run.
    """
    keys = [k for k in before if before[k] != now.get(k) and (k in now or not k.startswith(VALIDATION))]
    if keys:
        raise CheckpointError(
            f"{checkpoint} is of another run: {'; '.join(_difference(k, before[k], now.get(k)) for k in keys)}. "
            "Give what the run had, choose another --run-dir, or give trainer.resume=never"
        )


def _difference(key: str, before: str, now: str | None) -> str:
    if before.startswith("sha256:") or (now or "").startswith("sha256:"):
        return f"{key} names other content now"
    return f"{key} was {before} and is {now} now"


def _model(config: Config) -> dict[str, str]:
    """Return what identifies the base model: hashes for a folder, the name for a model of the hub."""
    path = config.model.path
    if path is None:
        return {"model.warmstart": base_model_folder(config, Path()).name}
    folder = Path(path)
    if not folder.is_dir():
        return {"model.path": path}
    tokenizer = sorted(f for f in folder.iterdir() if f.is_file() and _is_of_tokenizer(f))
    return {
        "model.path": _weights(folder),
        "model.path (tokenizer)": _sha256(*map(Path.read_bytes, tokenizer)),
    }


def _weights(folder: Path) -> str:
    """Return a hash of a model's config and weights."""
    return _sha256(*map(_sample, [folder / "config.json", *sorted(folder.glob("*.safetensors"))]))


def _is_of_tokenizer(file: Path) -> bool:
    names = ("tokenizer", "vocab", "merges", "chat_template", "special_tokens", "added_tokens")
    return file.name.startswith(names) or file.suffix == ".model"


def _sample(file: Path) -> bytes:
    """Return the size of a file and the bytes at its ends: whole files of weights would take minutes to read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(SAMPLE)
        stream.seek(max(0, size - SAMPLE))
        return b"%d:" % size + first + stream.read(SAMPLE)


def _hash_of_prompts(data: Dataset) -> str:
    return _sha256(*(json.dumps([p.messages, p.answer, p.source], sort_keys=True).encode() for p in data.prompts))


def _hash_of_rows(data: Dataset) -> str:
    """Return a hash of the columns that a reward may read, apart from the answer's, which the prompts' hash has."""
    rows = ({k: v for k, v in p.row.items() if k not in ("answer", "data_source")} for p in data.prompts)
    return _sha256(*(json.dumps(sorted(row.items()), default=str, skipkeys=True).encode() for row in rows))


def _reward(config: RewardConfig) -> str:
    """Return the function, or what of several rewards decides the score."""
    if config.function is not None:
        return "code, partial" if config.function == "code" and config.code.partial else config.function
    parts = [part.identity for part in config.parts]
    for part, what in zip(config.parts, parts, strict=True):
        if part.model and Path(part.model.path).is_dir():  # what it holds, wherever it is
            what["model"]["path"] = _weights(Path(part.model.path))
    return json.dumps({"rewards": parts, "normalise": config.normalise}, sort_keys=True)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return f"sha256:{digest.hexdigest()[:32]}"
