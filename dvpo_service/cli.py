"""The ``dvpo`` command line."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from dvpo_service import __version__
from dvpo_service.errors import UserError

# Heavy imports (torch, ray, transformers) stand in the commands, so that --help is quick.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DVPO: distributed RL post-training with a distributional critic.",
)

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="A shipped name or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, e.g. algorithm.dvpo_loss_weights.ablate_gain=true")
]


@app.callback(invoke_without_command=True)
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Stack traces with errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if debug:
        os.environ["DVPO_DEBUG"] = "1"
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where results go; runs/NAME by default.")] = None,
) -> None:
    """Train a policy. The same command again continues a run that was cut off."""
    from dvpo_service.config import load_config
    from dvpo_service.launch import train as launch

    resolved = load_config(config, overrides or [])
    launch(resolved, _run_dir(run_dir, resolved.trainer.run_dir, resolved.name))


@app.command()
def warmstart(
    config: ConfigOption,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Its folder base-models/ holds the model.")] = None,
) -> None:
    """Make the base model of a config that asks for one, and print its folder."""
    from dvpo_service.config import load_config
    from dvpo_service.data.splits import load_data
    from dvpo_service.launch import base_model, connected

    resolved = load_config(config, overrides or [])
    train_data = load_data(resolved.data).train
    with connected(resolved):
        typer.echo(base_model(resolved, train_data, _run_dir(run_dir, resolved.trainer.run_dir, resolved.name).parent))


@app.command("eval")
def evaluate(
    config: ConfigOption,
    model: Annotated[str, typer.Option("--model", "-m", help="A Hugging Face folder, e.g. runs/demo/policy.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
) -> None:
    """Held-out accuracy of a model on a config's splits, as a training run measures it."""
    from dvpo_service.config import load_config
    from dvpo_service.evaluate import evaluate_model

    evaluate_model(load_config(config, overrides or []), model, output)


@app.command()
def serve(
    run: Annotated[Path, typer.Option("--run", "-r", help="A run directory, a checkpoint of it, or an export.")],
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve newer checkpoints of the run as they appear.")
    ] = False,
) -> None:
    """Serve a policy with its value distributions: OpenAI's API, /v1/values, and a page to look at."""
    from dvpo_service.serve import run as serve_run

    serve_run(run, overrides or [], follow=follow)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Option("--config", "-c", help="Also check that its plan fits.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check the machine, and with --config that the run would fit."""
    from dvpo_service.config import load_config
    from dvpo_service.doctor import examine

    if not examine(load_config(config, overrides or []) if config else None):
        raise typer.Exit(1)


@app.command()
def sweep(
    config: ConfigOption,
    grid: Annotated[str, typer.Option("--grid", "-g", help="A built-in grid or a YAML file.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many: 0, 1, ...")] = 3,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in its folder.")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="Its folder; runs/GRID-CONFIG by default.")] = None,
) -> None:
    """Compare settings with paired seeds: each arm of a grid is a run; ends with the report."""
    from tune_sweeps.run import run_sweep

    folder = (run_dir or Path("runs") / f"{Path(grid).stem}-{Path(config).stem}").absolute()
    page, failed = run_sweep(
        grid, config, overrides or [], range(seeds), folder, max_concurrent=max_concurrent, resume=resume
    )
    typer.echo(f"report: {page}")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a sweep.")],
) -> None:
    """Make the page of a sweep from what its trials have measured so far."""
    from tune_sweeps.report import write_report

    typer.echo(f"report: {write_report(folder.absolute())}")


@app.command()
def grids() -> None:
    """List the built-in grids."""
    from tune_sweeps.grid import GRIDS

    for name, grid in GRIDS.items():
        typer.echo(f"{name:16} {len(grid.arms):2} arms  {grid.title}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="quantile-huber, advantages or critic-step.")],
) -> None:
    """Measure one part of the algorithm on this machine; prints JSON."""
    import importlib
    import json

    from dvpo_service.bench import NAMES
    from dvpo_service.errors import ConfigError

    if name not in NAMES:
        raise ConfigError(f"no benchmark {name!r}: one of {', '.join(NAMES)}")
    module = importlib.import_module(f"dvpo_service.bench.{name.replace('-', '_')}")
    typer.echo(json.dumps(module.run(), indent=2))


@app.command()
def configs() -> None:
    """List the shipped configs."""
    from dvpo_service.config import shipped_configs

    for name, path in shipped_configs().items():
        first = path.read_text().splitlines()[0].removeprefix("#").strip()
        typer.echo(f"{name:26} {first}")


def _run_dir(option: Path | None, configured: str | None, name: str) -> Path:
    return (option or Path(configured or f"runs/{name}")).absolute()


def main() -> None:
    """Entry point: an error a person can mend is one line and exit code 2, never a stack trace."""
    from dvpo_service.failure import describe

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C: pools shut down, nothing left
    sys.path.insert(0, os.getcwd())  # so that module:function rewards beside the user are found
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues from the last checkpoint", err=True)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("DVPO_DEBUG"):
            raise
        message, code = describe(error)
        typer.echo(f"error: {message}", err=True)
        sys.exit(code)


__all__ = ["UserError", "app", "main"]
