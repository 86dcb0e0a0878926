import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_service.data.cursor import PromptCursor
from dvpo_service.errors import CheckpointError


@settings(deadline=None)
@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    takes=st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=12),
)
def test_each_index_once_per_epoch_through_saves(size, seed, takes):
    cursor = PromptCursor(size, seed)
    given_out = []
    for n, save in takes:
        if save:
            state = json.loads(json.dumps(cursor.state_dict()))
            cursor = PromptCursor(size, seed)
            cursor.take(3)  # a used cursor loads a state just as a new one does
            cursor.load_state_dict(state)
        given_out += cursor.take(n)
        assert cursor.epoch == len(given_out) // size
    for start in range(0, len(given_out) - size + 1, size):
        assert Counter(given_out[start : start + size]) == Counter(range(size))
    assert len(set(given_out[len(given_out) // size * size :])) == len(given_out) % size
    assert given_out == PromptCursor(size, seed).take(len(given_out))


def test_epochs_and_seeds_have_their_own_order():
    first, second = PromptCursor(100, 0).take(100), PromptCursor(100, 0).take(200)[100:]
    assert first != second
    assert first != PromptCursor(100, 1).take(100)
    assert first != list(range(100))


STATE = {"seed": 1, "num_prompts": 10, "epoch": 2, "offset": 3}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (STATE | {"num_prompts": 11}, "made with 11 training prompts, the data now has 10"),
        (STATE | {"seed": 2}, "made with data seed 2, the config now has 1"),
        (STATE | {"offset": 10}, "epoch or offset is out of range"),
        (STATE | {"epoch": -1}, "epoch or offset is out of range"),
        (STATE | {"epoch": "2"}, "expected whole numbers seed, num_prompts, epoch, offset"),
        ({"seed": 1}, "expected whole numbers"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, message):
    cursor = PromptCursor(10, 1)
    with pytest.raises(CheckpointError, match=message):
        cursor.load_state_dict(state)
    assert cursor.state_dict() == {"seed": 1, "num_prompts": 10, "epoch": 0, "offset": 0}


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_prompts must be at least 1"):
        PromptCursor(0, 0)
    with pytest.raises(ValueError, match="n must not be negative"):
        PromptCursor(1, 0).take(-1)
