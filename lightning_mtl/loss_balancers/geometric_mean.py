"""The geometric mean of the task losses (GLS)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancer import LossBalancer, at_least_float32


def geometric_mean_weights(losses: Tensor) -> Tensor:
    r"""Derivative of the geometric mean of the losses.

    .. math:: \omega_t = \frac{\partial L}{\partial \ell_t} = \frac{L}{T \, \ell_t}, \qquad
              L = \Big( \prod_s \ell_s \Big)^{1/T}

    Computed from logarithms: the product of many losses would leave the range of floats.

    Args:
        losses: task losses, shape ``(T,)``, any float dtype and device.

    Returns:
        Weights of the shape, dtype and device of ``losses``, with
        :math:`\sum_t \omega_t \ell_t = L`. All NaN if a loss is not above zero: the mean does not
        exist then.

    Example:
        >>> geometric_mean_weights(torch.tensor([2.0, 0.5]))
        tensor([0.2500, 1.0000])
    """
    wide = at_least_float32(losses)
    logs = torch.where(wide > 0, wide.log(), torch.nan)
    return ((logs.mean() - logs).exp() / len(losses)).to(losses.dtype)


class GeometricMean(LossBalancer):
    r"""Minimise the geometric mean of the task losses.

    .. math:: L = \Big( \prod_t \ell_t \Big)^{1/T}, \qquad \omega_t = \frac{L}{T \, \ell_t}

    The direction is that of the summed logarithms, :class:`~lightning_mtl.LogLoss`, times
    :math:`L / T`: as long as that of a loss. Multiplying one loss by a constant multiplies every
    weighted gradient by the same number. Losses must be positive. Nothing to tune, no state. A
    step without a task takes the mean over the tasks that are there.

    Deviations: none from the paper. Codes that multiply the losses leave the range of floats with
    many tasks.

    References:
        Chennupati et al., *MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy
        for Multi-Task Learning*, CVPR Workshops 2019.
    """

    requires_positive_losses = True
    stateless = True

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`geometric_mean_weights`.

        Args:
            losses: positive task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        return geometric_mean_weights(losses)
