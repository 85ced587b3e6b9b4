"""Encoders: torchvision's dilated ResNet-50, a small ResNet for a CPU, and SegNet.

The two ResNets have the same build, a stem and stages of blocks, which the ways of sharing in
`sharing.py` take apart; both see the image at an eighth of its size at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.models.resnet import BasicBlock, conv1x1

from examples.pretrained import Weights, pretrained


class Backbone(nn.Module):
    """A ResNet without its classifier.

    Args:
        stem: before the first stage.
        stages: of two blocks or more each.
        channels: of every stage's output.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Sequential], channels: Sequence[int]
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(channels)

    def forward(self, images: Tensor) -> Tensor:
        z = self.stem(images)
        for stage in self.stages:
            z = stage(z)
        return z


def dilated_resnet50(weights: Weights = "random") -> Backbone:
    """ResNet-50 whose last two stages dilate instead of striding: images ``(N, 3, H, W)``.

    Args:
        weights: ``"imagenet"`` takes torchvision's (V1, as in LibMTL), downloaded once. Where they
            cannot be had, a warning says so and training starts from random weights.
    """
    dilate = [False, True, True]
    net: Any = pretrained(
        resnet50,
        ResNet50_Weights.IMAGENET1K_V1,
        weights,
        replace_stride_with_dilation=dilate,
    )
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    return Backbone(stem, stages, (256, 512, 1024, 2048))


def small_resnet(width: int = 16) -> Backbone:
    """A stem and three stages of two blocks, of ``width``, 2 and 4 times ``width`` channels."""
    stem = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )
    stages, channels, inputs = [], (width, 2 * width, 4 * width), width
    for outputs, stride in zip(channels, (1, 2, 2), strict=True):
        down = None
        if stride > 1:
            down = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        first = BasicBlock(inputs, outputs, stride, down)
        stages.append(nn.Sequential(first, BasicBlock(outputs, outputs)))
        inputs = outputs
    return Backbone(stem, stages, channels)


class SegNet(nn.Module):
    """SegNet: VGG-16's convolutions down, as many up, with the places of the maxima on the way.

    Images ``(N, 3, H, W)`` to features ``(N, width, H, W)``.

    Args:
        width: channels of the first block, 64 in the paper; the others have 2, 4, 8, 8 times that.

    Reference: Badrinarayanan, Kendall & Cipolla, TPAMI 39(12), 2017, with two or three
    convolutions a block, as in MTAN (Liu, Johns & Davison, CVPR 2019).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [width * factor for factor in (1, 2, 4, 8, 8)]
        depths = (2, 2, 3, 3, 3)
        inputs = [3, *sizes[:-1]]
        self.down = nn.ModuleList(
            convolutions([i, *[o] * n]) for i, o, n in zip(inputs, sizes, depths, strict=True)
        )
        outputs = [width, *sizes[:-1]]
        self.up = nn.ModuleList(
            convolutions([*[i] * n, o])
            for i, o, n in reversed(list(zip(sizes, outputs, depths, strict=True)))
        )
        self.channels = (width,)

    def forward(self, images: Tensor) -> Tensor:
        z, pools = images, []
        for block in self.down:
            z = block(z)
            size = z.shape[-2:]
            z, index = F.max_pool2d(z, 2, return_indices=True)
            pools.append((index, size))
        for block in self.up:
            index, size = pools.pop()
            z = block(F.max_unpool2d(z, index, 2, output_size=size))
        return z


def convolutions(channels: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions through these channels, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
