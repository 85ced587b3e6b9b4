"""The two pictures that torchmetrics' own plots lack: bars by task and a heat map of task pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def axes(ax: Any = None) -> tuple[Any, Any]:
    """Figure and axes to draw on; ``ax`` itself when it is given.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        import matplotlib.pyplot as plt  # an optional extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected matplotlib for `plot()` but it is not installed. "
            "Install it with `pip install matplotlib` or `pip install lightning-mtl[plot]`."
        ) from error
    return plt.subplots(layout="constrained") if ax is None else (ax.get_figure(), ax)


def bars(
    values: Mapping[str, Tensor | float], ax: Any, *, ylabel: str, signed: bool = False
) -> Any:
    """A bar per name with its value on it; ``signed`` colours gains and losses apart."""
    fig, ax = axes(ax)
    heights = [float(v) for v in values.values()]
    colors = [
        "tab:red" if signed and h < 0 else "tab:green" if signed else "tab:blue" for h in heights
    ]
    drawn = ax.bar(list(values), heights, color=colors)
    ax.bar_label(drawn, fmt="%+.2f" if signed else "%.3g", padding=2)
    ax.margins(y=0.15)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel(ylabel)
    return fig, ax


def heat_map(matrix: Tensor, names: Sequence[str], ax: Any, *, label: str) -> Any:
    """A square matrix with entries in [-1, 1]: blue below zero, red above, numbers in the cells."""
    fig, ax = axes(ax)
    cells = matrix.detach().cpu().to(torch.float64).tolist()
    image = ax.imshow(cells, vmin=-1, vmax=1, cmap="RdBu_r")
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(names)), names)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            text = "–" if math.isnan(cell) else f"{cell:.2f}"
            ax.text(
                j, i, text, ha="center", va="center", color="white" if abs(cell) > 0.6 else "black"
            )
    ax.figure.colorbar(image, ax=ax, label=label)
    return fig, ax
