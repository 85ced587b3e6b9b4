"""What balancing sends between processes, and how long a step takes: both forms beside plain DDP.

Two real gloo processes train one network in every way in turn, over the loopback interface, whose
byte counters are read before and after (Linux). A model on paper, checked against these volumes,
says what 8 to 1,024 GPUs would send and wait for.

``python benchmarks/ranks.py [--width 1024] [--batch 16] [--steps 20] [--rounds 3] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import socket
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_mtl import EqualWeighting, MinNorm, MultiTaskModule

WORLD = 2
TASKS = (2, 3, 11)
FORMS = ("plain DDP", "no balancer", "MinNorm", "MinNorm, sharded")
COUNTERS = Path("/proc/net/dev")


class Trunk(nn.Sequential):
    """Three layers; all but the heads is shared."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.ReLU()]
        super().__init__(*layers)


def task_losses(module: Any, batch: Any) -> dict[str, Tensor]:
    z = module.trunk(batch)
    return {name: head(z).square().mean() for name, head in module.heads.items()}


def build(module: Any, width: int, tasks: int) -> None:
    torch.manual_seed(0)
    module.trunk = Trunk(width)
    module.heads = nn.ModuleDict({f"task{t}": nn.Linear(width, 1) for t in range(tasks)})


class Plain(LightningModule):
    """Automatic optimisation of the summed loss."""

    def __init__(self, width: int, tasks: int) -> None:
        super().__init__()
        build(self, width, tasks)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack(list(task_losses(self, batch).values())).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Balanced(MultiTaskModule):
    """The same network."""

    def __init__(self, width: int, tasks: int, **kwargs: Any) -> None:
        super().__init__([f"task{t}" for t in range(tasks)], **kwargs)
        build(self, width, tasks)

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return task_losses(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Meter(Callback):
    """Time and bytes of the steps after a warm-up."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if args[-1] == self.warm_up - 1:
            dist.barrier()
            self.start, self.bytes = time.perf_counter(), loopback()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        steps = trainer.global_step - self.warm_up
        self.seconds = (time.perf_counter() - self.start) / steps
        dist.barrier()
        self.sent = (loopback() - self.bytes) / steps


def loopback() -> int:
    """Bytes that went over the loopback interface so far."""
    for line in COUNTERS.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise RuntimeError("Expected a loopback interface `lo` in /proc/net/dev; run this on Linux.")


def one(form: str, width: int, batch: int, tasks: int, steps: int) -> tuple[float, float]:
    """Seconds and bytes of a step."""
    if form == "plain DDP":
        module: Any = Plain(width, tasks)
    else:
        module = Balanced(width, tasks, shard_gradients=form.endswith("sharded"))
    balancers = {"plain DDP": [], "no balancer": [EqualWeighting()]}.get(form, [MinNorm()])
    meter = Meter(warm_up=3)
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(),
        callbacks=[*balancers, meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=1,
    )
    batches = torch.utils.data.DataLoader([torch.randn(batch, width)] * (steps + 3), None)
    trainer.fit(module, batches)
    return meter.seconds, meter.sent


def process(rank: int, port: int, arguments: argparse.Namespace, out: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):  # in turn, so that a busy moment meets all of them
        for tasks in TASKS:
            for form in FORMS:
                pair = one(form, arguments.width, arguments.batch, tasks, arguments.steps)
                found.setdefault(f"{tasks}|{form}", []).append(pair)
    if rank == 0:
        Path(out).write_text(json.dumps(found))


def model(form: str, tasks: int, shared: int, heads: int, world: int) -> tuple[float, int]:
    """Bytes that each process sends in a step, and how many collectives it waits for.

    A ring sends ``2 (W - 1) / W`` of its numbers for an all-reduce, half of that for a
    reduce-scatter or an all-gather (gloo's reduce-scatter sends as much as an all-reduce). Float32;
    tables of a few doubles count as nothing but latency.
    """
    once = (world - 1) / world
    if form in ("plain DDP", "no balancer"):
        # DDP cuts the gradients into buckets of 25 MB and overlaps them with the backward pass.
        buckets = max(1, round(4 * (shared + heads) / 25e6))
        return 4 * 2 * once * (shared + heads), buckets if form == "plain DDP" else 3
    if form == "MinNorm":
        return 4 * 2 * once * (tasks * shared + heads), 4
    return 4 * once * ((tasks + 1) * shared + 2 * heads), tasks + 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torch.multiprocessing.spawn(process, (port, arguments, str(out)), nprocs=WORLD)
        found = json.loads(out.read_text())
    width = arguments.width
    shared = 3 * (width * width + width)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 2 gloo ranks,")
    print(f"one thread each; trunk of {shared:,} parameters, {arguments.rounds} rounds.\n")
    print("| T | form | step | MB sent in a step, all ranks | on paper |")
    print("|---|---|---|---|---|")
    table = []
    for tasks in TASKS:
        plain = statistics.median(s for s, _ in found[f"{tasks}|plain DDP"])
        for form in FORMS:
            pairs = found[f"{tasks}|{form}"]
            ratio = statistics.median(s for s, _ in pairs) / plain
            sent = min(b for _, b in pairs) / 1e6  # others use the interface too
            paper = WORLD * model(form, tasks, shared, tasks * (width + 1), WORLD)[0] / 1e6
            print(f"| {tasks} | {form} | {ratio:.2f} | {sent:.1f} | {paper:.1f} |")
            table.append({"T": tasks, "form": form, "step": ratio, "MB": sent, "paper": paper})
    print("\nOn paper: a trunk of 25 million parameters, 50 GB/s and 20 µs a collective.\n")
    print("| GPUs | form | T = 2 | T = 3 | T = 11 |")
    print("|---|---|---|---|---|")
    for world in (8, 64, 1024):
        for form in FORMS:
            cells = []
            for tasks in TASKS:
                volume, waits = model(form, tasks, 25_000_000, 0, world)
                cells.append(
                    f"{volume / 1e6:.0f} MB, {1e3 * (volume / 50e9 + waits * 20e-6):.1f} ms"
                )
            print(f"| {world} | {form} | {' | '.join(cells)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
