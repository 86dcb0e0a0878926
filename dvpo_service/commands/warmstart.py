"""Warm start: train a small LM with supervision on the training answers, where no base model can be downloaded.

Runs on Ray Train's TorchTrainer with FSDP2. The result is a Hugging Face folder, cached under a hash of the settings
and the data that it was made from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dvpo_service.config import Config, WarmstartConfig
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.splits import check_demonstrations, encode, load_demonstrations, resolve_file
from dvpo_service.host.network import use_interface_of
from dvpo_service.models.load import load_causal_lm, load_tokenizer, quiet
from dvpo_service.models.sharding import shard
from dvpo_service.models.small import save_small_model
from dvpo_service.terminal import progress
from dvpo_service.types import Prompt

IGNORE = -100
REPORT_EVERY = 10
MAILBOX_S = 120.0
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
        examples = load_demonstrations(config.data, warm.files) if warm.files else train
        check_demonstrations(examples)
        with progress("warm start of the base model", warm.steps) as advance:
            make_base_model(
                config,
                folder.absolute(),
                lambda tokenizer: encode(config.data, examples, tokenizer).prompts,
                lambda step, numbers: advance.update(step, **numbers),
            )
    return str(folder.absolute())


def base_model_folder(config: Config, cache: Path) -> Path:
    """Return the folder in ``cache`` for this config's base model, named by a hash of its settings and its data files.

    Of ``data.row_format``, the name counts and not its code.
    """
    assert config.model.warmstart is not None
    digest = hashlib.sha256(config.model.warmstart.model_dump_json().encode())
    data = config.data.model_dump(include=set(DATA_KEYS))
    if config.data.row_format != "auto":
        data["row_format"] = config.data.row_format
    digest.update(json.dumps(data, sort_keys=True).encode())
    for file in config.model.warmstart.files or config.data.train_files:
        path = Path(resolve_file(file))
        digest.update(path.read_bytes() if path.is_file() else file.encode())
    return cache / f"base-{digest.hexdigest()[:12]}"


def make_base_model(
    config: Config,
    folder: Path,
    tokenize: Callable[[PreTrainedTokenizerBase], Sequence[Prompt]],
    on_progress: Callable[[int, dict[str, float]], None],
) -> None:
    """Make a small model, train it, and write it to ``folder``. The folder appears only when it is complete.

    Args:
      tokenize: encodes the demonstrations with the new model's tokenizer.
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
        examples = [
            (list(p.token_ids), [*tokenizer(p.answer)["input_ids"], tokenizer.eos_token_id])
            for p in tokenize(tokenizer)
        ]
        weights = _fit(config, warm, work, examples, on_progress)
        trained = load_causal_lm(str(work / "model"))
        trained.save_pretrained(work / "model", state_dict=load(weights))  # type: ignore[operator]
        shutil.rmtree(folder, ignore_errors=True)
        (work / "model").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Mailbox:
    """A Ray actor that carries progress and weights from rank 0, on any node, to the driver."""

    def __init__(self) -> None:
        self.progress: list[dict[str, Any]] = []
        self.weights = b""

    def tell(self, entry: dict[str, Any]) -> None:
        """Add a report of progress."""
        self.progress.append(entry)

    def hand_in(self, weights: bytes) -> None:
        """Take the trained parameters, the bytes of a safetensors file."""
        self.weights = weights

    def told(self, seen: int) -> list[dict[str, Any]]:
        """Return the reports after the first ``seen``."""
        return self.progress[seen:]

    def collect(self) -> bytes:
        """Return the trained parameters."""
        return self.weights


def _fit(
    config: Config,
    warm: WarmstartConfig,
    work: Path,
    examples: list[Any],
    on_progress: Callable[[int, dict[str, float]], None],
) -> bytes:
    """Train on the cluster. Return the trained parameters, the bytes of a safetensors file."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = config.cluster.gpus_per_trainer > 0
    # Ranks may run on machines that do not see the driver's folder, so files travel through Ray both ways.
    model = ray.put({f.name: f.read_bytes() for f in (work / "model").iterdir()})
    mailbox: Any = ray.remote(Mailbox).options(num_cpus=0).remote()
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"warm": warm.model_dump(), "mailbox": mailbox, "examples": examples, "model": model},
        torch_config=_torch_config(use_gpu),
        scaling_config=ScalingConfig(
            num_workers=warm.world_size,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_trainer},
        ),
        run_config=RunConfig(name="ray_train", storage_path=str(work)),
    )
    with _Follow(mailbox, on_progress):
        trainer.fit()
    return ray.get(mailbox.collect.remote(), timeout=MAILBOX_S)


def _torch_config(use_gpu: bool) -> Any:
    """Return Ray Train's config. Its gloo uses the network interface by which Ray's nodes reach each other."""
    import ray.util
    from ray.train.torch import TorchConfig

    if use_gpu:
        return TorchConfig(backend="nccl")
    plain: Any = TorchConfig().backend_cls

    class OnRaysInterface(plain):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(lambda: use_interface_of(ray.util.get_node_ip_address()))
            super().on_start(worker_group, backend_config)

    class GlooConfig(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return OnRaysInterface

    return GlooConfig(backend="gloo")


def train_loop(args: dict[str, Any]) -> None:
    """Train one rank: cross-entropy on the answer tokens, seeded batches, a warm-up and a cool-down of the rate.

    Args:
      args: ``warm`` (the settings), ``mailbox``, ``examples`` (pairs of prompt and answer tokens) and ``model`` (the
        files of the untrained model by name).
    """
    import ray
    import ray.train
    import ray.train.torch

    warm = WarmstartConfig(**args["warm"])
    mailbox = args["mailbox"]
    rank, world = dist.get_rank(), dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in ray.get(args["model"], timeout=MAILBOX_S).items():
            (Path(folder) / name).write_bytes(content)
        model = load_causal_lm(folder)
    shard(model, ray.train.torch.get_device(), bfloat16=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm.lr, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(warm.seed)
    cooldown = max(1, warm.steps // 10)
    recent = 0.0  # running mean of the accuracy
    step, last = 0, warm.steps
    while step < last:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = warm.lr * min(1.0, step / max(1, warm.steps // 20), (last + 1 - step) / cooldown)
        rows = torch.randint(len(args["examples"]), (warm.batch_size,), generator=generator)
        batch = [args["examples"][i] for i in rows.tolist()]
        loss, reproduced = _loss(model, batch[rank::world], warm.label_smoothing)
        loss = loss / sum(len(answer) for _, answer in batch)
        (loss * world).backward()  # FSDP averages over ranks, but the loss is a sum
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = torch.stack([loss.detach(), reproduced / len(batch)])
        dist.all_reduce(total)
        recent = 0.8 * recent + 0.2 * float(total[1])
        if warm.stop_at_accuracy and recent >= warm.stop_at_accuracy and last == warm.steps:
            last = min(last, step + cooldown)
        if rank == 0 and (step % REPORT_EVERY == 0 or step == last):
            mailbox.tell.remote({"step": step, "loss": float(total[0]), "accuracy": recent})
    state = {k: v.full_tensor().cpu().clone() for k, v in model.state_dict().items()}
    if rank == 0:
        ray.get(mailbox.hand_in.remote(save(state)), timeout=MAILBOX_S)
    ray.train.report({"loss": float(total[0]), "accuracy": recent})


def _loss(model: torch.nn.Module, batch: list[tuple[list[int], list[int]]], smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the answer tokens, and how many answers greedy decoding reproduces."""
    if not batch:
        batch = [([0], [IGNORE])]  # an empty share still takes part in the other ranks' collectives
    device = next(model.parameters()).device
    tokens = [torch.tensor(prompt + answer).clamp(min=0) for prompt, answer in batch]
    labels = [torch.tensor([IGNORE] * len(prompt) + answer) for prompt, answer in batch]
    inputs = pad_sequence(tokens, batch_first=True).to(device)
    wanted = pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(device)[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    # Where all tokens before are right, the argmax at a position is what greedy decoding gives.
    right = ((logits.argmax(-1) == wanted) | (wanted == IGNORE)).all(1) & (wanted != IGNORE).any(1)
    return loss, right.sum().to(loss.dtype)


class _Follow:
    """A thread that passes the mailbox's reports to ``on_progress`` while training runs."""

    def __init__(self, mailbox: Any, on_progress: Callable[[int, dict[str, float]], None]):
        self.mailbox, self.on_progress = mailbox, on_progress
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.seen = 0

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exc: object) -> None:
        self.done.set()
        self.thread.join(timeout=5)

    def _run(self) -> None:
        import ray

        finished = False
        while not finished:
            finished = self.done.wait(0.3)
            entries = ray.get(self.mailbox.told.remote(self.seen), timeout=MAILBOX_S)
            for entry in entries:
                self.on_progress(entry["step"], {k: v for k, v in entry.items() if k != "step"})
            self.seen += len(entries)
