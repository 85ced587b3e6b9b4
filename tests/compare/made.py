"""Comparisons that were never run, as records in the documented format; a model to be counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.compare.again import read
from lightning_mtl.compare.table import Summary

SINGLE = {"a": 4.0, "b": 6.0}  # milliseconds of a step


def timing(method: str, ratio: float, machine: float = 1.0, memory: float | None = 100.0) -> dict:
    """Six turns beside equal weighting, on a machine that is slower for a while."""
    noise = random.Random(method)
    equal = [10 * machine * noise.uniform(0.9, 1.1) for _ in range(6)]
    own = [ratio * ms * noise.uniform(0.99, 1.01) for ms in equal]
    return {
        "kind": "timing",
        "method": method,
        "seed": 0,
        "step_ms": sorted(own)[3],
        "step_ratio": ratio,
        "peak_mb": memory,
        "step_turns_ms": own,
        "equal_turns_ms": equal,
    }


def models(tasks: dict[str, float]) -> dict:
    """One model of 100 parameters and 2 ms, a model per task of 80 and 1.5 ms."""
    one = {"parameters": 80, "forward_turns_ms": [1.5] * 6}
    return {
        "joint": {"parameters": 100, "step_turns_ms": [10.0] * 6, "forward_turns_ms": [2.0] * 6},
        "single": {task: {**one, "step_turns_ms": [ms] * 6} for task, ms in tasks.items()},
        "timed": "forward",
    }


def lines(rows: int, metrics: int = 2, seeds: int = 3, names: list[str] | None = None) -> list:
    """Equal weighting, a fixed one, and balancers that are better and slower one by one."""
    random_ = random.Random(0)
    tasks = {f"task {i}": {f"metric {i}": i % 2 == 0} for i in range(metrics)}
    more = names or [f"Balancer{i}" for i in range(rows)]
    methods = {"equal": "equal", "x10": "fixed", **dict.fromkeys(more[: rows - 3], "balancer")}
    found: list[dict[str, Any]] = [{"kind": "about", "metrics": tasks, "methods": methods}]
    base = {task: 10.0 ** (i % 5 - 2) for i, task in enumerate(tasks)}
    for seed in range(seeds):
        for task, made in tasks.items():
            value = base[task] * random_.uniform(0.99, 1.01)
            run = {"method": "single-task", "task": task, "seed": seed, "steps": 1000}
            found.append({**run, "metrics": {task: dict.fromkeys(made, value)}})
        for i, method in enumerate(methods):
            gain = -0.4 if i == 0 else -0.2 if i == 1 else -0.3 + 0.4 * i / len(methods)
            values = {
                task: {
                    metric: base[task]
                    * (1 + (1 if higher else -1) * (gain + random_.uniform(-0.01, 0.01)))
                    for metric, higher in made.items()
                }
                for task, made in tasks.items()
            }
            found.append({"method": method, "seed": seed, "steps": 1000, "metrics": values})
    for i, method in enumerate(methods):
        found.append(timing(method, 1 + i / len(methods), 1 + i % 3, 100.0 + i))
    found[-len(methods)]["models"] = models(dict.fromkeys(tasks, 5.0))
    return found


def write(folder: Path, found: list) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in found)
    (folder / "results.jsonl").write_text(text, encoding="utf-8")
    return folder


def summary(folder: Path, found: list) -> Summary:
    about, records, _ = read(write(folder, found))
    return about.summary(records, {}, None)


class Frozen(MultiTaskModule):
    """A frozen layer, a trunk, a head a task, and a layer that nothing uses; own losses."""

    def __init__(self) -> None:
        super().__init__(["a", "b"])
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.trunk = nn.Linear(5, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 1)})
        self.unused = nn.Linear(100, 100)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(self.frozen(x))
        tasks = self.training_tasks
        return {task: self.heads[task](hidden) for task in tasks}

    def task_losses(self, batch: list) -> dict[str, Tensor]:
        return {task: out.pow(2).mean() for task, out in self(batch[0]).items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)
