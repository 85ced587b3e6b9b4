"""A softmax of the inverse losses (UW-SO)."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import LossBalancer, at_least_float32


def soft_optimal_weights(losses: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Softmax of the inverse losses.

    .. math:: \omega_t = \frac{e^{1 / (\tau \ell_t)}}{\sum_s e^{1 / (\tau \ell_s)}}

    Args:
        losses: task losses, shape ``(T,)``, any float dtype and device.
        temperature: :math:`\tau`; the larger, the closer the weights are to equal ones.

    Returns:
        Weights of sum one, in the shape, dtype and device of ``losses``; all NaN if a loss is not
        above zero.

    Example:
        >>> soft_optimal_weights(torch.tensor([2.0, 0.5]))
        tensor([0.1824, 0.8176])
    """
    wide = at_least_float32(losses)
    inverse = torch.where(wide > 0, 1 / wide, torch.nan)
    largest = torch.finfo(wide.dtype).max
    exponents = (inverse / temperature).clamp(max=largest)  # infinities have no softmax
    return torch.softmax(exponents, 0).to(losses.dtype)


class SoftOptimalUncertainty(LossBalancer):
    r"""Weigh the task losses by a softmax of their inverses.

    .. math:: \omega = \operatorname{softmax}\Big( \frac{1}{\tau \, \ell} \Big)

    The inverse loss is the best weight of :class:`~lightning_mtl.UncertaintyWeighting`, found
    without learning; used as it is, it is :class:`~lightning_mtl.LogLoss` (UW-O). The softmax with
    temperature :math:`\tau` keeps small losses from getting nearly everything, if :math:`\tau` is
    large enough for the scale of the losses. The weights are not differentiated. Losses must be
    positive. No state.

    Deviations: none known from the paper's formula.

    Args:
        temperature: :math:`\tau`. No value suits all losses, because :math:`\tau \ell` has to be
            of the order of one: tune it, as the paper does. The default is only a start.
        scale: ``"mean"``, weights of sum one as in the paper, or ``"sum"``, of sum :math:`T`.

    Raises:
        ValueError: ``temperature`` is not above zero, or an unknown ``scale``.

    References:
        Kirchdorfer et al., *Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning*,
        GCPR 2024, arXiv 2408.07985.
    """

    requires_positive_losses = True
    stateless = True

    def __init__(self, temperature: float = 1.0, scale: Scale = "mean") -> None:
        super().__init__()
        self.temperature = in_range(self, "temperature", temperature, open_low=True)
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`soft_optimal_weights`.

        Args:
            losses: positive task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        return rescaled(soft_optimal_weights(losses, self.temperature), self.scale, "mean")
