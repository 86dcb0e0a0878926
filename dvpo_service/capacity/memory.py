"""The bytes that a run needs on each of its devices, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dvpo_service.algo.chunked_logprobs import CHUNK_BYTES
from dvpo_service.capacity.shape import ModelShape, adapter_parameters
from dvpo_service.config.pools import TrainerPool
from dvpo_service.config.schema import Config
from dvpo_service.models.weight_files import MAX_FILE_BYTES, TRANSFER_BYTES

FLOAT32 = 4
LOGIT_COPIES = 4  # float32 logits of a chunk that exist at a time: scores, their exponential, gradient, the model's own
ATOM_COPIES = 8  # float32 atoms of a response token: the critic's, sorted, targets, and the loss's temporaries
CUDA_CONTEXT = int(1.5 * 2**30)  # CUDA's context and NCCL's buffers
PROCESS = 0.8 * 2**30  # a Python process with torch, transformers and Ray; an engine has two
PREFILL_TOKENS = 8192  # tokens of vLLM's largest batch by default


@dataclass(frozen=True)
class Part:
    """Memory for one purpose.

    Attributes:
      name: the purpose.
      size: bytes.
      key: the config key that makes it smaller.
    """

    name: str
    size: float
    key: str


@dataclass(frozen=True)
class Device:
    """What an actor keeps on its device; ``count`` actors of a pool are alike."""

    pool: str
    count: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> float:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)


def devices(config: Config, shape: ModelShape) -> list[Device]:
    """Return what each actor of each pool keeps on its device at the worst moment of a step."""
    found = [Device("policy", config.policy.world_size, tuple(_policy(config, shape)))]
    if config.algorithm.has_critic:
        found.append(Device("critic", config.critic.world_size, tuple(_critic(config, shape))))
    # Nothing is known of another engine's memory. In one process the policy's own weights are sampled from.
    if config.rollout.engine == "vllm" and not config.cluster.in_process:
        count = config.rollout.num_engines * config.rollout.tensor_parallel_size
        found.append(Device("rollout", count, tuple(_engine(config, shape))))
    return found


def _policy(config: Config, shape: ModelShape) -> Iterator[Part]:
    pool = config.policy
    adapter = adapter_parameters(config, pool.lora, head=True)
    yield from _trained("policy", pool, config, shape, shape.parameters + adapter, adapter or shape.parameters)
    if pool.kl.coef > 0 and not pool.lora:
        size = compute_bytes(config) * shape.parameters / pool.world_size
        yield Part("reference", size, "policy.kl.coef=0, policy.world_size")
    logits = micro_tokens(pool, config) * shape.vocab * FLOAT32
    yield Part("logits", LOGIT_COPIES * min(CHUNK_BYTES, logits), "policy.micro_batch_size")
    if logits > CHUNK_BYTES and not pool.lora:
        # The chunks' gradients of the output layer are added up in float32. In float32 the sum is itself the gradient,
        # which is counted above; the other copy is that of one chunk.
        width = compute_bytes(config)
        copies = width + (FLOAT32 if width < FLOAT32 else 0)
        yield Part("sum of the output layer's gradients", copies * shape.vocab * shape.hidden, "model.dtype")


def _critic(config: Config, shape: ModelShape) -> Iterator[Part]:
    pool, a = config.critic, config.algorithm
    atoms = a.n_heads * a.n_quantiles
    heads = shape.hidden * a.critic_hidden_dim + a.critic_hidden_dim**2 + a.critic_hidden_dim * atoms
    adapter = adapter_parameters(config, pool.lora, head=False)
    yield from _trained("critic", pool, config, shape, shape.body + heads + adapter, heads + (adapter or shape.body))
    tokens = micro_tokens(pool, config)
    responses = tokens * config.rollout.max_new_tokens / config.max_model_len
    values = FLOAT32 * responses * (ATOM_COPIES * atoms + shape.hidden + 4 * a.critic_hidden_dim)
    yield Part("value distributions", values, "algorithm.n_quantiles, algorithm.n_heads, critic.micro_batch_size")


def _trained(
    name: str, pool: TrainerPool, config: Config, shape: ModelShape, parameters: int, trained: int
) -> Iterator[Part]:
    """Yield the parts that policy and critic have in common; ``trained`` of the ``parameters`` have gradients."""
    shard, own = parameters / pool.world_size, trained / pool.world_size
    width = compute_bytes(config)
    yield Part("weights (float32)", FLOAT32 * shard, f"{name}.world_size")
    keys = f"{name}.world_size" if pool.lora else f"{name}.world_size, {name}.lora"
    yield Part("optimizer (AdamW)", 2 * FLOAT32 * own, keys)
    whole = pool.defer_gradient_reduction and pool.world_size > 1
    yield Part(
        "gradients (float32)",
        FLOAT32 * (trained if whole else own),
        f"{name}.defer_gradient_reduction=false" if whole else keys,
    )
    if pool.world_size > 1 or width < FLOAT32:  # one rank alone in float32 trains the plain module (models/sharding.py)
        # FSDP copies two layers, for the next is gathered while one computes, and what is in no layer; with gradients.
        gathered = 2 * shape.layer + (parameters - shape.layers * shape.layer)
        yield Part("gathered weights and their gradients", 2 * width * gathered, "model.dtype")
    tokens = micro_tokens(pool, config)
    layer = shape.saved * width
    kept = shape.hidden * width
    per_token = shape.layers * kept + layer if pool.gradient_checkpointing else shape.layers * layer
    smaller = [f"{name}.max_tokens_per_micro_batch", f"{name}.micro_batch_size"]
    if not pool.gradient_checkpointing:
        smaller.insert(0, f"{name}.gradient_checkpointing=true")
    yield Part("activations", tokens * per_token, ", ".join(smaller))


def _engine(config: Config, shape: ModelShape) -> Iterator[Part]:
    r = config.rollout
    width = compute_bytes(config)
    yield Part("weights", width * shape.parameters / r.tensor_parallel_size, "rollout.tensor_parallel_size")
    batch = max(PREFILL_TOKENS, config.max_model_len)
    per_token = (shape.saved * width + shape.vocab * FLOAT32 * r.max_num_seqs / batch) / r.tensor_parallel_size
    yield Part("activations", batch * per_token, "rollout.max_num_seqs, rollout.tensor_parallel_size")
    if config.cluster.gpus_per_engine == 0:
        yield Part("KV cache", r.kv_cache_gib * 2**30, "rollout.kv_cache_gib")
    else:
        yield Part("KV cache of one sequence", config.max_model_len * kv_bytes(config, shape), "rollout.max_new_tokens")


def micro_tokens(pool: TrainerPool, config: Config) -> int:
    """Return the tokens of a forward pass when every response is as long as it may be."""
    share = (pool.mini_batch_size or config.batch_size) // pool.world_size
    tokens = min(pool.micro_batch_size, share) * config.max_model_len
    budget = pool.max_tokens_per_micro_batch
    return min(tokens, max(budget, config.max_model_len)) if budget else tokens


def kv_bytes(config: Config, shape: ModelShape) -> float:
    """Return the bytes of an engine's KV cache per token, on each of its devices."""
    return shape.kv * compute_bytes(config) / config.rollout.tensor_parallel_size


def compute_bytes(config: Config) -> int:
    """Return the bytes of a number in the precision of the computation."""
    return 2 if config.model.dtype == "bfloat16" else FLOAT32


def host_bytes(config: Config, shape: ModelShape) -> dict[str, float]:
    """Return the bytes of host memory, over all hosts, beside what is on the devices.

    - ``processes``: what a process of each actor needs before it holds anything.
    - ``loading``: on GPUs, each rank's shard on its way to the device: one model for each pool, and one in the
      computation's precision for the reference. Where transformers must see whole tensors (``sharded_load``), one rank
      at a time has the whole model too.
    - ``export``: the file that the first rank of each pool has in memory.
    - ``critic targets``: they wait in host memory from the evaluation to the update.
    - ``weights to engines``: a part of them, and twice the file in memory through which CPU engines get it.
    """
    a = config.algorithm
    whole, critic = FLOAT32 * shape.parameters, FLOAT32 * shape.body if a.has_critic else 0
    ranks = config.policy.world_size + (config.critic.world_size if a.has_critic else 0)
    processes = 1 if config.cluster.in_process else ranks + 2 * config.rollout.num_engines
    found = {
        "processes": PROCESS * processes,
        "export": min(MAX_FILE_BYTES, whole) + min(MAX_FILE_BYTES, critic),
    }
    if config.cluster.gpus_per_trainer > 0:
        copied = config.policy.kl.coef > 0 and not config.policy.lora
        reference = compute_bytes(config) * shape.parameters if copied else 0
        found["loading"] = whole + critic + reference
    if a.has_critic:
        found["critic targets"] = FLOAT32 * config.batch_size * config.rollout.max_new_tokens * a.n_quantiles
    if config.cluster.gpus_per_engine == 0 and not config.cluster.in_process:
        found["weights to engines"] = 3 * min(TRANSFER_BYTES, compute_bytes(config) * shape.parameters)
    return found
