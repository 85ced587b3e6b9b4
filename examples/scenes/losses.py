"""Losses over the pixels that have a label or a measurement, and how many these are.

Each loss is the mean over valid pixels. The counts go into `Task(count=...)`: a batch without any
leaves the task out, and means over micro-batches and ranks are weighted by valid pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from examples.scenes.files import IGNORED


def measured(target: Tensor) -> Tensor:
    """Where something was measured: targets ``(N, C, H, W)`` that are not all zero, ``(N, H, W)``.

    Published code asks whether the sum over channels is zero, which is the same for depth.
    """
    return (target != 0).any(dim=1)


def segment_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy; scores ``(N, classes, H, W)``, labels ``(N, H, W)``, -1 for no class."""
    return F.cross_entropy(prediction, target, ignore_index=IGNORED)


def depth_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error; both ``(N, 1, H, W)``, 0 where nothing was measured."""
    valid = measured(target)[:, None]
    return F.l1_loss(prediction[valid], target[valid])


def normal_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine; both ``(N, 3, H, W)``, zero vectors where nothing was measured."""
    cosine = F.cosine_similarity(prediction, target, dim=1)
    return (1 - cosine[measured(target)]).mean()


def count_labels(target: Tensor) -> Tensor:
    """The number of pixels with a class."""
    return (target != IGNORED).sum()


def count_measured(target: Tensor) -> Tensor:
    """The number of pixels with a measurement."""
    return measured(target).sum()
