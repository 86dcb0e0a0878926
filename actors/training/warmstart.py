"""The ranks of a warm start: supervised training of a small LM on Ray Train's TorchTrainer with FSDP2."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from dvpo_service.config import Config, WarmstartConfig
from dvpo_service.data.judged import Pair, attempts, judged_answer
from dvpo_service.host.network import use_interface_of
from dvpo_service.models.load import load_causal_lm
from dvpo_service.models.sharding import all_ranks, shard
from dvpo_service.models.whole import gathered, saved
from dvpo_service.objectives.supervised import answer_loss, judgement_loss

REPORT_EVERY = 10
MAILBOX_S = 120.0


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


@dataclass(frozen=True)
class Examples:
    """What a warm start learns from, as pairs of prompt and answer tokens; every answer ends with the end token.

    Attributes:
      demonstrations: answers to imitate.
      references: right answers, of which judged ones are made; empty where none are wanted.
      verdicts: the tokens whose logits stand for right and wrong.
    """

    demonstrations: list[Pair]
    references: list[Pair]
    verdicts: tuple[int, int]


def fit(
    config: Config,
    warm: WarmstartConfig,
    work: Path,
    examples: Examples,
    on_progress: Callable[[int, dict[str, float]], None],
) -> bytes:
    """Train on the cluster. Return the trained parameters, the bytes of a safetensors file.

    Args:
      config: of the run.
      warm: the warm start's settings.
      work: a folder with the untrained model in ``model``; Ray Train keeps its files there too.
      examples: what to learn.
      on_progress: called with the steps done, and with loss and accuracy by name.
    """
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
    """Train one rank: seeded batches, a warm-up and a cool-down of the learning rate.

    Args:
      args: ``warm`` (the settings), ``mailbox``, ``examples``, and ``model`` (the untrained model's files by name).
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
    shard(model, all_ranks(ray.train.torch.get_device()), bfloat16=False)
    batches = Batches(args["examples"], warm, rank, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm.lr, betas=(0.9, 0.95), weight_decay=0.01)
    cooldown = max(1, warm.steps // 10)
    recent = torch.zeros(2)  # running means of the accuracies
    step, last = 0, warm.steps
    while step < last:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = warm.lr * min(1.0, step / max(1, warm.steps // 20), (last + 1 - step) / cooldown)
        loss, accuracies = batches.loss(model)
        (loss * world).backward()  # FSDP averages over ranks, but the loss is a sum
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = torch.cat([loss.detach().reshape(1), accuracies])
        dist.all_reduce(total)
        recent = 0.8 * recent + 0.2 * total[1:].cpu()
        if warm.stop_at_accuracy and recent[0] >= warm.stop_at_accuracy and last == warm.steps:
            last = min(last, step + cooldown)
        if rank == 0 and (step % REPORT_EVERY == 0 or step == last):
            judged = {"judged": float(recent[1])} if warm.judged else {}
            mailbox.tell.remote({"step": step, "loss": float(total[0]), "accuracy": float(recent[0]), **judged})
    state = {name: weight.detach().cpu().clone() for name, weight in gathered(saved(model))}
    if rank == 0:
        ray.get(mailbox.hand_in.remote(save(state)), timeout=MAILBOX_S)
    ray.train.report({"loss": float(total[0]), "accuracy": float(recent[0])})


class Batches:
    """A rank's shares of the batches: demonstrations, and judged answers where the settings ask for them.

    Every rank draws the same batches and takes its own rows of them.
    """

    def __init__(self, examples: Examples, warm: WarmstartConfig, rank: int, world: int):
        self.examples, self.warm, self.rank, self.world = examples, warm, rank, world
        self.generator = torch.Generator().manual_seed(warm.seed)
        self.judged = int(warm.batch_size * warm.judged)  # rounded down, so that demonstrations are left
        self.attempts = attempts(examples.demonstrations, examples.references)
        self.replacements = sorted({token for _, answer in examples.references for token in answer})

    def loss(self, model: Any) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the next batch's loss, and its share [2] of the accuracies.

        The accuracies are of the demonstrations (reproduced greedily) and of the judgements (1 - absolute error).
        """
        batch = self._draw(self.examples.demonstrations, self.warm.batch_size - self.judged)
        loss, reproduced = answer_loss(model, batch[self.rank :: self.world], self.warm.label_smoothing)
        loss = loss / sum(len(answer) for _, answer in batch)
        accuracies = [reproduced / len(batch), torch.zeros_like(reproduced)]
        if self.judged:
            rows = [
                judged_answer(prompt, answer, reference, self.replacements, self.generator)
                for prompt, answer, reference in self._draw(self.attempts, self.judged)
            ]
            tokens = sum(len(row.answer) for row in rows)
            judging, right = judgement_loss(model, rows[self.rank :: self.world], self.examples.verdicts)
            loss, accuracies[1] = loss + judging / tokens, right / tokens
        return loss, torch.stack(accuracies)

    def _draw(self, rows: list[Any], count: int) -> list[Any]:
        return [rows[i] for i in torch.randint(len(rows), (count,), generator=self.generator).tolist()]


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
