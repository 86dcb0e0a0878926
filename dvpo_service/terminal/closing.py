"""The panel at the end of a run: how its accuracy changed, and where everything is."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dvpo_service.host.secrets import mask_uri
from dvpo_service.runs.storage import StoragePath
from dvpo_service.terminal.console import hours, make_console, plain


def closing(
    summary: Mapping[str, Any], run_dir: StoragePath, tracking_uri: str | None, console: Console | None = None
) -> None:
    """Print each split's accuracy before and after, the time taken, and where the results are.

    Args:
      summary: must have ``steps`` and ``seconds``; may have ``held_out_before``, ``held_out_after``,
        ``held_out_greedy_before`` and ``held_out_greedy_after`` (accuracy by split, None where nothing was scored),
        ``graded`` (the splits whose rewards are not 0 or 1), ``critic_explains``, ``where`` (name to path) and
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
    console = console or make_console()
    console.print(Panel(Group(_accuracies(summary), places), title=took, title_align="left", border_style="green"))
    if command := _mlflow_command(tracking_uri):
        plain(console, f"to open these runs in MLflow: {command}")  # below the box, so that it can be copied whole


def _accuracies(summary: Mapping[str, Any]) -> Table:
    graded = set(summary.get("graded", ()))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("held-out, mean reward" if graded else "held-out accuracy")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    for words, key in (("sampled", "held_out"), ("greedy", "held_out_greedy")):
        before, after = summary.get(f"{key}_before", {}), summary.get(f"{key}_after", {})
        for split in dict.fromkeys([*before, *after]):
            values = before.get(split), after.get(split)
            cells = [_figure(value, split in graded) for value in values]
            table.add_row(f"{split}, {words}", *cells, _change(*values, graded=split in graded))
    return table


def _figure(value: float | None, graded: bool) -> str:
    """Return an accuracy as a percentage, a mean of graded rewards as it is, and ``-`` where nothing was scored."""
    return "-" if value is None else f"{value:.3f}" if graded else f"{value:.1%}"


def _change(before: float | None, after: float | None, *, graded: bool) -> Text:
    if before is None or after is None:
        return Text("-")
    change = after - before
    style = "bold green" if change > 0 else "bold red" if change < 0 else ""
    return Text(f"{change:+.3f}" if graded else f"{100 * change:+.1f} points", style=style)


def _mlflow_command(tracking_uri: str | None) -> str | None:
    """Return the command that shows the runs in a browser; None for an MLflow server, which has a page of its own."""
    if not tracking_uri or "://" not in tracking_uri or tracking_uri.startswith(("http:", "https:", "databricks")):
        return None
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") or not beside.exists() else shlex.quote(str(beside))
    return f"{program} ui --backend-store-uri {shlex.quote(mask_uri(tracking_uri))}"


def _critic_words(explains: Mapping[str, float]) -> str:
    """Return what the critic's values explain, in words; empty where nothing is known."""
    what = {
        "between_prompts": "of the differences between prompts",
        "within_a_prompt": "of those between right and wrong answers to one prompt",
    }
    known = [f"{explains[k]:.0%} {words}" for k, words in what.items() if k in explains]
    return f"explains {' and '.join(known)}" if known else ""


def _places(summary: Mapping[str, Any], run_dir: StoragePath, tracking_uri: str | None) -> dict[str, str]:
    rows = {"summary": str(run_dir / "summary.json"), "metrics": str(run_dir / "metrics.jsonl")}
    where = dict(summary.get("where", {}))
    rows |= {name: str(where[name]) for name in ("policy", "checkpoints") if name in where}
    if words := _critic_words(summary.get("critic_explains", {})):
        rows = {"critic": words, **rows}
    if warnings := summary.get("warnings"):
        rows["warnings"] = f"{len(warnings)}, in summary.json; docs/troubleshooting.md says what helps"
    if tracking_uri:
        rows["MLflow"] = mask_uri(tracking_uri)
    return rows
