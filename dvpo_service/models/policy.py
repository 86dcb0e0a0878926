"""The policy as the trainer uses it: log-probs and entropy of given responses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvpo_service.algo.policy_loss import entropy, token_logprobs
from dvpo_service.models.critic import length_mask
from dvpo_service.models.packing import pack


class PolicyModel(nn.Module):
    """A Hugging Face causal LM whose forward pass scores responses."""

    def __init__(self, lm: nn.Module, *, temperature: float, packing: bool = False):
        super().__init__()
        self.backbone = lm
        self.temperature = temperature
        self.packing = packing

    def forward(self, tokens: Tensor, prompt_lens: Tensor, lengths: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies of the response tokens, under the sampling temperature.

        Args:
          tokens: [B, S], prompt then response, right-padded.
          prompt_lens, lengths: [B], prompt tokens, and prompt + response tokens.
          num_tokens: T, the length of the longest response.

        Returns:
          (log-probs, entropies), both [B, T] float32; undefined past a response's end.
        """
        score = self._packed if self.packing else self._padded
        return score(tokens, prompt_lens, lengths, num_tokens)

    def _padded(self, tokens: Tensor, prompt_lens: Tensor, lengths: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        # Logits are large, so the model computes none before the first response position of the batch.
        first = int(prompt_lens.min()) - 1
        logits = self.backbone(
            input_ids=tokens,
            attention_mask=length_mask(lengths, tokens.shape[1]),
            logits_to_keep=tokens.shape[1] - first,
            use_cache=False,
        ).logits[:, :-1]
        logits = logits.float() / self.temperature
        columns = prompt_lens[:, None] - 1 - first + torch.arange(num_tokens, device=tokens.device)
        columns = columns.clamp(max=logits.shape[1] - 1)
        logprobs = token_logprobs(logits, tokens[:, first + 1 :])
        return logprobs.gather(1, columns), entropy(logits).gather(1, columns)

    def _packed(self, tokens: Tensor, prompt_lens: Tensor, lengths: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        row = pack(tokens, lengths)
        steps = torch.arange(num_tokens, device=tokens.device)
        valid = steps < (lengths - prompt_lens)[:, None]
        before = row.index(prompt_lens[:, None] - 1 + steps, lengths)[valid]  # states that predict a response token
        logits = self.backbone(**row.inputs(), logits_to_keep=before, use_cache=False).logits
        logits = logits.float() / self.temperature
        logprobs = token_logprobs(logits, row.tokens[:, before + 1])[0]
        blank = torch.zeros(valid.shape, dtype=logprobs.dtype, device=tokens.device)
        return blank.masked_scatter(valid, logprobs), blank.masked_scatter(valid, entropy(logits)[0])
