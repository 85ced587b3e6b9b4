"""Everything that is to be known of one NVIDIA GPU, in at most ten minutes: ``make gpu``.

First the tests of ``tests/gpu``, then times, kernel launches, waits, copies and memory of a step.
All results go to one JSON file, written after each of them: what the time does not suffice for is
left out, and the file says so. Needs torch, lightning, torchmetrics and pytest, nothing else, and
no network. With ``--device cpu`` tiny networks run there, to try it, and no launch is counted.

    python benchmarks/gpu.py [--out gpu.json] [--minutes 9.5] [--parts tests] [--device cpu]
    python benchmarks/gpu.py --table gpu.json       the results as tables, for docs/cost.md

Exit status 1 if a test failed, a part broke off, or the time did not suffice; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_parts import parts, run_part
from gpu_results import Results, describe
from gpu_table import tables

LEAST = 15.0  # seconds below which no part is begun
GRACE = 12.0  # seconds between a part's own end and the end that it is put to


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together")
    parser.add_argument("--parts", default="", help="only those whose name holds this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--table", type=Path, help="print the tables of this file, and end")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(tables(Results(args.table).read()))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing is measured. `--device cpu` tries the script.")
        return 2
    if args.part:
        run_part(args.part, Results(args.out), args.device, args.seconds)
        return 0
    every = parts(args.device)
    chosen = {name: budget for name, budget in every.items() if args.parts in name}
    if not chosen:
        parser.error(f"Expected a part of one of {list(every)} but got {args.parts!r}.")
    return run(Results(args.out), args.device, args.minutes, chosen)


def run(results: Results, device: str, minutes: float, chosen: dict[str, float]) -> int:
    """Every part in turn, in a process of its own, as long as there is time."""
    begun = time.monotonic()
    results.begin(describe(device), minutes)
    for name, budget in chosen.items():
        left = begun + 60 * minutes - time.monotonic()
        if left < LEAST + GRACE:
            results.part(name, state="left out", why="no time was left")
            continue
        print(f"== {name}: at most {min(budget, left):.0f} s of {left:.0f} s", flush=True)
        started = time.monotonic()
        results.part(name, state="running")
        state, why = _child(name, results.path, device, min(budget, left))
        results.part(name, state=state, why=why, seconds=round(time.monotonic() - started, 1))
        print(f"== {name}: {state}{f' ({why})' if why else ''}\n", flush=True)
    found = results.end(time.monotonic() - begun)
    counts = found.get("tests", {}).get("counts", {})
    broken = [name for name, part in found["parts"].items() if part["state"] != "done"]
    print(f"Tests: {counts or 'none'}. Not done: {broken or 'nothing'}. Results: {results.path}")
    return 1 if broken or counts.get("failed") or counts.get("error") else 0


def _child(name: str, path: Path, device: str, seconds: float) -> tuple[str, str]:
    """Run a part; how it ended, and why it did so."""
    command = [sys.executable, __file__, "--part", name, "--out", str(path), "--device", device]
    command += ["--seconds", str(max(seconds - GRACE, LEAST - 5))]
    environment = {
        **os.environ,
        # Sums of cuBLAS in one order: read when it starts.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_given()]),
    }
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "stopped", f"it did not end within {seconds:.0f} s"
    if done.returncode:
        return "failed", f"exit status {done.returncode}"
    short = Results(path).read()["parts"][name].get("short")
    return ("stopped", short) if short else ("done", "")


def _given() -> list[str]:
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


if __name__ == "__main__":
    raise SystemExit(main())
