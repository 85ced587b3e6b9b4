"""What a step through ``Trainer.fit`` costs beside Lightning's automatic optimisation.

The same small network trains on two tasks: by plain Lightning on the summed loss, as
MultiTaskModule without a balancer, and with balancers. Fits are interleaved; a cost is the median
over rounds of the time a step, and the figure that counts is its ratio to plain Lightning in the
same run. Seconds of one machine say nothing about another.

    python benchmarks/overhead.py [--rounds 15] [--steps 300] [--check]

``--check`` fails when a ratio is above its limit.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_mtl as mtl

TASKS = ("a", "b")
LIMITS = {"no balancer": 1.15, "MinNorm": 1.3}


class Network(nn.Module):
    """A trunk of three layers and a linear head a task."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in TASKS})

    def losses(self, batch: list[Tensor]) -> dict[str, Tensor]:
        z = self.trunk(batch[0])
        return {
            task: nn.functional.mse_loss(head(z).squeeze(-1), target)
            for (task, head), target in zip(self.heads.items(), batch[1:], strict=True)
        }


class Plain(LightningModule):
    """Lightning's automatic optimisation of the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = Network(width)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.net.losses(batch).values())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Balanced(mtl.MultiTaskModule):
    """The same under MultiTaskModule."""

    def __init__(self, width: int) -> None:
        super().__init__(TASKS)
        self.net = Network(width)

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.net.losses(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


CASES: dict[str, Callable[[], list[Any]] | None] = {
    "plain Lightning": None,
    "no balancer": list,
    "LogLoss": lambda: [mtl.LogLoss()],
    "MinNorm": lambda: [mtl.MinNorm()],
    "CentralDirection": lambda: [mtl.CentralDirection()],
    "TaskTensioner": lambda: [mtl.TaskTensioner()],
    "DualBalance": lambda: [mtl.DualBalance()],
    "MinNorm, monitored": lambda: [mtl.MinNorm(), mtl.GradientMonitor(50)],
}


def time_per_step(
    make: Callable[[], list[Any]] | None, width: int, steps: int, *, plain: bool | None = None
) -> float:
    """Milliseconds of one step of ``Trainer.fit``, set-up excluded by a warm-up of the same run."""
    torch.manual_seed(0)
    plain = make is None if plain is None else plain
    module = Plain(width) if plain else Balanced(width)
    clock = Clock(warm_up=steps // 10)
    callbacks = [clock, *(make() if make else [])]
    run = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x = torch.randn(32, 16)
    batch = [x, x.sum(1), -x[:, 0]]
    run.fit(module, DataLoader([batch] * steps, batch_size=None))
    return 1e3 * clock.seconds / (steps - clock.warm_up)


class Clock(lightning.pytorch.Callback):
    """Time between the end of the warm-up and the end of training."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds = 0.0

    def on_train_batch_end(self, run: Trainer, module: Any, *args: Any) -> None:
        if run.global_step == self.warm_up:
            self.started = time.perf_counter()

    def on_train_end(self, run: Trainer, module: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--check", action="store_true", help="fail when a limit is exceeded")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, make in CASES.items():
            times[name].append(time_per_step(make, args.width, args.steps))
    plain = times["plain Lightning"]
    ratios = {
        name: statistics.median(t / p for t, p in zip(values, plain, strict=True))
        for name, values in times.items()
    }
    print(
        f"T = 2, width {args.width}, {args.rounds} rounds of {args.steps} steps, one thread; "
        f"{platform.machine()}, torch {torch.__version__}, lightning {lightning.__version__}"
    )
    for name, values in times.items():
        limit = f"  (limit {LIMITS[name]:.2f})" if name in LIMITS else ""
        print(f"{name:20} {statistics.median(values):7.3f} ms  {ratios[name]:5.2f}x{limit}")
    if args.json:
        medians = {name: statistics.median(values) for name, values in times.items()}
        Path(args.json).write_text(json.dumps({"ratios": ratios, "ms": medians}))
    failed = [name for name, limit in LIMITS.items() if ratios[name] > limit]
    if args.check and failed:
        print(f"Above the limit: {', '.join(failed)}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
