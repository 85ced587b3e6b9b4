"""What a step asks of a CUDA device: kernel launches, waits, and copies from and to the host.

Two ways of counting: from a trace of torch.profiler, which sees what the driver was asked for, and
from PyTorch's own operations, which needs no profiler and also sees devices other than CUDA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names in a trace. Calls of the runtime are events of the processor, copies are the device's.
KINDS = {
    "launches": re.compile(r"^cu(da)?(Launch\w*Kernel|GraphLaunch)"),
    "waits": re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize|^cu(da)?Memcpy(?!\w*Async)"),
    "to host": re.compile(r"^Memcpy DtoH"),
    "to device": re.compile(r"^Memcpy HtoD"),
}


def counted(events: Iterable[Any]) -> dict[str, int]:
    """How many events of each kind; ``events`` have ``key`` and ``count``, as key averages do."""
    counts = dict.fromkeys(KINDS, 0)
    for event in events:
        for kind, name in KINDS.items():
            if name.search(event.key):
                counts[kind] += event.count
    return counts


@contextmanager
def traced(device: str) -> Any:
    """Fill the dictionary that it gives with the counts of what runs inside."""
    on_gpu = device == "cuda"
    found: dict[str, int] = {}
    if on_gpu:
        torch.cuda.synchronize()  # nothing from before
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:
        yield found
        if on_gpu:
            torch.cuda.synchronize()  # all copies and kernels are over, and in the trace
    found.update(counted(trace.key_averages()))


def each(few: dict[str, int], more: dict[str, int], steps: int) -> dict[str, float]:
    """Counts of a step, from two traces, the second ``steps`` longer: without what frames them."""
    return {kind: (more[kind] - few[kind]) / steps for kind in few}


class Copies(TorchDispatchMode):
    """Counts the operations that bring numbers from a device to the host, and to the device.

    An operation that reads a number (``item``, ``tolist``, a truth value) is one to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[str] = []
        self.to_device: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "copy_":
            from_, to = args[1], args[0]
        else:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            reads = name in ("_local_scalar_dense", "is_nonzero", "equal")
            moves = name in ("_to_copy", "_copy_from", "_copy_from_and_resize")
            if not tensors or not (reads or moves):
                return result
            from_, to = tensors[0], torch.empty(0) if reads else result
        if from_.device.type != "cpu" and to.device.type == "cpu":
            self.to_host.append(name)
        elif from_.device.type == "cpu" and to.device.type != "cpu":
            self.to_device.append(name)
        return result
