"""Start a command: the checks that need small files only come before the imports that take seconds (torch, Ray, vLLM).

So a mistake is reported within a second or two. Nothing heavy is imported at the top of this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from dvpo_service.config import load_config
from dvpo_service.errors import ConfigError, UserError


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal, during the block, that the heavy libraries are imported."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status("loading torch, Ray and vLLM"):
        yield


def train(config: str, overrides: Sequence[str], run_dir: str | None) -> None:
    """Train, unless the run is finished already."""
    from dvpo_service.commands.finished import finished, say_finished
    from dvpo_service.runs.directory import resolve_run_dir

    resolved = load_config(config, overrides)
    place = resolve_run_dir(run_dir, resolved.trainer.run_dir, resolved.name)
    if summary := finished(resolved, place):
        typer.echo(say_finished(resolved, place, summary))
        return
    with loading():
        from dvpo_service.commands import train as command
    command.train(resolved, place)


def warmstart(config: str, overrides: Sequence[str], run_dir: str | None) -> None:
    """Make a config's base model, and print its folder."""
    resolved = load_config(config, overrides)
    with loading():
        from actors.cluster.connect import connected
        from dvpo_service.commands.warmstart import base_model
        from dvpo_service.data.splits import load_data
        from dvpo_service.runs.directory import RunDir, resolve_run_dir

    train_data = load_data(resolved.data).train
    with connected(resolved):
        run = RunDir(resolve_run_dir(run_dir, resolved.trainer.run_dir, resolved.name))
        typer.echo(base_model(resolved, train_data, run.local.parent))


def evaluate(
    run: str | None,
    config: str | None,
    model: str | None,
    overrides: Sequence[str],
    data: Sequence[str],
    n: int,
    output: Path | None,
) -> None:
    """Evaluate a run, or a model on a config's splits. Raises ConfigError unless exactly one of the two is given."""
    from dvpo_service.export.download import local_copy
    from dvpo_service.export.states import config_of

    output = output.expanduser() if output else None
    if run and not (config or model):
        with local_copy(run) as folder:
            resolved = config_of(folder, overrides)
            with loading():
                from dvpo_service.commands import evaluate as command
            with command.from_run(folder, run, resolved) as subject:
                command.evaluate(subject, data, n, output)
    elif config and model and not run:
        resolved = load_config(config, overrides)
        with loading():
            from dvpo_service.commands import evaluate as command
        command.evaluate(command.Subject(resolved, model, model), data, n, output)
    else:
        raise ConfigError("dvpo eval: give either --run, or both --config and --model")


def export(run: str, output: Path, register: str | None) -> None:
    """Export a run, and say where it is."""
    from dvpo_service.export.download import local_copy
    from dvpo_service.export.states import config_of

    with local_copy(run) as folder:
        config_of(folder)
        with loading():
            from dvpo_service.export.export import export_and_register
        exported, version = export_and_register(folder, output.expanduser(), register)
    typer.echo(f"policy after {exported.step} updates: {exported.folder}")
    typer.echo(f"critic: {exported.critic or 'none, the run has none'}")
    if version:
        typer.echo(f"MLflow: version {version} of {register}")


def serve(run: str, overrides: Sequence[str], *, follow: bool) -> None:
    """Serve a run until interrupted. Raises UserError for a URL."""
    from dvpo_service.export.states import config_of
    from dvpo_service.runs.storage import is_url

    if is_url(run):
        raise UserError(f"{run}: every replica reads the weights from a path; `dvpo export --run {run} -o DIR` first")
    source = Path(run).expanduser()
    config_of(source, overrides)
    with loading():
        from dvpo_service.commands.serve import run as serve_run
    serve_run(source, overrides, follow=follow)


def doctor(config: str | None, overrides: Sequence[str]) -> bool:
    """Examine the machine and, with a config, the run. Return whether every check passed."""
    resolved = load_config(config, overrides) if config else None
    with loading():
        from dvpo_service.commands.doctor import examine
    return examine(resolved)
