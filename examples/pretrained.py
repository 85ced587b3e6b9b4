"""torchvision's networks with the weights that they were trained to, where these can be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

Weights = Literal["imagenet", "random"]


def pretrained(
    build: Callable[..., nn.Module], trained: Any, weights: Weights, **options: Any
) -> nn.Module:
    """A network of torchvision.

    Args:
        build: its function, ``torchvision.models.resnet18``.
        trained: its weights, ``ResNet18_Weights.IMAGENET1K_V1``.
        weights: ``"imagenet"`` takes them, downloaded once. Where they cannot be had, a warning
            says so and training starts from random weights. ``"random"`` does without.
        options: further arguments of ``build``.
    """
    if weights == "imagenet":
        try:
            return build(weights=trained, **options)
        except OSError as error:  # URLError is one
            rank_zero_warn(
                f"Expected ImageNet weights from {trained.url} or torch's cache but found neither "
                f"({error}). This model starts from RANDOM weights: its results are not those of "
                f"the paper's setting."
            )
    return build(**options)
