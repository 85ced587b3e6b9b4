"""Figures 6 and 7 of the tensioner paper."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from examples.logic_gates.data import GATES
from examples.logic_gates.directions import AS_CODED, factors
from examples.logic_gates.engine import Cell, curves

PANELS = {
    "(a) uniform weighting": Cell("uniform", scale=10.0),
    "(b) min-norm": Cell("min-norm", scale=10.0),
    "(c) central direction": Cell("central", scale=10.0),
    "(d) min-norm + tension": Cell("min-norm", 0.3, scale=10.0),
    "(e) central direction + tension": Cell("central", 0.3, scale=10.0),
}
EPOCHS = 300  # by then the last three have usually learned both gates
ANGLES, NORMS = ("tab:pink", "deepskyblue"), ("tab:red", "tab:blue")  # as printed


def draw(folder: Path, epochs: int) -> None:
    """Write ``figure6.png`` and ``figure7.png``; what they show stands in README.md."""
    figure = Figure((5, 4), layout="constrained")
    _draw_factors(figure)
    figure.savefig(folder / "figure6.png", dpi=100)
    figure = Figure((9, 12), layout="constrained")
    _draw_curves(figure, epochs)
    figure.savefig(folder / "figure7.png", dpi=70)


def _draw_factors(figure: Figure) -> None:
    """Figure 6: equation 8, the tension factor by the change of the gradient's norm."""
    axes = figure.subplots()
    delta = torch.linspace(-1, 3, 201, dtype=torch.float64).unsqueeze(0)
    for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        # A loss of 1 leaves the ratio alone in equation 7.
        c = factors(torch.ones_like(delta), delta, torch.tensor([[alpha]]), AS_CODED)
        axes.plot(delta[0], c[0], label=f"α = {alpha:g}")
    axes.set(xlabel="δ (equation 7)", ylabel="tension factor c (equation 8)")
    axes.legend()


def _draw_curves(figure: Figure, epochs: int) -> None:
    """Figure 7: angles to the direction and norms in one run with c = 10, step by step."""
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, (title, cell) in zip(panels, PANELS.items(), strict=True):
        found, right = curves(cell, 0, epochs), axes.twinx()
        for task, (gate, angle, norm) in enumerate(zip(GATES, ANGLES, NORMS, strict=True)):
            axes.plot(
                [a[task] for a in found.angles], color=angle, lw=1, label=f"angle {gate.upper()}"
            )
            right.plot(
                [n[task] for n in found.norms],
                color=norm,
                alpha=0.7,
                lw=1,
                label=f"norm {gate.upper()}",
            )
        right.plot(
            found.direction, color="tab:orange", alpha=0.7, lw=1, label="norm of the direction"
        )
        right.set(yscale="log", ylabel="gradient norm")
        axes.axhline(90, color="black", linewidth=0.5)
        axes.set(title=title, ylabel="angle, degrees", ylim=(0, 180))
    axes.set_xlabel("step")
    figure.legend(*_labels(axes, right), loc="outside lower center", ncols=5)


def _labels(*axes):
    handles, labels = [], []
    for ax in axes:
        more_handles, more_labels = ax.get_legend_handles_labels()
        handles += more_handles
        labels += more_labels
    return handles, labels
