"""`dvpo report`: write the report of a sweep as one HTML page, as Markdown, and its numbers as JSON."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dvpo_service.errors import DataError
from dvpo_service.host.secrets import MASK, mask_message
from dvpo_service.tracking.store import open_store, reaching, sqlite_path
from tune_sweeps.analysis import Analysis, analyse
from tune_sweeps.comparison import LEVEL, MIN_PAIRS, UNSURE, Comparison, by_chance
from tune_sweeps.guide import GuideRow, OwnLoss, guide_rows, own_losses
from tune_sweeps.records import Sweep, read_sweep
from tune_sweeps.sections import Section, all_sections, counted
from tune_sweeps.tables import Table, points

logger = logging.getLogger(__name__)
_NAMED = 6  # a sentence names this many arms and counts the rest


def write_report(folder: Path, *, mlflow_uri: str | None = None) -> Path:
    """Write report.html, report.md and report.json into the sweep's folder, and return the path of report.html.

    The files are also logged to the sweep's MLflow run, if it has one. If that fails, a warning is logged.

    Args:
      mlflow_uri: tracking URI with its password, which the folder does not keep. By default the URI of the folder, or
        MLFLOW_TRACKING_URI if a password was masked in it.

    Raises:
      DataError: ``folder`` holds no sweep, or no trial of it has measured anything yet.
    """
    sweep = read_sweep(folder)
    sweep = replace(sweep, mlflow_uri=mlflow_uri or sweep.mlflow_uri)
    if not any(t.metrics or t.summary or t.state.status == "failed" for t in sweep.trials):
        raise DataError(f"{folder}: no trial has measured anything yet; run `dvpo sweep`, or wait for a first step")
    analysis = analyse(sweep)
    guide = guide_rows(sweep, analysis)
    losses = own_losses(sweep, analysis)
    sections = all_sections(sweep, analysis, guide, losses)
    conclusion = conclude(analysis, guide)
    notices = noticed(analysis)
    html = _page(sweep, sections, conclusion, notices)
    texts = {
        "report.html": html,
        "report.md": _markdown(sweep, sections, conclusion, notices),
        "report.json": json.dumps(_numbers(sweep, analysis, guide, losses, conclusion), indent=2, allow_nan=False),
    }
    for name, text in texts.items():
        (folder / name).write_text(text.rstrip() + "\n", encoding="utf-8")
    _log_artifacts(sweep, [folder / name for name in texts])
    return folder / "report.html"


def conclude(analysis: Analysis, guide: Sequence[GuideRow]) -> list[str]:
    """Return the report's conclusion: two sentences that follow from the verdicts alone."""
    return [_on_accuracy(analysis), _on_guide(guide) if guide else _on_runs(analysis)]


def noticed(analysis: Analysis) -> list[str]:
    """Return notices that a reader must not overlook: trials that are missing from the means."""
    total = _status(analysis)
    everything = sum(total.values())
    notices = []
    open_ = total["unfinished"] + total["not begun"]
    if open_:
        notices.append(f"The sweep has not ended: {open_} of {everything} trials are still to finish.")
    if total["failed"]:
        notices.append(
            f"{total['failed']} of {everything} trials failed and are in no mean; their errors are under Every trial."
        )
    return notices


def _on_accuracy(analysis: Analysis) -> str:
    if analysis.reference is None:
        best = [
            f"{column.label}, {arm.name} with {points(arm.levels[column.key].after)}"
            for column in analysis.columns
            for arm in sorted(analysis.arms, key=lambda a: -(a.levels[column.key].after or 0.0))[:1]
            if arm.levels[column.key].after is not None
        ]
        highest = f"highest mean held-out accuracy: {'; '.join(best)}" if best else "and no run has finished"
        return f"This sweep has no reference arm, so nothing says which differences are more than chance; {highest}."
    by_verdict = {v: [c for c in analysis.accuracy if c.verdict == v] for v in ("lower", "higher", UNSURE)}
    directions = [f"{v} for {_named(by_verdict[v], analysis)}" for v in ("lower", "higher") if by_verdict[v]]
    unsure, everything = len(by_verdict[UNSURE]), len(analysis.accuracy)
    if not directions:
        return (
            f"Against {analysis.reference}, the seeds cannot tell for any arm whether held-out accuracy changed "
            f"({everything} comparisons; pairs of seeds: {_most_pairs(analysis)} at most; a verdict needs {MIN_PAIRS})."
        )
    rest = f"for {unsure} of {everything} comparisons the seeds cannot tell, and " if unsure else ""
    chance = f"about {by_chance(analysis.accuracy):.1f} would get a direction by chance"
    return f"Against {analysis.reference}, held-out accuracy in points is {' and '.join(directions)}; {rest}{chance}."


def _named(comparisons: Sequence[Comparison], analysis: Analysis) -> str:
    """Return ``no-gain (out of distribution -9.1), ...``, the largest change first."""
    short = {str(c.key): c.label.partition(" (")[0] for c in analysis.columns}
    by_arm: dict[str, list[str]] = {}
    for c in sorted(comparisons, key=lambda c: -abs(c.mean or 0.0)):
        by_arm.setdefault(c.arm, []).append(f"{short[c.measure]} {points(c.mean, signed=True)}")
    named = [f"{arm} ({', '.join(changes)})" for arm, changes in list(by_arm.items())[:_NAMED]]
    more = f" and {len(by_arm) - _NAMED} more" if len(by_arm) > _NAMED else ""
    return ", ".join(named) + more


def _on_guide(guide: Sequence[GuideRow]) -> str:
    by_answer: dict[str, list[str]] = {}
    for row in guide:
        by_answer.setdefault(row.shown, []).append(row.expected.name)
    order = ("shown", "not shown", UNSURE, "not tested")
    answers = [f"{answer}: {', '.join(by_answer[answer])}" for answer in order if answer in by_answer]
    return f"Of the guide's {len(guide)} expectations for removed terms, {'; '.join(answers)}."


def _on_runs(analysis: Analysis) -> str:
    total = _status(analysis)
    collapsed = sum(len(arm.collapsed) for arm in analysis.arms)
    spreads = [(level.sd, arm.name) for arm in analysis.arms for level in arm.levels.values() if level.sd is not None]
    text = f"Of {total['done'] + total['failed']} trials that ended, {collapsed} collapsed or failed"
    if not spreads:
        return f"{text}."
    widest, arm = max(spreads)
    return f"{text}; the widest spread across seeds is {points(widest)} points, of {arm}."


def _status(analysis: Analysis) -> dict[str, int]:
    kinds = ("done", "failed", "unfinished", "not begun")
    return {kind: sum(arm.status[kind] for arm in analysis.arms) for kind in kinds}


def _most_pairs(analysis: Analysis) -> int:
    return max((len(c.by_seed) for c in analysis.accuracy), default=0)


def _page(sweep: Sweep, sections: Sequence[Section], conclusion: Sequence[str], notices: Sequence[str]) -> str:
    # Arm names and errors are text of the user: everything but our own SVG is escaped.
    pages = Environment(loader=PackageLoader("tune_sweeps", "."), autoescape=True, undefined=StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.filters["svg"] = Markup
    written_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return pages.get_template("report.html.j2").render(
        sweep=sweep, sections=sections, conclusion=conclusion, notices=notices, made=written_at
    )


def _markdown(sweep: Sweep, sections: Sequence[Section], conclusion: Sequence[str], notices: Sequence[str]) -> str:
    overrides = " ".join(sweep.overrides) or "none"
    facts = f"Grid {sweep.grid.name}, config {sweep.config}, seeds {sweep.seeds}, overrides: {overrides}."
    parts = [f"# {sweep.grid.title}", " ".join(conclusion), *(f"**{line}**" for line in notices), facts]
    for section in sections:
        parts += [f"## {section.title}", *section.text]
        for table in section.tables:
            parts += [f"### {table.title}"] if table.title else []
            parts.append(_markdown_table(table))
        for caption, text in section.code:
            parts += [f"{caption}:", "\n".join(f"    {line}" for line in text.splitlines())]
    return "\n\n".join(parts)


def _markdown_table(table: Table) -> str:
    rows = [table.headers, ["---"] * len(table.headers), *table.rows]
    return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows)


def _markdown_cell(cell: str) -> str:
    head, _, why = cell.partition("\n")
    text = f"{head} ({why})" if why else head
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _numbers(
    sweep: Sweep, analysis: Analysis, guide: Sequence[GuideRow], losses: Sequence[OwnLoss], conclusion: Sequence[str]
) -> dict[str, Any]:
    comparisons = [c for c in counted(analysis, guide) if c.low is not None]
    names = {"grid": sweep.grid.name, "title": sweep.grid.title, "config": sweep.config}
    return {
        "sweep": names | {"overrides": sweep.overrides, "seeds": sweep.seeds},
        "conclusion": list(conclusion),
        "interval_level": LEVEL,
        "comparisons_with_interval": len(comparisons),
        "directions_expected_by_chance": by_chance(comparisons),
        **asdict(analysis),
        "guide": [asdict(row) for row in guide],
        "own_losses": [asdict(loss) for loss in losses],
        "trials": [asdict(t.state) for t in sweep.trials],
    }


def _log_artifacts(sweep: Sweep, paths: Sequence[Path]) -> None:
    """Log the files to the sweep's own MLflow run. A failure is logged as a warning."""
    uri = sweep.mlflow_uri
    if not uri or not sweep.mlflow_run_id:
        return
    if MASK in uri:
        uri = os.environ.get("MLFLOW_TRACKING_URI", uri)
    try:
        db = sqlite_path(uri)
        if db is not None and not db.is_file():  # opening it would create an empty one
            raise FileNotFoundError(f"{db} is not there")
        client = open_store(uri)
        with reaching(uri):
            for path in paths:
                client.log_artifact(sweep.mlflow_run_id, str(path))
    except Exception as error:  # noqa: BLE001 - the report is written; whatever MLflow's stores raise must not hide it
        logger.warning("the report is not in MLflow: %s", mask_message(str(error), uri))
