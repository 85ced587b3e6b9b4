"""One transfer to the host a step, counted by the profiler and from PyTorch's operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from benchmarks.launches import Copies, counted, each, traced
from lightning_mtl import DualBalance, LogLoss, MinNorm, NashMTL
from tests.common.models import Balanced, Batched, loader
from tests.gpu.fits import trainer_on

pytestmark = pytest.mark.gpu
FEW, MORE, FIRST = 2, 10, 4  # steps of the two windows, and where they begin

BALANCERS: dict[str, Any] = {
    "none": list,
    "LogLoss": lambda: [LogLoss()],
    "MinNorm": lambda: [MinNorm()],
    "DualBalance": lambda: [DualBalance()],
    "NashMTL": lambda: [NashMTL()],
}
# A direction is looked at before it is written: one transfer more.
NUMBER = {name: 2.0 if name == "DualBalance" else 1.0 for name in BALANCERS}
balancers = pytest.mark.parametrize("name", BALANCERS)


class Window(Callback):
    """Holds a context open for some steps in the middle of a fit."""

    def __init__(self, context: Any, steps: int) -> None:
        self.context, self.last = context, FIRST + steps - 1

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == FIRST:
            self.found = self.context.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        if args[-1] == self.last:
            self.context.__exit__(None, None, None)


def watched(device: str, context: Any, steps: int, *callbacks: Any, **options: Any) -> Any:
    """What the context gives, open for ``steps`` steps. Batches are on the device before."""
    window = Window(context, steps)
    batches = [
        (x.to(device), {task: y.to(device) for task, y in targets.items()})
        for x, targets in loader()
    ]
    run = trainer_on(device, window, *callbacks, max_steps=FIRST + steps + 1)
    run.fit(Balanced(**options), Batched(batches))
    return window.found


@balancers
def test_one_transfer_a_step_in_the_trace(device: str, name: str) -> None:
    with traced(device):  # the profiler's own start
        torch.ones(4, device=device).sum().item()
    few, more = (watched(device, traced(device), n, *BALANCERS[name]()) for n in (FEW, MORE))
    found = each(few, more, MORE - FEW)
    if device == "cpu":  # where nothing has to be copied or launched
        assert set(found.values()) == {0.0}
        return
    assert found["launches"] > 0, "the profiler sees no kernels: CUPTI may not be there"
    assert found["to host"] == NUMBER[name], found
    # What goes to the device waits for nothing but itself, and not for the network.
    assert found["waits"] <= NUMBER[name] + found["to device"], found


@balancers
def test_one_transfer_a_step_by_operations(device: str, name: str) -> None:
    few, more = (watched(device, Copies(), n, *BALANCERS[name]()) for n in (FEW, MORE))
    number = (len(more.to_host) - len(few.to_host)) / (MORE - FEW)
    assert number == (0.0 if device == "cpu" else NUMBER[name]), more.to_host


def test_nothing_is_looked_at_where_nobody_asks(cuda: str) -> None:
    few, more = (watched(cuda, Copies(), n, on_bad_loss="ignore") for n in (FEW, MORE))
    assert more.to_host == few.to_host == []


def test_names_of_a_trace() -> None:
    """As traces of CUDA have them."""
    names = {
        "aten::mm": 3,
        "cudaLaunchKernel": 5,
        "cudaLaunchKernelExC": 2,
        "cuLaunchKernelEx": 1,
        "cudaGraphLaunch": 1,
        "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>": 8,
        "cudaMemcpyAsync": 6,
        "cudaMemcpy": 1,
        "Memcpy DtoH (Device -> Pageable)": 1,
        "Memcpy DtoH (Device -> Pinned)": 1,
        "Memcpy HtoD (Pageable -> Device)": 3,
        "Memcpy DtoD (Device -> Device)": 9,
        "Memset (Device)": 9,
        "cudaStreamSynchronize": 4,
        "cudaDeviceSynchronize": 1,
        "cudaEventSynchronize": 1,
        "cudaStreamWaitEvent": 9,
        "cudaStreamIsCapturing": 9,
        "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags": 9,
    }
    events = [SimpleNamespace(key=key, count=count) for key, count in names.items()]
    assert counted(events) == {"launches": 9, "waits": 7, "to host": 2, "to device": 3}
