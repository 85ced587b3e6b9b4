"""Random loss weights, drawn anew at every step (RLW)."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from lightning_mtl.arguments import Scale, one_of, rescaled
from lightning_mtl.balancer import LossBalancer


def random_weights(z: Tensor) -> Tensor:
    r"""Weights from numbers drawn from the standard normal distribution.

    .. math:: \omega_t = \frac{e^{z_t}}{\sum_s e^{z_s}}, \qquad z \sim \mathcal N(0, I_T)

    Args:
        z: the numbers, shape ``(T,)``, any float dtype and device.

    Returns:
        Weights of sum one, in the shape, dtype and device of ``z``.

    Example:
        >>> random_weights(torch.tensor([0.5, -1.0]))
        tensor([0.8176, 0.1824])
    """
    return torch.softmax(z, 0)


class RandomWeighting(LossBalancer):
    r"""Weigh the task losses at random, anew at every step.

    .. math:: \omega = \operatorname{softmax}(z), \qquad z \sim \mathcal N(0, I_T)

    A litmus test: a method that balances should do better. Always one backward pass. Numbers come
    from a generator of its own, which is saved and is the same on every rank.

    Deviations: the paper draws from "a distribution"; here, as in the authors' code (LibMTL), it is
    the standard normal one. Some codes multiply the weights by :math:`T`, which is ``scale="sum"``.

    Args:
        scale: ``"mean"``, weights of sum one as in the paper, or ``"sum"``, of sum :math:`T`.
        seed: of the generator; ``None`` takes PyTorch's initial seed.

    Raises:
        ValueError: an unknown ``scale``, or a seed that is no integer of at least 0.

    References:
        Lin et al., *Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
        Learning*, TMLR 2022.
    """

    needs_current_losses = False

    def __init__(self, scale: Scale = "mean", seed: int | None = None) -> None:
        super().__init__()
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.seed = seed
        self.add_generator(seed)

    def loss_weights(self, losses: Tensor) -> Tensor:
        """New weights, see :func:`random_weights`.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype; only their number matters.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        z = torch.randn(len(losses), generator=self.generator, dtype=torch.float32, device="cpu")
        return rescaled(random_weights(z), self.scale, "mean").to(losses)
