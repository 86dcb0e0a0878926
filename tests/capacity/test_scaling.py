"""docs/scaling.md quotes what the formulas say now."""

from __future__ import annotations

from pathlib import Path

from dvpo_service.capacity.scaling import MODELS, memory, moved, shipped_config, traffic
from dvpo_service.capacity.shape import shape_of

PAGE = Path(__file__).parents[2] / "docs/scaling.md"


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    lines = PAGE.read_text().splitlines()
    missing = [line for line in (*memory(), *moved()) if line not in lines]
    assert not missing, "python -m dvpo_service.capacity.scaling prints them"


def test_what_moves_does_not_grow_with_the_ranks_but_with_the_batch() -> None:
    shape = shape_of(MODELS["7B"])
    small, large = (traffic(shipped_config("7B", 8192, gpus), shape) for gpus in (64, 1024))
    assert small["a push"] == large["a push"] == 2 * shape.parameters
    assert large["rollouts"] == 16 * small["rollouts"] == 17 * 16_384 * 8192
