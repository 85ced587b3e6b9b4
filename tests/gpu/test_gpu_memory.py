"""Task gradients in other memory: in the host's, in half precision, a block at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_mtl import DualBalance, LogLoss, MinNorm
from tests.common.method_rows.row import Method
from tests.common.models import Balanced, Batched, loader
from tests.engine.test_gradient_memory import ROWS, WEIGHTED
from tests.gpu.fits import fit, parameters, states, trainer_on

pytestmark = pytest.mark.gpu
TASKS = ("a", "b", "c")


def train(memory: Any, device: str, *callbacks: Any, **flags: Any) -> Any:
    """A module after a few steps."""
    module = Balanced(gradient_memory=memory, tasks=TASKS)
    return fit(module, loader(tasks=TASKS), device, *callbacks, **{"max_steps": 4, **flags})


def of_each_class(methods: list[Method]) -> Any:
    chosen = {method.cls: method for method in reversed(methods)}
    return pytest.mark.parametrize("method", list(chosen.values()), ids=lambda m: m.name)


@of_each_class(ROWS)
def test_host_memory_trains_as_the_device_s(device: str, method: Method) -> None:
    one, other = method.make(), method.make()
    whole = train("full", device, one, **method.flags)
    host = train("host", device, other, **method.flags)
    torch.testing.assert_close(parameters(host), parameters(whole), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(states(other), states(one), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [MinNorm, DualBalance, lambda: MinNorm(gradients="parameters")])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_host_memory_over_micro_batches(device: str, make: Any, precision: Any) -> None:
    flags = {"accumulate_grad_batches": 2, "precision": precision}
    whole = train("full", device, make(), **flags)
    host = train("host", device, make(), **flags)
    torch.testing.assert_close(parameters(host), parameters(whole), rtol=1e-4, atol=1e-5)


@of_each_class(WEIGHTED)
def test_blocks_train_as_the_whole_matrix(device: str, method: Method) -> None:
    whole = train("full", device, method.make())
    blocks = train("blocks", device, method.make())
    torch.testing.assert_close(parameters(blocks), parameters(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [MinNorm, DualBalance])
def test_half_precision_goes_the_same_way(device: str, make: Any) -> None:
    start = parameters(Balanced(tasks=TASKS))
    whole = parameters(train("full", device, make(), max_steps=1)) - start
    half = parameters(train("bf16", device, make(), max_steps=1)) - start
    assert torch.cosine_similarity(half, whole, dim=0) > 0.999


class Where(Callback):
    """Notes where the rows and a state as large as they are live."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        rows = module._flow.layout._gradients.rows
        balancer = next(c for c in trainer.callbacks if isinstance(c, DualBalance))
        self.devices = rows.device.type, balancer.average.device.type
        self.pinned = rows.is_pinned() if torch.cuda.is_available() else None


@pytest.mark.parametrize("memory", ["full", "bf16", "host"])
def test_where_rows_and_state_live(device: str, memory: str) -> None:
    where = Where()
    train(memory, device, where, DualBalance())
    assert where.devices == (("cpu",) * 2 if memory == "host" else (device,) * 2)
    if device == "cuda":
        assert where.pinned is (memory == "host")


class Wide(Balanced):
    """Many parameters and little else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tasks=TASKS, **options)
        wide = (nn.Linear(2048, 2048, bias=False) for _ in range(4))
        self.net.trunk = nn.Sequential(nn.Linear(4, 2048), *wide, nn.Linear(2048, 6))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=1e-3)


class Peak(Callback):
    """The most memory on the device from the third step on."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if args[-1] == 2:
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        torch.cuda.synchronize()
        self.bytes = torch.cuda.max_memory_allocated()


def test_host_memory_is_not_the_device_s(cuda: str) -> None:
    """It saves the rows; half precision saves half of them."""
    peaks = {}
    for memory in ("full", "bf16", "host"):
        torch.cuda.empty_cache()
        peak, module = Peak(), Wide(gradient_memory=memory)
        width = sum(p.numel() for p in module.net.trunk.parameters())
        trainer_on(cuda, peak, MinNorm(), max_steps=6).fit(module, loader(tasks=TASKS))
        peaks[memory] = peak.bytes / (4 * width * len(TASKS))  # in units of J
        del module
    assert peaks["full"] - peaks["host"] > 0.8, peaks
    assert peaks["full"] - peaks["bf16"] > 0.3, peaks


@pytest.mark.parametrize("first", [[], [LogLoss]], ids=["", "LogLoss"])
def test_a_batch_on_the_host_is_brought_over(device: str, first: list[Any]) -> None:
    """As Lightning does, also where a loader gives pinned memory."""
    batches = Batched(loader(tasks=TASKS))
    if device == "cuda":
        batches = Batched(
            [(x.pin_memory(), {t: y.pin_memory() for t, y in ys.items()}) for x, ys in batches]
        )
    module = Balanced(tasks=TASKS)
    fit(module, batches, device, *(make() for make in first), MinNorm())
    expected = fit(
        Balanced(tasks=TASKS), loader(tasks=TASKS), "cpu", *(m() for m in first), MinNorm()
    )
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=1e-5, atol=1e-5)
