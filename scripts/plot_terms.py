"""Plot what each of the critic's eight loss terms does to a distribution: docs/algorithm-terms.png.

python scripts/plot_terms.py [OUT.png]

Fifty atoms first learn a known distribution of returns by Eq. 3, then continue with Eq. 3 plus one term. Targets are
single draws, as at a response's last token. A batch holds all quantiles of the distribution, so the plot has no noise.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dvpo_service.algo.critic_loss import critic_loss
from dvpo_service.algo.loss_spec import TERMS, CriticLossSpec
from dvpo_service.config.algorithm import FORM_WEIGHTS, FORMS, AlgorithmConfig

M, DRAWS = 50, 400
# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles repeat the distinction.
TRUE, PAPER, CALIBRATED, BEFORE = "#bdbdbd", "#d55e00", "#0072b2", "#1a1a1a"
CLIP = (-3.0, 3.0)
LOWER_TAIL_ONLY = ("shape", "curv")  # these two terms change no other part of the distribution here

TITLES = {
    "qr": "Eq. 3  quantile regression",
    "risk": "Eq. 4  risk-weighted",
    "cvar": "Eq. 5  CVaR of the lower tail",
    "gain": "Eq. 6  upper-tail gain",
    "shift": "Eq. 7  mean shift",
    "shape": "Eq. 8  tail shape",
    "curv": "Eq. 9  tail curvature",
    "consist": "Eq. 10  head consistency",
}


@dataclass(frozen=True)
class Setting:
    """A loss and the Huber threshold that belongs to it."""

    spec: CriticLossSpec
    delta: float


def return_quantiles() -> Tensor:
    """Return [DRAWS] quantiles of 0.7 N(0.7, 0.4) + 0.3 N(-0.9, 0.5): mostly good returns, skewed to the left."""
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    cdf = 0.7 * torch.special.ndtr((grid - 0.7) / 0.4) + 0.3 * torch.special.ndtr((grid + 0.9) / 0.5)
    return grid[torch.searchsorted(cdf, midpoints(DRAWS))]


def midpoints(m: int) -> Tensor:
    """Return the [m] midpoints of m equal parts of [0, 1]."""
    return (torch.arange(m, dtype=torch.float64) + 0.5) / m


def setting(form: str, term: str, distribution: Tensor) -> Setting:
    """Return the setting of the form's Eq. 3 alone (``term`` "qr"), or of the calibrated Eq. 3 plus the form's term."""
    keys = FORMS[form] if term == "qr" else {k: FORMS[form][k] for k in ("tail_target", "shift_over", "curvature")}
    if term == "consist":
        keys["qr_over"] = "ensemble"  # with Eq. 3 on each head, the heads would agree anyway
    config = AlgorithmConfig.model_validate({"form": "calibrated"} | keys)
    weights = dict.fromkeys(TERMS, 0.0) | {"qr": 1.0, term: FORM_WEIGHTS[form][term]}
    sd = float(distribution.std(correction=0)) if config.huber_scale == "return_sd" else 1.0
    return Setting(replace(config.critic_loss_spec(), weights=weights), config.huber_delta * sd)


def train(start: Tensor, distribution: Tensor, how: Setting, steps: int = 500, lr: float = 0.05) -> Tensor:
    """Train atoms [H, M] from ``start`` until they rest, and return them sorted.

    Uses Adam with a falling learning rate. The result is the mean over the last quarter of the steps.
    """
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    targets = distribution[None, :, None]
    mask = torch.ones(1, DRAWS, dtype=torch.bool)
    last = []
    for step in range(steps):
        tokens = z.expand(1, DRAWS, *z.shape)
        loss = critic_loss(tokens, targets, mask, how.spec, delta=how.delta, denominator=DRAWS)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
        if 4 * step >= 3 * steps:
            last.append(z.detach().sort(-1).values)
    return torch.stack(last).mean(0)


def panel(axes: Axes, term: str, distribution: Tensor, fitted: Tensor) -> None:
    """Draw the true quantiles, the atoms ``fitted`` by Eq. 3 alone, and those trained with the term in both forms."""
    axes.plot(
        midpoints(DRAWS), distribution, color=TRUE, lw=7, solid_capstyle="butt", label="the distribution of the return"
    )
    start = fitted
    if term == "consist":
        start = fitted + torch.tensor([[-0.5], [0.0], [0.5]], dtype=torch.float64)
    if term != "qr":
        for head in start:
            axes.plot(midpoints(M), head, color=BEFORE, lw=1, ls=(0, (1, 1.5)), label="Eq. 3 alone, calibrated")
    styles = (("calibrated", CALIBRATED, "-", 0.04), ("paper", PAPER, (0, (4, 2.5)), 0.14))  # the dashed line on top
    for form, color, style, height in styles:
        atoms = train(start, distribution, setting(form, term, distribution))
        for head in atoms:
            axes.plot(midpoints(M), head, color=color, ls=style, lw=2, label=f"{form} form at its default weight")
        axes.text(
            0.97, height, words(form, term, atoms, distribution), transform=axes.transAxes, color=color, ha="right"
        )
    axes.set_title(TITLES[term], loc="left", fontsize=11, fontweight="bold")
    axes.set(ylim=CLIP, yticks=[-2, 0, 2])
    if term in LOWER_TAIL_ONLY:
        axes.set(xlim=(0, 0.3), xticks=[0, 0.1, 0.2, 0.3])
    else:
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def words(form: str, term: str, atoms: Tensor, distribution: Tensor) -> str:
    """Return the term's weight and its effect on spread and mean; for Eq. 10, how far apart the heads are."""
    weight = f"weight {FORM_WEIGHTS[form][term]:g}"
    if term == "consist":
        return f"{weight}: heads {abs(float((atoms[-1] - atoms[0]).mean())):.2f} apart"
    q = atoms.mean(0)
    true = distribution.quantile(midpoints(M))
    spread = float(q.std(correction=0) / true.std(correction=0))
    shift = float(q.mean() - true.mean())
    moved = f"{shift:+.2f}" if abs(shift) >= 0.005 else "0.00"
    rising = " ↑" if (form, term) == ("paper", "shift") else ""  # with more steps it rises to a mean of 1.56
    return f"{weight}: sd × {spread:.2f}, mean {moved}{rising}"


def draw(distribution: Tensor) -> Figure:
    """Draw a panel for each term, with ``distribution`` as the true quantiles."""
    start = torch.linspace(-1, 1, M, dtype=torch.float64)[None]
    fitted = train(start, distribution, setting("calibrated", "qr", distribution))
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    grid = figure.subplots(2, 4, sharey=True)
    for axes, term in zip(grid.ravel(), TERMS, strict=True):
        panel(axes, term, distribution, fitted)
    for axes in grid[:, 0]:
        axes.set_ylabel("return")
    for axes in grid[1]:
        axes.set_xlabel("level")
    entries = dict(zip(*reversed(grid[0, 1].get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    return figure


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "algorithm-terms.png"
    draw(return_quantiles()).savefig(out, dpi=100)


if __name__ == "__main__":
    main()
