"""Pull a common direction towards the tasks whose gradients grow or whose losses are high."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, as_weights
from lightning_mtl.numerics.quadratic import (
    Array,
    dual_cone_weights,
    gramian_array,
    resolution,
    to_numpy,
)

Feasibility = Literal["published", "exact", "none"]
History = Literal["mean", "ema"]


def tension_weights(
    gramian: Tensor,
    base_weights: Tensor,
    losses: Tensor,
    ratios: Tensor,
    alpha: float = 0.3,
    feasibility: Feasibility = "published",
) -> Tensor:
    r"""Weights of the tensioned direction (equations 5 and 7 to 9 of the paper).

    .. math:: v_n = v + \sum_m c_m \frac{g_m - v}{\lVert g_m - v \rVert}, \qquad
              c_m = \frac{\alpha}{1 + e^{e - e \delta_m}} + 1 - \alpha, \qquad
              \delta_m = r_m + \log_{10} \ell_m

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.
        base_weights: weights of the base direction :math:`v`, shape ``(T,)``.
        losses: positive task losses, shape ``(T,)``.
        ratios: :math:`r`, the mean gradient norm of the window over that of the window one step
            before, shape ``(T,)``.
        alpha: how far :math:`c` follows :math:`\delta`, in [0, 1].
        feasibility: how the condition :math:`g_m \cdot v_n \ge 0` is met, see
            :class:`TaskTensioner`.

    Returns:
        Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``. The term of a task
        with :math:`g_m = v` up to rounding, which is undefined, is zero. NaN for input that is not
        finite or a loss at or below zero.

    Raises:
        ValueError: ``gramian`` is not square.
    """
    matrix, base = gramian_array(gramian), to_numpy(base_weights)
    values, growth = to_numpy(losses), to_numpy(ratios)
    bad = np.isnan(growth).any() or not (values > 0).all()
    if bad or not (np.isfinite(matrix).all() and np.isfinite(base).all()):
        return as_weights(np.full(len(matrix), np.nan), gramian)

    delta = growth + np.log10(values)
    tension = alpha * 0.5 * (1.0 + np.tanh(0.5 * np.e * (delta - 1.0))) + 1.0 - alpha  # eq. 8

    offsets = np.eye(len(matrix)) - base  # row m holds the weights of g_m - v
    squares = np.einsum("mi,ij,mj->m", offsets, matrix, offsets)
    norms = np.sqrt(np.maximum(matrix.diagonal(), 0.0))
    rounding = len(matrix) * resolution(gramian.dtype) * (np.abs(offsets) @ norms) ** 2
    defined = squares > rounding
    lengths = np.sqrt(np.where(defined, squares, 1.0))
    weights = base + np.where(defined, tension / lengths, 0.0) @ offsets  # eqs. 5 and 9
    if feasibility == "published":
        weights = _correct_in_order(matrix, weights)
    elif feasibility == "exact":
        weights = dual_cone_weights(matrix, weights)
    return as_weights(weights, gramian)


class TaskTensioner(GradientBalancer):
    r"""Pull the direction of another balancer towards tasks that diverge or lag behind.

    .. math:: v_n = v + \sum_m c_m \frac{g_m - v}{\lVert g_m - v \rVert}, \qquad
              c_m = \frac{\alpha}{1 + e^{e - e \delta_m}} + 1 - \alpha, \qquad
              \delta_m = \frac{\zeta_m(k)}{\zeta_m(k - 1)} + \log_{10} \ell_m

    where :math:`v` is the base direction and :math:`\zeta_m(k)` the history of the last ``window``
    gradient norms of task :math:`m` (their mean). Tension acts from call ``window + 1`` on, once
    all tasks of the step have been seen that often; before that the direction is :math:`v`. Each
    task's own parameters get their plain gradients.

    Worth knowing:

    * The tension has unit length for every task, so the direction is not scale-equivariant: with
      small gradients tension outweighs :math:`v`, with large ones it vanishes. It also depends on
      the unit of every loss.
    * For two tasks whose losses are well below 1 both :math:`c_m` reach :math:`1 - \alpha`, the two
      terms cancel, and the tension is off.
    * ``alpha=0`` is equation 8 taken literally: every :math:`c_m` is 1. That is the base direction
      for two tasks but not for three or more, whatever the paper says. To switch tension off, use
      the base alone.

    Args:
        base: a Gramian-weighted balancer with plain head gradients; ``None`` is
            ``CentralDirection()``. The paper also shows ``MinNorm()``. Its ``gradients`` say what
            the task gradients are taken by.
        window: number of steps in the history, at least 1 (the paper's :math:`T`, 10).
        alpha: how far :math:`c` follows :math:`\delta`, in [0, 1] (the paper's 0.3).
        history: ``"mean"`` (the paper's), ``"ema"`` (weights :math:`(1 - 2/(K+1))^{age}` in the
            window of :math:`K` steps), or a function of the window, norms of shape ``(T, K)`` with
            the newest last, that returns ``(T,)``.
        feasibility: the paper asks for :math:`g_m \cdot v_n \ge 0` without saying how.
            ``"published"`` is what the authors' code does: tasks in order, each moved along the
            segment to :math:`g_m` until it no longer conflicts, without looking back, so with three
            or more tasks conflicts can remain and the order of tasks matters. ``"exact"`` is the
            nearest direction without conflict. ``"none"`` leaves :math:`v_n` as it is.

    Raises:
        ValueError: ``base`` is not Gramian-weighted or weighs heads, or an argument is out of
            range.

    References:
        Nakamura, Grassi & Wolf, *Leveraging convergence behavior to balance conflicting tasks in
        multi-task learning*, Neurocomputing 511, 2022.
    """

    requires_positive_losses = True
    norms: Tensor | None
    count: Tensor | None

    def __init__(
        self,
        base: GradientBalancer | None = None,
        window: int = 10,
        alpha: float = 0.3,
        history: History | Callable[[Tensor], Tensor] = "mean",
        feasibility: Feasibility = "published",
    ) -> None:
        super().__init__()
        if base is None:
            from lightning_mtl.gradient_balancers.central_direction import (
                CentralDirection,
            )

            base = CentralDirection()
        if not getattr(base, "gramian_weighted", False):
            raise ValueError(
                f"Expected `base` of TaskTensioner to be a gradient balancer with weights from the "
                f"Gramian, found {type(base).__name__}. Use CentralDirection() or MinNorm()."
            )
        if base.weight_heads:
            raise ValueError(
                f"Expected `base` of TaskTensioner to leave head gradients plain, found "
                f"{type(base).__name__} with `weight_heads=True`. Set it to False."
            )
        if type(window) is not int or window < 1:
            raise ValueError(
                f"Expected `window` of TaskTensioner to be an integer of at least 1, "
                f"found {window!r}."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"Expected `alpha` of TaskTensioner to be in [0, 1], found {alpha!r}.")
        if not callable(history) and history not in get_args(History):
            raise ValueError(
                f"Expected `history` of TaskTensioner to be one of {get_args(History)} or a "
                f"function, found {history!r}."
            )
        if feasibility not in get_args(Feasibility):
            raise ValueError(
                f"Expected `feasibility` of TaskTensioner to be one of {get_args(Feasibility)}, "
                f"found {feasibility!r}."
            )
        self.base = base
        self.gradients = base.gradients
        self.window = window
        self.alpha = alpha
        self.history = history
        self.feasibility = feasibility
        self.add_state("norms", 0.0, per_task=True)
        self.add_state("count", 0.0, per_task=True)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Record the gradient norms of this step and weigh the tasks.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: positive task losses, shape ``(T,)``.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``. They sum to one
            where those of ``base`` do, except with ``feasibility="exact"``.

        Raises:
            ValueError: ``gramian`` is not square, or ``history`` returns another shape.
        """
        base_weights = self.base.weights(gramian, losses)
        dtype = torch.promote_types(gramian.dtype, torch.float32)
        latest = gramian.diagonal().to(dtype).clamp(min=0).sqrt()
        self._resize()
        norms = self.per_task_state("norms", latest, (self.window + 1,))
        count = self.per_task_state("count", latest)
        norms.copy_(norms.roll(-1, dims=1))
        norms[:, -1] = latest
        count.add_(1).clamp_(max=self.window + 1)
        if bool(count.min() <= self.window):
            return base_weights
        now, before = self._summary(norms[:, 1:]), self._summary(norms[:, :-1])
        ratios = torch.where(now == before, 1.0, now / before)  # 0/0: nothing has changed
        return tension_weights(gramian, base_weights, losses, ratios, self.alpha, self.feasibility)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history; with another ``window`` the newest norms are kept."""
        super().load_state_dict(state_dict)
        self._resize()

    def _resize(self) -> None:
        """Keep the newest norms after a change of ``window``."""
        size = self.window + 1
        if self.norms is None or self.count is None or self.norms.shape[1] == size:
            return
        kept = min(size, self.norms.shape[1])
        norms = self.norms.new_zeros(len(self.norms), size)
        norms[:, -kept:] = self.norms[:, -kept:]
        self.norms = norms
        self.count.clamp_(max=kept)

    def _summary(self, window: Tensor) -> Tensor:
        if callable(self.history):
            summary = self.history(window)
            if summary.shape != window.shape[:1]:
                raise ValueError(
                    f"Expected `history` of TaskTensioner to return shape "
                    f"{tuple(window.shape[:1])}, one value a task, found {tuple(summary.shape)}. "
                    f"Reduce the last dimension of its argument."
                )
            return summary
        if self.history == "mean":
            return window.mean(1)
        size = window.shape[1]
        age = torch.arange(size - 1, -1, -1, device=window.device, dtype=window.dtype)
        share = (1 - 2 / (size + 1)) ** age
        return window @ (share / share.sum())


def _correct_in_order(gramian: Array, weights: Array) -> Array:
    """The published correction: where v_n meets a task's hyperplane on the segment to its g_m."""
    for m, row in enumerate(gramian):
        product, square = row @ weights, row[m]
        if product < 0 < square:
            weights[m] -= product / square
            weights = weights * (square / (square - product))
    return weights
