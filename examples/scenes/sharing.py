"""What tasks share of an encoder: all of it, all of it but attention (MTAN), or nothing (stitches).

Each is called with the images and the tasks that are wanted, and returns the features of each. A
single task runs the plain encoder in all three, which is the single-task baseline of the paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, conv1x1

from examples.scenes.backbones import Backbone


class Hard(nn.Module):
    """Hard parameter sharing: one encoder, the same features for all tasks.

    Args:
        encoder: from images to features.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(tasks, self.encoder(images))


class CrossStitch(nn.Module):
    r"""An encoder a task; between stages each goes on with a mixture of all.

    .. math:: \tilde x_t = \sum_u a_{tu} x_u

    with one trained matrix a stage, the last one excepted. It starts at 0.9 on the diagonal and
    0.1 shared by the others, which the paper found best (section 4; there for two tasks).

    Args:
        make: makes an encoder.
        tasks: names of all tasks.

    Reference: Misra et al., CVPR 2016. One number for all channels, as in LibMTL, where it starts
    at 1; the paper has one for each channel.
    """

    def __init__(self, make: Callable[[], Backbone], tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.columns = nn.ModuleDict({task: make() for task in tasks})
        count, stages = len(self.tasks), len(self.columns[self.tasks[0]].stages)
        start = torch.full((count, count), 0.1 / max(1, count - 1)).fill_diagonal_(0.9)
        self.stitches = nn.ParameterList(start.clone() for _ in range(stages - 1))

    def forward(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        if len(tasks) == 1:
            return {tasks[0]: self.columns[tasks[0]](images)}
        columns = [self.columns[task] for task in tasks]
        rows = [self.tasks.index(task) for task in tasks]
        features = [column.stem(images) for column in columns]
        for stage in range(len(self.stitches) + 1):
            features = [c.stages[stage](z) for c, z in zip(columns, features, strict=True)]
            if stage < len(self.stitches):
                matrix = self.stitches[stage][rows][:, rows]
                features = list(torch.einsum("tu,u...->t...", matrix, torch.stack(features)))
        return dict(zip(tasks, features, strict=True))


class MTAN(nn.Module):
    r"""A shared encoder, and for each task and stage a mask that picks from it.

    .. math:: \hat a_t^{(j)} = m_t^{(j)} \odot p^{(j)}, \qquad
        m_t^{(j)} = h_t^{(j)}([u^{(j)}; f^{(j)}(\hat a_t^{(j-1)})])

    where :math:`u` and :math:`p` are the features before and after the last block of a stage,
    :math:`h` two 1x1 convolutions that end in a sigmoid, and :math:`f` a residual block that all
    tasks share.

    Args:
        encoder: the shared one.
        tasks: names of all tasks.

    Reference: Liu, Johns & Davison, CVPR 2019; on a ResNet as in LibMTL, whose tasks however use
    one and the same :math:`h` where the paper has one for each task, as here.
    """

    def __init__(self, encoder: Backbone, tasks: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        channels = encoder.channels
        self.masks = nn.ModuleDict(
            {
                task: nn.ModuleList(mask(c if i == 0 else 2 * c, c) for i, c in enumerate(channels))
                for task in tasks
            }
        )
        self.onward = nn.ModuleList(residual(a, b) for a, b in itertools.pairwise(channels))

    def forward(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        if len(tasks) == 1:
            return {tasks[0]: self.encoder(images)}
        z = self.encoder.stem(images)
        picked: dict[str, Tensor] = {}
        for i, stage in enumerate(self.encoder.stages):
            before = stage[:-1](z)
            z = stage[-1](before)
            for task in tasks:
                seen = before
                if i > 0:
                    earlier = self.onward[i - 1](picked[task])
                    if earlier.shape[-2:] != before.shape[-2:]:
                        earlier = F.adaptive_max_pool2d(earlier, before.shape[-2:])
                    seen = torch.cat([before, earlier], dim=1)
                picked[task] = self.masks[task][i](seen) * z
        return picked


def mask(inputs: int, outputs: int) -> nn.Sequential:
    """Two 1x1 convolutions from features to a mask in (0, 1)."""
    middle = max(1, outputs // 4)
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )


def residual(inputs: int, outputs: int) -> Bottleneck:
    """A residual block that changes the number of channels."""
    down = nn.Sequential(conv1x1(inputs, outputs), nn.BatchNorm2d(outputs))
    return Bottleneck(inputs, outputs // Bottleneck.expansion, downsample=down)
