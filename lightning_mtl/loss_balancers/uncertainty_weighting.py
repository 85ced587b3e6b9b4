"""Loss weights learned as task uncertainties (UW)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.loss_balancers._learned import Learned


def uncertainty_weights(log_variances: Tensor) -> Tensor:
    r"""Weights of losses whose noise has the variance :math:`\sigma_t^2 = e^{s_t}`.

    .. math:: \omega_t = \tfrac12 e^{-s_t}

    Args:
        log_variances: :math:`s`, shape ``(T,)``, any float dtype and device.

    Returns:
        Weights of the shape, dtype and device of ``log_variances``.

    Example:
        >>> uncertainty_weights(torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.1839])
    """
    return 0.5 * torch.exp(-log_variances)


class UncertaintyWeighting(Learned):
    r"""Learn a variance for every task and weigh its loss by the inverse.

    .. math:: L = \sum_t \Big( \frac{\ell_t}{2 e^{s_t}} + \frac{s_t}{2} \Big), \qquad
              \omega_t = \tfrac12 e^{-s_t}, \qquad
              \frac{\partial L}{\partial s_t} = \tfrac12 - \tfrac12 \ell_t e^{-s_t}

    The logarithm :math:`s_t = \log \sigma_t^2` of the variance is learned with the model, one step
    of Adam after each optimiser step. It is best at :math:`s_t = \log \ell_t`, where
    :math:`\omega_t = 1 / (2 \ell_t)`. Always one backward pass. A loss may be zero or negative, but
    while it is, :math:`s_t` falls without end, to -70. A step without a task leaves its
    :math:`s_t` as it is.

    Deviations: the paper weighs classification losses by :math:`e^{-s_t}`, twice as much; here,
    as in LibMTL, all tasks have its form for regression. Both have the same weight where
    :math:`s_t` is best. The paper and LibMTL train :math:`s` with the model's optimizer, weight
    decay included, which pulls the weights towards one half; here :math:`s` has an Adam of its own
    without weight decay. :math:`s_t` is kept within 70 of zero (losses of 1e-30 to 1e30) and its
    gradient within 1e15, so that float32 is enough.

    Args:
        init: the first :math:`s_t` of every task: 0 as in the code of Navon et al. (Nash-MTL);
            LibMTL has -0.5.
        lr: learning rate of :math:`s`; the default of the code of Navon et al.

    Raises:
        ValueError: ``init`` is not within 70 of zero, or ``lr`` is not above zero.

    References:
        Kendall, Gal & Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
        Geometry and Semantics*, CVPR 2018.
    """

    log_variances: Tensor | None

    def __init__(self, init: float = 0.0, lr: float = 0.025) -> None:
        super().__init__("log_variances", init, lr)

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`uncertainty_weights`.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype; only their number matters.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        return uncertainty_weights(self.learned(losses)).to(losses.dtype)

    def slope(self, s: Tensor, losses: Tensor) -> Tensor:
        """The derivative of :math:`L`, shape ``(T,)``."""
        return 0.5 - losses * uncertainty_weights(s)
