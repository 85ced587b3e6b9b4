"""The Nash bargaining solution between the tasks (Nash-MTL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, in_range, one_of, rescaled, whole
from lightning_mtl.balancer import GradientBalancer, Level, as_weights, at_least_float32
from lightning_mtl.numerics.newton import alpha_fair
from lightning_mtl.numerics.quadratic import gramian_array, resolution, to_numpy


def nash_mtl_weights(gramian: Tensor, preference: Sequence[float] | None = None) -> Tensor:
    r"""Weights of the Nash bargaining solution.

    .. math:: M w = p / w, \qquad w > 0

    Args:
        gramian: :math:`M = J J^\top`, shape ``(T, T)``, any float dtype and device.
        preference: bargaining powers :math:`p`, one number above zero a task, divided by their
            mean; ones if left out.

    Returns:
        Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``; the direction
        :math:`J^\top w` has norm :math:`\sqrt T`. Zero for tasks without gradient, which do not
        count in :math:`T`; weights with which the gradients cancel where a convex combination of
        them is zero, to the precision of ``gramian``; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> nash_mtl_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000])
    """
    matrix = gramian_array(gramian)
    powers = None if preference is None else np.asarray(preference, dtype=np.float64)
    return as_weights(alpha_fair(matrix, 1.0, powers, resolution(gramian.dtype)), gramian)


class NashMTL(GradientBalancer):
    r"""Let the tasks bargain for the direction: the largest product of their improvements.

    .. math:: d = \sum_t w_t \, g_t, \qquad M w = p / w, \qquad M = J J^\top, \qquad
              d \leftarrow d \, \min(1, c / \lVert d \rVert)

    To first order a step improves task :math:`t` by :math:`g_t \cdot d = p_t / w_t > 0` (before the
    clipping), and among directions of its length :math:`d` has the largest :math:`\sum_t p_t \log
    (g_t \cdot d)`. Its norm is always :math:`\sqrt T`, whatever the gradients, and it does not
    change when a loss is multiplied by a constant: the logarithm of the losses before it changes
    nothing. With ``max_norm`` at its default the direction of new weights has norm one, so the
    learning rate alone decides how far the shared parameters move.

    Each task's own parameters get :math:`w_t` times their gradient, before the clipping. As
    :math:`w_t` is about :math:`1 / \lVert g_t \rVert`, those of a task with long shared gradients
    move slowly.

    There is no solution where a convex combination of the gradients is zero (a Pareto-stationary
    point). The weights then make the direction zero: those of the shortest convex combination of
    the normalised gradients, with the factor that the solution has for identical gradients; they
    can be 0 for a task. A task with a zero gradient is left out: its weight is 0, also for its own
    parameters, and it does not count in :math:`T`. Newton's method, in a few steps.

    **Reuse.** With ``update_weights_every`` above 1, weights serve for that many optimiser steps
    and only the first of these needs the task gradients; the others take one backward pass. A step
    that is skipped does not count. The weights are computed anew for all tasks of a step as soon as
    those of one of them are missing or have served their time. Clipping is part of the weights
    that are kept: without the task gradients the norm is not known, and it may then differ from
    :math:`c`.

    Deviations: the authors' code approaches the solution by a sequence of convex programs, and
    where these fail (a zero gradient, identical or opposite gradients, one task) takes the weights
    of the step before, ones at first. It clips the shared gradient in every step, also where
    weights are reused. ``preference`` is the generalised bargaining of Shamsian et al.

    Args:
        update_weights_every: for how many optimiser steps weights serve, at least 1, the paper's
            default.
        max_norm: :math:`c`, above zero: the norm that the direction of the shared parameters is
            clipped to; the default of the authors' code. ``None`` for no clipping.
        weight_heads: weigh the gradients of each task's own parameters by :math:`w_t` too, as the
            paper does with the loss :math:`\sum_t w_t \ell_t`.
        preference: bargaining powers :math:`p` by task name, 1 for tasks not named; or one number
            a task, in the order of the module's tasks. Above zero; only their ratios matter.
        scale: ``"mean"`` is the equation, ``"sum"`` multiplies all weights, after the clipping, by
            the number of tasks.
        gradients: what the task gradients are taken by; see
            :class:`~lightning_mtl.GradientBalancer`. The clipping then counts their norm.

    Raises:
        ValueError: an argument is out of range.

    References:
        Navon et al., *Multi-Task Learning as a Bargaining Game*, ICML 2022. Shamsian et al.,
        *Auxiliary Learning as an Asymmetric Bargaining Game*, ICML 2023.
    """

    kept: Tensor | None

    def __init__(
        self,
        update_weights_every: int = 1,
        max_norm: float | None = 1.0,
        weight_heads: bool = True,
        preference: dict[str, float] | list[float] | None = None,
        scale: Scale = "mean",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.update_weights_every = whole(self, "update_weights_every", update_weights_every)
        self.max_norm = max_norm
        if max_norm is not None:
            self.max_norm = in_range(self, "max_norm", max_norm, open_low=True)
        self.weight_heads = weight_heads
        self.preference = preference
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self._powers = PerTask(self, "preference", preference)
        self._head_weights: Tensor | None = None
        # Weights before and after clipping, and in how many steps they served; 0: compute them.
        self.add_state("kept", 0.0, per_task=True)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Clipped weights: those of :func:`nash_mtl_weights`, or kept ones that still serve.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.

        Raises:
            ValueError: the restored weights belong to other tasks.
        """
        if self.update_weights_every == 1:
            self._head_weights, clipped = self._solved(gramian)
            return clipped
        kept = self.per_task_state("kept", at_least_float32(gramian), (3,))
        if not self._serves(kept):
            kept[:, 0], kept[:, 1] = self._solved(gramian)
            kept[:, 2] = 0
        self._head_weights = kept[:, 0].to(gramian)
        return kept[:, 1].to(gramian)

    def head_weights(self) -> Tensor:
        """Weights of the head gradients, before clipping: of this step, kept ones included.

        Returns:
            Shape ``(T,)``.

        Raises:
            RuntimeError: there are none yet.
        """
        if self.update_weights_every > 1 and self.kept is not None:
            return self.kept[:, 0].clone()
        if self._head_weights is None:
            raise RuntimeError("NashMTL has no weights yet: call `weights` or `direction` first.")
        return self._head_weights

    def reused_weights(self) -> Tensor | None:
        """Kept weights that serve for this step too, shape ``(T,)``; ``None`` otherwise."""
        kept = self.kept
        if self.update_weights_every == 1 or kept is None or not self._serves(kept):
            return None
        if self.tasks and len(self.tasks) != len(kept):
            return None  # restored from another run, which `weights` refuses
        return kept[:, 1].clone()

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        """Count the step that was taken with the weights of these tasks.

        Args:
            losses: not used.
            after: not used.
        """
        super().update(losses, after)
        if self.kept is not None:
            self.kept[:, 2] += 1

    def _serves(self, kept: Tensor) -> bool:
        served = kept[:, 2]
        fresh = (served > 0) & (served < self.update_weights_every)
        return bool((fresh & kept[:, 1].isfinite()).all())

    def _solved(self, gramian: Tensor) -> tuple[Tensor, Tensor]:
        powers = self._powers.of(self.tasks, len(gramian))
        weights = nash_mtl_weights(gramian, powers)
        clipped = weights
        if self.max_norm is not None:
            w, matrix = to_numpy(weights), to_numpy(gramian)
            norm = np.sqrt(np.maximum(w @ matrix @ w, 0.0))
            clipped = weights * float(self.max_norm / np.maximum(norm, self.max_norm))
        return rescaled(weights, self.scale, "mean"), rescaled(clipped, self.scale, "mean")
