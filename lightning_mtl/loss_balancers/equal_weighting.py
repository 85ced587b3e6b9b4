"""Equal weighting: the plain sum of the task losses."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancer import LossBalancer


class EqualWeighting(LossBalancer):
    r"""Weigh every task loss by one: the plain sum, also what happens with no balancer.

    .. math:: \omega_t = 1

    Always one backward pass. Deviation: the survey's text divides by :math:`T`; like the code of
    the field this is the sum, so that one task alone is plain training.

    References:
        Kurin et al., *In Defense of the Unitary Scalarization for Deep Multi-Task Learning*,
        NeurIPS 2022. Xin et al., *Do Current Multi-Task Optimization Methods in Deep Learning Even
        Help?*, NeurIPS 2022.

    Example:
        >>> EqualWeighting().loss_weights(torch.tensor([2.0, 0.5]))
        tensor([1., 1.])
    """

    needs_current_losses = False
    stateless = True

    @property
    def all_ones(self) -> bool:
        """They are, unless a subclass has others."""
        return type(self).loss_weights is EqualWeighting.loss_weights

    def loss_weights(self, losses: Tensor) -> Tensor:
        """Ones.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        return torch.ones_like(losses)
