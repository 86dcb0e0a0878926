"""``dvpo eval``: the held-out accuracy of any model folder, with the engines and rewards of a run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dvpo_service.config import Config
from dvpo_service.types import Metrics


def show(metrics: Metrics, sizes: dict[str, int], model: str) -> None:
    table = Table(title=f"Held-out accuracy of {model}")
    for column in ("split", "prompts", "sampled", "greedy"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, size in sizes.items():
        table.add_row(
            split,
            str(size),
            f"{metrics[f'eval/{split}/accuracy']:.3f}",
            f"{metrics[f'eval/{split}/greedy']:.3f}",
        )
    Console().print(table)


def evaluate_model(config: Config, model: str, output: Path | None) -> Metrics:
    """Print a table by split; write it as JSON to ``output`` if given."""
    from dvpo_service import launch

    with launch.connected(config), ExitStack() as stack:
        metrics, sizes = launch.held_out_accuracy(config, model, stack)
    show(metrics, sizes, model)
    if output:
        output.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
