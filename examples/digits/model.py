"""A LeNet whose code of 50 numbers serves a classifier and a decoder."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task


class Encoder(nn.Sequential):
    """LeNet's convolutions and one layer to the code.

    Args:
        width: channels of the first convolution; the second has twice as many.
        code: size of the shared code.
        batch_norm: normalise the input of every activation.
        max_pool: halve the images by pooling; otherwise by the stride of the convolutions, which
            takes half the time.
    """

    def __init__(self, width: int, code: int, batch_norm: bool, max_pool: bool) -> None:
        norm2d, norm1d = (nn.BatchNorm2d, nn.BatchNorm1d) if batch_norm else (nn.Identity,) * 2
        stride, pool = (1, nn.MaxPool2d(2)) if max_pool else (2, nn.Identity())
        super().__init__(
            nn.Conv2d(1, width, 5, stride),
            pool,
            norm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 5, stride),
            pool,
            norm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, code),
            norm1d(code),
        )


class TwoDigits(MultiTaskModule):
    """Classify the upper-left digit and reconstruct the lower-right one.

    Args:
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of either optimiser.
        width: channels of the first convolution.
        code: size of the code that both tasks share.
        hidden: width of the decoder's hidden layer.
        batch_norm: normalise in the encoder; the paper's LeNet does not.
        max_pool: max pooling in the encoder, as in the paper, instead of strided convolutions.
        decay_steps: let the learning rate fall to zero along a cosine over this many steps; by
            default it stays constant.
        baseline: single-task results for Δp, as in :class:`~lightning_mtl.MultiTaskModule`.
    """

    def __init__(
        self,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 2e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        width: int = 10,
        code: int = 50,
        hidden: int = 128,
        batch_norm: bool = True,
        max_pool: bool = False,
        decay_steps: int | None = None,
        baseline: str | None = None,
    ) -> None:
        super().__init__(
            tasks={
                "classify": Task(nn.CrossEntropyLoss(), MulticlassAccuracy(10, average="micro")),
                "reconstruct": Task(nn.MSELoss(), MeanSquaredError()),
            },
            baseline=baseline,
        )
        self.save_hyperparameters()
        self.encoder = Encoder(width, code, batch_norm, max_pool)
        self.heads = nn.ModuleDict(
            {
                "classify": nn.Sequential(nn.Linear(code, code), nn.ReLU(), nn.Linear(code, 10)),
                "reconstruct": nn.Sequential(
                    nn.Linear(code, hidden),
                    nn.ReLU(),
                    nn.Linear(hidden, 28 * 28),
                    nn.Sigmoid(),
                    nn.Unflatten(1, (1, 28, 28)),
                ),
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        code = self.encoder(images)
        return {task: head(code) for task, head in self.heads.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.hparams
        rate, decay = options.lr, options.weight_decay
        if options.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters(), rate, weight_decay=decay, fused=True
            )
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), rate, options.momentum, weight_decay=decay
            )
        if options.decay_steps is None:
            return {"optimizer": optimizer}
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * min(1, step / options.decay_steps))) / 2
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
