"""Cheaper ways to the same direction: what a step costs, and how near it comes.

Each balancer with task gradients by all parameters, and by less: its cost beside plain Lightning
(interleaved rounds), and the cosine of its direction with the exact one, in the first step of the
same network on the same batch. Targets are random, which leaves the task gradients nearly
orthogonal: harder for an estimate of the Gramian than tasks that have something in common.

    python benchmarks/cheaper.py [--rounds 5] [--models T=40] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from networks import MODELS, Model
from report import arguments, bars, begin, end, notes, table
from timing import interleaved
from torch import Tensor
from torch.utils.data import DataLoader
from ways import FITS, LIGHTNING, Balanced, Time, Way, fit

import lightning_mtl as mtl

LEVELS = ("parameters", "last_layer", "representation", "representation+1", "representation+2")
METHODS = ("MinNorm", "IMTLG", "UPGrad", "NashMTL", "CAGrad", "AlignedMTL")


class Grab(Callback):
    """Keeps the direction of a step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten() for p in module.net.trunk.parameters()]
        self.direction = torch.cat(grads).double()


def direction(model: Model, method: str, level: str) -> Tensor:
    grab, network = Grab(), model.network()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        callbacks=[grab, getattr(mtl, method)(gradients=level)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Balanced(network), DataLoader([model.batch()], None))
    return grab.direction


def by_level(level: str) -> Way:
    return partial(fit, callbacks=lambda: [mtl.MinNorm(gradients=level)])


def every(n: int) -> Way:
    """Timed in whole periods: all other steps are plain ones."""

    def way(model: Model) -> Time:
        timed = fit(model, callbacks=lambda: [mtl.Every(n, mtl.MinNorm())])
        return lambda number: timed(-(-number // n) * n)

    return way


def measure(model: Model, rounds: int) -> dict[str, float | None]:
    ways: dict[str, Way] = {LIGHTNING: FITS[LIGHTNING]}
    ways |= {level: by_level(level) for level in LEVELS}
    ways |= {f"Every({n})": every(n) for n in (4, 16)}
    times = interleaved(model, ways, rounds)
    exact = {method: direction(model, method, "parameters") for method in METHODS}
    print(f"### {model.name}\n")
    rows = []
    for way in ways:
        cosines: list[float | None] = [None] * len(METHODS)
        if way in LEVELS:
            cosines = [
                float(torch.cosine_similarity(direction(model, m, way), exact[m], dim=0))
                for m in METHODS
            ]
        ms = times.median(way)
        cells = [None if c is None else f"{c:.3f}" for c in cosines]
        rows.append([way, None if ms is None else 1e3 * ms, times.ratio(way, LIGHTNING), *cells])
    table(["MinNorm by", "ms a step", "× plain Lightning", *(f"cos {m}" for m in METHODS)], rows)
    notes(times.reasons)
    return {way: times.ratio(way, LIGHTNING) for way in ways}


def plot(path: Path, measured: dict[str, dict[str, float | None]]) -> None:
    bars(path, measured, "× plain Lightning")


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--models", default="MLP 0.9M", help="only those whose name holds this")
    args = begin(parser)
    chosen = [model for name, model in MODELS.items() if args.models in name]
    measured = {model.name: measure(model, args.rounds) for model in chosen}
    end(args, measured, partial(plot, measured=measured))


if __name__ == "__main__":
    main()
