"""Segmentation, depth and surface normals from one image: DeepLab or SegNet with a head a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.models.segmentation.deeplabv3 import ASPP

from examples.pretrained import Weights
from examples.scenes import losses
from examples.scenes.backbones import SegNet, dilated_resnet50, small_resnet
from examples.scenes.data import TASKS, ScenesDataModule, check_tasks
from examples.scenes.files import IGNORED
from examples.scenes.sharing import MTAN, CrossStitch, Hard
from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.metrics import (
    MaskedAbsoluteError,
    MaskedRelativeError,
    MeanAngle,
    MedianAngle,
    WithinAngle,
)


class Scenes(MultiTaskModule):
    """Dense prediction of the tasks ``"segment"``, ``"depth"`` and ``"normal"``.

    Images are ``(N, 3, H, W)``; predictions have their height and width, and as channels the
    scores of the classes, the depth, or a normal of any length.

    Args:
        tasks: some of the three.
        classes: number of classes: 13 for NYUv2, 7 for Cityscapes, 4 for generated scenes.
        network: ``"resnet50"``, DeepLab with a dilated ResNet-50 and a head of atrous spatial
            pyramid pooling a task; ``"small"``, the same on a ResNet that a CPU trains; or
            ``"segnet"``.
        sharing: ``"hard"``; ``"cross_stitch"`` and ``"mtan"`` need one of the two ResNets.
        weights: ``"imagenet"`` or ``"random"``, of ResNet-50.
        width: channels of the first stage of the small ResNet or of SegNet; 16 and 64 by default.
        lr: learning rate of Adam. Default 1e-4, as in DB-MTL (arXiv:2308.12029, section 4.1), of
            which are the next two as well.
        weight_decay: of Adam.
        halve_every: epochs after which the learning rate is halved.
        baseline: single-task results for Δp, as in :class:`~lightning_mtl.MultiTaskModule`.

    Raises:
        ValueError: unknown tasks; arguments that do not fit together.
    """

    def __init__(
        self,
        tasks: Sequence[str] = TASKS,
        classes: int = 13,
        network: Literal["resnet50", "small", "segnet"] = "resnet50",
        sharing: Literal["hard", "cross_stitch", "mtan"] = "hard",
        weights: Weights = "random",
        width: int | None = None,
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        halve_every: int = 100,
        baseline: str | None = None,
    ) -> None:
        tasks = check_tasks(tasks)
        check(network, sharing, weights, width)
        super().__init__({task: make_task(task, classes) for task in tasks}, baseline=baseline)
        self.save_hyperparameters()

        def encoder() -> Any:
            if network == "resnet50":
                return dilated_resnet50(weights)
            return SegNet(width or 64) if network == "segnet" else small_resnet(width or 16)

        self.encoder: nn.Module
        if sharing == "cross_stitch":
            self.encoder = CrossStitch(encoder, tasks)
            channels = self.encoder.columns[tasks[0]].channels[-1]
        else:
            shared = encoder()
            channels = shared.channels[-1]
            self.encoder = Hard(shared) if sharing == "hard" else MTAN(shared, tasks)
        outputs = {"segment": classes, "depth": 1, "normal": 3}
        make_head = {
            "resnet50": lambda n: aspp_head(channels, 256, (12, 24, 36), n),
            "small": lambda n: aspp_head(channels, max(16, channels // 2), (2, 4, 6), n),
            "segnet": lambda n: nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, n, 1)
            ),
        }[network]
        self.heads = nn.ModuleDict({task: make_head(outputs[task]) for task in tasks})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tasks = self.training_tasks  # a single-task run does not compute the other heads
        features = self.encoder(images, tasks)
        if isinstance(self.encoder, Hard):
            features = dict.fromkeys(tasks, self.shared_representation(features[tasks[0]]))
        return {task: self.predict(task, features[task], images.shape[-2:]) for task in tasks}

    def predict(self, task: str, features: Tensor, size: torch.Size) -> Tensor:
        """The head's output, enlarged to the size of the image."""
        small = self.heads[task](features)
        return F.interpolate(small, size, mode="bilinear", align_corners=True)

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ScenesDataModule) and data.classes != self.hparams.classes:
            raise ValueError(
                f"Expected the model's `classes` to be the data's {data.classes} but found "
                f"{self.hparams.classes}. Give both the same number."
            )

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.hparams
        optimizer = torch.optim.Adam(
            self.parameters(), options.lr, weight_decay=options.weight_decay
        )
        halve = torch.optim.lr_scheduler.StepLR(optimizer, options.halve_every, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": halve}


def check(network: str, sharing: str, weights: str, width: int | None) -> None:
    """Refuse arguments that do not fit together."""
    if network == "segnet" and sharing != "hard":
        raise ValueError(
            f"Expected `sharing: hard` with `network: segnet` but found {sharing!r}, which takes "
            f"an encoder apart by its stages. Use `network: resnet50` or `small`."
        )
    if network != "resnet50" and weights != "random":
        raise ValueError(
            f"Expected `weights: random` with `network: {network}` but found {weights!r}. Only "
            f"`network: resnet50` has trained weights."
        )
    if width is not None and (network == "resnet50" or width < 4):
        raise ValueError(
            f"Expected `width` to be at least 4, and none with `network: resnet50`, but found "
            f"{width} with {network!r}."
        )


def make_task(task: str, classes: int) -> Task:
    """Loss, metrics and count of valid pixels of a task, as in the tables of DB-MTL."""
    if task == "segment":
        metrics = {
            "mIoU": MulticlassJaccardIndex(classes, ignore_index=IGNORED),
            "PAcc": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED),
        }
        return Task(losses.segment_loss, metrics, count=losses.count_labels)
    if task == "depth":
        errors = {"AErr": MaskedAbsoluteError(), "RErr": MaskedRelativeError()}
        return Task(losses.depth_loss, errors, count=losses.count_measured)
    angles = {
        "Mean": MeanAngle(),
        "MED": MedianAngle(),
        "within_11": WithinAngle(11.25),
        "within_22": WithinAngle(22.5),
        "within_30": WithinAngle(30),
    }
    return Task(losses.normal_loss, angles, count=losses.count_measured)


def aspp_head(inputs: int, width: int, rates: Sequence[int], outputs: int) -> nn.Sequential:
    """The head of DeepLabV3; with 256 and (12, 24, 36) it is torchvision's ``DeepLabHead``."""
    return nn.Sequential(
        ASPP(inputs, list(rates), width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, outputs, 1),
    )
