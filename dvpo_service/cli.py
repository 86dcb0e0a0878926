"""The ``dvpo`` command line."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dvpo_service import __version__
from dvpo_service.errors import UserError
from dvpo_service.host.stopping import SIGNALS, Stopped, raise_stopped

# Imports are inside the commands, so that --help is quick; commands/start.py has the order in which a command imports.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DVPO: distributed RL post-training with a distributional critic.",
)


def _overrides(example: str) -> Any:
    """Return the argument that takes config overrides, with an example for its help."""
    return typer.Argument(help=f"Config overrides as key=value, e.g. {example}")


ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="Name of a shipped config (see `dvpo configs`), or a YAML file.")
]
Overrides = Annotated[list[str] | None, _overrides("algorithm.dvpo_loss_weights.ablate_gain=true")]
WarmstartOverrides = Annotated[list[str] | None, _overrides("model.warmstart.steps=500")]
EvalOverrides = Annotated[list[str] | None, _overrides("rollout.temperature=0.6")]
ServeOverrides = Annotated[list[str] | None, _overrides("serve.port=9000")]


@app.callback(invoke_without_command=True)
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces with errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Handle the options that stand before a command."""
    if debug:
        os.environ["DVPO_DEBUG"] = "1"
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Folder or URL (s3://...) for the results. Default: runs/NAME.")
    ] = None,
) -> None:
    """Train a policy. Run the same command again to continue an interrupted run."""
    from dvpo_service.commands import start

    start.train(config, overrides or [], run_dir)


@app.command()
def warmstart(
    config: ConfigOption,
    overrides: WarmstartOverrides = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Run directory. The model is written to base-models/ beside it.")
    ] = None,
) -> None:
    """Make the base model of a config that has a warm start, and print the model's folder."""
    from dvpo_service.commands import start

    start.warmstart(config, overrides or [], run_dir)


@app.command("eval")
def evaluate(
    overrides: EvalOverrides = None,
    run: Annotated[
        str | None, typer.Option(help="A run directory, one of its checkpoints, or an export: a path or URL.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="With --model: name of a shipped config, or a YAML file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --config: a Hugging Face folder or hub name.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="A data file to use in place of the config's splits; repeatable.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of samples for each prompt.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this file, as JSON.")] = None,
) -> None:
    """Measure accuracy, pass@k and greedy accuracy of a run (--run), or of any model on a config's splits."""
    from dvpo_service.commands import start

    start.evaluate(run, config, model, overrides or [], data or [], n, output)


@app.command()
def export(
    run: Annotated[str, typer.Option(help="A run directory, one of its checkpoints, or an export: a path or URL.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to create.")],
    register: Annotated[
        str | None, typer.Option(help="Also register the export as a new version of this model in the run's MLflow.")
    ] = None,
) -> None:
    """Export the newest policy and critic of a run as a Hugging Face folder with a model card."""
    from dvpo_service.commands import start

    start.export(run, output, register)


@app.command()
def serve(
    run: Annotated[str, typer.Option("--run", "-r", help="A run directory, one of its checkpoints, or an export.")],
    overrides: ServeOverrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Switch to newer checkpoints of the run as they appear.")
    ] = False,
) -> None:
    """Serve a policy and its value distributions: OpenAI's API, /v1/values, and a web page."""
    from dvpo_service.commands import start

    start.serve(run, overrides or [], follow=follow)


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="Also check this config's data, model and cluster plan."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check that this machine is ready and, with --config, that the run fits on it."""
    from dvpo_service.commands import start

    if not start.doctor(config, overrides or []):
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigOption,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="How many GPUs there will be.")] = None,
    gib: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of each GPU, or of the host for a run on CPUs, in GiB.")
    ] = None,
) -> None:
    """Show what a run needs on each device, and whether it fits, without the devices."""
    from dvpo_service.config import load_config

    resolved = load_config(config, overrides or [])

    from dvpo_service.commands.plan import show

    show(resolved, gpus, gib)


@app.command()
def sweep(
    config: ConfigOption,
    grid: Annotated[
        str, typer.Option("--grid", "-g", help="Name of a built-in grid (see `dvpo grids`), or a YAML file.")
    ],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds; the seeds are 0, 1, ...")] = 3,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Number of trials that run at the same time.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep that is in the folder.")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: runs/GRID-CONFIG.")] = None,
) -> None:
    """Train every arm of a grid with every seed, compare the arms, and write the report."""
    from dvpo_service.commands.start import loading
    from dvpo_service.runs.directory import resolve_run_dir
    from tune_sweeps.plan import find_grid, plan_trials

    if (found := find_grid(grid)).arms:
        plan_trials(found, config, overrides or [], range(seeds))  # says what is wrong before the heavy imports
    folder = resolve_run_dir(str(run_dir) if run_dir else None, None, f"{Path(grid).stem}-{Path(config).stem}")
    if not isinstance(folder, Path):
        raise UserError(f"{folder}: a sweep's folder is a path, not a URL; give --run-dir")
    with loading():
        from tune_sweeps.run import run_sweep
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
    """Write the report of a sweep from what its trials have measured so far."""
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
    name: Annotated[str, typer.Argument(help="The benchmark: quantile-huber, advantages, critic-step or memory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON on one line, the last.")] = False,
) -> None:
    """Measure the speed or the memory of one part of the algorithm on this machine, and print JSON."""
    import importlib
    import json

    from dvpo_service.bench import NAMES
    from dvpo_service.errors import ConfigError

    if name not in NAMES:
        raise ConfigError(f"no benchmark {name!r}: one of {', '.join(NAMES)}")
    module = importlib.import_module(f"dvpo_service.bench.{name.replace('-', '_')}")
    typer.echo(json.dumps(module.run(), indent=None if as_json else 2))


@app.command()
def configs() -> None:
    """List the shipped configs."""
    from dvpo_service.config import shipped_configs

    for name, path in shipped_configs().items():
        title = path.read_text().splitlines()[0].removeprefix("#").strip()
        typer.echo(f"{name:26} {title}")


def main() -> None:
    """Run the command line, and exit with its status.

    An error that the user can fix is printed as one line, without a stack trace, and the exit code is 2.
    """
    from dvpo_service.host.failure import describe
    from dvpo_service.host.secrets import MaskingFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(MaskingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("vllm.triton_utils").setLevel(
        logging.ERROR
    )  # it warns that Triton does not support CPUs, which is expected
    for signum in SIGNALS:  # SIGTERM ends like Ctrl-C: the pools are shut down, nothing is left running
        signal.signal(signum, raise_stopped)
    sys.path.insert(0, os.getcwd())  # so that module:function rewards in the user's folder are found
    try:
        app()
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        sys.exit(stopped.exit_code)
    except Exception as error:
        if os.environ.get("DVPO_DEBUG"):
            raise
        message, code = describe(error)
        typer.echo(f"error: {message}", err=True)
        sys.exit(code)


__all__ = ["UserError", "app", "main"]
