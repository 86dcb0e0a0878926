"""Measure what keeps a trainer's memory small: `dvpo bench memory`, and checkpointing and reduced gradients as ratios.

``python -m tests.bench.bench_memory`` prints one JSON object. The bytes saved for the backward pass leave out the
layers' inputs, which checkpointing keeps.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dvpo_service.bench import memory


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved, retained = trainers(Path(folder))
    results = memory.run() | {
        "bytes_saved_for_backward": saved,
        "checkpointed_over_plain": round(saved["checkpointed"] / saved["plain"], 3),
        "retained_gradient_share": retained,
    }
    print(json.dumps(results, indent=2))


def trainers(folder: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Return the bytes that a policy's step saves for its backward pass, and the share of the gradient that is kept."""
    from actors.training.policy import PolicyWorker
    from dvpo_service.models.small import save_small_model
    from tests.actors.training import test_checkpointing, test_reduction

    tiny = folder / "tiny"
    save_small_model(tiny, hidden_size=64, num_layers=2, num_heads=2, max_positions=128, seed=0)
    plain, checkpointed = test_checkpointing.bytes_of(PolicyWorker, tiny, folder)
    results = test_reduction.measure(tiny, folder)
    shares = {
        f"{world}_ranks_{'deferred' if defer else 'each'}": round(max(ranks[0]["retained"]), 3)
        for (world, defer), ranks in results.items()
    }
    return {"plain": plain, "checkpointed": checkpointed}, shares


if __name__ == "__main__":
    main()
