"""The plan of a run: what each device holds, whether it fits, the longest response that does, the longest stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dvpo_service.capacity.memory import (
    CUDA_CONTEXT,
    Device,
    compute_bytes,
    devices,
    host_bytes,
    kv_bytes,
)
from dvpo_service.capacity.shape import ModelShape
from dvpo_service.config.schema import Config
from dvpo_service.errors import ConfigError

# Rough speeds of a current data-centre GPU, to compare a step's stages with each other.
FLOPS = 400e12  # bfloat16 at 40 % of the peak
BANDWIDTH = 2.5e12  # bytes a second from its memory


@dataclass(frozen=True)
class Capacity:
    """A run's needs beside what its devices have.

    Attributes:
      gib: memory of each GPU. A run on CPUs shares ``gib`` of one host's memory.
    """

    config: Config
    shape: ModelShape
    gib: float

    @cached_property
    def devices(self) -> list[Device]:
        """What each pool's actors keep on their devices."""
        return devices(self.config, self.shape)

    @property
    def on_cpu(self) -> bool:
        """Whether no actor has a GPU."""
        cluster = self.config.cluster
        return cluster.gpus_per_trainer == 0 and cluster.gpus_per_engine == 0

    def room(self, device: Device) -> float:
        """Return the bytes that a device has for a pool's actor."""
        if self.on_cpu:
            return self.gib * 2**30
        share = self.config.rollout.gpu_memory_utilization if device.pool == "rollout" else 1.0
        return share * self.gib * 2**30 - CUDA_CONTEXT

    def check(self) -> None:
        """Raise ConfigError, naming the largest part of what does not fit and the keys that make it smaller."""
        for device in self.devices:
            room = self.room(device)
            if device.size <= room:
                continue
            worst = max(device.parts, key=lambda part: part.size)
            raise ConfigError(
                f"the plan does not fit: each {device.pool} actor needs {gib(device.size)} and has {gib(room)}. "
                f"The most is for {worst.name}, {gib(worst.size)}: change {worst.key}. `dvpo plan` shows every part"
            )
        total = sum(device.count * device.size for device in self.devices) + sum(self.host.values())
        if self.on_cpu and total > self.gib * 2**30:
            raise ConfigError(
                f"the plan does not fit: all actors together need {gib(total)} of this machine's memory and it has "
                f"{self.gib:.1f} GiB. `dvpo plan` shows every part; fewer actors, or a smaller model, need less"
            )

    @cached_property
    def host(self) -> dict[str, float]:
        """Bytes of host memory by purpose, over all hosts."""
        return host_bytes(self.config, self.shape)

    def fits(self, max_new_tokens: int) -> bool:
        """Return whether the run fits with responses of up to ``max_new_tokens``."""
        rollout = self.config.rollout.model_copy(update={"max_new_tokens": max_new_tokens})
        try:
            Capacity(self.config.model_copy(update={"rollout": rollout}), self.shape, self.gib).check()
        except ConfigError:
            return False
        return True

    def longest_response(self, limit: int = 2**20) -> int:
        """Return the largest ``rollout.max_new_tokens`` that fits, up to ``limit``; 0 where none does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle - 1)
        return low

    def sequences_at_once(self) -> float:
        """Return how many sequences of full length fit an engine's KV cache."""
        free = self.config.rollout.kv_cache_gib * 2**30
        engine = next((d for d in self.devices if d.pool == "rollout"), None)
        if engine is not None and self.config.cluster.gpus_per_engine > 0:
            free = self.room(engine) - sum(p.size for p in engine.parts if "KV" not in p.name)
        return max(0.0, free / (self.config.max_model_len * kv_bytes(self.config, self.shape)))

    def tokens(self) -> dict[str, int]:
        """Return the tokens of a step when every prompt and response is as long as it may be."""
        batch = self.config.batch_size
        return {
            "prompts": batch * self.config.data.max_prompt_tokens,
            "responses": batch * self.config.rollout.max_new_tokens,
        }

    def stage_seconds(self) -> dict[str, float]:
        """Return a rough time of each stage on GPUs, for comparison with each other."""
        c, s = self.config, self.shape
        tokens = sum(self.tokens().values())
        forward = 2 * s.parameters * tokens / FLOPS
        seconds = {"generate": self._generate_seconds()}
        reference = c.policy.kl.coef > 0
        seconds["log-probs"] = forward * (2 if reference else 1) / c.policy.world_size
        update = forward * (4 if c.policy.gradient_checkpointing else 3)
        seconds["update policy"] = update * c.policy.epochs / c.policy.world_size
        if c.algorithm.has_critic:
            seconds["evaluate critic"] = forward / c.critic.world_size
            again = forward * (4 if c.critic.gradient_checkpointing else 3)
            seconds["update critic"] = again * c.critic.epochs / c.critic.world_size
        return seconds

    def _generate_seconds(self) -> float:
        """Every token of a sequence reads the weights, and the KV cache of the sequences beside it."""
        c, s, r = self.config, self.shape, self.config.rollout
        per_engine = c.batch_size / r.num_engines
        at_once = max(1.0, min(per_engine, r.max_num_seqs, self.sequences_at_once()))
        weights = compute_bytes(c) * s.parameters / r.tensor_parallel_size
        cache = at_once * kv_bytes(c, s) * (c.data.max_prompt_tokens + r.max_new_tokens / 2)
        arithmetic = 2 * s.parameters * at_once / (FLOPS * r.tensor_parallel_size)
        token = max((weights + cache) / BANDWIDTH, arithmetic)
        return token * r.max_new_tokens * per_engine / at_once


def gib(size: float) -> str:
    """Return bytes as text, in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
