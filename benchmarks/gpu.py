"""On one CUDA device: times, kernel launches and synchronisations of a step, and peak memory.

The table of cost.py for its own networks, ResNet-50 at 288 x 384 and a transformer trunk in
bfloat16; in it, ``batched`` takes one backward pass of all tasks at once (``is_grads_batched``)
where the textbook loop takes one each. Without CUDA it says so and measures nothing; with
``--device cpu`` it runs there, to try the script, and counts no launches.

    python benchmarks/gpu.py [--rounds 9] [--models ResNet] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from functools import partial

import torch
from cost import figures, plot, show_costs
from networks import MODELS, Model, resnet, transformer
from report import arguments, begin, end, notes, table
from timing import Times, with_limit
from torch.profiler import ProfilerActivity, profile
from ways import FITS, LOOPS, Way

WAYS: dict[str, Way] = {**LOOPS, **FITS}
LAUNCHES = ("LaunchKernel",)
# Every call at which the host waits for the device.
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
FEW, MORE = 2, 12  # steps of the two profiled runs, whose difference is without set-up


def models(device: str) -> dict[str, Model]:
    large = [
        Model("ResNet-50 288x384, T=3", 3, resnet("resnet50"), (8, 3, 288, 384)),
        Model(
            "transformer bf16, T=3", 3, transformer(12, 768), (8, 256, 768), dtype=torch.bfloat16
        ),
    ]
    every = [*MODELS.values(), *large]
    return {model.name: dataclasses.replace(model, device=device) for model in every}


def counted(run: Way, model: Model) -> dict[str, float | None]:
    """Launches and waits of a step, and the most memory of a short run in MB."""
    found = {}
    timed, on_gpu = run(model), model.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for steps in (FEW, MORE):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with profile(activities=activities) as trace:
            timed(steps)
        calls = {event.key: event.count for event in trace.key_averages()}
        found[steps] = [
            sum(count for key, count in calls.items() if any(name in key for name in names))
            for names in (LAUNCHES, WAITS)
        ]
    each = [(b - a) / (MORE - FEW) for a, b in zip(found[FEW], found[MORE], strict=True)]
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    return {"launches": each[0], "synchronisations": each[1], "peak MB": peak}


def show_counts(model: Model, times: Times) -> dict[str, dict[str, float | None]]:
    """A table of counts, each way alone on the device."""
    found, reasons = {}, {}
    for name, way in WAYS.items():
        if name in times.reasons:
            continue
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without CUDA
        try:
            found[name] = counted(way, model)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}"
    rows = [[name, *values.values()] for name, values in found.items()]
    table(["way", "launches a step", "synchronisations a step", "peak, MB"], rows)
    notes(reasons)
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--models", default="", help="only those whose name holds this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    if "cpu" not in sys.argv and not torch.cuda.is_available():
        parser.parse_args()
        print("No CUDA device: nothing is measured.")
        return
    args = begin(parser)
    if args.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}.\n")
    measured, counts = {}, {}
    for name, model in models(args.device).items():
        if args.models in name:
            measured[name] = with_limit(model, WAYS, args.rounds)
            show_costs(model, measured[name])
            counts[name] = show_counts(model, measured[name])
    found = {"times": figures(measured), "counts": counts}
    end(args, found, partial(plot, measured=measured, methods=False))


if __name__ == "__main__":
    main()
