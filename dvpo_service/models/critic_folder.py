"""A critic on disk: ``config.json`` and ``model.safetensors``, all that is needed to build it again.

``config.json`` holds the ``CriticSpec`` and, under ``backbone``, the backbone's Hugging Face config, so that
loading needs neither the base model nor a network.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from dvpo_service.algo.choices import LevelKind
from dvpo_service.algo.quantiles import quantile_levels
from dvpo_service.errors import CheckpointError, one_line
from dvpo_service.models.base import build_empty

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MODEL_TYPE = "dvpo_critic"


@dataclass(frozen=True)
class CriticSpec:
    """What the numbers of a critic mean: H heads of M atoms, the levels they stand at, the tails it was trained for.

    ``estimator`` trained it (``algorithm.adv_estimator``); ``alpha`` and ``beta`` are ``dvpo_alpha`` and
    ``dvpo_beta``. A scalar critic (gae, robust_gae) is one head of one atom: the value itself.
    """

    width: int
    num_heads: int
    num_quantiles: int
    quantile_levels: LevelKind = "endpoint"
    alpha: float = 0.1
    beta: float = 0.1
    estimator: str = "dvpo"

    def levels(self) -> Tensor:
        """Quantile levels of the atoms, [M]."""
        return quantile_levels(self.num_quantiles, self.quantile_levels)


def write_critic(folder: Path, spec: CriticSpec, backbone: PretrainedConfig, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError when the disk refuses it."""
    architecture = {
        k: v for k, v in backbone.to_dict().items() if k != "_name_or_path"
    }  # a path of the machine it is on
    tree = {"model_type": MODEL_TYPE, **dataclasses.asdict(spec), "backbone": architecture}
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(tree, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the critic to {folder}: {error}; free some space there") from error


def read_critic(folder: Path, *, trust_remote_code: bool = False) -> tuple[CriticSpec, nn.Module, dict[str, Tensor]]:
    """The spec, the backbone with no weights in it yet, and the weights of both backbone and heads.

    Raises CheckpointError for a folder that holds no critic, or half of one.
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
        return spec, backbone, load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"critic {folder}: {WEIGHTS_FILE} cannot be read ({error}); export it again with `dvpo export`"
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
    with tempfile.TemporaryDirectory() as work:  # transformers finds the class of a config by reading it from a folder
        (Path(work) / CONFIG_FILE).write_text(json.dumps(config))
        return build_empty(AutoModel, Path(work), trust_remote_code=trust_remote_code)
