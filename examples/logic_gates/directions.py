"""The directions that the paper compares, for many runs of two tasks at once.

The library weighs one Gramian a call, which for the 15 million steps of these tables would take
hours. Here are the same equations over a leading dimension of runs, in the space of gradients, and
with the readings of the paper that the library does not offer. `tests/examples` compares them with
the library's functions, and three whole trainings with the Trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from examples.logic_gates.model import clamped

Base = Literal["uniform", "min-norm", "central"]
SPLIT = (4, 2)  # numbers of the shared weight and of the shared bias


@dataclass(frozen=True)
class Reading:
    """How the tension of the paper is read. The default is what the authors' code does.

    Args:
        divisor: the logarithm of equation 7 is of a task's mean squared error divided by this.
        correction: how :math:`g_m \\cdot v_n \\ge 0` is met, task by task: ``"published"`` moves
            along the segment to :math:`g_m`, ``"orthogonal"`` takes the part against :math:`g_m`
            away, ``"none"`` does nothing.
        apart: the two windows of equation 7 do not overlap.
        by_tensor: the unit vectors of equation 5 are of weight and bias separately.
    """

    divisor: float = 1.0
    correction: Literal["published", "orthogonal", "none"] = "published"
    apart: bool = False
    by_tensor: bool = False


AS_CODED = Reading()


def base_weights(gramian: Tensor, base: Base) -> Tensor:
    """Weights of the base direction, shape ``(R, T)``, from Gramians of shape ``(R, T, T)``."""
    square = gramian.diagonal(dim1=1, dim2=2)
    if base == "uniform" or square.shape[1] == 1:
        return torch.full_like(square, 1 / square.shape[1])
    if base == "central":  # equations 3 and 4: with two tasks both k are 1/2
        return square.rsqrt() / square.rsqrt().sum(1, keepdim=True)
    difference = square.flip(1) - gramian[:, :1, 1]
    return clamped((difference / difference.sum(1, keepdim=True)).clamp(0, 1))


def factors(losses: Tensor, ratios: Tensor, alpha: Tensor, reading: Reading) -> Tensor:
    """Tension factors :math:`c_m` of equations 7 and 8, shape ``(R, T)``.

    Args:
        losses: mean squared errors, shape ``(R, T)``.
        ratios: mean gradient norm over that of the window before, shape ``(R, T)``.
        alpha: shape ``(R, 1)``.
        reading: divisor of the losses.
    """
    delta = ratios + torch.log10(losses / reading.divisor)
    return alpha * torch.sigmoid(math.e * (delta - 1)) + 1 - alpha


def tensioned(rows: Tensor, base: Tensor, tension: Tensor, reading: Reading) -> Tensor:
    """The direction of equations 5 and 9, shape ``(R, P)``.

    Args:
        rows: task gradients, shape ``(R, T, P)``, float64.
        base: base direction, shape ``(R, P)``.
        tension: :math:`c`, shape ``(R, T)``.
        reading: unit vectors and correction.
    """
    parts = (rows - base.unsqueeze(1)).split(SPLIT if reading.by_tensor else rows.shape[2], dim=2)
    units = torch.cat([torch.nn.functional.normalize(part, dim=2) for part in parts], dim=2)
    direction = base + (tension.unsqueeze(2) * units).sum(1)
    if reading.correction == "none":
        return direction
    for row in rows.unbind(1):
        square = row.square().sum(1, keepdim=True)
        against = (row * direction).sum(1, keepdim=True).clamp(max=0)
        direction = direction - against / square * row
        if reading.correction == "published":
            direction = direction * (square / (square - against))
    return direction
