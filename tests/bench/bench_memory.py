"""Measure what keeps a trainer's memory small, as ratios: chunked log-probs, checkpointing, reduced gradients.

``python -m tests.bench.bench_memory`` prints one JSON object. Peaks are the growth of the resident memory of a process
of their own: one forward and one backward pass through an output layer of 152,064 words. ``rss_gib FORM TOKENS`` as
arguments measures a single one. The bytes saved for the backward pass leave out the layers' inputs, which checkpointing
keeps.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

VOCABULARY, WIDTH = 152_064, 16


def main() -> None:
    peaks = {f"{form}_{tokens}": peak_gib(form, tokens) for form, tokens in CASES}
    with tempfile.TemporaryDirectory() as folder:
        saved, retained = trainers(Path(folder))
    results = {
        "logprobs_peak_gib": {name: round(peak, 3) for name, peak in peaks.items()},
        "chunked_over_plain_1024": round(peaks["chunked_1024"] / peaks["plain_1024"], 3),
        "chunked_8192_over_1024": round(peaks["chunked_8192"] / peaks["chunked_1024"], 3),
        "bytes_saved_for_backward": saved,
        "checkpointed_over_plain": round(saved["checkpointed"] / saved["plain"], 3),
        "retained_gradient_share": retained,
    }
    print(json.dumps(results, indent=2))


CASES = (("plain", 1024), ("chunked", 1024), ("chunked", 8192))


def peak_gib(form: str, tokens: int) -> float:
    """Return the growth of a new process's memory during log-probs, entropies and their backward pass, in GiB."""
    command = [sys.executable, "-m", "tests.bench.bench_memory", "rss_gib", form, str(tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)


def rss_gib(form: str, tokens: int) -> float:
    from dvpo_service.algo.chunked_logprobs import chunked_logprobs
    from dvpo_service.algo.policy_loss import entropy, token_logprobs

    torch.set_num_threads(1)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if form == "chunked":
        logprobs, entropies = chunked_logprobs(hidden, targets, head, [head.weight])
        assert entropies is not None
    else:
        logits = head(hidden)[None]
        logprobs, entropies = token_logprobs(logits, targets[None]), entropy(logits)
    (logprobs.sum() + entropies.sum()).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


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
    if sys.argv[1:2] == ["rss_gib"]:
        print(rss_gib(sys.argv[2], int(sys.argv[3])))
    else:
        main()
