"""The panel at the end of a run: how its accuracy changed, and where everything is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dvpo_service.host.secrets import mask_uri
from dvpo_service.runs.storage import StoragePath
from dvpo_service.terminal.console import hours, make_console
from dvpo_service.tracking.store import sqlite_path


def closing(
    summary: Mapping[str, Any], run_dir: StoragePath, tracking_uri: str | None, console: Console | None = None
) -> None:
    """Print each split's accuracy before and after, the time taken, and where the results are.

    Args:
      summary: must have ``steps`` and ``seconds``; may have ``held_out_before``, ``held_out_after``,
        ``held_out_greedy_before`` and ``held_out_greedy_after`` (accuracy by split), ``where`` (name to path) and
        ``warnings``.
      run_dir: the run directory.
      tracking_uri: MLflow's URI, if there is one; its password is masked.
      console: by default standard output.
    """
    places = Table.grid(padding=(0, 2))
    places.add_column(style="bold cyan", no_wrap=True)
    places.add_column(overflow="fold")
    for name, value in _places(summary, run_dir, tracking_uri).items():
        places.add_row(name, Text(value))
    took = f" done: {summary['steps']} steps in {hours(summary['seconds'])} "
    (console or make_console()).print(
        Panel(Group(_accuracies(summary), places), title=took, title_align="left", border_style="green")
    )


def _accuracies(summary: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("held-out accuracy")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    for words, key in (("sampled", "held_out"), ("greedy", "held_out_greedy")):
        before, after = summary.get(f"{key}_before", {}), summary.get(f"{key}_after", {})
        for split in dict.fromkeys([*before, *after]):
            cells = [f"{x[split]:.1%}" if split in x else "-" for x in (before, after)]
            table.add_row(f"{split}, {words}", *cells, _change(before.get(split), after.get(split)))
    return table


def _change(before: float | None, after: float | None) -> Text:
    if before is None or after is None:
        return Text("-")
    points = 100 * (after - before)
    style = "bold green" if points > 0 else "bold red" if points < 0 else ""
    return Text(f"{points:+.1f} points", style=style)


def _places(summary: Mapping[str, Any], run_dir: StoragePath, tracking_uri: str | None) -> dict[str, str]:
    rows = {"summary": str(run_dir / "summary.json"), "metrics": str(run_dir / "metrics.jsonl")}
    where = dict(summary.get("where", {}))
    rows |= {name: str(where[name]) for name in ("policy", "checkpoints") if name in where}
    if warnings := summary.get("warnings"):
        rows["warnings"] = f"{len(warnings)}, in summary.json; docs/troubleshooting.md says what helps"
    if tracking_uri:
        uri = mask_uri(tracking_uri)
        rows["MLflow"] = f"make mlflow  ({uri})" if sqlite_path(tracking_uri) else uri
    return rows
