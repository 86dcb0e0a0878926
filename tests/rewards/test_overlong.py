import math

import pytest
import torch

from dvpo_service.rewards.overlong import overlong_penalty


def test_the_penalty_by_hand():
    lens = torch.tensor([0, 12, 13, 14, 16, 20])
    penalty = overlong_penalty(lens, max_len=16, buffer=4)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert penalty.dtype == torch.float32
    assert overlong_penalty(lens.int(), max_len=16, buffer=4, factor=0.5).tolist()[3] == -0.25
    assert overlong_penalty(lens, max_len=16, buffer=4, factor=0.0).tolist() == [0.0] * 6


def test_a_buffer_as_long_as_the_limit_starts_at_once():
    assert overlong_penalty(torch.tensor([0, 2, 4]), max_len=4, buffer=4).tolist() == [0.0, -0.5, -1.0]


@pytest.mark.parametrize(
    ("lens", "given", "match"),
    [
        (torch.tensor([1]), {"buffer": 0}, "buffer"),
        (torch.tensor([1]), {"buffer": 9}, "buffer"),
        (torch.tensor([1]), {"factor": -1.0}, "penalty"),
        (torch.tensor([1]), {"factor": math.nan}, "penalty"),
        (torch.tensor([1.0]), {}, "lengths"),
        (torch.tensor([[1]]), {}, "lengths"),
    ],
)
def test_bad_arguments(lens, given, match):
    with pytest.raises(ValueError, match=match):
        overlong_penalty(lens, **({"max_len": 8, "buffer": 4} | given))
