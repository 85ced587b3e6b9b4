"""torchvision's Mask R-CNN in the LightningModule that its users write, and that one ported."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from lightning_mtl import MultiTaskModule

TASKS = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


def detector() -> MaskRCNN:
    """The whole of it at a size for tests."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
    )
    backbone.out_channels = 8
    return MaskRCNN(
        backbone,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)),
        rpn_pre_nms_top_n_train=40,
        rpn_post_nms_top_n_train=20,
        rpn_batch_size_per_image=16,
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(8 * 3 * 3, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        box_batch_size_per_image=16,
        mask_roi_pool=MultiScaleRoIAlign(["0"], 4, 2),
        mask_head=MaskRCNNHeads(8, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, 3),
    )


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


class Plain(LightningModule):
    """As it is trained without us."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = detector()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.detector(images, targets)
        self.log_dict(losses, batch_size=len(images))
        return sum(losses.values())

    def configure_optimizers(self) -> Any:
        return sgd(self)


class Ported(MultiTaskModule):
    """A copy in which the losses are returned as they are."""

    def __init__(self) -> None:
        super().__init__(tasks=TASKS)
        self.detector = detector()

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        images, targets = batch
        losses = self.detector(images, targets)
        self.log_dict(losses, batch_size=len(images))
        return losses

    def configure_optimizers(self) -> Any:
        return sgd(self)


def scenes(count: int, *, masks: bool) -> list[Any]:
    """Batches of two noisy images, each with two bright rectangles."""
    draw = torch.Generator().manual_seed(0)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    def scene() -> tuple[Tensor, dict[str, Tensor]]:
        image = torch.rand(3, 32, 32, generator=draw) / 4
        found = torch.zeros(2, 32, 32, dtype=torch.uint8)
        boxes = []
        for i in range(2):
            x, y, width, height = whole(0, 16), whole(0, 16), whole(8, 16), whole(8, 16)
            image[i, y : y + height, x : x + width] += 0.7
            found[i, y : y + height, x : x + width] = 1
            boxes.append([x, y, x + width, y + height])
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([1, 2])}
        return image, {**target, "masks": found} if masks else target

    return [tuple(zip(*(scene() for _ in range(2)), strict=True)) for _ in range(count)]


def batches(count: int) -> list[Any]:
    return scenes(count, masks=True)
