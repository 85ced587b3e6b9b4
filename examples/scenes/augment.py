"""Augmentation of a scene: a zoomed crop and a flip that also change what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, dict[str, Tensor]]


def crop(image: Tensor, targets: dict[str, Tensor], scale: float, top: int, left: int) -> Batch:
    """Cut out a window of 1/scale of the size and enlarge it to the size of the image.

    The scene comes nearer, so depth is divided by ``scale``. Targets are enlarged by the nearest
    pixel: a mean of two would mix classes, and measurements with "no measurement". (The code that
    the papers share interpolates normals.)

    Args:
        image: shape ``(3, H, W)``.
        targets: ``"segment"`` of shape ``(H, W)``, ``"depth"``, ``"normal"``; any of them.
        scale: at least 1.
        top: first row of the window.
        left: first column of it.
    """
    size = image.shape[-2:]
    height, width = (int(side / scale) for side in size)
    window = (..., slice(top, top + height), slice(left, left + width))
    zoomed = {}
    for task, target in targets.items():
        small = target[window]
        # Labels have no channel; as float32 they are exact.
        planes = small.reshape(1, -1, height, width).float()
        large = F.interpolate(planes, size, mode="nearest").to(target.dtype)
        zoomed[task] = large.reshape(target.shape)
    if "depth" in zoomed:
        zoomed["depth"] = zoomed["depth"] / scale
    image = F.interpolate(image[window][None], size, mode="bilinear", align_corners=True)[0]
    return image, zoomed


def flip(image: Tensor, targets: dict[str, Tensor]) -> Batch:
    """Mirror left and right; the x component of normals changes its sign."""
    targets = {task: target.flip(-1) for task, target in targets.items()}
    if "normal" in targets:
        targets["normal"] = targets["normal"] * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return image.flip(-1), targets


class CropAndFlip:
    """A crop at a random scale and place, and a flip of every other image.

    Random numbers are torch's, which the loaders of all worker processes seed differently.

    Args:
        scales: one is drawn for each image. Default 1, 1.2, 1.5, as for SegNet in CAGrad and
            DB-MTL (arXiv:2308.12029, table 6).

    Raises:
        ValueError: no scale, or one below 1.
    """

    def __init__(self, scales: Sequence[float] = (1.0, 1.2, 1.5)) -> None:
        if not scales or min(scales) < 1:
            raise ValueError(f"Expected `scales` of at least 1 but found {list(scales)}.")
        self.scales = tuple(scales)

    def __call__(self, image: Tensor, targets: dict[str, Tensor]) -> Batch:
        scale = self.scales[draw(len(self.scales))]
        height, width = image.shape[-2:]
        top, left = (draw(side - int(side / scale) + 1) for side in (height, width))
        image, targets = crop(image, targets, scale, top, left)
        return flip(image, targets) if draw(2) else (image, targets)


def draw(count: int) -> int:
    """A whole number from 0 to ``count - 1``."""
    return int(torch.randint(count, ()))
