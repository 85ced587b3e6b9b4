"""One model for all tasks against a model for each: parameters, memory, inference time.

``python -m examples.scenes.cost --config examples/scenes/nyuv2.yaml --height 288 --width 384``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from examples.scenes.data import TASKS
from examples.scenes.model import Scenes

MB = 2**20


class Cost(NamedTuple):
    """What a set of models costs that together predict all tasks."""

    parameters: int
    weights_mb: float  # of parameters and buffers
    ms: float  # an image, median
    peak_mb: float | None  # memory allocated by torch at most, on a GPU only


def measure(models: Sequence[Scenes], images: Tensor, repeats: int) -> Cost:
    """Run all models on the same images, one after the other, ``repeats`` times."""
    device = images.device
    models = [model.to(device).eval() for model in models]
    stored = [v for m in models for v in (*m.parameters(), *m.buffers())]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            for model in models:
                model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 0:  # the first one warms up
                times.append((time.perf_counter() - start) / len(images))
    peak = torch.cuda.max_memory_allocated(device) / MB if device.type == "cuda" else None
    return Cost(
        sum(p.numel() for m in models for p in m.parameters()),
        sum(v.numel() * v.element_size() for v in stored) / MB,
        1000 * statistics.median(times),
        peak,
    )


def compare(options: dict[str, Any], images: Tensor, repeats: int = 20) -> dict[str, Cost]:
    """Costs of the model with these arguments and of plain models for each of its tasks."""
    options = {**options, "weights": "random"}  # their values cost nothing
    tasks = options.get("tasks", TASKS)
    single = {**options, "sharing": "hard"}
    several = [Scenes(**{**single, "tasks": [task]}) for task in tasks]
    return {
        "one model": measure([Scenes(**options)], images, repeats),
        f"{len(tasks)} single-task models": measure(several, images, repeats),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.scenes.cost", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--images", type=int, default=8, help="in a batch (default: 8)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    options = yaml.safe_load(given.config.read_text(encoding="utf-8"))["model"]["init_args"]
    images = torch.rand(given.images, 3, given.height, given.width, device=given.device)
    print("| | parameters | weights | inference | peak memory |\n|---|---|---|---|---|")
    for name, cost in compare(options, images, given.repeats).items():
        peak = "not measured" if cost.peak_mb is None else f"{cost.peak_mb:.0f} MB"
        print(
            f"| {name} | {cost.parameters / 1e6:.2f} M | {cost.weights_mb:.1f} MB "
            f"| {cost.ms:.1f} ms an image | {peak} |"
        )


if __name__ == "__main__":
    main()
