"""Residual networks for images as in He et al. (2016), so that no benchmark needs torchvision.

Architecture and initial weights are those of torchvision's ResNet-18 and ResNet-50, without the
classifier: 11.2 and 23.5 million parameters.
"""

from __future__ import annotations

from torch import Tensor, nn

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


class Block(nn.Module):
    """Convolutions around which the input goes: two 3 x 3, or 1 x 1, 3 x 3, 1 x 1 (wide)."""

    def __init__(self, inputs: int, width: int, stride: int, *, wide: bool) -> None:
        super().__init__()
        outputs = 4 * width if wide else width
        if wide:
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        layers: list[nn.Module] = []
        for size in sizes:
            layers += [_convolution(*size), nn.BatchNorm2d(size[1]), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        self.around = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(
                _convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.around(x))
        return y


def resnet_trunk(name: str, first: int = 64) -> tuple[nn.Module, int]:
    """``"resnet18"`` or ``"resnet50"`` up to its features, and how many there are.

    Args:
        name: which of the two.
        first: channels of the first stage.
    """
    wide = name == "resnet50"
    layers: list[nn.Module] = [
        _convolution(3, first, 7, 2),
        nn.BatchNorm2d(first),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = first
    for stage, depth in enumerate(DEPTHS[name]):
        width = first << stage
        for i in range(depth):
            layers.append(Block(inputs, width, 2 if stage and not i else 1, wide=wide))
            inputs = 4 * width if wide else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    made = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made
