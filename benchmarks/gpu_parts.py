"""The parts of a run on a GPU: the tests, and a network each. Each runs in its own process."""

from __future__ import annotations

import dataclasses
import gc
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_results import Results
from gpu_tests import run_tests
from launches import each, traced
from networks import WIDE, Model, mlp, resnet, transformer
from timing import FEWEST, FORWARD, steps_for
from torch import Tensor
from ways import FITS, LIGHTNING, LOOPS, MINNORM, PLAIN, Way, balanced, forward, repeat

ROOT = Path(__file__).parents[1]
# Rounds, seconds of a way in a round, and steps of the two traced runs, whose difference is without
# set-up. On the processor only as much as shows that all of it runs.
EFFORT = {"cuda": (7, 0.12, 2, 6), "cpu": (1, 0.0, 1, 2)}

# In the order of their value. Two runs of tests, so that a broken-off one is not all of them.
TESTS: dict[str, tuple[float, list[str]]] = {
    "tests": (190.0, ["exactness", "precision", "transfers", "memory", "resume"]),
    "tests of process groups and compilers": (100.0, ["nccl", "compile"]),
}
NETWORKS: dict[str, tuple[float, Model]] = {
    model.name: (budget, model)
    for budget, model in (
        (60.0, Model("tiny MLP, T=2", 2, mlp(16, 32, 32), (32, 16))),
        (80.0, Model("ResNet-50 288x384, T=3", 3, resnet("resnet50"), (8, 3, 288, 384))),
        (55.0, Model("MLP 0.9M, T=3", 3, WIDE, (128, 256))),
        (
            70.0,
            Model(
                "transformer of 12 layers, bf16, T=3",
                3,
                transformer(12, 768, 12),
                (8, 256, 768),
                dtype=torch.bfloat16,
            ),
        ),
        (60.0, Model("ResNet-18 288x384, T=3", 3, resnet("resnet18"), (16, 3, 288, 384))),
        (55.0, Model("MLP 0.9M, T=11", 11, WIDE, (128, 256))),
        (60.0, Model("MLP 0.9M, T=40", 40, WIDE, (128, 256))),
    )
}
# What stands for a network where the script is only tried.
TINY: dict[str, dict[str, Any]] = {
    "ResNet": {"inputs": (4, 3, 64, 64), "trunk": resnet("resnet50", 4)},
    "transformer": {"inputs": (2, 8, 64), "trunk": transformer(2, 64, 1)},
    "MLP": {"inputs": (8, 256)},
}
TRIED = ("tests", "tiny", "ResNet-50", "transformer")  # on the processor: one of a kind


def parts(device: str) -> dict[str, float]:
    """Every part in its order, and the most seconds it may take."""
    every = {name: budget for of in (TESTS, NETWORKS) for name, (budget, _) in of.items()}
    # A machine with few processors may be busy with other things: seconds say little there.
    return every if device == "cuda" else {n: 600.0 for n in every if n.startswith(TRIED)}


def run_part(name: str, results: Results, device: str, seconds: float) -> None:
    """Run one part, which ends itself when its time is over."""
    signal.alarm(int(seconds) + 20)  # also without the process that started this one
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    if name in TESTS:
        files = [ROOT / "tests" / "gpu" / f"test_gpu_{file}.py" for file in TESTS[name][1]]
        short = run_tests(files, results, device, end)
    else:
        short = Measured(NETWORKS[name][1], results, device, end).run()
    if short:
        results.part(name, short=short)


# ------------------------------------------------------------------------- backward passes


def rows_looped(model: Model) -> Any:
    """A forward pass, and a backward pass a task written into the rows of one matrix."""
    network, batch = model.network(), model.batch()
    shared = list(network.trunk.parameters())
    rows = torch.zeros(model.tasks, sum(p.numel() for p in shared), device=model.device)
    views = [[part.view_as(p) for part, p in _parts(row, shared)] for row in rows]

    def step() -> None:
        losses = list(network.losses(batch).values())
        for t, loss in enumerate(losses):
            grads = torch.autograd.grad(loss, shared, retain_graph=t < len(losses) - 1)
            torch._foreach_copy_(views[t], list(grads))

    return repeat(model, step)


def rows_batched(model: Model) -> Any:
    """The same by one backward pass of all tasks at once (``is_grads_batched``)."""
    network, batch = model.network(), model.batch()
    shared = list(network.trunk.parameters())
    rows = torch.zeros(model.tasks, sum(p.numel() for p in shared), device=model.device)
    views = [part.view(model.tasks, *p.shape) for part, p in _parts(rows, shared)]

    def step() -> None:
        losses = torch.stack(list(network.losses(batch).values()))
        one = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        grads = torch.autograd.grad(losses, shared, one, is_grads_batched=True)
        torch._foreach_copy_(views, list(grads))

    return repeat(model, step)


def _parts(rows: Tensor, parameters: list[Any]) -> Any:
    return zip(rows.split([p.numel() for p in parameters], dim=-1), parameters, strict=True)


LOOPED, BATCHED = "rows, a backward pass a task", "rows, one batched backward pass"
WAYS: dict[str, Way] = {
    FORWARD: forward,
    PLAIN: LOOPS[PLAIN],
    LOOPED: rows_looped,
    BATCHED: rows_batched,
    "textbook loop, MinNorm": LOOPS["textbook loop"],
    "our engine, MinNorm": LOOPS["our engine, MinNorm"],
    LIGHTNING: FITS[LIGHTNING],
    "MultiTaskModule, no balancer": FITS["MultiTaskModule, no balancer"],
    **{
        f"MultiTaskModule, {name}": balanced(name)
        for name in ("LogLoss", MINNORM, "DualBalance", "NashMTL")
    },
    **{
        f"MultiTaskModule, {MINNORM}, {memory}": balanced(MINNORM, gradient_memory=memory)
        for memory in ("host", "bf16", "blocks")
    },
    "MultiTaskModule, DualBalance, host": balanced("DualBalance", gradient_memory="host"),
}
HOST = f"MultiTaskModule, {MINNORM}, host"
KINDS = (PLAIN, BATCHED, "our engine, MinNorm", LIGHTNING, HOST)  # one of a kind, to try a network


# ------------------------------------------------------------------------------ measuring


class Measured:
    """Times, counts and memory of every way of one network, written as they are found.

    Args:
        model: the network.
        results: where figures go.
        device: where it runs; a small one stands for it on the processor.
        end: when to stop, on the monotonic clock.
    """

    def __init__(self, model: Model, results: Results, device: str, end: float) -> None:
        small = next((of for part, of in TINY.items() if part in model.name), {})
        small = small if device == "cpu" and not model.name.startswith("tiny") else {}
        self.model = dataclasses.replace(model, device=device, **small)
        self.results = results
        self.end = end
        self.on_gpu = device == "cuda"
        self.ways = {name: way for name, way in WAYS.items() if not small or name in KINDS}
        self.rounds, self.round, self.few, self.more = EFFORT[device]
        self.failed: set[str] = set()

    def run(self) -> str:
        """What the time did not suffice for; empty if for everything."""
        model = self.model
        about = {
            "tasks": model.tasks,
            "shared parameters": model.shared(),
            "batch": list(model.inputs),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        self.results.add("figures", model.name, about)
        rounds = self.times(0.6 * (self.end - time.monotonic()))
        left = [way for way in self.ways if way not in self.failed and not self.count(way)]
        short = [f"no counts of {left}"] if left else []
        if rounds < self.rounds:
            short.append(f"{rounds} of {self.rounds} rounds")
        return ", ".join(short)

    def add(self, way: str, **figures: Any) -> None:
        self.results.add("figures", self.model.name, "ways", way, figures)

    def fails(self, way: str, error: Exception) -> None:
        """Say why a way has no figure."""
        self.failed.add(way)
        text = (str(error).strip() or "no message").split("\n")[0]
        self.add(way, fails=f"{type(error).__name__}: {text}"[:300])
        print(f"   {way}: {type(error).__name__}: {text}"[:200], flush=True)
        self.clear()

    def clear(self) -> None:
        """Give memory back that nobody holds."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def times(self, seconds: float) -> int:
        """Run all ways in turn, for as many rounds as there is time; returns how many."""
        end = time.monotonic() + seconds
        ready, steps = {}, {}
        for name, make in self.ways.items():
            if time.monotonic() > end and ready:
                break
            try:
                ready[name] = make(self.model)
                steps[name] = steps_for(self.round / ready[name](FEWEST))
            except Exception as error:  # others may work
                self.fails(name, error)
        found: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(self.rounds):
            if time.monotonic() > end and turn:
                return turn
            first = turn % len(ready)
            names = list(ready)
            for name in names[first:] + names[:first]:
                gc.collect()
                try:
                    found[name].append(1e3 * ready[name](steps[name]))
                except Exception as error:  # others may go on
                    del ready[name], found[name]
                    self.fails(name, error)
            for name, ms in found.items():
                self.add(name, ms=spread(ms))
            if turn == 0 and len(ready) + len(self.failed) < len(self.ways):
                return 1  # some ways were not even begun
        print(f"   {self.model.name}: {self.rounds} rounds of {len(ready)} ways", flush=True)
        return self.rounds

    def count(self, way: str) -> bool:
        """Launches, waits and copies of a step, and the most memory; whether there was time."""
        if time.monotonic() > self.end:
            return False
        self.clear()
        before = torch.cuda.memory_allocated() if self.on_gpu else 0
        try:
            timed = WAYS[way](self.model)
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            timed(FEWEST)
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if self.on_gpu else None
            traces = []
            for steps in (self.few, self.more):
                with traced(self.model.device) as counts:
                    timed(steps)
                traces.append(counts)
        except Exception as error:  # others may work
            self.fails(way, error)
            return True
        self.add(way, **each(*traces, self.more - self.few), **{"peak MB": peak})
        return True


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes, and of how many."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "rounds": len(values),
    }
