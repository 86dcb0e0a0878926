"""A warm start's batches: two ranks' shares add up to what one rank computes, and demonstrations are never left out."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM

from actors.training.warmstart import Batches, Examples
from dvpo_service.config import WarmstartConfig
from dvpo_service.models.small import small_config

RIGHT = [([2, 10 + i, 3], [20 + i, 30 + i, 1]) for i in range(6)]
WRONG = [([2, 10 + i, 3], [21 + i, 30 + i, 1]) for i in range(6)]
EXAMPLES = Examples(RIGHT + WRONG, RIGHT, (190, 191))


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(small_config(hidden_size=32, num_layers=2, num_heads=1, max_positions=32)).eval()


@pytest.mark.parametrize(("judged", "batch_size"), [(0.0, 8), (0.5, 8), (0.5, 3), (0.999, 8)])
def test_two_ranks_have_the_loss_of_one(model: Qwen2ForCausalLM, judged: float, batch_size: int) -> None:
    warm = WarmstartConfig(judged=judged, batch_size=batch_size)
    alone = Batches(EXAMPLES, warm, 0, 1)
    ranks = [Batches(EXAMPLES, warm, rank, 2) for rank in range(2)]
    for _ in range(2):
        loss, accuracies = alone.loss(model)
        shares = [rank.loss(model) for rank in ranks]
        assert float(loss) == pytest.approx(float(sum(share for share, _ in shares)), rel=1e-5)
        assert accuracies.tolist() == pytest.approx(sum(a for _, a in shares).tolist(), rel=1e-5)
        assert (float(accuracies[1]) > 0) == (judged > 0)
