"""One network for the images of all domains, and a linear classifier a domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import ResNet18_Weights, resnet18

from examples.office.data import OFFICE_31, OfficeDataModule
from examples.office.files import check_domains
from examples.pretrained import Weights, pretrained
from lightning_mtl import MultiTaskModule, Task


class Office(MultiTaskModule):
    """Classify the images of several domains: cross-entropy, accuracy.

    The images of a domain go through the encoder by themselves, so that batch normalisation sees
    one domain at a time, as published. Images are ``(N, 3, H, W)``, predictions ``(N, classes)``.

    Args:
        domains: names of the tasks. Default: those of Office-31.
        classes: number of classes, which all domains have.
        network: ``"resnet18"``, torchvision's, or ``"small"``, three convolutions for a CPU.
        weights: ``"imagenet"`` or ``"random"``, of ResNet-18.
        width: channels of the small network's first convolution; 16 by default.
        hidden: width of a hidden layer after the encoder, with batch normalisation and dropout,
            which all domains share; 0 for none. Default 512, as in the published code.
        dropout: probability of that layer. Default: that of the published code.
        lr: learning rate of Adam. Default 1e-4, as in DB-MTL (arXiv:2308.12029, section 4.3), of
            which is the next one as well.
        weight_decay: of Adam.
        baseline: single-task results for Δp, as in :class:`~lightning_mtl.MultiTaskModule`.

    Raises:
        ValueError: arguments that do not fit together, or not with those of the data.
    """

    def __init__(
        self,
        domains: Sequence[str] = OFFICE_31,
        classes: int = 31,
        network: Literal["resnet18", "small"] = "resnet18",
        weights: Weights = "random",
        width: int | None = None,
        hidden: int = 512,
        dropout: float = 0.5,
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        baseline: str | None = None,
    ) -> None:
        domains = check_domains(domains)
        check(network, weights, width)
        tasks = {d: Task(nn.CrossEntropyLoss(), accuracy(classes)) for d in domains}
        super().__init__(tasks, baseline=baseline)
        self.save_hyperparameters()
        self.encoder, channels = make_encoder(network, weights, width or 16)
        if hidden:
            self.encoder.append(hidden_layer(channels, hidden, dropout))
        self.heads = nn.ModuleDict({d: nn.Linear(hidden or channels, classes) for d in domains})

    def forward(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            domain: self.heads[domain](self.encoder(images[domain]))
            for domain in self.training_tasks
            if domain in images
        }

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, OfficeDataModule):
            return
        own, theirs = (self.task_names, self.hparams.classes), (data.domains, data.classes)
        if own != theirs:
            raise ValueError(
                f"Expected the model's `domains` and `classes` to be the data's {theirs} but found "
                f"{own}. Give both the same."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = self.hparams
        return torch.optim.Adam(self.parameters(), options.lr, weight_decay=options.weight_decay)


def check(network: str, weights: str, width: int | None) -> None:
    """Refuse arguments that do not fit together."""
    if network != "resnet18" and weights != "random":
        raise ValueError(
            f"Expected `weights: random` with `network: {network}` but found {weights!r}. Only "
            f"`network: resnet18` has trained weights."
        )
    if width is not None and (network == "resnet18" or width < 4):
        raise ValueError(
            f"Expected `width` to be at least 4, and none with `network: resnet18`, but found "
            f"{width} with {network!r}."
        )


def accuracy(classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, average="micro")


def make_encoder(network: str, weights: Weights, width: int) -> tuple[nn.Sequential, int]:
    """A network from images to vectors, and the length of these."""
    if network == "small":
        return small_network(width)
    net: Any = pretrained(resnet18, ResNet18_Weights.IMAGENET1K_V1, weights)
    channels: int = net.fc.in_features
    net.fc = nn.Identity()
    return nn.Sequential(net), channels


def small_network(width: int) -> tuple[nn.Sequential, int]:
    """Three convolutions of stride 2, of ``width``, 2 and 4 times ``width`` channels.

    They are normalised image by image: black and white grounds have other means, and the running
    averages of batch normalisation would be of none of them.
    """
    layers: list[nn.Module] = []
    channels = 3
    for outputs in (width, 2 * width, 4 * width):
        convolution = nn.Conv2d(channels, outputs, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(4, outputs), nn.ReLU()]
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


def hidden_layer(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """The layer that the published code has before the linear heads, with its initial values."""
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, 0, 0.005)
    nn.init.constant_(linear.bias, 0.1)
    return nn.Sequential(linear, nn.BatchNorm1d(outputs), nn.ReLU(), nn.Dropout(dropout))
