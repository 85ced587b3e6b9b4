"""What a balanced step costs beside a plain one, textbook code, TorchJD, Lightning and the limit.

All ways train the same network on the same batch, in turn, in one process. The limit is one
forward pass and T times the rest of a plain step, t_fwd + T * (t_plain - t_fwd). It counts the
optimiser and the backward pass of every head T times, so that with many heads or a small batch a
step can be cheaper. A ratio is the median of the ratios within a round.

    python benchmarks/cost.py [--rounds 9] [--models ResNet] [--json FILE] [--plot FILE]
    python benchmarks/cost.py --methods     what other balancers add to MinNorm in Trainer.fit
    python benchmarks/cost.py --blocks      the Gramian by blocks beside rows of all parameters
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from networks import MODELS, Model, transformer
from report import arguments, bars, begin, end, notes, table
from timing import FORWARD, Times, interleaved, with_limit
from ways import FITS, LIGHTNING, LIMIT, LOOPS, MINNORM, PLAIN, Way, balanced

TRANSFORMERS = {
    f"transformer of four layers, T={tasks}": Model(
        f"transformer of four layers, T={tasks}", tasks, transformer(4, 128, 2), (32, 16, 128)
    )
    for tasks in (3, 11)
}
AUTOGRAM = "TorchJD MGDA, autogram"
METHODS = (MINNORM, "DualBalance", "CAGrad", "NashMTL", "PCGrad", "UPGrad", "TaskTensioner")

Panels = dict[str, dict[str, float | None]]


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--models", default="", help="only those whose name holds this")
    parser.add_argument("--methods", action="store_true", help="other balancers beside MinNorm")
    parser.add_argument("--blocks", action="store_true", help="the Gramian by blocks beside rows")
    args = begin(parser)
    show = methods if args.methods else blocks if args.blocks else costs
    models = {**MODELS, **TRANSFORMERS} if args.blocks else MODELS
    chosen = {name: model for name, model in models.items() if args.models in name}
    if not chosen:
        parser.error(f"Expected a part of one of {list(models)} but got {args.models!r}.")
    measured = {name: show(model, args.rounds) for name, model in chosen.items()}
    beside = args.methods or args.blocks
    end(args, figures(measured), partial(plot, measured=measured, methods=beside))


def costs(model: Model, rounds: int) -> Times:
    """Every way beside the plain PyTorch step and the limit, and fits beside plain Lightning."""
    times = with_limit(model, {**LOOPS, **FITS}, rounds)
    show_costs(model, times)
    return times


def show_costs(model: Model, times: Times) -> None:
    print(f"### {model.name}\n")
    rows = []
    for way in [FORWARD, PLAIN, LIMIT, *compared(times)]:
        ms = times.median(way)
        bases = [times.ratio(way, base) for base in (PLAIN, LIMIT)]
        beside = times.ratio(way, LIGHTNING) if way in FITS else None
        rows.append([way, None if ms is None else 1e3 * ms, *bases, beside])
    table(["way", "ms a step", "× plain PyTorch", "× limit", "× plain Lightning"], rows)
    notes(times.reasons)


def compared(times: Times) -> list[str]:
    """The ways that stand beside the plain step and the limit."""
    return [way for way in times.ways if way not in (FORWARD, PLAIN, LIMIT)]


def methods(model: Model, rounds: int) -> Times:
    """Balancers in ``Trainer.fit`` beside MinNorm."""
    ways: dict[str, Way] = {LIGHTNING: FITS[LIGHTNING], **{m: balanced(m) for m in METHODS}}
    times = interleaved(model, ways, rounds)
    print(f"### {model.name}\n")
    rows = []
    for way in ways:
        ms, adds = times.median(way), times.adds(way, MINNORM)
        row = [way, None if ms is None else 1e3 * ms, times.ratio(way, LIGHTNING)]
        more = None if adds is None or way in (LIGHTNING, MINNORM) else 1e3 * adds
        rows.append([*row, times.ratio(way, MINNORM), more])
    table(["balancer", "ms a step", "× plain Lightning", "× MinNorm", "adds, ms"], rows)
    notes(times.reasons)
    return times


def blocks(model: Model, rounds: int) -> Times:
    """Rows of all parameters in ``Trainer.fit``, and blocks of them; one pass more is allowed."""
    ways: dict[str, Way] = {LIGHTNING: FITS[LIGHTNING], MINNORM: balanced(MINNORM)}
    ways |= {
        f"{number} blocks": balanced(MINNORM, gradient_memory="blocks", gradient_blocks=number)
        for number in (4, 16)
    }
    ways |= {way: LOOPS[way] for way in ("our engine, MinNorm", AUTOGRAM) if way in LOOPS}
    times = interleaved(model, ways, rounds)
    print(f"### {model.name}: one pass more is {(model.tasks + 1.2) / model.tasks:.2f}\n")
    rows = []
    for way in ways:
        ms = times.median(way)
        row = [way, None if ms is None else 1e3 * ms, times.ratio(way, LIGHTNING)]
        rows.append([*row, times.ratio(way, MINNORM)])
    table(["way", "ms a step", "× plain Lightning", "× rows"], rows)
    notes(times.reasons)
    return times


def figures(measured: dict[str, Times]) -> dict[str, Any]:
    return {
        name: {
            "ms": {way: 1e3 * (times.median(way) or 0.0) for way in times.seconds},
            "ratios": {
                base: {way: times.ratio(way, base) for way in times.seconds}
                for base in (PLAIN, LIMIT, LIGHTNING)
                if base in times.seconds
            },
            "rounds_ms": {w: [1e3 * s for s in all_] for w, all_ in times.seconds.items()},
            "reasons": times.reasons,
        }
        for name, times in measured.items()
    }


def plot(path: Path, measured: dict[str, Times], *, methods: bool) -> None:
    base = LIGHTNING if methods else PLAIN
    panels: Panels = {
        name: {way: times.ratio(way, base) for way in compared(times) if way != base}
        for name, times in measured.items()
    }
    if methods:
        bars(path, panels, f"ratio to {base}", ours=(MINNORM,))
    else:
        marks = {name: ("limit", times.ratio(LIMIT, base)) for name, times in measured.items()}
        bars(path, panels, f"ratio to {base}", marks)


if __name__ == "__main__":
    main()
