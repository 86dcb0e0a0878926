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
from dvpo_service.host.stopping import SIGNALS, Stopped, raise_stopped

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
    run_dir: Annotated[
        str | None, typer.Option(help="Where results go, a folder or URL (s3://...); runs/NAME by default.")
    ] = None,
) -> None:
    """Train a policy. The same command again continues a run that was cut off."""
    from dvpo_service.config import load_config

    resolved = load_config(config, overrides or [])  # what is wrong there is said before the heavy imports

    from dvpo_service.commands import train as command
    from dvpo_service.runs.directory import resolve_run_dir

    command.train(resolved, resolve_run_dir(run_dir, resolved.trainer.run_dir, resolved.name))


@app.command()
def warmstart(
    config: ConfigOption,
    overrides: Overrides = None,
    run_dir: Annotated[str | None, typer.Option(help="base-models/ beside it holds the model.")] = None,
) -> None:
    """Make the base model of a config that asks for one, and print its folder."""
    from dvpo_service.config import load_config

    resolved = load_config(config, overrides or [])

    from actors.cluster.connect import connected
    from dvpo_service.commands.warmstart import base_model
    from dvpo_service.data.splits import load_data
    from dvpo_service.runs.directory import RunDir, resolve_run_dir

    train_data = load_data(resolved.data).train
    with connected(resolved):
        run = RunDir(resolve_run_dir(run_dir, resolved.trainer.run_dir, resolved.name))
        typer.echo(base_model(resolved, train_data, run.local.parent))


@app.command("eval")
def evaluate(
    overrides: Overrides = None,
    run: Annotated[
        str | None, typer.Option(help="A run directory, a checkpoint of it, or an export; or a URL.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="With --model: a name or a YAML file.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A Hugging Face folder or hub name.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="A file in place of the config's splits; repeatable.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Samples of each prompt.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Also write the figures there, as JSON.")] = None,
) -> None:
    """Accuracy, pass@k and greedy accuracy of a run (--run), or of any model on a config's splits."""
    from dvpo_service.commands.evaluate import Subject, from_run
    from dvpo_service.commands.evaluate import evaluate as measure
    from dvpo_service.config import load_config
    from dvpo_service.errors import ConfigError
    from dvpo_service.export.download import local_copy

    if run and not (config or model):
        with local_copy(run) as found, from_run(found, run, overrides or []) as subject:
            measure(subject, data or [], n, output)
    elif config and model and not run:
        measure(Subject(load_config(config, overrides or []), model, model), data or [], n, output)
    else:
        raise ConfigError("dvpo eval: give either --run, or both --config and --model")


@app.command()
def export(
    run: Annotated[str, typer.Option(help="A run, a checkpoint of it, or an export: a path or URL.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    register: Annotated[str | None, typer.Option(help="Also a version of this model in the run's MLflow.")] = None,
) -> None:
    """The newest policy and critic of a run as a Hugging Face folder with a model card."""
    from dvpo_service.export.download import local_copy
    from dvpo_service.export.export import export_and_register

    with local_copy(run) as found:
        done, version = export_and_register(found, output, register)
    typer.echo(f"policy after {done.step} updates: {done.folder}")
    typer.echo(f"critic: {done.critic or 'none, the run has none'}")
    if version:
        typer.echo(f"MLflow: version {version} of {register}")


@app.command()
def serve(
    run: Annotated[str, typer.Option("--run", "-r", help="A run directory, a checkpoint of it, or an export.")],
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve newer checkpoints of the run as they appear.")
    ] = False,
) -> None:
    """Serve a policy with its value distributions: OpenAI's API, /v1/values, and a page to look at."""
    from dvpo_service.commands.serve import run as serve_run
    from dvpo_service.runs.storage import is_url

    if is_url(run):
        raise UserError(f"{run}: every replica reads the weights from a path; `dvpo export --run {run} -o DIR` first")
    serve_run(Path(run), overrides or [], follow=follow)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Option("--config", "-c", help="Also check that its plan fits.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check the machine, and with --config that the run would fit."""
    from dvpo_service.commands.doctor import examine
    from dvpo_service.config import load_config

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
    from dvpo_service.runs.directory import resolve_run_dir
    from tune_sweeps.run import run_sweep

    folder = resolve_run_dir(str(run_dir) if run_dir else None, None, f"{Path(grid).stem}-{Path(config).stem}")
    if not isinstance(folder, Path):
        raise UserError(f"{folder}: a sweep's folder is a path, not a URL; give --run-dir")
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


def main() -> None:
    """Entry point: an error a person can mend is one line and exit code 2, never a stack trace."""
    from dvpo_service.host.failure import describe
    from dvpo_service.host.secrets import MaskingFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(MaskingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("vllm.triton_utils").setLevel(logging.ERROR)  # that Triton does nothing for a CPU is no news
    for signum in SIGNALS:  # SIGTERM ends like Ctrl-C: pools shut down, nothing left
        signal.signal(signum, raise_stopped)
    sys.path.insert(0, os.getcwd())  # so that module:function rewards beside the user are found
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
