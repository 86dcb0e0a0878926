"""Pictures render, and show the numbers they were given."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest

from dvpo_service.tracking.figures import FanData, calibration_plot, fan_chart

LEVELS = np.linspace(0, 1, 21)


def chart(text="48+1", outcome=1.0, title="12+36="):
    quantiles = np.tile(LEVELS, (len(text), 1)) + np.arange(len(text))[:, None]
    return FanData(title, list(text), LEVELS, quantiles, outcome)


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
    crossed.quantiles = crossed.quantiles[:, ::-1]
    median = next(x for x in fan_chart([crossed], 0).axes[0].get_lines() if x.get_label() == "median")
    np.testing.assert_allclose(median.get_ydata(), [0.5, 1.5, 2.5, 3.5])


def test_long_responses_thin_their_labels_and_panels_are_at_most_six(tmp_path):
    figure = fan_chart([chart("word and more " * 20)] * 8, step=1)
    assert len(figure.axes) == 6
    assert len(figure.axes[0].get_xticks()) <= 60
    assert png(figure, tmp_path / "long.png") > 10_000


def test_odd_tokens_render(tmp_path):
    odd = FanData("cost $5_x$ \n日", [" ", "\n", "$a_{", "日本", "<|im_end|>"], LEVELS, np.tile(LEVELS, (5, 1)), 0.0)
    assert png(fan_chart([odd, chart("1")], 0), tmp_path / "odd.png") > 5_000


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        fan_chart([chart("")], 0)


def test_calibration_plot(tmp_path):
    figure = calibration_plot({0.9: 0.8, 0.1: 0.2}, step=3)
    critic = next(x for x in figure.axes[0].get_lines() if x.get_label() == "critic")
    assert list(critic.get_xdata()) == [0.1, 0.9]
    assert "0.100" in figure.axes[0].get_title()
    assert png(figure, tmp_path / "calibration.png") > 5_000
