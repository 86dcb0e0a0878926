"""Values along a response equal those of the critic called directly, and of NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvpo_service.algo.quantiles import interpolate_quantiles
from dvpo_service.models.critic import DistributionalCritic
from dvpo_service.serving.values import ResponseValues, ValueModel, ValueQuery, as_json, rank
from tests.serving.server import make_export


@pytest.fixture(scope="module")
def critic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_export(tmp_path_factory.mktemp("export") / "export").critic
    assert folder
    return folder


PROMPT, RESPONSE = (2, 20, 21, 14, 3), (25, 26, 27, 1)


def by_hand(folder: Path, prompt: tuple[int, ...], response: tuple[int, ...]) -> np.ndarray:
    """Return the sorted atoms [T + 1, H, M], from one unpadded forward pass per state."""
    critic = DistributionalCritic.from_pretrained(folder)
    states = []
    for read in range(len(response) + 1):
        ids = torch.tensor([prompt + response[:read]])
        length = torch.tensor([ids.shape[1]])
        with torch.no_grad():
            flat = critic(ids, length, length[:, None] - 1)
        states.append(flat.reshape(3, 20).sort(-1).values.numpy())
    return np.stack(states)


def test_each_state_is_the_critic_after_that_many_tokens(critic_folder: Path) -> None:
    model = ValueModel(critic_folder)
    longer = ValueQuery((2, 20), (30,) * 9, None)  # its padding must not matter
    [along, _] = model.values([ValueQuery(PROMPT, RESPONSE, None), longer])
    atoms = by_hand(critic_folder, PROMPT, RESPONSE)
    distribution = atoms.mean(1)
    assert np.allclose(along.quantiles, distribution, atol=1e-5)
    assert np.allclose(along.mean, distribution.mean(-1), atol=1e-5)
    assert np.allclose(along.cvar, distribution[:, :2].mean(-1), atol=1e-5), "alpha 0.1 of 20 atoms is the lowest 2"
    assert np.allclose(along.upper_tail, distribution[:, -4:].mean(-1), atol=1e-5), "beta 0.2 is the critic's own"
    assert np.allclose(along.head_disagreement, atoms.mean(-1).std(-1), atol=1e-5)
    assert len(along.mean) == len(RESPONSE) + 1


def test_the_last_state_alone_and_other_tails(critic_folder: Path) -> None:
    model = ValueModel(critic_folder)
    whole, last = model.values(
        [ValueQuery(PROMPT, RESPONSE, (), 0.5, 1.0), ValueQuery(PROMPT, RESPONSE, (), 0.5, 1.0, only_last=True)]
    )
    assert last.mean == pytest.approx(whole.mean[-1:])
    distribution = by_hand(critic_folder, PROMPT, RESPONSE)[-1].mean(0)
    assert last.cvar[0] == pytest.approx(distribution[:10].mean(), abs=1e-5)
    assert last.upper_tail == pytest.approx(last.mean), "the upper tail of everything is the mean"
    assert last.quantiles == [[]]


def test_an_empty_response_has_one_state(critic_folder: Path) -> None:
    [along] = ValueModel(critic_folder).values([ValueQuery(PROMPT, ())])
    assert len(along.mean) == 1


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=30),
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
)
def test_quantiles_between_atoms_are_numpys(atoms: list[float], levels: list[float]) -> None:
    distribution = torch.tensor(atoms, dtype=torch.float64).sort().values[None]
    m = len(atoms)
    at = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    quantiles = interpolate_quantiles(distribution, at, torch.tensor(levels, dtype=torch.float64))
    assert np.allclose(quantiles[0], np.interp(levels, at, distribution[0]), atol=1e-6)


def test_one_atom_is_every_quantile() -> None:
    distributions = torch.tensor([[0.3], [0.4]])
    assert interpolate_quantiles(distributions, torch.tensor([0.5]), torch.tensor([0.1, 0.9])).tolist() == [
        pytest.approx([0.3, 0.3]),
        pytest.approx([0.4, 0.4]),
    ]


def values(mean: float, cvar: float, upper: float) -> ResponseValues:
    return ResponseValues(0.1, 0.1, [], [[]], [mean], [cvar], [upper], [0.0])


def test_responses_rank_by_what_is_asked_for() -> None:
    safe = values(0.5, 0.4, 0.6)
    bold = values(0.45, 0.1, 0.9)
    assert rank([bold, safe], "mean") == [1, 0]
    assert rank([bold, safe], "cvar") == [1, 0]
    assert rank([bold, safe], "upper_tail") == [0, 1]
    assert rank([safe, safe, bold], "mean") == [0, 1, 2], "equal ones stay in order"


def test_states_as_json_name_the_token_read_last() -> None:
    two_states = ResponseValues(0.1, 0.2, [0.5], [[1.0], [2.0]], [1.0, 2.0], [0.0, 1.0], [2.0, 3.0], [0.1, 0.2])
    body = as_json(two_states, ["7"], [26])
    assert [s["token"] for s in body["states"]] == [None, "7"]
    assert body["states"][1] == {
        "token": "7",
        "token_id": 26,
        "mean": 2.0,
        "cvar": 1.0,
        "upper_tail": 3.0,
        "head_disagreement": 0.2,
        "quantiles": [2.0],
    }
