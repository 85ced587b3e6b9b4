"""What a balancer that works on the weights of another one asks of it."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, LossBalancer


def checked_base(owner: object, base: GradientBalancer) -> GradientBalancer:
    """``base`` if its weights can be taken and changed.

    Raises:
        ValueError: it is no gradient balancer with weights from the Gramian, or it balances losses
            too, which would be lost.
    """
    name = type(owner).__name__
    if not getattr(base, "gramian_weighted", False):
        raise ValueError(
            f"Expected `base` of {name} to be a gradient balancer with weights from the Gramian, "
            f"found {type(base).__name__}. Use for example MinNorm() or CentralDirection()."
        )
    if isinstance(base, LossBalancer):
        raise ValueError(
            f"Expected `base` of {name} to balance gradients only, found {type(base).__name__}, "
            f"whose loss weights would be lost. Put a loss balancer beside {name} instead."
        )
    return base


def head_weights_of(base: GradientBalancer, weights: Tensor) -> Tensor:
    """What ``base`` multiplies the head gradients by, after it gave ``weights``; shape ``(T,)``."""
    if not base.weight_heads:
        return weights.new_ones(len(weights))
    return base.head_weights().to(weights) if base.own_head_weights else weights
