"""Min-norm drawn to the average gradient, with independent batches if wanted (SDMGrad)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, in_range, one_of, rescaled, whole
from lightning_mtl.balancer import GradientBalancer, Level, as_weights, at_least_float32
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.quadratic import (
    gramian_array,
    min_norm_point,
    project_on_simplex,
    shares,
    to_numpy,
)
from lightning_mtl.numerics.storage import combined


def sdmgrad_weights(
    gramian: Tensor, lam: float = 0.3, preference: Sequence[float] | None = None
) -> Tensor:
    r"""Weights of the direction-oriented min-norm combination.

    .. math:: d = \frac{1}{1 + \lambda} \sum_t (w_t + \lambda b_t) \, g_t, \qquad
              w = \arg\min_{w \ge 0, \sum_t w_t = 1} \Big\lVert \sum_t w_t \, g_t
              + \lambda g_0 \Big\rVert^2, \qquad g_0 = \sum_t b_t \, g_t

    Exact, by an active set on the rows :math:`g_t + \lambda g_0`.

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.
        lam: :math:`\lambda`, at least 0.
        preference: :math:`b` up to a factor, ``T`` numbers above 0; ``None`` for :math:`1 / T`.

    Returns:
        Weights :math:`(w + \lambda b) / (1 + \lambda)` of shape ``(T,)`` and sum one, in the dtype
        and on the device of ``gramian``; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> sdmgrad_weights(torch.tensor([[1.0, 0.0], [0.0, 99.0]]))
        tensor([0.8846, 0.1154])
    """
    matrix = gramian_array(gramian)
    b = shares(preference, len(matrix))
    along = matrix @ b
    shifted = matrix + lam * (along + along[:, None]) + lam**2 * (b @ along)
    return as_weights((min_norm_point(shifted) + lam * b) / (1.0 + lam), gramian)


def sdmgrad_step(
    cross: Tensor,
    weights: Tensor,
    lam: float = 0.3,
    preference: Sequence[float] | None = None,
    step_size: float = 0.1,
    inner_steps: int = 1,
) -> Tensor:
    r"""Kept weights after steps of projected gradient descent on a sample of the min-norm problem.

    .. math:: w \leftarrow \Pi \Big( w - \frac{\eta}{L} \, S (w + \lambda b) \Big), \qquad
              S = \tfrac12 (A + A^\top), \qquad L = \lVert S \rVert_2

    with the projection :math:`\Pi` onto weights of at least zero with sum one.

    Args:
        cross: :math:`A = J_1 J_2^\top` of two independent batches, shape ``(T, T)``; its mean over
            batches is the Gramian of the mean gradients.
        weights: :math:`w` so far, shape ``(T,)``.
        lam: :math:`\lambda`, at least 0.
        preference: :math:`b` up to a factor; ``None`` for :math:`1 / T`.
        step_size: :math:`\eta`.
        inner_steps: number of steps.

    Returns:
        :math:`w`, shape ``(T,)``, in the dtype and on the device of ``cross``; NaN for input that
        is not finite.

    Example:
        >>> import torch
        >>> sdmgrad_step(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.5244, 0.4756])
    """
    matrix, w = gramian_array(cross), to_numpy(weights)
    if not (np.isfinite(matrix).all() and np.isfinite(w).all()):
        return as_weights(np.full(len(w), np.nan), cross)
    symmetric = 0.5 * (matrix + matrix.T)
    length = float(np.abs(np.linalg.eigvalsh(symmetric)).max())
    if length > 0:
        pull = lam * shares(preference, len(w))
        for _ in range(inner_steps):
            w = project_on_simplex(w - step_size / length * (symmetric @ (w + pull)))
    return as_weights(w, cross)


class SDMGrad(GradientBalancer):
    r"""Follow the min-norm combination of the task gradients, drawn to their average.

    .. math:: d = \frac{1}{1 + \lambda} \sum_t (w_t + \lambda b_t) \, g_t, \qquad
              w = \arg\min_{w \ge 0, \sum_t w_t = 1} \Big\lVert \sum_t w_t \, g_t
              + \lambda g_0 \Big\rVert^2, \qquad g_0 = \sum_t b_t \, g_t, \qquad b_t = 1 / T

    ``lam=0`` is min-norm and a large ``lam`` the average gradient. The final weights are those of
    min-norm under a lower bound of :math:`\lambda b_t / (1 + \lambda)`, so no task is left without
    weight, and a task without gradient does not stop the others. Each task's own parameters get
    their plain gradients.

    With ``batches=1`` the weights are exact for the step's gradients, which are noisy, so they are
    biased. With ``batches=3`` the step's first two micro-batches move weights that are kept from
    step to step, without bias, and the third gives the gradients that they are applied to:

    .. math:: w \leftarrow \Pi \Big( w - \frac{\eta}{L} \, S (w + \lambda b) \Big), \qquad
              S = \tfrac12 (J_1 J_2^\top + J_2 J_1^\top), \qquad L = \lVert S \rVert_2, \qquad
              d = \frac{1}{1 + \lambda} \, J_3^\top (w + \lambda b)

    Use it with ``accumulate_grad_batches=3``. A group with fewer micro-batches uses the mean of
    those that are there, and one with a single one uses it throughout.

    Deviations: with ``batches=1`` solved exactly. With ``batches=3`` the published code takes 20
    steps with momentum 0.5 and step size 10 (LibMTL: 5) where more than 2 does not converge, and
    its weights jump between single tasks; here a step is a share :math:`\eta` of the largest that
    converges, so the weights follow a running average of the samples. A weight that is kept is its
    difference from equal weights; tasks that are absent keep theirs.

    Args:
        lam: :math:`\lambda`, at least 0. The default is that of the authors' scripts.
        batches: 1, or 3 for independent batches.
        step_size: :math:`\eta`, in (0, 2), with ``batches=3``. Smaller follows more slowly with
            less noise. Our choice.
        inner_steps: number of steps on the same sample, with ``batches=3``. More follow its noise.
        preference: numbers above 0, by task name (1 for tasks not named) or in order, that
            :math:`b` is proportional to; ``None`` for :math:`b_t = 1 / T`. In the paper
            :math:`g_0` can be the gradient of any weighted loss.
        scale: ``"mean"`` for weights with sum one, as in the paper; ``"sum"`` for ``T`` times that.
        gradients: what the task gradients are taken by, see
            :class:`~lightning_mtl.GradientBalancer`; only with ``batches=1``.

    Raises:
        ValueError: an argument is out of range.

    References:
        Xiao, Ban & Ji, *Direction-oriented Multi-objective Learning: Simple and Provable
        Stochastic Algorithms*, NeurIPS 2023.
    """

    offsets: Tensor | None

    def __init__(
        self,
        lam: float = 0.3,
        batches: int = 1,
        step_size: float = 0.1,
        inner_steps: int = 1,
        preference: dict[str, float] | list[float] | None = None,
        scale: Scale = "mean",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.lam = in_range(self, "lam", lam)
        self.batches = one_of(self, "batches", batches, (1, 3))
        self.step_size = in_range(self, "step_size", step_size, 0.0, 2.0, open_low=True)
        self.inner_steps = whole(self, "inner_steps", inner_steps)
        self.preference = preference
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        if batches > 1 and gradients != "parameters":
            raise ValueError(
                f"Expected `gradients='parameters'` for SDMGrad with `batches=3`, found "
                f"{gradients!r}: its direction is none of one batch's Gramian. Leave it out, or "
                f"use `batches=1`."
            )
        self._per_task_preference = PerTask(self, "preference", preference)
        self.add_state("offsets", 0.0, per_task=True)

    @property
    def gramian_weighted(self) -> bool:
        """Whether one batch gives weights and gradients alike."""
        return self.batches == 1

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`sdmgrad_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.

        Raises:
            ValueError: ``batches`` is 3, so that the weights are no function of one Gramian.
        """
        if self.batches > 1:
            raise ValueError(
                f"Expected `batches=1` for weights of SDMGrad, found {self.batches}: its direction "
                f"combines independent batches. Call `direction` instead."
            )
        preference = self._per_task_preference.of(self.tasks, len(gramian))
        return rescaled(sdmgrad_weights(gramian, self.lam, preference), self.scale, "mean")

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """The direction; with ``batches=3`` after an update of the kept weights.

        Args:
            jacobian: shape ``(T, P)``, or with ``batches=3`` those of the micro-batches, stacked to
                ``(3, T, P)`` or fewer.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.
        """
        if self.batches == 1:
            return super().direction(jacobian, losses)
        wide = at_least_float32(jacobian)
        samples = wide if wide.ndim == 3 else wide[None]
        size = samples.shape[1]
        preference = self._per_task_preference.of(self.tasks, size)
        cross = self.sum_shards(inner.products(samples[0], samples[min(1, len(samples) - 1)]))
        offsets = self.per_task_state("offsets", cross.diagonal())
        kept = as_weights(project_on_simplex(1 / size + to_numpy(offsets)), cross)
        kept = sdmgrad_step(cross, kept, self.lam, preference, self.step_size, self.inner_steps)
        if kept.isfinite().all():
            offsets.copy_(kept - 1 / size)
        pull = as_weights(self.lam * shares(preference, size), cross)
        weights = rescaled((kept + pull) / (1 + self.lam), self.scale, "mean")
        last = samples[2] if len(samples) > 2 else samples.mean(0)
        return combined(last, weights).to(jacobian.dtype)
