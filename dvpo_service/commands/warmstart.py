"""Warm start: train a small LM with supervision on the training answers, where no base model can be downloaded.

The result is a Hugging Face folder, cached under a hash of the settings and the data that it was made from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load
from transformers import PreTrainedTokenizerBase

from actors.training.warmstart import Examples, fit
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.judged import Pair
from dvpo_service.data.splits import check_demonstrations, encode, load_demonstrations, resolve_file
from dvpo_service.models.load import load_causal_lm, load_tokenizer, quiet
from dvpo_service.models.small import VERDICTS, save_small_model
from dvpo_service.terminal import progress

DATA_KEYS = ("gsm8k_mode", "operators", "max_operands", "max_digits", "chat_template", "val_fraction")


def base_model(config: Config, train: Dataset, runs: Path) -> str:
    """Return the path of the model to start from. Make and cache it if the config has a warm start.

    Args:
      train: demonstrations for the warm start, unless it names files of its own.
      runs: folder of the runs; the cache is ``base-models`` in it.
    """
    if config.model.path is not None:
        return config.model.path
    warm = config.model.warmstart
    assert warm is not None
    folder = base_model_folder(config, runs / "base-models")
    if not folder.exists():
        demonstrations = load_demonstrations(config.data, warm.files) if warm.files else train
        for examples in (demonstrations, train) if warm.judged else (demonstrations,):
            check_demonstrations(examples)
        with progress("warm start of the base model", warm.steps) as advance:
            make_base_model(
                config,
                folder.absolute(),
                demonstrations,
                train,
                lambda step, numbers: advance.update(step, **numbers),
            )
    return str(folder.absolute())


def is_made(config: Config, runs: Path) -> bool:
    """Return whether ``base_model`` would return at once."""
    return config.model.path is not None or base_model_folder(config, runs / "base-models").exists()


def base_model_folder(config: Config, cache: Path) -> Path:
    """Return the folder in ``cache`` for this config's base model, named by a hash of its settings and its data files.

    Of ``data.row_format``, the name counts and not its code.
    """
    warm = config.model.warmstart
    assert warm is not None
    digest = hashlib.sha256(warm.model_dump_json().encode())
    data = config.data.model_dump(include=set(DATA_KEYS))
    if config.data.row_format != "auto":
        data["row_format"] = config.data.row_format
    digest.update(json.dumps(data, sort_keys=True).encode())
    files = [*(warm.files or []), *(config.data.train_files if warm.judged or not warm.files else [])]
    for file in files:
        path = Path(resolve_file(file))
        digest.update(path.read_bytes() if path.is_file() else file.encode())
    return cache / f"base-{digest.hexdigest()[:12]}"


def make_base_model(
    config: Config,
    folder: Path,
    demonstrations: Dataset,
    train: Dataset,
    on_progress: Callable[[int, dict[str, float]], None],
) -> None:
    """Make a small model, train it, and write it to ``folder``. The folder appears only when it is complete.

    Args:
      demonstrations: what the model learns to write.
      train: the training data, whose right answers the model learns to tell from wrong ones (``warmstart.judged``).
      on_progress: called during training with the steps done, and with loss and accuracy by name.
    """
    warm = config.model.warmstart
    assert warm is not None
    quiet()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_small_model(
            work / "model",
            hidden_size=warm.hidden_size,
            num_layers=warm.num_layers,
            num_heads=warm.num_heads,
            max_positions=warm.max_positions,
            seed=warm.seed,
        )
        tokenizer = load_tokenizer(str(work / "model"))
        vocabulary = tokenizer.get_vocab()
        examples = Examples(
            _token_pairs(config, demonstrations, tokenizer),
            _token_pairs(config, train, tokenizer) if warm.judged else [],
            (vocabulary[VERDICTS[0]], vocabulary[VERDICTS[1]]),
        )
        weights = fit(config, warm, work, examples, on_progress)
        trained = load_causal_lm(str(work / "model"))
        trained.save_pretrained(work / "model", state_dict=load(weights))  # type: ignore[operator]
        shutil.rmtree(folder, ignore_errors=True)
        (work / "model").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _token_pairs(config: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Return prompt and answer tokens of every row; answers end with the end token."""
    return [
        (list(p.token_ids), [*tokenizer(p.answer)["input_ids"], tokenizer.eos_token_id])
        for p in encode(config.data, data, tokenizer).prompts
    ]
