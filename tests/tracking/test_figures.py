"""Pictures can be drawn, and show the numbers that they are given."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest

from dvpo_service.tracking.critic_figures import evenly, fan_over_training, head_disagreement, quantile_heatmap
from dvpo_service.tracking.figures import FanData, calibration_plot, fan_chart

LEVELS = np.linspace(0, 1, 21)


def chart(text="48+1", outcome=1.0, title="12+36="):
    quantiles = np.tile(LEVELS, (len(text), 1)) + np.arange(len(text))[:, None]
    return FanData(title, list(text), LEVELS, quantiles[:, None], outcome)


def two_heads(apart, text="48+1"):
    """Return a chart of two heads whose means differ by ``apart`` x the token's index."""
    with_two = chart(text)
    shift = apart * np.arange(len(text))[:, None, None] * np.array([0.0, 1.0])[:, None]
    with_two.heads = LEVELS + shift
    return with_two


def png(figure, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        figure.savefig(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return len(data)


def test_fan_chart_draws_bands_median_mean_and_outcome(tmp_path):
    figure = fan_chart([chart(), chart(outcome=None)], step=100)
    first, second = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in first.get_lines()}
    np.testing.assert_allclose(lines["median"], [0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(lines["mean"], [0.5, 1.5, 2.5, 3.5])
    assert list(lines["observed outcome"]) == [1.0, 1.0]
    outer = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (outer.min(), outer.max()) == (pytest.approx(0.05), pytest.approx(3.95))
    assert "observed outcome" not in {line.get_label() for line in second.get_lines()}
    assert [t.get_text() for t in first.get_xticklabels()] == ["4", "8", "+", "1"]
    assert first.get_shared_y_axes().joined(first, second)
    assert "step 100" in figure.get_suptitle()
    assert png(figure, tmp_path / "fan.png") > 10_000
    assert "matplotlib.pyplot" not in sys.modules


def test_crossed_quantiles_are_put_in_order():
    crossed = chart()
    crossed.heads = crossed.heads[..., ::-1]
    median = next(x for x in fan_chart([crossed], 0).axes[0].get_lines() if x.get_label() == "median")
    np.testing.assert_allclose(median.get_ydata(), [0.5, 1.5, 2.5, 3.5])


def test_long_responses_thin_their_labels_and_panels_are_at_most_six(tmp_path):
    figure = fan_chart([chart("word and more " * 20)] * 8, step=1)
    assert len(figure.axes) == 6
    assert len(figure.axes[0].get_xticks()) <= 60
    assert png(figure, tmp_path / "long.png") > 10_000


def test_odd_tokens_render(tmp_path):
    heads = np.tile(LEVELS, (5, 3, 1))
    odd = FanData("cost $5_x$ \n日", [" ", "\n", "$a_{", "日本", "<|im_end|>"], LEVELS, heads, 0.0)
    for draw in (fan_chart, quantile_heatmap, head_disagreement):
        assert png(draw([odd, chart("1")], 0), tmp_path / "odd.png") > 5_000
    assert png(fan_over_training([(0, [odd]), (7, [odd])]), tmp_path / "odd.png") > 5_000


def test_nothing_to_draw_is_an_error():
    for draw in (fan_chart, quantile_heatmap, head_disagreement):
        with pytest.raises(ValueError, match="at least one token"):
            draw([chart("")], 0)


def test_the_heat_map_has_a_row_per_level_and_one_colour_scale(tmp_path):
    low = chart(outcome=0.0)
    high = chart()
    high.heads = high.heads + 10
    figure = quantile_heatmap([low, high], step=5)
    (first,), (second,) = (ax.collections for ax in figure.axes[:2])
    np.testing.assert_allclose(first.get_array(), low.quantiles.T)
    assert first.get_clim() == second.get_clim()
    assert 0 < first.get_clim()[0] < 0.5, "the lowest hundredth does not set the scale"
    edges = first.get_coordinates()[:, 0, 1]
    assert (edges[0], edges[1], edges[-1]) == (0.0, pytest.approx(0.025), 1.0)
    assert [ax.get_title("right") for ax in figure.axes[:2]] == ["earns 0", "earns 1"]
    assert figure.axes[2].get_ylabel() == "predicted return"
    assert png(figure, tmp_path / "heat.png") > 10_000


def test_a_critic_that_predicts_a_constant_still_has_a_heat_map(tmp_path):
    flat = chart()
    flat.heads = np.full_like(flat.heads, 0.7)
    assert png(quantile_heatmap([flat], 0), tmp_path / "flat.png") > 5_000


def test_head_disagreement_shows_each_head_and_their_spread(tmp_path):
    figure = head_disagreement([two_heads(0.2), two_heads(0.0)], step=5)
    above, other, below, even = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in above.get_lines()}
    np.testing.assert_allclose(lines["head 1, mean and 5-95 %"], [0.5] * 4)
    np.testing.assert_allclose(lines["head 2, mean and 5-95 %"], [0.5, 0.7, 0.9, 1.1])
    np.testing.assert_allclose([bar.get_height() for bar in below.patches], [0.0, 0.1, 0.2, 0.3])  # population sd
    np.testing.assert_allclose([bar.get_height() for bar in even.patches], [0.0] * 4)
    tails = {line.get_label(): line.get_ydata() for line in below.get_lines()}
    np.testing.assert_allclose(tails["sd of the 95% quantiles"], [0.0, 0.1, 0.2, 0.3], atol=1e-12)
    assert below.get_shared_y_axes().joined(below, even)
    assert above.get_shared_y_axes().joined(above, other)
    assert [t.get_text() for t in below.get_xticklabels()] == ["4", "8", "+", "1"]
    assert png(figure, tmp_path / "heads.png") > 10_000
    assert png(head_disagreement([chart("x" * 40), chart("1", None)], 0), tmp_path / "odd.png") > 10_000


def test_the_fan_over_training_has_six_even_steps_and_a_row_per_response(tmp_path):
    history = [(step, [chart(), chart(outcome=0.0, title="wrong " * 9 + "= 7")]) for step in range(0, 1010, 10)]
    figure = fan_over_training(history)
    assert len(figure.axes) == 12
    assert [ax.get_title() for ax in figure.axes[:6]] == [f"step {s}" for s in (0, 200, 400, 600, 800, 1000)]
    assert figure.axes[6].get_ylabel().endswith("wrong = 7")
    assert png(figure, tmp_path / "over.png") > 10_000
    assert len(fan_over_training(history[:2]).axes) == 4


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [([5], [5]), ([1, 2, 3], [1, 2, 3]), ([0, 1, 2, 50, 100], [0, 2, 50, 100]), (range(61), [0, 12, 24, 36, 48, 60])],
)
def test_evenly(steps, chosen):
    assert [step for step, _ in evenly([(step, None) for step in steps], 6)] == chosen


def test_calibration_plot(tmp_path):
    figure = calibration_plot({0.9: 0.8, 0.1: 0.2}, step=3)
    critic = next(x for x in figure.axes[0].get_lines() if x.get_label() == "critic")
    assert list(critic.get_xdata()) == [0.1, 0.9]
    assert "0.100" in figure.axes[0].get_title()
    assert png(figure, tmp_path / "calibration.png") > 5_000
