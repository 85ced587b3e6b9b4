"""What weights of an earlier step are worth, and cheaper ways, all through a training.

A network of `cheaper.py` learns 600 batches, each drawn anew, by the logarithm of its losses. At
some steps, cosines with the exact direction of the batch are taken: of the exact weights of an
earlier step; of an estimated Gramian that was corrected by the exact one of an earlier step; and of
the cheaper ways as they are. The correction keeps, of the exact Gramian and of that at the
representation, the ratio of the norms and the difference of the cosines.

    python benchmarks/stale.py [--rounds 6] [--models "MLP 0.9M, T=40"] [--same]

``--rounds`` is the number of steps that are looked at; with ``--same`` all steps have one batch, as
where there is no noise of batches.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cheaper import LEVELS, METHODS, MORE, cosines, related
from networks import MODELS, Model, Network
from report import arguments, bars, begin, end, table
from torch import Tensor

import lightning_mtl as mtl

STEPS = 600
AGES = (1, 8, 32)
CHOSEN = ("MLP 0.9M, T=3", "MLP 0.9M, T=40", "MLP of ten layers, T=40")
CHOSEN += ("transformer of four layers, T=40", "ResNet-18, T=3")


def gramians(network: Network, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of all shared parameters, of the representation; and the losses. All in float64."""
    marked: list[Tensor] = []

    def mark(z: Tensor) -> Tensor:
        marked.append(z)
        return z

    losses = list(network.losses(batch, mark).values())
    inputs = [*network.trunk.parameters(), *marked]
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, inputs, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    width = marked[0].numel()
    return (
        inner([row[:-width] for row in rows]),
        inner([row[-width:] for row in rows]),
        torch.stack(losses).detach().double(),
    )


def inner(rows: list[Tensor]) -> Tensor:
    parts = [part.double() for part in torch.stack(rows).split(1 << 15, dim=1)]
    total: Tensor = sum((part @ part.T for part in parts[1:]), parts[0] @ parts[0].T)
    return total


def corrected(exact: Tensor, rough: Tensor, now: Tensor) -> Tensor:
    """An estimate of the Gramian of now, from the one at the representation and a pair before."""
    (cosines_exact, norms), (cosines_rough, at), (cosines_now, norms_now) = map(
        split, (exact, rough, now)
    )
    values, vectors = torch.linalg.eigh(cosines_now + cosines_exact - cosines_rough)
    unit = (vectors * values.clamp(min=0)) @ vectors.T
    sizes = norms_now * norms / at
    return unit * sizes * sizes[:, None]


def split(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and norms."""
    norms = gramian.diagonal().clamp(min=1e-300).sqrt()
    return gramian / norms / norms[:, None], norms


def cosine(weights: Tensor, others: Tensor, gramian: Tensor) -> float:
    """Of two directions that are combinations of the same rows."""
    lengths = (weights @ gramian @ weights).sqrt() * (others @ gramian @ others).sqrt()
    return float(weights @ gramian @ others / lengths)


def through(model: Model, looks: int, same: bool) -> dict[str, list[list[float]]]:
    """Cosines of every way: a list a method, of as many as there were looks."""
    network = model.network()
    steps = torch.optim.Adam(network.parameters(), lr=1e-3)
    found: dict[str, list[list[float]]] = {}
    every = STEPS // looks
    kept: dict[int, Any] = {}
    for step in range(1, STEPS + 1):
        batch = related(model, 0 if same else 100 + step)
        if any((step + age) % every == 0 for age in AGES):
            exact, rough, losses = gramians(network, batch)
            kept[step] = exact, rough, [weighed(method, exact, losses) for method in METHODS]
        if step % every == 0:
            exact, rough, losses = gramians(network, batch)
            best = [weighed(method, exact, losses) for method in METHODS]
            ways: dict[str, list[Tensor]] = {}
            for age in AGES:
                before, at, ways[f"weights of {age} before"] = kept[step - age]
                estimate = corrected(before, at, rough)
                now = [weighed(method, estimate, losses) for method in METHODS]
                ways[f"corrected {age} before"] = now
            values = {
                way: [cosine(w, d, exact) for w, d in zip(weights, best, strict=True)]
                for way, weights in ways.items()
            }
            for way, cells in (values | cosines(network, batch)).items():
                methods = found.setdefault(way, [[] for _ in METHODS])
                for values_so_far, value in zip(methods, cells, strict=True):
                    values_so_far.append(value)
        steps.zero_grad()
        torch.stack(list(network.losses(batch).values())).log().sum().backward()
        steps.step()
    return found


def weighed(method: str, gramian: Tensor, losses: Tensor) -> Tensor:
    weights: Tensor = getattr(mtl, method)().weights(gramian.clone(), losses.clone())
    return weights


def measure(model: Model, looks: int, same: bool) -> dict[str, list[list[float]]]:
    found = through(model, looks, same)
    del found[LEVELS[0]]
    print(f"### {model.name}{', one batch' if same else ''}\n")
    cells = [
        [way, *(f"{mean(values):.3f} ({min(values):.3f})" for values in methods)]
        for way, methods in found.items()
    ]
    table(["mean cosine (least)", *METHODS], cells)
    return found


def plot(path: Path, measured: dict[str, dict[str, list[list[float]]]]) -> None:
    panels = {
        name: {way: mean(map(mean, methods)) for way, methods in found.items()}
        for name, found in measured.items()
    }
    bars(path, panels, "mean cosine with the exact direction")


def main() -> None:
    parser = arguments(__doc__, rounds=6)
    parser.add_argument("--models", default="", help="only those whose name holds this")
    parser.add_argument("--same", action="store_true", help="the same batch in every step")
    args = begin(parser)
    known = {**MODELS, **{model.name: model for model in MORE}}
    chosen = [known[name] for name in CHOSEN if args.models in name]
    measured = {model.name: measure(model, args.rounds, args.same) for model in chosen}
    end(args, measured, partial(plot, measured=measured))


if __name__ == "__main__":
    main()
