"""Many runs at once: every seed of every cell of a table is a row of the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.logic_gates.data import BATCH, GATES, INPUTS, orders, truth
from examples.logic_gates.directions import (
    AS_CODED,
    SPLIT,
    Base,
    Reading,
    base_weights,
    factors,
    tensioned,
)
from examples.logic_gates.model import Network, learned

LIMIT = 3000  # epochs
MOMENTUM = 0.9


@dataclass(frozen=True)
class Cell:
    """What one cell of a table trains.

    Args:
        base: base direction; of no account with a single gate.
        alpha: the paper's :math:`\\alpha`, how far the tension follows a task; ``None`` for none.
        window: the paper's :math:`T`, steps in the history of gradient norms.
        scale: the paper's :math:`c`, what the targets of XOR are multiplied by.
        gates: what is trained.
        lr: learning rate.
    """

    base: Base = "central"
    alpha: float | None = None
    window: int = 10
    scale: float = 1.0
    gates: tuple[str, ...] = GATES
    lr: float = 0.05


@dataclass
class Curves:
    """What figure 7 draws of one run, a list entry a step: norms, angles in degrees, by task."""

    norms: list[list[float]] = field(default_factory=list)
    angles: list[list[float]] = field(default_factory=list)
    direction: list[float] = field(default_factory=list)

    def add(self, rows: Tensor, direction: Tensor) -> None:
        norms, length = rows.norm(dim=1), direction.norm()
        cosines = (rows @ direction / (norms * length)).clamp(-1, 1)
        self.norms.append(norms.tolist())
        self.angles.append(cosines.arccos().rad2deg().tolist())
        self.direction.append(length.item())


def initial(network: Network) -> dict[str, Tensor]:
    """Its parameters, those of the heads stacked over tasks: shapes (2, 2), (2,), (T, 2), (T,)."""
    layer, heads = network.encoder[0], network.heads.values()
    parameters = {
        "weight": layer.weight,
        "bias": layer.bias,
        "head_weight": torch.cat([head.weight for head in heads]),
        "head_bias": torch.cat([head.bias for head in heads]),
    }
    return {name: value.detach() for name, value in parameters.items()}


def gradients_of(
    parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses and gradients of :class:`~examples.logic_gates.model.Network` in ``R`` runs.

    By hand: with so small a network, automatic differentiation would be most of the time.

    Args:
        parameters: those of :func:`initial`, each with a leading dimension ``R``.
        inputs: shape ``(R, B, 2)``.
        targets: shape ``(R, B, T)``.

    Returns:
        Mean squared errors ``(R, T)``; gradients by the shared parameters ``(R, T, 6)``, weight
        first; plain gradients of the heads.
    """
    hidden = (inputs @ parameters["weight"].mT + parameters["bias"].unsqueeze(1)).sigmoid()
    errors = hidden @ parameters["head_weight"].mT + parameters["head_bias"].unsqueeze(1) - targets
    slopes = 2 / inputs.shape[1] * errors
    inner = parameters["head_weight"].unsqueeze(1) * (hidden * (1 - hidden)).unsqueeze(2)
    inner = inner * slopes.unsqueeze(3)  # by what goes into each sigmoid: (R, B, T, 2)
    weight = (inner.flatten(2).mT @ inputs).unflatten(1, inner.shape[2:]).flatten(2)
    heads = {"head_weight": slopes.mT @ hidden, "head_bias": slopes.sum(1)}
    return errors.square().mean(1), torch.cat([weight, inner.sum(1)], dim=2), heads


class Runs:
    """Runs of cells with the same gates: parameters, momentum and history, a row a run.

    A run that has learned all its tasks leaves; the rows of the others move up.

    Args:
        cells: what is trained, all with the same gates.
        seeds: of the order of the inputs; the initial weights are the same in every run.
        reading: of the tension.
        limit: epochs.
    """

    def __init__(
        self, cells: Sequence[Cell], seeds: Sequence[int], reading: Reading, limit: int
    ) -> None:
        (gates,) = {cell.gates for cell in cells}
        self.reading = reading
        self.cells = [cell for cell in cells for _ in seeds]
        runs = len(self.cells)
        self.parameters = {
            name: value.expand(runs, *value.shape).clone()
            for name, value in initial(Network(gates)).items()
        }
        self.momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.orders = torch.stack([orders(seed, limit) for seed in seeds])  # shared by the cells
        self.seeds = torch.arange(len(seeds)).repeat(len(cells))
        self.targets = torch.stack(
            [torch.stack([truth(gate, cell.scale) for gate in gates], 1) for cell in self.cells]
        )
        self.lr = self._column([cell.lr for cell in self.cells], torch.float32)
        self.alpha = self._column([cell.alpha or 0.0 for cell in self.cells])
        self.window = self._column([cell.window for cell in self.cells])
        self.bases = {
            base: torch.tensor([cell.base == base for cell in self.cells]).unsqueeze(1)
            for base in ("uniform", "min-norm", "central")
        }
        self.tense = torch.tensor([cell.alpha is not None for cell in self.cells]).unsqueeze(1)
        longest = max(cell.window for cell in cells)
        self.norms = torch.zeros(runs, len(gates), 2 * longest, dtype=torch.float64)
        self.steps = 0

    @staticmethod
    def _column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype).unsqueeze(1)

    def epoch(self, number: int, curves: Curves | None = None) -> Tensor:
        """Two steps of every run; mean losses, shape ``(R, T)``."""
        index = self.orders[self.seeds, number]
        losses = [self.step(batch, curves) for batch in index.split(BATCH, dim=1)]
        return torch.stack(losses).mean(0)

    def step(self, index: Tensor, curves: Curves | None = None) -> Tensor:
        """One step of SGD on the inputs ``index``, shape ``(R, 2)``; losses before it."""
        targets = self.targets.gather(1, index.unsqueeze(2).expand(-1, -1, self.targets.shape[2]))
        losses, rows, gradients = gradients_of(self.parameters, INPUTS[index], targets)
        direction = self.direction(rows.double(), losses.double())
        if curves is not None:
            curves.add(rows[0].double(), direction[0])
        gradients["weight"], gradients["bias"] = direction.float().split(SPLIT, dim=1)
        for name, parameter in self.parameters.items():
            gradient = gradients[name].view_as(parameter)
            momentum = self.momentum[name].mul_(MOMENTUM).add_(gradient)
            parameter -= self.lr.view(-1, *[1] * (parameter.ndim - 1)) * momentum
        return losses

    def direction(self, rows: Tensor, losses: Tensor) -> Tensor:
        """Directions of all runs, shape ``(R, P)``, float64, from rows of shape ``(R, T, P)``."""
        gramian = rows @ rows.mT
        weights = sum(
            torch.where(mask, base_weights(gramian, base), 0.0) for base, mask in self.bases.items()
        )
        base = (weights.unsqueeze(1) @ rows).squeeze(1)
        if not self.tense.any():
            return base
        self.norms = self.norms.roll(1, dims=2)  # the newest first
        self.norms[:, :, 0] = rows.norm(dim=2)
        self.steps += 1
        shift = self.window if self.reading.apart else torch.ones_like(self.window)
        ratios = self._mean(torch.zeros_like(shift)) / self._mean(shift)
        tension = factors(losses, ratios, self.alpha, self.reading)
        acts = self.tense & (self.steps >= self.window + shift)
        return torch.where(acts, tensioned(rows, base, tension, self.reading), base)

    def _mean(self, start: Tensor) -> Tensor:
        """Mean norm of the window that begins ``start`` steps ago, shape ``(R, T)``."""
        age = torch.arange(self.norms.shape[2])
        inside = (age >= start) & (age < start + self.window)
        return (self.norms * inside.unsqueeze(1)).sum(2) / self.window

    def keep(self, left: Tensor) -> None:
        """Only the runs ``left``, indices of rows."""
        for values in (self.parameters, self.momentum, self.bases):
            values.update({name: value[left] for name, value in values.items()})
        for name in ("seeds", "targets", "lr", "alpha", "window", "tense", "norms"):
            setattr(self, name, getattr(self, name)[left])


def train(
    cells: Sequence[Cell],
    seeds: Sequence[int],
    reading: Reading = AS_CODED,
    limit: int = LIMIT,
) -> dict[Cell, Tensor]:
    """Train every cell with every seed.

    Args:
        cells: what is trained; those with the same gates go together.
        seeds: of the order of the inputs.
        reading: of the tension.
        limit: epochs.

    Returns:
        By cell the epoch, counted from zero, in which the last task was learned: shape
        ``(len(seeds),)``, float64, NaN where it was not.
    """
    results: dict[Cell, Tensor] = {}
    for gates in dict.fromkeys(cell.gates for cell in cells):
        group = [cell for cell in cells if cell.gates == gates]
        found = _train(Runs(group, seeds, reading, limit), len(gates), limit)
        results.update(zip(group, found.view(len(group), len(seeds)), strict=True))
    return results


@torch.no_grad()
def _train(runs: Runs, tasks: int, limit: int) -> Tensor:
    epochs = torch.full((len(runs.cells), tasks), torch.nan, dtype=torch.float64)
    rows = torch.arange(len(runs.cells))  # which run each row is of
    for epoch in range(limit):
        below = learned(runs.epoch(epoch), tasks) & epochs[rows].isnan()
        epochs[rows] = torch.where(below, float(epoch), epochs[rows])
        left = epochs[rows].isnan().any(1)
        if not left.all():
            rows = rows[left]
            runs.keep(left.nonzero()[:, 0])
        if not len(rows):
            break
    return epochs.max(1).values  # NaN wins


@torch.no_grad()
def curves(cell: Cell, seed: int, epochs: int) -> Curves:
    """Angles and norms over the first epochs of one run, as in figure 7."""
    found, runs = Curves(), Runs([cell], [seed], AS_CODED, epochs)
    for epoch in range(epochs):
        runs.epoch(epoch, found)
    return found
