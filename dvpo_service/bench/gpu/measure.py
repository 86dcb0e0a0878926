"""Sizes of the measurements, and what they share: seconds, peak memory, models of random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config

GIB = 2**30
REPEATS = 3


@dataclass(frozen=True)
class Sizes:
    """How large everything is; ``REAL`` is Qwen2.5-7B's width.

    Attributes:
      tokens: of the log-probs and of a training step.
      long: tokens of the attention and of the whole model's forward pass.
      batches: sequences and tokens of each, for the critic.
      atoms: tokens and quantiles of the quantile-Huber loss.
      save: bytes of a checkpoint.
    """

    device: str
    vocab: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    tokens: tuple[int, ...]
    long: tuple[int, ...]
    batches: tuple[tuple[int, int], ...]
    atoms: tuple[int, int]
    save: int

    @property
    def low(self) -> torch.dtype:
        """The precision of the computation: bfloat16 on a GPU."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def model_config(self, layers: int) -> Qwen2Config:
        """Return the config of a model of this width."""
        return Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=False,
            max_position_embeddings=max(self.long) + 1,
        )


REAL = Sizes(
    device="cuda",
    vocab=152_064,
    hidden=3584,
    inner=18_944,
    heads=28,
    kv_heads=4,
    layers=28,
    tokens=(1024, 4096, 8192),
    long=(2048, 8192, 32_768),
    batches=((8, 1536), (8, 8192)),
    atoms=(65_536, 200),
    save=4 * GIB,
)
TINY = Sizes(
    device="cpu",
    vocab=97,
    hidden=32,
    inner=48,
    heads=2,
    kv_heads=1,
    layers=2,
    tokens=(8, 16),
    long=(16, 32),
    batches=((2, 16),),
    atoms=(8, 6),
    save=2**16,
)


def causal_lm(sizes: Sizes, layers: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a causal LM of random weights on the device."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        return AutoModelForCausalLM.from_config(sizes.model_config(layers), dtype=dtype).eval()


def backbone(sizes: Sizes, layers: int) -> Any:
    """Return a model of random weights without an output layer, in the computation's precision, on the device."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        return AutoModel.from_config(sizes.model_config(layers), dtype=sizes.low).eval()


def random_tokens(sizes: Sizes, rows: int, length: int) -> Tensor:
    """Return tokens [rows, length] on the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(sizes.vocab, (rows, length), generator=generator).to(sizes.device)


def timed(work: Callable[[], Any], device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Return the least seconds of ``repeats`` calls after a first one, and the peak memory that they add in GiB.

    What needs more memory than there is, says so in their place.
    """
    try:
        return _timed(work, device, repeats)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"out_of_memory": True}


def _timed(work: Callable[[], Any], device: str, repeats: int) -> dict[str, Any]:
    work()
    seconds = []
    with peak(device) as measured:
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            _finish(device)
            seconds.append(time.perf_counter() - start)
    return {"seconds": round(min(seconds), 6)} | measured


@contextmanager
def peak(device: str) -> Iterator[dict[str, float]]:
    """Yield a dict that has, after the block, ``peak_gib``: what the block added on a GPU, and ``before_gib``."""
    measured: dict[str, float] = {}
    if device != "cuda":
        yield measured
        return
    _finish(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield measured
    _finish(device)
    measured["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / GIB, 3)
    measured["before_gib"] = round(before / GIB, 3)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """A process group of this process alone: NCCL on a GPU, gloo without."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
