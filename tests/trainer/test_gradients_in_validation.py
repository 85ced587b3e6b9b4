"""Losses and predictions that take gradients themselves, in validation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule, Task
from tests.common.models import (
    Balanced,
    Batched,
    loader,
    sgd,
    trainer,
)
from tests.trainer.test_evaluation import validated

# ------------------------------------------------------------------------ losses with gradients


class Physics(MultiTaskModule):
    """A residual with derivatives of the prediction by the inputs."""

    def __init__(self, held: bool = False) -> None:
        super().__init__({"data": Task(nn.MSELoss()), "residual": Task(lambda p, t: p.mean())})
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.held, self.points = held, None

    def on_validation_start(self) -> None:
        self.points = torch.ones(3, 1) if self.held else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        at = (x if self.points is None else self.points).requires_grad_()
        u = self.net(at)
        (slope,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        return {"data": u, "residual": (slope - u).square()}

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_losses_that_take_gradients(mode: bool) -> None:
    points = torch.linspace(0, 1, 6)[:, None]
    data = Batched([(p.clone(), {"data": p.exp(), "residual": p}) for p in points.split(3)])
    module = Physics()
    logged = validated(module, data, inference_mode=mode)
    expected = module(points.clone())["residual"].mean()
    assert logged["val/loss/residual"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert all(p.grad is None for p in module.parameters())
    trainer(inference_mode=mode).fit(module, data, data)


def test_gradients_at_tensors_of_inference_mode() -> None:
    data = Batched([(torch.ones(3, 1), {"data": torch.ones(3, 1), "residual": torch.ones(3)})])
    with pytest.raises(
        RuntimeError, match=r"^Expected a loss to take gradients.*inference_mode=Fa"
    ):
        validated(Physics(held=True), data)
    assert validated(Physics(held=True), data, inference_mode=False)["val/loss/residual"] > 0


def test_another_error_is_told_as_it_is() -> None:
    class Wrong(Balanced):
        def forward(self, x: Tensor) -> Any:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"^shapes do not fit"):
        validated(Wrong(), loader(16))
