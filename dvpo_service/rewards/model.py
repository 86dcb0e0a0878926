"""Score responses with a sequence-classification model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dvpo_service.config.reward_model import RewardModelConfig
from dvpo_service.errors import ConfigError, one_line
from dvpo_service.models.load import quiet
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.scoring import NotANumber, Result, failed, finite_number


class ModelPart:
    """A reward model in this process.

    Raises:
      ConfigError: the folder holds no such model, or its head or chat template is missing.
    """

    def __init__(self, config: RewardModelConfig):
        quiet()
        self.config = config
        self.tokenizer, model_config = check_reward_model(config)
        self.device = torch.device("cuda" if config.gpus else "cpu")
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                config.path,
                dtype=getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"reward.model.path {config.path}: cannot be loaded: {one_line(error)}") from error
        if info["missing_keys"]:  # transformers would fill them with random numbers
            raise ConfigError(
                f"reward.model.path {config.path}: it has no weights for {sorted(info['missing_keys'])[0]}, so it is "
                "no trained reward model; name one that was saved with its classification head"
            )
        self.pad = self.tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.tokenizer.eos_token_id or 0
        model.config.pad_token_id = self.pad  # by which the model finds a sequence's last token
        self.model = model.to(self.device).eval()
        self.limit = config.max_tokens or getattr(model_config.get_text_config(), "max_position_embeddings", None)

    def score(self, groups: Sequence[Work]) -> list[list[Result]]:
        """Return the results of every group."""
        encoded = [self._encoded(work, response) for work in groups for response in work.responses]
        sequences = {i: ids for i, ids in enumerate(encoded) if isinstance(ids, list)}
        found = {i: result for i, result in enumerate(encoded) if isinstance(result, Result)}
        # Sequences of similar length go together, so that little is padding.
        order = sorted(sequences, key=lambda i: (len(sequences[i]), i))
        for start in range(0, len(order), self.config.batch_size):
            batch = order[start : start + self.config.batch_size]
            found |= zip(batch, self._scored([sequences[i] for i in batch]), strict=True)
        results = iter(found[i] for i in range(len(encoded)))
        return [[next(results) for _ in work.responses] for work in groups]

    def attempt(self, work: Work) -> None:
        """Score once. Raises NotANumber when there is no score."""
        [[result]] = self.score([work])
        if result.error:
            raise NotANumber(result.error)

    def _encoded(self, work: Work, response: str) -> list[int] | Result:
        """Return the token ids of the chat with the response, or why there are none."""
        chat = [*work.messages, {"role": "assistant", "content": response}]
        try:
            ids = list(
                self.tokenizer.apply_chat_template(
                    chat, chat_template=self.config.chat_template, tokenize=True, return_dict=True
                )["input_ids"]
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything, and it costs its response
            return failed(error)
        if self.limit is not None and len(ids) > self.limit:
            return failed(
                NotANumber(f"prompt and response have {len(ids)} tokens, the reward model reads {self.limit}")
            )
        return ids

    def _scored(self, sequences: list[list[int]]) -> list[Result]:
        try:
            scores = self._forward(sequences).tolist()
        except RuntimeError as error:  # out of memory
            return [failed(error)] * len(sequences)
        return [_result(score) for score in scores]

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> Tensor:
        """Return the scores, [batch] float32."""
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [self.pad] * (longest - len(s)) for s in sequences], device=self.device)
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        if not self.config.probability:
            return logits[:, self.config.label]
        one = logits.shape[1] == 1
        return logits[:, 0].sigmoid() if one else logits.softmax(1)[:, self.config.label]


def _result(score: float) -> Result:
    try:
        return Result(finite_number(score))
    except NotANumber:
        return failed(NotANumber(f"the reward model gave {score}"))


def check_reward_model(config: RewardModelConfig) -> tuple[Any, Any]:
    """Return the tokenizer and the model's config, without loading weights.

    Raises:
      ConfigError: the folder has no such model, no label of that number, or no chat template.
    """
    where = f"reward.model.path {config.path}"
    try:
        trust = {"trust_remote_code": config.trust_remote_code}
        model: Any = AutoConfig.from_pretrained(config.path, **trust)
        tokenizer: Any = AutoTokenizer.from_pretrained(config.path, **trust)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{where}: no model of transformers: {one_line(error)}; check the path") from error
    kinds = model.architectures or []
    if kinds and not any("SequenceClassification" in kind or "RewardModel" in kind for kind in kinds):
        raise ConfigError(f"{where}: it is a {kinds[0]}, not a model for sequence classification; name a reward model")
    if config.label >= model.num_labels:
        raise ConfigError(f"{where}: reward.model.label = {config.label}, and it has {model.num_labels}, from 0 on")
    if config.chat_template is None and not tokenizer.chat_template:
        raise ConfigError(f"{where}: its tokenizer has no chat template; give one as reward.model.chat_template")
    return tokenizer, model
