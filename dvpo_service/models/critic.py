"""The distributional critic: a causal LM backbone and H heads of M return quantiles per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from dvpo_service.algo.choices import LevelKind
from dvpo_service.errors import CheckpointError, one_line
from dvpo_service.models.critic_folder import CriticSpec, read_critic, write_critic
from dvpo_service.models.packing import pack


class QuantileHeads(nn.Module):
    """Hidden states [..., D] -> atoms [..., H * M]: a shared two-layer encoder, then H linear heads.

    Computed in float32 whatever the backbone's precision: atoms are differences of returns,
    and bfloat16 has no room for them.
    """

    def __init__(self, hidden_size: int, *, width: int, num_heads: int, num_quantiles: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.heads = nn.Linear(width, num_heads * num_quantiles)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.heads(self.encoder(hidden))


class DistributionalCritic(nn.Module):
    """Per response token, the distribution of the return that follows it.

    Args:
        backbone: a Hugging Face model that returns ``last_hidden_state``.
        quantile_levels, alpha, beta, estimator: kept in ``spec`` for whoever reads the atoms (``CriticSpec``).
        seed: of the heads' initialisation; heads differ only by it, so disagreement starts there.
        packing: feed the backbone sequences end to end instead of padded.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        width: int,
        num_heads: int,
        num_quantiles: int,
        seed: int,
        packing: bool = False,
        quantile_levels: LevelKind = "endpoint",
        alpha: float = 0.1,
        beta: float = 0.1,
        estimator: str = "dvpo",
    ):
        super().__init__()
        self.spec = CriticSpec(width, num_heads, num_quantiles, quantile_levels, alpha, beta, estimator)
        self.backbone = backbone
        self.packing = packing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.value = QuantileHeads(
                backbone.config.hidden_size,  # type: ignore[union-attr, arg-type]
                width=width,
                num_heads=num_heads,
                num_quantiles=num_quantiles,
            )

    def save_pretrained(self, folder: Path | str, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``state_dict`` in place of the module's own (sharded) one.

        Raises CheckpointError when the disk refuses it.
        """
        state = self.state_dict() if state_dict is None else state_dict
        write_critic(Path(folder), self.spec, self.backbone.config, state)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, trust_remote_code: bool = False) -> Self:
        """The critic that ``save_pretrained`` wrote: float32, on the CPU, in eval mode; no network is used.

        Raises CheckpointError for a folder that holds no critic, or half of one.
        """
        spec, backbone, state = read_critic(Path(folder), trust_remote_code=trust_remote_code)
        critic = cls(backbone, **asdict(spec), seed=0)
        try:
            critic.load_state_dict(state)
        except RuntimeError as error:
            reason = one_line(error)
            raise CheckpointError(f"critic {folder}: the weights are not those of its config: {reason}") from error
        return critic.eval()

    def forward(self, tokens: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
        """Atoms at chosen positions.

        Args:
            tokens: [B, S] right-padded.
            lengths: [B] valid tokens.
            positions: [B, T] indices into S.

        Returns:
            [B, T, H * M], to be split by ``split_heads``: entry t is Z after reading
            ``tokens[:, : positions[t] + 1]``. (FSDP wants no view from a forward pass.)
        """
        if self.packing:
            row = pack(tokens, lengths)
            hidden = self.backbone(**row.inputs(), use_cache=False).last_hidden_state[0]
            hidden = hidden[row.index(positions, lengths)]
        else:
            mask = length_mask(lengths, tokens.shape[1])
            hidden = self.backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            hidden = gather_positions(hidden, positions)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value(hidden.float())


def split_heads(flat: Tensor, num_heads: int) -> Tensor:
    """[..., H * M] -> [..., H, M]."""
    return flat.unflatten(-1, (num_heads, -1))


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """[B] -> [B, size] int64, 1 on valid tokens."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None]).long()


def response_positions(prompt_lens: Tensor, num_tokens: int, size: int) -> Tensor:
    """[B, num_tokens]: where the state before response token t is read, ``prompt_len - 1 + t``.

    Column ``response_len`` is the state after the last token. Past the padded size it is clamped;
    those entries are masked by the caller.
    """
    steps = torch.arange(num_tokens, device=prompt_lens.device)
    return (prompt_lens[:, None] - 1 + steps).clamp(max=size - 1)


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """[B, S, D] at [B, T] -> [B, T, D]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
