"""The benchmark's references: the pairwise loop computes the same loss, and memory counts what a call adds."""

from __future__ import annotations

import pytest
import torch

from dvpo_service.bench import quantile_huber as bench


def test_both_sides_compute_the_same() -> None:
    figures = bench.speedup(20, 64, pairwise_tokens=16)
    assert figures["gradient_max_difference"] < 1e-6
    assert figures["speedup"] > 0


def test_memory_counts_at_least_the_results() -> None:
    figures = bench.memory(2048, 100)
    assert figures["extra_mib"] >= figures["of_which_results_mib"] - 1
    assert figures["share_of_the_table"] < 0.1


def test_kernel_figures_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench.kernel(2, 4, torch.device("cpu")) == {"note": "Triton is not installed"}
