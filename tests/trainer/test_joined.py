"""States of one metric in several processes, joined as torchmetrics would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, PearsonCorrCoef

from lightning_mtl.trainer.joined import compute, state_of


class Growing(Metric):
    """A mean whose state has another shape after an update, as in torchmetrics 1.3."""

    total: Tensor
    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(1), "sum")
        self.add_state("number", torch.zeros(()), "sum")

    def update(self, x: Tensor) -> None:
        self.total = (self.total if self.number else self.total.squeeze()) + x.sum()
        self.number = self.number + x.numel()

    def compute(self) -> Tensor:
        return (self.total / self.number).squeeze()


@pytest.mark.parametrize("first", [1, 2])
def test_a_state_that_gains_or_loses_a_dimension(first: int) -> None:
    here, there, together = Growing(), Growing(), Growing()
    there.total = there.total.reshape(1)
    for metric, number in ((here, first), (there, 3 - first)):
        for i in range(number):
            x = torch.arange(1.0, 3.0 + i)
            metric.update(x)
            together.update(x)
    there.total = there.total.reshape(1, 1)
    found = compute(here, [state_of(here), state_of(there)])
    torch.testing.assert_close(found, together.compute())


def test_moments_of_two_processes_are_those_of_all_data() -> None:
    parts = [torch.randn(2, n) for n in (5, 8, 3)]
    metrics = [PearsonCorrCoef() for _ in parts]
    for metric, (x, y) in zip(metrics, parts, strict=True):
        for some in (slice(0, 2), slice(2, None)):
            metric.update(x[some], y[some])
    metrics[0].update(*parts[0])
    found = compute(metrics[0], [state_of(m) for m in metrics])
    expected = PearsonCorrCoef()
    expected.update(*torch.cat([*parts, parts[0]], 1))
    torch.testing.assert_close(found, expected.compute())
