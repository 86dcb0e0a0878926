"""Configs of the runs with faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(__file__).parents[2] / "dvpo_service" / "data" / "shipped"
# The demo's base model, made once and used by both the calm run and the run with faults.
WARMSTART = {
    "files": ["shipped:demo-warmstart.jsonl"],
    "hidden_size": 96,
    "num_layers": 3,
    "num_heads": 3,
    "max_positions": 64,
    "steps": 1000,
    "stop_at_accuracy": 0.5,
    "batch_size": 128,
    "lr": 2e-3,
}


def shipped_prompts(folder: Path, count: int) -> str:
    """Write the demo's first ``count`` training prompts to a file: few, so that a run has several epochs."""
    file = folder / f"train-{count}.jsonl"
    lines = (SHIPPED / "demo-train.jsonl").read_text().splitlines()[:count]
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def small_config(model: dict[str, Any], train_file: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a config with two engines, two policy ranks and two critic ranks. ``sections`` are merged in."""
    trainer = {"world_size": 2, "micro_batch_size": 32, "mini_batch_size": 64}
    tree: dict[str, Any] = {
        "model": model,
        "data": {"train_files": train_file, "val_files": {"val": "shipped:demo-val.jsonl"}, "max_prompt_tokens": 16},
        "rollout": {"num_engines": 2, "enforce_eager": True, "kv_cache_gib": 0.2},
        "critic": trainer,
        "policy": trainer,
        "cluster": {"restart_backoff_s": 0.5},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return tree


def write_config(file: Path, tree: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(tree))
    return file
