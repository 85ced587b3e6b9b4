"""Cheaper ways to the same direction: what a step costs, and how near it comes.

Each balancer with task gradients by all parameters, and by less: its cost beside plain Lightning
(interleaved rounds), and the cosine of its direction with the exact one, on the same network and
batch, at two places. In the first step with random targets, which leave the task gradients nearly
orthogonal; and after sixty steps on targets that have something in common, and scales that are
two orders of magnitude apart, where the task gradients are so too.

    python benchmarks/cheaper.py [--rounds 5] [--models T=40] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from networks import MODELS, Model, Network, square, transformer
from report import arguments, bars, begin, end, notes, table
from timing import interleaved
from torch import Tensor
from torch.utils.data import DataLoader
from ways import FITS, LIGHTNING, Balanced, Time, Way, fit

import lightning_mtl as mtl

LEVELS = ("parameters", "last_layer", "representation", "representation+1", "representation+2")
METHODS = ("MinNorm", "IMTLG", "UPGrad", "NashMTL", "CAGrad", "AlignedMTL")


EVERY = (4, 16)
# Where the representation says less about all parameters than in the networks of the other tables.
MORE = (
    Model("MLP of ten layers, T=40", 40, square(256, 10), (128, 256)),
    Model("transformer of four layers, T=40", 40, transformer(4, 128, 2), (32, 16, 128)),
)
STEPS = 60


class Grab(Callback):
    """Keeps the direction of a step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten() for p in module.net.trunk.parameters()]
        self.direction = torch.cat(grads).double()


def related(model: Model, seed: int) -> list[Tensor]:
    """Inputs, and targets that are linear in them, of scales from 0.1 to 10."""
    fixed, drawn = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    x = torch.randn(*model.inputs, generator=drawn)
    width = x[0].numel()
    common = torch.randn(width, 1, generator=fixed)
    weights = torch.randn(width, model.tasks, generator=fixed) + common
    scales = torch.logspace(-1, 1, model.tasks)
    return [x, x.flatten(1) @ weights / width**0.5 * scales]


def start(model: Model) -> tuple[Network, list[Tensor]]:
    return model.network(), model.batch()


def trained(model: Model) -> tuple[Network, list[Tensor]]:
    """After some steps on the logarithm of the losses, which has no favourite among the tasks."""
    network = model.network()
    steps = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(STEPS):
        steps.zero_grad()
        losses = network.losses(related(model, 100 + step)).values()
        torch.stack(list(losses)).log().sum().backward()
        steps.step()
    return network, related(model, 1)


def direction(network: Network, batch: list[Tensor], method: str, level: str) -> Tensor:
    grab = Grab()
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
    trainer.fit(Balanced(copy.deepcopy(network)), DataLoader([batch], None))
    return grab.direction


def cosines(network: Network, batch: list[Tensor]) -> dict[str, list[float]]:
    """Of every method by every level, with its exact direction."""
    exact = [direction(network, batch, method, "parameters") for method in METHODS]
    return {
        level: [
            float(torch.cosine_similarity(direction(network, batch, method, level), d, dim=0))
            for method, d in zip(METHODS, exact, strict=True)
        ]
        for level in LEVELS
    }


def by_level(level: str) -> Way:
    return partial(fit, callbacks=lambda: [mtl.MinNorm(gradients=level)])


def every(n: int) -> Way:
    """Timed in whole periods: all other steps are plain ones."""

    def way(model: Model) -> Time:
        timed = fit(model, callbacks=lambda: [mtl.Every(n, mtl.MinNorm())])
        return lambda number: timed(-(-number // n) * n)

    return way


def measure(model: Model, rounds: int) -> dict[str, Any]:
    ways: dict[str, Way] = {LIGHTNING: FITS[LIGHTNING]}
    ways |= {level: by_level(level) for level in LEVELS}
    ways |= {f"Every({n})": every(n) for n in EVERY}
    times = interleaved(model, ways, rounds)
    near = {"first step": cosines(*start(model)), f"step {STEPS}": cosines(*trained(model))}
    print(f"### {model.name}\n")
    rows = []
    for way in ways:
        ms = times.median(way)
        cells = [f"{c:.3f}" for found in near.values() for c in found.get(way, [])]
        rows.append([way, None if ms is None else 1e3 * ms, times.ratio(way, LIGHTNING)])
        rows[-1] += cells or [None] * (len(METHODS) * len(near))
    head = [f"{method}, {when}" for when in near for method in METHODS]
    table(["MinNorm by", "ms a step", "× plain Lightning", *head], rows)
    notes(times.reasons)
    return {"ratios": {way: times.ratio(way, LIGHTNING) for way in ways}, "cosines": near}


def plot(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    panels = {name: found["ratios"] for name, found in measured.items()}
    bars(path, panels, "× plain Lightning")


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--models", default="", help="only those whose name holds this")
    args = begin(parser)
    chosen = [model for model in (*MODELS.values(), *MORE) if args.models in model.name]
    measured = {model.name: measure(model, args.rounds) for model in chosen}
    end(args, measured, partial(plot, measured=measured))


if __name__ == "__main__":
    main()
