"""The distributional critic: a causal LM backbone and H heads of M return quantiles per token."""

from __future__ import annotations

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
    """The critic's output layers: a shared two-layer encoder, then H linear heads of M atoms.

    They compute in float32 whatever the backbone's precision, because the differences between atoms are too small for
    bfloat16.
    """

    def __init__(self, hidden_size: int, *, width: int, num_heads: int, num_quantiles: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.heads = nn.Linear(width, num_heads * num_quantiles)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the atoms [..., H * M] for hidden states [..., D]."""
        return self.heads(self.encoder(hidden))


class DistributionalCritic(nn.Module):
    """A critic that predicts, for each response token, the distribution of the return that follows.

    Args:
      backbone: a Hugging Face model that returns ``last_hidden_state``.
      width: hidden units of the heads' encoder.
      num_heads, num_quantiles: H and M.
      seed: seed of the heads' initialisation, which is all that makes the heads differ at first.
      packing: feed the backbone sequences end to end instead of padded.
      quantile_levels, alpha, beta, estimator: stored in ``spec`` for code that interprets the atoms (``CriticSpec``).
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

    def save_pretrained(self, folder: Path | str | None) -> None:
        """Write ``config.json`` and the weights. Collective if they are sharded.

        Args:
          folder: None for a rank that does not write.

        Raises:
          CheckpointError: when the files cannot be written.
        """
        place = None if folder is None else Path(folder)
        write_critic(place, self.spec, self.backbone.config, self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, trust_remote_code: bool = False) -> Self:
        """Return the critic that ``save_pretrained`` wrote, in float32, on the CPU and in eval mode.

        No network connection is used. Raises CheckpointError when ``folder`` holds no critic, or only part of one.
        """
        spec, backbone, state = read_critic(Path(folder), trust_remote_code=trust_remote_code)
        critic = cls(backbone, **asdict(spec), seed=0)
        try:
            critic.load_state_dict(state, assign=True)  # no second copy
        except RuntimeError as error:
            reason = one_line(error)
            raise CheckpointError(f"critic {folder}: the weights are not those of its config: {reason}") from error
        return critic.eval()

    def forward(self, tokens: Tensor, lengths: Tensor, positions: Tensor) -> Tensor:
        """Return the atoms at the given positions.

        Args:
          tokens: [B, S], right-padded.
          lengths: [B], valid tokens of each sequence.
          positions: [B, T], indices into S.

        Returns:
          [B, T, H * M]; entry [b, t] is Z after reading ``tokens[b, : positions[b, t] + 1]``. Split it with
          ``split_heads``. (The split is not done here because FSDP wants no view from a forward pass.)
        """
        if self.packing:
            row = pack(tokens, lengths)
            hidden = self.backbone(**row.inputs(), use_cache=False).last_hidden_state[0]
            hidden = hidden[row.index(positions, lengths)]
        else:
            # No mask: nothing looks ahead at the padding on the right, and without one SDPA takes its flash kernel.
            hidden = self.backbone(input_ids=tokens, use_cache=False).last_hidden_state
            hidden = gather_positions(hidden, positions)
        return self.value(hidden.float())


def split_heads(flat: Tensor, num_heads: int) -> Tensor:
    """Return ``flat`` [..., H * M] as [..., H, M]."""
    return flat.unflatten(-1, (num_heads, -1))


def response_positions(prompt_lens: Tensor, num_tokens: int, size: int) -> Tensor:
    """Return the positions at which to read the state before response token t: ``prompt_len - 1 + t``.

    Args:
      prompt_lens: [B].
      num_tokens: number of columns. Column ``response_len`` is the state after the last token.
      size: S, the padded length of the sequences.

    Returns:
      [B, num_tokens] int64, clamped to ``size - 1``. The caller masks the entries past a response's end.
    """
    steps = torch.arange(num_tokens, device=prompt_lens.device)
    return (prompt_lens[:, None] - 1 + steps).clamp(max=size - 1)


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return ``hidden`` [B, S, D] at ``positions`` [B, T], as [B, T, D]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
