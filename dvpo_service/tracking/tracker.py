"""The tracker of a run: one ``log`` per step writes to ``metrics.jsonl``, MLflow and the terminal."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpo_service.alerts import Advisor
from dvpo_service.config.schema import Config
from dvpo_service.host.secrets import mask, mask_text
from dvpo_service.runs.step_file import MetricsFile
from dvpo_service.tracking.critic_figures import fan_over_training, head_disagreement, quantile_heatmap
from dvpo_service.tracking.figures import FanData, calibration_plot, fan_chart
from dvpo_service.tracking.mlflow_sink import MlflowSink, RunStatus
from dvpo_service.tracking.samples import SamplesFile
from dvpo_service.tracking.spool import UNSENT
from dvpo_service.tracking.store import tracking_uri

if TYPE_CHECKING:
    from dvpo_service.roles import Display

logger = logging.getLogger(__name__)


class Tracker:
    """Logs a run's metrics, samples and pictures.

    Metrics are in ``metrics.jsonl`` when ``log`` returns; another thread sends them to MLflow.

    A run that resumes gives ``run_id`` and ``resume_step``. Its MLflow run continues, the lines of ``resume_step`` and
    later are removed from the file, and lines that MLflow does not have are sent.

    Args:
      run_dir: the run directory.
      config: the run's config; its secrets are masked in everything that is logged.
      run_id: the MLflow run to continue, if any.
      resume_step: the number of updates done when the run resumes.
      display: shows metrics and warnings; by default warnings are logged.

    Attributes:
      advice: the alerts of this run so far, in words.
      tracking_uri: MLflow's URI; None without MLflow.

    Raises:
      TrackingError: MLflow is on and cannot be reached.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        *,
        run_id: str | None = None,
        resume_step: int = 0,
        display: Display | None = None,
    ) -> None:
        self._display = display
        self._file = MetricsFile(run_dir / "metrics.jsonl", resume_step)
        self._samples = SamplesFile(run_dir / "samples.jsonl", resume_step)
        self._samples.rows.clear()
        self._sample_rows = config.tracking.sample_rows
        self._advisor = _advisor(config)
        self.advice: list[str] = []
        for row in self._file.rows:  # these alerts were shown before the run was cut off
            self.advice += self._advisor.check(row["step"], _values(row))
        self.tracking_uri: str | None = None
        self._sink: MlflowSink | None = None
        if config.tracking.mlflow:
            self.tracking_uri = tracking_uri(config, run_dir)
            self._sink = _open_sink(self.tracking_uri, run_dir, config, run_id, resume_step, self._samples, self._warn)
            self._send_missed(self._sink)
        self._file.rows.clear()

    @property
    def run_id(self) -> str | None:
        """Return the id of the MLflow run, for the checkpoint, or None without MLflow."""
        return self._sink.run_id if self._sink else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log everything measured at a step, evaluations too, in one call."""
        now = time.time()
        self._file.write(step, metrics, now)
        if self._sink:
            self._sink.log_metrics(step, metrics, now)
        if any(name.startswith("eval/") for name in metrics):
            self._log_calibration(step, metrics)
        if self._display:
            self._display.update(step, dict(metrics))
        for line in self._advisor.check(step, metrics):
            self.advice.append(line)
            self._warn(line)

    def rewind(self, step: int) -> None:
        """Remove ``step`` and later from the files: they will be logged again. MLflow keeps the points it has."""
        self._file.rewind(step)
        self._samples.rewind(step)

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log sample rollouts: the first ``tracking.sample_rows`` rows go to a file and to MLflow's table view."""
        if rows := rows[: self._sample_rows]:
            self._samples.write(step, rows)
            if self._sink:
                self._sink.send_samples()

    def log_critic_pictures(
        self, step: int, charts: list[FanData], history: list[tuple[int, list[FanData]]] | None = None
    ) -> None:
        """Log pictures of the critic's value distributions along fixed responses.

        Another thread draws them later, so the caller must not change the arguments afterwards.

        Args:
          step: the number of updates done.
          charts: the responses as the critic values them now.
          history: (step, charts) of this and earlier observations, for the picture over training.
        """
        if not (self._sink and charts):
            return
        self._sink.log_figure(step, "value_fan", lambda: fan_chart(charts, step))
        self._sink.log_figure(step, "quantile_heatmap", lambda: quantile_heatmap(charts, step))
        self._sink.log_figure(step, "head_disagreement", lambda: head_disagreement(charts, step))
        if history:
            self._sink.log_figure(step, "fan_over_training", lambda: fan_over_training(history))

    def _log_calibration(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a picture of the share of returns at or below each predicted quantile."""
        prefix = "critic/coverage/"
        coverage = {float(k.removeprefix(prefix)): v for k, v in metrics.items() if k.startswith(prefix)}
        if self._sink and coverage:
            self._sink.log_figure(step, "calibration", lambda: calibration_plot(coverage, step))

    def finish(
        self,
        status: RunStatus,
        summary: dict[str, Any] | None,
        deadline_s: float = 30.0,
    ) -> None:
        """Close the files and the MLflow run. A failure of MLflow becomes a warning, not an error.

        Args:
          status: of the MLflow run.
          summary: the run's summary, if there is one.
          deadline_s: how long to wait for MLflow, in seconds.
        """
        self._file.close()
        self._samples.close()
        if self._sink and (unsent := self._sink.finish(status, summary, deadline_s)):
            self._warn(
                f"MLflow did not get the last {unsent} calls; every metric is in {self._file.path}, artifacts wait "
                f"in {self._file.path.parent / UNSENT}, and the same command again sends both"
            )

    def _send_missed(self, sink: MlflowSink) -> None:
        for row in self._file.rows:
            sink.log_metrics(row["step"], _values(row), row.get("time"))

    def _warn(self, text: str) -> None:
        if self._display:
            self._display.note(text)
        else:
            logger.warning("%s", text)


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a line of ``metrics.jsonl``; null becomes NaN."""
    return {k: math.nan if v is None else v for k, v in row.items() if k not in ("step", "time")}


def _advisor(config: Config) -> Advisor:
    # The values of a pessimistic estimator are below the returns on purpose.
    silent = {"critic_mean_off"} if config.algorithm.traits.pessimistic else set()
    norms = {"policy": config.policy.optim.max_grad_norm, "critic": config.critic.optim.max_grad_norm}
    return Advisor(silent=silent, max_grad_norm=norms)


def _open_sink(
    uri: str,
    run_dir: Path,
    config: Config,
    run_id: str | None,
    resume_step: int,
    samples: SamplesFile,
    warn: Callable[[str], None],
) -> MlflowSink:
    import yaml

    tree = mask(config.model_dump(mode="json"))
    return MlflowSink(
        uri,
        config.tracking.experiment,
        config.tracking.run_name or config.name,
        tree,
        yaml.safe_dump(tree, sort_keys=False),
        unsent=run_dir / UNSENT,
        samples=samples,
        run_id=run_id,
        resume_step=resume_step,
        tags=config.tracking.tags,
        description=mask_text(_description(config, run_dir)),
        warn=warn,
    )


def _description(config: Config, run_dir: Path) -> str:
    a = config.algorithm
    r = config.rollout
    model = config.model.path or "a small model made by `dvpo warmstart`"
    off = [name for name, weight in a.dvpo_loss_weights.effective().items() if weight == 0]
    critic = f"- critic: {a.n_heads} heads x {a.n_quantiles} quantiles; terms off: {', '.join(off) or 'none'}"
    lines = [
        f"**{config.name}**: `{a.adv_estimator}`{f' ({a.form} form)' if a.traits.distributional else ''} on {model}.",
        "",
        f"- {config.trainer.num_steps} steps of {r.prompts_per_step} prompts x {r.n} responses",
        *([critic] if a.traits.distributional else []),
        f"- policy loss `{config.policy.loss}`",
        f"- reward `{config.reward.words}`, noise {config.reward.noise_words}",
        f"- data: {', '.join(config.data.train_files)}",
        f"- run folder: `{run_dir.absolute()}`",
        "- repeat it: save the artifact `config.yaml` (secrets in it are masked), then "
        "`dvpo train --config config.yaml --run-dir runs/again`",
        "",
        "**Model metrics** (a section per group of charts):",
        "",
        *_sections(config),
        "",
        "**Artifacts**: `samples.json` (responses with their rewards, as a table), `config.yaml`, `summary.json`",
        "",
        *_figures(config),
    ]
    return "\n".join(lines)


def _sections(config: Config) -> list[str]:
    """Return the description's lines on MLflow's sections: a metric's section is its name up to the last slash."""
    distributional = config.algorithm.traits.distributional
    critic = config.algorithm.has_critic
    lines = {
        "- `eval/<split>`: held-out accuracy, sampled and greedy; step 0 is before training": True,
        "- `critic`: `explained_variance` (above 0 is better than a constant), `explained_variance_within` a prompt "
        "(right against wrong), `grad_norm`, the loss": critic,
        "- `advantage`: `clean_correlation` with the reward without noise, within a prompt": True,
        "- `critic/loss`: the eight components as measured, also those of weight 0": distributional,
        "- `critic/weighted`: the components times their weights, so what each adds to the loss": distributional,
        "- `critic/coverage`: share of returns at or below each predicted quantile; its name is right": distributional,
        "- `policy`: `entropy`, `approx_kl`; `rollout_kl` is engine against trainer, about 0 when all is well": True,
        "- `reward`, `rollout`: what training saw (`reward/clean_mean` without the noise), length, staleness": True,
        "- `time`: seconds per stage; `time/step` is the whole update": True,
    }
    return [line for line, applies in lines.items() if applies]


def _figures(config: Config) -> list[str]:
    if not config.algorithm.traits.distributional:
        return []
    return [
        "- `figures/value_fan`: the predicted return along fixed responses, a right and a wrong one per prompt",
        "- `figures/fan_over_training`: the same for the first prompt at up to six steps; the newest file has them all",
        "- `figures/quantile_heatmap`: every quantile along them; `figures/head_disagreement`: where heads differ",
        "- `figures/calibration`: predicted level against observed coverage",
    ]
