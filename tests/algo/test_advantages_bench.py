"""The benchmark of the advantages runs, and times what it says."""

from __future__ import annotations

from dvpo_service.bench import advantages as bench


def test_the_huber_advantage_is_a_part_of_its_estimate() -> None:
    figures = bench.advantage(64)
    assert figures["tokens"] == 64
    assert 0 < figures["huber_alone_us"] < 2 * figures["huber_us"]
    assert figures["mean_us"] > 0
