"""torchvision's RetinaNet in the LightningModule that its users write, and a port inherited."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import AnchorGenerator

from lightning_mtl import MultiTaskModule
from tests.ported.mask_rcnn import scenes

TASKS = ("classification", "bbox_regression")


def detector() -> RetinaNet:
    """The whole of it at a size for tests; its towers have four layers each in any case."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    )
    backbone.out_channels = 8
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    return RetinaNet(
        backbone,
        num_classes=3,
        min_size=32,
        max_size=32,
        anchor_generator=anchors,
        head=RetinaNetHead(8, anchors.num_anchors_per_location()[0], 3, norm_layer=nn.BatchNorm2d),
    )


class Plain(LightningModule):
    """As it is trained without us."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = detector()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.detector(*batch)
        total = sum(losses.values())
        self.log("total", total, batch_size=len(batch[0]), on_step=True, on_epoch=True)
        return total

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Ported(MultiTaskModule, Plain):
    """Inherits what it does not change; the tasks are those of the first batch."""

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.detector(*batch)
        total = sum(losses.values())
        self.log("total", total, batch_size=len(batch[0]), on_step=True, on_epoch=True)
        return losses


def batches(count: int) -> list[Any]:
    return scenes(count, masks=False)
