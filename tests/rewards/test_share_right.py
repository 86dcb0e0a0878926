from __future__ import annotations

import pytest

from dvpo_service.rewards.share_right import score


@pytest.mark.parametrize(
    ("response", "answer", "share"),
    [
        ("bcd", "bcd", 1.0),
        (" bcd\n", "bcd", 1.0),
        ("bxd", "bcd", 2 / 3),
        ("bc", "bcd", 2 / 3),
        ("bcde", "bcd", 3 / 4),
        ("", "bcd", 0.0),
        ("abcd", "bcd", 0.0),
        ("", "", 1.0),
    ],
)
def test_positions_count_and_so_do_missing_and_further_ones(response: str, answer: str, share: float) -> None:
    assert score(response, answer) == pytest.approx(share)
