"""The layer that `gradients="last_layer"` looks at by default is one that all tasks reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import GradientBalancer, GradNorm, MinNorm, MultiTaskModule, NashMTL
from tests.common.faulty import fitted, parameters, same
from tests.common.models import Batched

TASKS = ("a", "kd", "b")
COMMON = ("e.2.weight", "e.2.bias")


class Towers(MultiTaskModule):
    """``a`` and ``kd`` by one tower, ``b`` by another; the first tower is shared by two."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tasks=TASKS, **kwargs)
        torch.manual_seed(1)
        self.e = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.h1, self.h2 = nn.Linear(6, 1), nn.Linear(6, 1)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        z = self.e(x).tanh()
        one, two = self.h1(z).squeeze(-1), self.h2(z).squeeze(-1)
        return {
            "a": (one - y).square().mean(),
            "kd": (one - y.sin()).square().mean(),
            "b": (two + y).square().mean(),
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Named(Towers):
    def last_shared_layer(self) -> Any:
        return self.e[2].parameters()


class Apart(Towers):
    """No layer is reached by all: ``kd`` shares one encoder with ``a``, another with ``b``."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 6)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        two = self.h2(self.other(x)).squeeze(-1)
        losses = super().task_losses(batch, batch_idx)
        return {**losses, "kd": losses["kd"] + two.square().mean(), "b": (two + y).square().mean()}


class Late(Towers):
    """``b`` comes in batch 2; shared are all that the user says."""

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        return losses if batch_idx > 1 else {t: losses[t] for t in ("a", "kd")}

    def shared_parameters(self) -> Any:
        return [*self.e.parameters(), *self.h1.parameters()]


class Columns(GradientBalancer):
    """Equal weights; notes the layer of each step."""

    def __init__(self) -> None:
        super().__init__(gradients="last_layer")
        self.seen: list[tuple[str, ...]] = []

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        assert self.columns is not None
        self.seen.append(self.columns.names)
        return torch.ones_like(losses)


def batches(count: int = 6) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, 4, generator=generator)
    return Batched([(part, part.sum(1)) for part in x])


@pytest.mark.parametrize(
    "make",
    [lambda: NashMTL(gradients="last_layer"), lambda: MinNorm(gradients="last_layer"), GradNorm],
    ids=["NashMTL", "MinNorm", "GradNorm"],
)
def test_the_last_that_all_reach(make: Any) -> None:
    found, named = Towers(), Named()
    fitted(found, batches(), [make()])
    fitted(named, batches(), [make()])
    assert same(parameters(found), parameters(named))
    assert not same(parameters(found), parameters(Towers()))


def test_its_weights_are_those_of_the_paths_of_all() -> None:
    """All three tasks count, `kd` most of all, as by all parameters."""
    weights = {}
    for gradients in ("last_layer", "parameters"):
        module, balancer = Towers(), NashMTL(gradients=gradients)
        fitted(module, batches(1), [balancer])
        assert module.last_step is not None
        weights[gradients] = module.last_step.gradient_weights
        assert (weights[gradients] > 0).all()


def test_refused_where_there_is_none() -> None:
    module = Apart()
    before = parameters(module)
    message = (
        r"^Expected a layer that all of the tasks \['a', 'kd', 'b'\] reach with `gradients="
        r"'last_layer'` of MinNorm but found none. Override `last_shared_layer\(\)`"
    )
    with pytest.raises(ValueError, match=message):
        fitted(module, batches(), [MinNorm(gradients="last_layer")])
    assert same(parameters(module), before)


def test_a_task_that_comes_later_moves_it() -> None:
    balancer = Columns()
    fitted(Late(), batches(4), [balancer])
    first = ("h1.weight", "h1.bias")
    assert balancer.seen == [first, first, COMMON, COMMON]
