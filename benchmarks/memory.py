"""Peak memory of training with a Jacobian beside plain training, a fresh process for each way.

A child makes two steps, forgets its peak so far, makes a few more and tells the peak of those
(VmHWM of Linux; where it may not be forgotten, that of the whole child, which the table says).
What balancing has to hold is J, the direction and the method's own state, in float32:
((T + 1) P + state) * 4 bytes; the last column is the memory above plain PyTorch in units of that.

    python benchmarks/memory.py [--rounds 1] [--models MLP] [--options '{"on_bad_loss": "ignore"}']
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import Model, Trunk, resnet, square, transformer
from report import arguments, bars, begin, end, notes, table
from ways import FITS, LIGHTNING, LOOPS, MINNORM, PLAIN, Way, balanced

TRUNKS: dict[str, tuple[Trunk, tuple[int, ...]]] = {
    "MLP": (square(2048, 6), (32, 2048)),
    "ResNet-50": (resnet("resnet50"), (8, 3, 64, 64)),
    "transformer": (transformer(12, 416, 13), (8, 64, 416)),
}
TASKS = (3, 11)
# Rows of T x P that a method keeps, beside J and the direction.
OWN_STATE = {MINNORM: 0, "DualBalance": 1}
OURS = {f"MultiTaskModule, {name}": name for name in OWN_STATE}
WAYS = [PLAIN, LIGHTNING, "our engine, MinNorm", *OURS, "textbook loop"]
WAYS += [way for way in LOOPS if way.startswith("TorchJD")]
STEPS = 2
# Freed memory goes back at once, so that the peak is of what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--models", default="", help="only the trunk whose name holds this")
    parser.add_argument("--ways", default="", help="only plain PyTorch and names that hold this")
    parser.add_argument("--options", type=json.loads, default={}, help="of MultiTaskModule, JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    if "--child" in sys.argv:
        child(parser.parse_args())
        return
    args = begin(parser)
    ways = [way for way in WAYS if way == PLAIN or args.ways in way]
    found = {
        model.name: compare(model, trunk, ways, args)
        for trunk in TRUNKS
        if args.models in trunk
        for model in (model_of(trunk, tasks) for tasks in TASKS)
    }
    end(args, found, partial(plot, found=found))


def model_of(trunk: str, tasks: int) -> Model:
    return Model(f"{trunk}, T={tasks}", tasks, *TRUNKS[trunk])


# ------------------------------------------------------------------------------ a child


def child(args: argparse.Namespace) -> None:
    """Train in one way and print the peak in bytes and whether an earlier one was forgotten."""
    torch.set_num_threads(args.threads)
    name, trunk, tasks = args.child
    model = model_of(trunk, int(tasks))
    reset: list[bool] = []
    if name in LOOPS:
        timed = LOOPS[name](model)
        reset.append(forget_peak())
    else:
        fit: Way = FITS[name] if name == LIGHTNING else balanced(OURS[name], **args.options)
        timed = partial(fit, started=lambda: reset.append(forget_peak()))(model)
    timed(STEPS)
    print(json.dumps([peak(), all(reset)]))


def forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """Most bytes in memory since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---------------------------------------------------------------------------- the parent


def compare(model: Model, trunk: str, ways: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """A table of all ways of one model."""
    peaks: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for way in ways:
        each = [run(way, trunk, model.tasks, args) for _ in range(args.rounds)]
        failed = [found for found in each if isinstance(found, str)]
        if failed:
            reasons[way] = failed[0]
            continue
        peaks[way] = statistics.median(found[0] for found in each)
        if not all(found[1] for found in each):
            reasons[way] = "the peak could not be forgotten; it is that of the whole process"
    shared = model.shared()
    megabytes, multiples = {}, {}
    for way in ways:
        above = peaks[way] - peaks[PLAIN] if way in peaks and PLAIN in peaks else None
        state = OWN_STATE.get(OURS.get(way, ""), 0) * model.tasks
        megabytes[way] = None if above is None else above / 1e6
        needed = 4 * (model.tasks + 1 + state) * shared
        bare = way in (PLAIN, LIGHTNING)
        multiples[way] = None if above is None or bare else above / needed
    jacobian = 4e-6 * model.tasks * shared
    print(f"### {model.name}: P = {shared / 1e6:.1f} million, J = {jacobian:,.0f} MB\n")
    rows = [[w, peaks[w] / 1e6 if w in peaks else None, megabytes[w], multiples[w]] for w in ways]
    table(["way", "peak, MB", "above plain, MB", "× (J + direction + state)"], rows)
    notes(reasons)
    return {"above_mb": megabytes, "multiples": multiples, "peaks": peaks, "reasons": reasons}


def run(way: str, trunk: str, tasks: int, args: argparse.Namespace) -> Any:
    """Peak and whether it is of the steps alone, from a process of its own; a text if it failed."""
    command = [sys.executable, __file__, "--threads", str(args.threads)]
    command += ["--options", json.dumps(args.options), "--child", way, trunk, str(tasks)]
    environment = {**os.environ, **MALLOC}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def plot(path: Path, found: dict[str, Any]) -> None:
    panels = {
        name: {way: value for way, value in of["multiples"].items() if way in bars_of(of)}
        for name, of in found.items()
    }
    marks = dict.fromkeys(found, ("what it has to hold", 1.0))
    bars(path, panels, "memory above plain PyTorch / (J + direction + state)", marks)


def bars_of(figures: dict[str, Any]) -> list[str]:
    """Ways that hold a Jacobian or something in its stead."""
    return [way for way in figures["multiples"] if way not in (PLAIN, LIGHTNING)]


if __name__ == "__main__":
    main()
