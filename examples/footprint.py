"""What one multi-task model costs at inference beside one model a task."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Footprint(NamedTuple):
    """What inference needs.

    Attributes:
        parameters: how many numbers are trained.
        memory: bytes of parameters and buffers.
        seconds: median time of a forward pass of all models on one batch.
    """

    parameters: int
    memory: int
    seconds: float


def separate(model: nn.Module) -> list[nn.Module]:
    """One model a task: the encoder of ``model`` with each of its ``heads`` alone."""
    found = []
    for task in model.heads:
        single = copy.deepcopy(model)
        for other in set(single.heads) - {task}:
            del single.heads[other]
        found.append(single)
    return found


@torch.inference_mode()
def footprint(models: Sequence[nn.Module], inputs: Tensor, repeats: int = 50) -> Footprint:
    """Parameters, memory and time of ``models``, one after the other, on a batch ``inputs``."""
    parameters = [p for model in models for p in model.parameters()]
    buffers = [b for model in models for b in model.buffers()]
    times = []
    for model in models:
        model.eval()
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        for model in models:
            model(inputs)
        times.append(time.perf_counter() - start)
    return Footprint(
        sum(p.numel() for p in parameters),
        sum(t.numel() * t.element_size() for t in parameters + buffers),
        statistics.median(times[1:]),
    )


def footprint_table(model: nn.Module, inputs: Tensor) -> str:
    """Both in Markdown, as a table."""
    models = separate(model)
    rows = {"one model": [model], f"{len(models)} models": models}
    lines = [
        f"| | parameters | memory, kB | forward pass of {len(inputs)} inputs, ms |",
        "|---|---|---|---|",
    ]
    for name, group in rows.items():
        found = footprint(group, inputs)
        lines.append(
            f"| {name} | {found.parameters:,} | {found.memory / 1000:.3g} | "
            f"{found.seconds * 1000:.3g} |"
        )
    return "\n".join(lines)
