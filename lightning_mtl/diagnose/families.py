r"""What each family of methods would do to recorded gradients, from their Gramian alone.

A direction :math:`d = J^\top w` has with task :math:`t` the cosine
:math:`(M w)_t / (\sqrt{w^\top M w} \sqrt{M_{tt}})`. It is two things at once: how far the step
points the task's way, and to first order the share of the decrease that the task would have in a
step of the same length taken for it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from lightning_mtl.gradient_balancers.cagrad import cagrad_weights
from lightning_mtl.gradient_balancers.central_direction import central_direction_weights
from lightning_mtl.gradient_balancers.min_norm import min_norm_weights
from lightning_mtl.gradient_balancers.nash_mtl import nash_mtl_weights
from lightning_mtl.gradient_balancers.upgrad import upgrad_weights

Array = npt.NDArray[np.float64]
Weights = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """Methods that do much the same to gradients, and one of them that stands for all.

    Attributes:
        name: in words.
        example: the class that is computed here.
        members: classes that are near to it.
        page: of the documentation.
        weights: ``(gramian, losses) -> weights``, float64.
    """

    name: str
    example: str
    members: tuple[str, ...]
    page: str
    weights: Weights


def loss_scale_weights(_: Tensor, losses: Tensor) -> Tensor:
    r"""Weights :math:`1 / \ell_t`, those of ``LogLoss``; NaN for a loss that is not above 0.

    Args:
        losses: shape ``(T,)``.
    """
    return torch.where(losses > 0, 1.0 / losses, torch.nan)


def unit_weights(gramian: Tensor, _: Tensor) -> Tensor:
    r"""Weights :math:`1 / \lVert g_t \rVert`, the sum of unit gradients; 0 for a zero gradient.

    Args:
        gramian: shape ``(T, T)``.
    """
    norms = gramian.diagonal().clamp_min(0).sqrt()
    return torch.where(norms > 0, 1.0 / norms, 0.0)


FAMILIES = (
    Family(
        "loss scales made alike",
        "LogLoss",
        ("GeometricMean", "UncertaintyWeighting", "IMTLL", "FAMO"),
        "methods/log_loss.html",
        loss_scale_weights,
    ),
    Family(
        "gradient lengths made alike",
        "DualBalance",
        ("GradNorm", "MetaBalance"),
        "methods/dual_balance.html",
        unit_weights,
    ),
    Family(
        "the same share for every task",
        "CentralDirection",
        ("IMTLG", "ConFIG", "TaskTensioner"),
        "methods/central_direction.html",
        lambda gramian, _: central_direction_weights(gramian),
    ),
    Family(
        "a bargain between tasks",
        "NashMTL",
        ("FairGrad",),
        "methods/nash_mtl.html",
        lambda gramian, _: nash_mtl_weights(gramian),
    ),
    Family(
        "conflicts projected out",
        "UPGrad",
        ("PCGrad", "DualProj", "GradVac"),
        "methods/upgrad.html",
        lambda gramian, _: upgrad_weights(gramian),
    ),
    Family(
        "near the mean, kind to the worst",
        "CAGrad",
        ("SDMGrad",),
        "methods/cagrad.html",
        lambda gramian, _: cagrad_weights(gramian),
    ),
    Family(
        "the shortest combination",
        "MinNorm",
        ("MoDo", "MoCo"),
        "methods/min_norm.html",
        lambda gramian, _: min_norm_weights(gramian),
    ),
)


def shares(gramian: Array, weights: Array) -> Array:
    r"""Cosine of the direction to every task gradient, shape ``(..., T)``.

    That is the share of its own first-order decrease, in a step of the same length, that a task
    keeps. 0 where the direction is zero, NaN for a task whose gradient is.

    Args:
        gramian: :math:`M`, shape ``(..., T, T)``.
        weights: :math:`w`, shape ``(..., T)``.
    """
    along = np.einsum("...ij,...j->...i", gramian, weights)
    square = np.einsum("...i,...i->...", weights, along)[..., None]
    own = np.diagonal(gramian, axis1=-2, axis2=-1)
    length = np.sqrt(np.maximum(square, 0.0) * np.where(own > 0, own, np.nan))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(length > 0, along / length, 0.0)
    return np.where(np.isfinite(length) & np.isfinite(along), np.clip(found, -1, 1), np.nan)


def decreases(gramian: Array, weights: Array, losses: Array, length: Array) -> Array:
    r"""Predicted first-order decrease of every loss, as a part of it, shape ``(..., T)``.

    .. math:: \frac{\lVert \Delta \rVert \, \lVert g_t \rVert \cos(d, g_t)}{\lvert \ell_t \rvert}

    for a step of length :math:`\lVert \Delta \rVert` along :math:`-d`, the same for every family:
    the length of a direction is a learning rate.

    Args:
        gramian: shape ``(..., T, T)``.
        weights: shape ``(..., T)``.
        losses: shape ``(..., T)``.
        length: of the step, shape ``(...)``.
    """
    norms = np.sqrt(np.maximum(np.diagonal(gramian, axis1=-2, axis2=-1), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = length[..., None] * norms * shares(gramian, weights) / np.abs(losses)
    return found


def family_weights(family: Family, gramians: Array, losses: Array) -> Array:
    """Weights that a family gives in every step, shape ``(S, T)``.

    Args:
        family: of :data:`FAMILIES`.
        gramians: shape ``(S, T, T)``, finite.
        losses: shape ``(S, T)``.
    """
    found = [
        family.weights(torch.from_numpy(m), torch.from_numpy(loss)).numpy()
        for m, loss in zip(gramians, losses, strict=True)
    ]
    return np.stack(found) if found else np.empty((0, gramians.shape[-1]))


def best_fixed_weights(gramians: Array) -> Array:
    r"""One weight a task, of mean 1, under which the worst-off task is best off on average.

    .. math:: w = \arg\max_w \frac1S \sum_s \min_t \cos\big( J_s^\top w, g_{s,t} \big)

    What a search for fixed weights could find, as far as first-order decrease tells. The search
    (Nelder and Mead's, over logarithms) starts at the inverse of the mean gradient norms and at
    equal weights, and gives the better end; weights stay within a factor of 1e6 of its start.

    Args:
        gramians: shape ``(S, T, T)``, finite.
    """
    size = gramians.shape[-1]
    norms = np.sqrt(np.diagonal(gramians, axis1=-2, axis2=-1)).mean(axis=0)
    even = np.zeros(size)
    inverse = -np.log(np.where(norms > 0, norms, norms.max() or 1.0))

    def worst(logs: Array) -> float:
        weights = np.exp(np.clip(logs - logs.mean(), -14, 14))
        found = shares(gramians, np.broadcast_to(weights, gramians.shape[:-1]))
        return -float(np.mean(np.nanmin(found, axis=1)))

    def from_inverse(logs: Array) -> float:
        return worst(logs + inverse)

    if not len(gramians) or size < 2 or not np.isfinite(worst(even)):
        return np.ones(size)
    options = {"maxiter": 200 * size, "xatol": 1e-3, "fatol": 1e-5}
    ends = [
        minimize(from_inverse, even, method="Nelder-Mead", options=options).x + inverse,
        even,
        inverse,
    ]
    best = min(ends, key=worst)
    weights = np.exp(np.clip(best - best.mean(), -14, 14))
    found: Array = weights / weights.mean()
    return found
