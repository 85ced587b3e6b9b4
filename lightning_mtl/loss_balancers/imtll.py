"""Loss weights that bring all losses to one scale (IMTL-L)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.loss_balancers._learned import Learned


def imtll_weights(log_scales: Tensor) -> Tensor:
    r"""Weights of losses that are brought to one scale.

    .. math:: \omega_t = e^{s_t}

    Args:
        log_scales: :math:`s`, shape ``(T,)``, any float dtype and device.

    Returns:
        Weights of the shape, dtype and device of ``log_scales``.

    Example:
        >>> imtll_weights(torch.tensor([0.0, -1.0]))
        tensor([1.0000, 0.3679])
    """
    return torch.exp(log_scales)


class IMTLL(Learned):
    r"""Learn a factor for every loss that brings all of them to one scale.

    .. math:: L = \sum_t \big( e^{s_t} \ell_t - s_t \big), \qquad \omega_t = e^{s_t}, \qquad
              \frac{\partial L}{\partial s_t} = e^{s_t} \ell_t - 1

    :math:`s_t` is learned with the model, one step of Adam after each optimiser step. It is best at
    :math:`s_t = -\log \ell_t`, where the weighted loss is one and :math:`L = \sum_t (1 + \log
    \ell_t)`: kept there, it is the logarithm of the losses, :class:`~lightning_mtl.LogLoss`
    (Proposition 1 of Lin et al.), which has nothing to learn. Always one backward pass. Losses must
    be positive: :math:`L` has no minimum otherwise. A step without a task leaves its :math:`s_t` as
    it is.

    Deviations: the paper trains :math:`s` with the model; LibMTL does so with the model's
    optimizer, whose weight decay pulls the weights towards one. Here :math:`s` has an Adam of its
    own without weight decay. :math:`s_t` is kept within 70 of zero (losses of 1e-30 to 1e30) and
    its gradient within 1e15, so that float32 is enough.

    Args:
        init: the first :math:`s_t` of every task; 0 in the paper and in codes.
        lr: learning rate of :math:`s`. The paper names none of its own; the default is that of
            :class:`~lightning_mtl.UncertaintyWeighting`, which learns the same numbers.

    Raises:
        ValueError: ``init`` is not within 70 of zero, or ``lr`` is not above zero.

    References:
        Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021. Lin et al., *Dual-Balancing
        for Multi-Task Learning*, arXiv 2308.12029 (Proposition 1).
    """

    requires_positive_losses = True
    log_scales: Tensor | None

    def __init__(self, init: float = 0.0, lr: float = 0.025) -> None:
        super().__init__("log_scales", init, lr)

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`imtll_weights`.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype; only their number matters.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        return imtll_weights(self.learned(losses)).to(losses.dtype)

    def slope(self, s: Tensor, losses: Tensor) -> Tensor:
        """The derivative of :math:`L`, shape ``(T,)``."""
        return losses * imtll_weights(s) - 1
