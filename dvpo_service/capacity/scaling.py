"""``python -m dvpo_service.capacity.scaling``: the tables of docs/scaling.md, for 1 to 1,024 GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import LlamaConfig, Qwen2Config

from dvpo_service.capacity.memory import compute_bytes
from dvpo_service.capacity.plan import Capacity
from dvpo_service.capacity.shape import ModelShape, shape_of
from dvpo_service.config import Config, load_config

GIB = 80.0  # of a GPU
GPUS = (1, 8, 64, 1024)
LENGTHS = (8192, 32_768)  # tokens of prompt and response together
PROMPT = 512
MODELS = {
    "7B": Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}
MEMORY = ("model", "tokens", "GPUs", "policy", "critic", "engines", "not in 80 GiB", "at once", "longest stage")
MOVED = ("model", "GPUs", "a micro-batch, each rank", "a push", "rollouts", "critic targets")


def memory() -> Iterator[str]:
    """Yield the lines of the table of memory, in Markdown."""
    yield from _head(MEMORY)
    for name, model in MODELS.items():
        shape = shape_of(model)
        for length in LENGTHS:
            for gpus in GPUS:
                yield _row(name, shape, length, gpus)


def moved() -> Iterator[str]:
    """Yield the lines of the table of bytes that move in a step at 8k tokens, in Markdown."""
    yield from _head(MOVED)
    for name, model in MODELS.items():
        shape = shape_of(model)
        for gpus in GPUS:
            sizes = traffic(shipped_config(name, LENGTHS[0], gpus), shape)
            yield _line(name, f"{gpus:,}", *(f"{sizes[part] / 1e9:,.1f} GB" for part in MOVED[2:]))


def _head(names: tuple[str, ...]) -> tuple[str, str]:
    return _line(*names), _line(*("---" for _ in names))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _row(name: str, shape: ModelShape, length: int, gpus: int) -> str:
    capacity = Capacity(shipped_config(name, length, gpus), shape, GIB)
    sizes = [f"{d.count} x {d.size / 2**30:.0f} GiB" for d in capacity.devices]
    short = []
    for device in capacity.devices:
        if device.size > capacity.room(device):
            worst = max(device.parts, key=lambda part: part.size)
            short.append(f"{device.pool}: {worst.name}")
    seconds = capacity.stage_seconds()
    longest = max(seconds, key=lambda stage: seconds[stage])
    stage = f"{longest}, {seconds[longest] / sum(seconds.values()):.0%}" if not short else ""
    at_once = f"{capacity.sequences_at_once():,.0f}" if not short else ""
    return _line(name, f"{length:,}", f"{gpus:,}", *sizes, "; ".join(short) or "nothing", at_once, stage)


def shipped_config(name: str, length: int, gpus: int) -> Config:
    """Return ``qwen2.5-7b-fsdp`` on ``gpus`` GPUs: half for the policy, a quarter each for critic and engines.

    On one GPU each pool has one rank, as if it had the GPU to itself.
    """
    policy, critic, rollout = (max(1, gpus // part) for part in (2, 4, 4))
    parallel = min(rollout, 8) if name == "70B" else 1
    budget = max(8192, length)
    return load_config(
        "qwen2.5-7b-fsdp",
        [
            f"data.max_prompt_tokens={PROMPT}",
            f"rollout.max_new_tokens={length - PROMPT}",
            f"rollout.prompts_per_step={max(128, 2 * gpus)}",
            f"rollout.num_engines={rollout // parallel}",
            f"rollout.tensor_parallel_size={parallel}",
            f"cluster.gpus_per_engine={parallel}",
            f"policy.world_size={policy}",
            f"policy.mini_batch_size={max(256, policy)}",
            f"policy.max_tokens_per_micro_batch={budget}",
            f"critic.world_size={critic}",
            f"critic.mini_batch_size={max(256, policy)}",
            f"critic.max_tokens_per_micro_batch={budget}",
        ],
    )


def traffic(config: Config, shape: ModelShape) -> dict[str, float]:
    """Return the bytes that move in a step, by what moves.

    - ``a micro-batch, each rank``: FSDP gathers the weights in the forward and in the backward pass, and reduces
      float32 gradients.
    - ``a push``: the weights from the policy's first rank to every engine.
    - ``rollouts``: tokens, mask, log-probs and rewards of the whole batch, to every node.
    - ``critic targets``: they stay in the host memory of the critic's ranks from evaluation to update.
    """
    width = compute_bytes(config)
    tokens = config.batch_size * config.max_model_len
    return {
        "a micro-batch, each rank": (2 * width + 4) * shape.parameters,
        "a push": width * shape.parameters,
        "rollouts": 17.0 * tokens,
        "critic targets": 4.0 * config.batch_size * config.rollout.max_new_tokens * config.algorithm.n_quantiles,
    }


def main() -> None:
    """Print both tables."""
    print("\n".join((*memory(), "", *moved())))


if __name__ == "__main__":
    main()
