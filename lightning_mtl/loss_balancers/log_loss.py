"""Logarithm of the losses: the scale-invariant loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.arguments import in_range
from lightning_mtl.balancer import LossBalancer


def log_loss_weights(losses: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Derivative of the sum of the logarithms of the losses.

    .. math:: \omega_t = \frac{\partial}{\partial \ell_t} \sum_s \log(\ell_s + \varepsilon)
              = \frac{1}{\ell_t + \varepsilon}

    Args:
        losses: task losses, shape ``(T,)``, any float dtype and device.
        eps: :math:`\varepsilon`.

    Returns:
        Weights of the shape, dtype and device of ``losses``. NaN for a negative loss, whose
        logarithm does not exist; the formula alone would silently ascend there.
    """
    return torch.where(losses < 0, torch.nan, 1 / (losses + eps))


class LogLoss(LossBalancer):
    r"""Minimise the sum of the logarithms of the task losses.

    .. math:: \omega_t = 1 / (\ell_t + \varepsilon)

    The direction does not change when a loss is multiplied by a constant, as long as the losses
    stay well above ``eps``. Losses must be positive.

    Args:
        eps: :math:`\varepsilon` under the logarithm, at least zero. The default is that of the
            paper's Algorithm 1; other codes use zero.

    Raises:
        ValueError: ``eps`` is negative or not finite.

    References:
        Lin et al., *Dual-Balancing for Multi-Task Learning*, arXiv 2308.12029. As the
        scale-invariant baseline: Navon et al., *Multi-Task Learning as a Bargaining Game*,
        ICML 2022.

    Example:
        >>> LogLoss().loss_weights(torch.tensor([2.0, 0.5]))
        tensor([0.5000, 2.0000])
    """

    requires_positive_losses = True
    stateless = True

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = in_range(self, "eps", eps)

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`log_loss_weights`.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        return log_loss_weights(losses, self.eps)
