"""How much of a cosine between task gradients is the tasks, and how much the draw of a batch.

Functions of arrays, float64. A gradient on a batch is the true one and noise; two independent
batches have independent noise. So the same task's gradients on two halves of a batch say how near
to 1 a cosine can come at all: the *noise floor*. Cosines of two tasks are to be read beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]


def cosines(gramians: Array) -> Array:
    r"""Cosines :math:`M_{ij} / \sqrt{M_{ii} M_{jj}}`, NaN where a row is zero or not finite.

    Args:
        gramians: inner products of rows, shape ``(..., R, R)``.
    """
    squares = np.diagonal(gramians, axis1=-2, axis2=-1)
    norms = np.sqrt(np.where((squares > 0) & np.isfinite(squares), squares, np.nan))
    found: Array = np.clip(gramians / norms[..., :, None] / norms[..., None, :], -1, 1)
    return found


def half_cosines(pairs: Array) -> Array:
    r"""Cosines between tasks on *different* halves of a batch, shape ``(..., T, T)``.

    .. math:: a_{ij} = \tfrac12 \big( \cos(g_i^{(1)}, g_j^{(2)}) + \cos(g_i^{(2)}, g_j^{(1)}) \big)

    Its diagonal is the noise floor of each task.

    Args:
        pairs: inner products of the task gradients on the first half and those on the second,
            stacked, shape ``(..., 2T, 2T)``.
    """
    size = pairs.shape[-1] // 2
    across = cosines(pairs)[..., :size, size:]
    found: Array = 0.5 * (across + np.swapaxes(across, -1, -2))
    return found


def corrected_cosines(halves: Array) -> Array:
    r"""Cosines of the true gradients: the mean ones, corrected for the noise of both tasks.

    .. math:: \rho_{ij} = \bar a_{ij} \big/ \sqrt{\bar a_{ii} \, \bar a_{jj}}

    as Spearman corrects a correlation for the reliability of both measures. NaN where a floor is
    not above 0: that gradient is noise. Clipped to [-1, 1], which chance may leave.

    Args:
        halves: :math:`a` of every measured step, shape ``(S, T, T)``; NaN where there is none.

    References:
        Spearman, *The proof and measurement of association between two things*, American Journal of
        Psychology 15, 1904.
    """
    mean = mean_of(halves)
    floor = np.diagonal(mean)
    root = np.sqrt(np.where(floor > 0, floor, np.nan))
    found: Array = np.clip(mean / np.outer(root, root), -1, 1)
    return found


def mean_of(values: Array) -> Array:
    """Mean over the first axis of what is a number; NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    found: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return found


def noise_scale(pairs: Array, size: float) -> Array:
    r"""Simple gradient noise scale of each task, shape ``(T,)``, in the unit of ``size``.

    .. math:: B = \frac{\operatorname{tr} \Sigma}{\lVert G \rVert^2}, \qquad
              \lVert G \rVert^2 \approx \overline{g^{(1)} \cdot g^{(2)}}, \qquad
              \operatorname{tr} \Sigma \approx \tfrac{b}{2} \, \overline{
              \lVert g^{(1)} - g^{(2)} \rVert^2}

    A batch of :math:`B` samples has as much noise as signal; far larger ones are wasted, far
    smaller ones train as if blind. These are the unbiased estimates of McCandlish et al. (appendix
    A.1) for batches of :math:`b` and :math:`2b`, the larger being both halves. Means are taken
    over steps before the ratio; infinite where no signal was seen.

    Args:
        pairs: inner products on both halves, shape ``(S, 2T, 2T)``, as in :func:`half_cosines`.
        size: :math:`b`, samples in one half.

    References:
        McCandlish et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162.
    """
    tasks = pairs.shape[-1] // 2
    squares = np.diagonal(pairs, axis1=-2, axis2=-1)
    signal = mean_of(np.diagonal(pairs[..., :tasks, tasks:], axis1=-2, axis2=-1))
    noise = size * (mean_of(0.5 * (squares[..., :tasks] + squares[..., tasks:])) - signal)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(signal > 0, np.maximum(noise, 0.0) / signal, np.inf)
    return np.where(np.isfinite(signal), found, np.nan)


def share_below_zero(values: Array) -> tuple[float, float, float]:
    """Share of negative numbers among those there are, with Wilson's 95 % interval.

    Args:
        values: shape ``(S,)``; NaN are left out. All NaN when nothing is left.
    """
    there = values[np.isfinite(values)]
    if not len(there):
        return np.nan, np.nan, np.nan
    found = stats.binomtest(int((there < 0).sum()), len(there))
    interval = found.proportion_ci(0.95, method="wilson")
    return float(found.statistic), float(interval.low), float(interval.high)


def mean_interval(values: Array) -> tuple[float, float, float]:
    """Mean with Student's 95 % interval, as if steps were independent; NaN are left out.

    Args:
        values: shape ``(S,)``.
    """
    there = values[np.isfinite(values)]
    if len(there) < 2:
        return (float(there[0]) if len(there) else np.nan), np.nan, np.nan
    mean, error = float(there.mean()), float(stats.sem(there))
    if error == 0:
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(there) - 1, mean, error)
    return mean, float(low), float(high)


def verdict_of(values: Array, trusted: bool) -> str:
    """``"conflict"``, ``"agree"`` or ``"unsure"`` of a pair's cosines on different halves.

    Args:
        values: of every measured step, shape ``(S,)``.
        trusted: whether both tasks' floors are above 0.
    """
    _, low, high = mean_interval(values)
    if not trusted or not (np.isfinite(low) and np.isfinite(high)):
        return "unsure"
    return "conflict" if high < 0 else "agree" if low > 0 else "unsure"


def as_list(values: Any) -> Any:
    """Nested lists of numbers with ``None`` for what is not finite, for JSON."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0:
        return float(array) if np.isfinite(array) else None
    return [as_list(value) for value in array]
