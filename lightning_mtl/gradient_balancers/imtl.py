"""Losses of one scale and equal projections on the task gradients (IMTL)."""

from __future__ import annotations

from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import (
    GradientBalancer,
    Level,
    LossBalancer,
    as_weights,
    at_least_float32,
)
from lightning_mtl.numerics.adam import adam_step
from lightning_mtl.numerics.bisector import equal_projections
from lightning_mtl.numerics.quadratic import gramian_array, resolution, to_numpy

_FARTHEST = 70.0  # the logarithm of about 1e30: weights stay float32 numbers
_STEEPEST = 1e15  # its square is a float32 number


def imtl_weights(gramian: Tensor, log_scales: Tensor) -> Tensor:
    r"""Weights of the plain task gradients in the direction of IMTL.

    .. math:: w_t = e^{s_t} a_t, \qquad \frac{g_t \cdot \sum_s a_s e^{s_s} g_s}
              {\lVert g_t \rVert} = c \;\; \text{for all } t, \qquad \sum_t a_t = 1

    Args:
        gramian: :math:`J J^\top` of the plain gradients, shape ``(T, T)``, any float dtype and
            device.
        log_scales: :math:`s`, shape ``(T,)``, any float dtype.

    Returns:
        Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> imtl_weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.zeros(2))
        tensor([0.7500, 0.2500])
    """
    matrix, scales = gramian_array(gramian), np.exp(to_numpy(log_scales))
    scaled = matrix * scales * scales[:, None]
    shares = equal_projections(scaled, resolution(gramian.dtype))
    return as_weights(shares * scales, gramian)


class IMTL(LossBalancer, GradientBalancer):
    r"""Bring the losses to one scale, and follow the direction of equal projections.

    .. math:: L = \sum_t \big( e^{s_t} \ell_t - s_t \big), \qquad \omega_t = e^{s_t}, \qquad
              d = \sum_t a_t \, \omega_t \, g_t, \qquad
              \frac{g_t \cdot d}{\lVert g_t \rVert} = c \;\; \text{for all } t, \qquad
              \sum_t a_t = 1

    IMTL-L learns a factor :math:`e^{s_t}` for every loss, one step of Adam on :math:`L` after each
    optimiser step, with the gradient :math:`e^{s_t} \ell_t - 1`; it is best at
    :math:`s_t = -\log \ell_t`, where every loss counts as one. IMTL-G combines the gradients of
    the factored losses. It owns both stages, so no other balancer can stand beside it. The factors
    change the length of the direction and the gradients of each task's own parameters, which are
    multiplied by :math:`e^{s_t}`, but not where the direction points. Losses must be positive. A
    step without a task leaves its :math:`s_t` as it is.

    Deviations: :math:`s` is trained with the model in the paper and by the model's optimizer in
    LibMTL, weight decay included; here it has an Adam of its own without weight decay.
    :math:`s_t` is kept within 70 of zero (losses of 1e-30 to 1e30) and its gradient within 1e15.
    The direction has the guards of :class:`~lightning_mtl.IMTLG`: the central direction where
    equal projections are not positive, out of reach or need a direction longer than the longest
    gradient; a task with a zero gradient is left out.

    Args:
        lr: learning rate of :math:`s`. The paper names none of its own; the default is that of
            :class:`~lightning_mtl.IMTLL`.
        scale: ``"mean"`` for weights :math:`a` of sum one, as in the paper; ``"sum"`` multiplies
            them by the number of tasks.
        gradients: what the task gradients are taken by; see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: ``lr`` is not above zero, or an unknown ``scale`` or ``gradients``.

    References:
        Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021.
    """

    needs_current_losses = False
    requires_positive_losses = True
    log_scales: Tensor | None
    moments: Tensor | None

    def __init__(
        self, lr: float = 0.025, scale: Scale = "mean", gradients: Level = "parameters"
    ) -> None:
        super().__init__(gradients=gradients)
        self.lr = in_range(self, "lr", lr, open_low=True)
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.add_state("log_scales", 0.0, per_task=True)
        self.add_state("moments", 0.0, per_task=True)

    def loss_weights(self, losses: Tensor) -> Tensor:
        r"""The factors :math:`e^{s_t}` of the losses.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype; only their number matters.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        s = self.per_task_state("log_scales", at_least_float32(losses))
        return s.exp().to(losses.dtype)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        r"""Weights :math:`a` of the gradients of the factored losses.

        Args:
            gramian: shape ``(T, T)``, of rows that carry the loss weights already.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        shares = imtl_weights(gramian, gramian.new_zeros(len(gramian)))
        return rescaled(shares, self.scale, "mean")

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        """One step of Adam on the factors of these tasks.

        Args:
            losses: positive task losses of the step, shape ``(T,)``.
            after: not used.
        """
        super().update(losses, after)
        wide = at_least_float32(losses)
        s = self.per_task_state("log_scales", wide)
        moments = self.per_task_state("moments", wide, (3,))
        gradient = wide * s.exp() - 1
        adam_step(s, gradient.clamp(-_STEEPEST, _STEEPEST), moments, self.lr)
        s.clamp_(-_FARTHEST, _FARTHEST)
