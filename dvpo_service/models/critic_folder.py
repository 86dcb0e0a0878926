"""A critic on disk: ``config.json`` and the weights hold everything that is needed to build it again.

``config.json`` holds the ``CriticSpec`` and, under ``backbone``, the backbone's Hugging Face config, so that loading
needs neither the base model nor a network connection.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from dvpo_service.algo.choices import LevelKind
from dvpo_service.algo.quantiles import quantile_levels
from dvpo_service.errors import CheckpointError, one_line
from dvpo_service.models.base import build_empty
from dvpo_service.models.lora import merged, plain
from dvpo_service.models.weight_files import WEIGHTS_FILE, read_weights, write_weights
from dvpo_service.models.whole import gathered, saved

CONFIG_FILE = "config.json"
MODEL_TYPE = "dvpo_critic"


@dataclass(frozen=True)
class CriticSpec:
    """What the numbers that a critic outputs mean.

    A scalar critic (gae, robust_gae) has one head with one atom: the value itself.

    Attributes:
      width: hidden units of the heads' encoder.
      num_heads, num_quantiles: H heads with M atoms each.
      quantile_levels: which levels the atoms are the quantiles of.
      alpha, beta: fractions of the tails that the critic was trained for: ``dvpo_alpha`` and ``dvpo_beta``.
      estimator: the estimator that trained the critic, ``algorithm.adv_estimator``.
    """

    width: int
    num_heads: int
    num_quantiles: int
    quantile_levels: LevelKind = "endpoint"
    alpha: float = 0.1
    beta: float = 0.1
    estimator: str = "dvpo"

    def levels(self) -> Tensor:
        """Return the quantile levels of the atoms, [M] float32."""
        return quantile_levels(self.num_quantiles, self.quantile_levels)


def write_critic(folder: Path | None, spec: CriticSpec, backbone: PretrainedConfig, critic: nn.Module) -> None:
    """Write the critic to ``folder``. Collective if its weights are sharded: one is gathered at a time.

    Args:
      folder: None for a rank that does not write.
      backbone: the config of the backbone.

    Raises:
      CheckpointError: when the files cannot be written.
    """
    # The name or path of the base model means nothing on another machine.
    architecture = {k: v for k, v in backbone.to_dict().items() if k != "_name_or_path"}
    tree = {"model_type": MODEL_TYPE, **dataclasses.asdict(spec), "backbone": architecture}
    weights = saved(critic)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        write_weights(plain(weights), gathered(merged(critic, weights)), folder)
        if folder is not None:
            (folder / CONFIG_FILE).write_text(json.dumps(tree, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the critic to {folder}: {error}; free some space there") from error


def read_critic(folder: Path, *, trust_remote_code: bool = False) -> tuple[CriticSpec, nn.Module, dict[str, Tensor]]:
    """Return the spec, the backbone without its weights, and the weights of both backbone and heads.

    Raises:
      CheckpointError: when ``folder`` holds no critic, or only part of one.
    """
    tree = _read_config(folder)
    try:
        spec = CriticSpec(**{f.name: tree[f.name] for f in dataclasses.fields(CriticSpec)})
        backbone = _build(tree["backbone"], trust_remote_code)
    except (KeyError, TypeError, ValueError, OSError, ImportError) as error:
        reason = one_line(error)
        raise CheckpointError(
            f"critic {folder}: {CONFIG_FILE} describes no critic that can be built: {reason}"
        ) from error
    try:
        return spec, backbone, read_weights(folder)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"critic {folder}: {WEIGHTS_FILE} cannot be read ({one_line(error)}); export it again with `dvpo export`"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        raise CheckpointError(f"critic {folder}: no such folder; a run without a critic exports none")
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"critic {folder}: {CONFIG_FILE} cannot be read ({error})") from error
    if not isinstance(tree, dict) or tree.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"critic {folder}: {CONFIG_FILE} is not that of a critic; a critic is in the folder critic/ of an export"
        )
    return tree


def _build(config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    # transformers finds the class of a config only when it reads the config from a folder.
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / CONFIG_FILE).write_text(json.dumps(config))
        return build_empty(AutoModel, Path(work), trust_remote_code=trust_remote_code)
