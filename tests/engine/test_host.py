"""How often a step brings numbers to the host, where every read of the device would wait for it.

There is no GPU in the tests. Parameters and batches, and all that is computed from them, count as
the device's; what `to_host` returns counts as the host's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_mtl import (
    CAGrad,
    DualBalance,
    Every,
    GeometricMean,
    LogLoss,
    MinNorm,
    NashMTL,
    RandomWeighting,
    UPGrad,
)
from lightning_mtl.engine.forms import bad_sum, balanced
from tests.common.models import Balanced, loader, trainer

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}


class Device(TorchFunctionMode):
    """Follows what belongs to the device, and notes what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.kept: dict[int, Tensor] = {}  # alive, so that no other tensor gets their identity

    def take(self, *values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self.kept[id(tensor)] = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = func(*args, **kwargs)
        if any(id(t) in self.kept for t in given):
            name = getattr(func, "__name__", "")
            if name in READS:
                self.reads.append(name)
            else:
                self.take(found)
                if name.endswith("_") or "out" in kwargs:
                    self.take(given)
        return found


class Watched(Balanced):
    """Reads are counted from the third step on, when the layout is known."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.device_mode = Device()
            rows = self._flow.layout._gradients
            buffers = [] if rows is None else [rows.rows, rows._direction]
            self.device_mode.take(batch, list(self.parameters()), buffers)
            self.before = self.transfers[0]
            self.device_mode.__enter__()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.device_mode.__exit__(None, None, None)


def counted(monkeypatch: pytest.MonkeyPatch, rule: str, *callbacks: Any) -> tuple[int, list[str]]:
    """Transfers by `to_host`, and reads past it, of one step."""
    transfers = [0]

    def to_host(*tensors: Tensor) -> list[Tensor]:
        transfers[0] += 1
        with torch._C.DisableTorchFunction():
            return [t.detach().clone() for t in tensors]

    for place in (bad_sum, balanced):
        monkeypatch.setattr(place, "to_host", to_host)
    module = Watched(on_bad_loss=rule)
    module.transfers = transfers
    trainer(callbacks=list(callbacks), max_steps=3).fit(module, loader())
    return transfers[0] - module.before, module.device_mode.reads


def every(n: int) -> Every:
    return Every(n, MinNorm())


ONCE = [MinNorm, CAGrad, UPGrad, NashMTL, partial(every, 1), partial(every, 3)]
ONCE += [partial(NashMTL, update_weights_every=2), LogLoss, GeometricMean, None]


@pytest.mark.parametrize("rule", ["raise", "skip_step"])
@pytest.mark.parametrize("make", ONCE)
def test_one_transfer_a_step(monkeypatch: pytest.MonkeyPatch, make: Any, rule: str) -> None:
    callbacks = [] if make is None else [make()]
    assert counted(monkeypatch, rule, *callbacks) == (1, [])


@pytest.mark.parametrize("rule", ["raise", "skip_step"])
def test_a_direction_of_its_own_is_looked_at_once_more(
    monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """What a method makes of finite gradients is known when it is there; weights are before."""
    assert counted(monkeypatch, rule, DualBalance()) == (1, ["item"])


@pytest.mark.parametrize("make", [MinNorm, CAGrad])
def test_tasks_are_left_out_by_the_same_transfer(
    monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    assert counted(monkeypatch, "skip_task", make()) == (1, [])


@pytest.mark.parametrize("make", [DualBalance, RandomWeighting, None])
def test_none_where_nothing_needs_one(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    callbacks = [] if make is None else [make()]
    assert counted(monkeypatch, "ignore", *callbacks) == (0, [])


def test_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(MinNorm):
        def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
            jacobian.sum().item()
            return jacobian.sum(0)

    # The other one is the look at the direction: see the test of that.
    assert counted(monkeypatch, "raise", Reads()) == (1, ["item", "item"])
