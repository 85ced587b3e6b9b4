"""Small problems whose trouble is known, for the rules of ``lightning-mtl diagnose``.

Every task is a regression on the same inputs, y_t = u_t · tanh(W x) + σ_t ε, with a teacher of 16
features and targets of variance 1 before the noise. A problem says how the u_t of its tasks lie to
each other, what their losses are multiplied by, how noisy their labels are, how wide the shared
layer is, and whether tasks have heads of their own. Batches are drawn anew in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule

INPUTS, FEATURES, BATCH, RATE = 16, 16, 32, 1e-2
KINDS = ("alike", "unrelated", "scale", "direction", "scale and direction", "noisy task")
KINDS += ("capacity", "label noise")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        kind: what its trouble is.
        number: which one of its kind and size.
        features: W, shape ``(inputs, features)``.
        mixtures: u_t as rows, shape ``(T, features)``, each giving targets of variance 1.
        scales: what the losses are multiplied by, shape ``(T,)``.
        noise: σ_t, shape ``(T,)``.
        width: of the shared layer.
        heads: whether each task has one; otherwise all share the only output.
    """

    kind: str
    number: int
    features: Tensor
    mixtures: Tensor
    scales: Tensor
    noise: Tensor
    width: int
    heads: bool = True

    @property
    def tasks(self) -> int:
        return len(self.mixtures)

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.tasks} tasks, {self.number}"

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs ``(count, inputs)`` and targets ``(count, T)``."""
        x = torch.randn(count, INPUTS, generator=generator)
        clean = torch.tanh(x @ self.features) @ self.mixtures.T
        return x, clean + self.noise * torch.randn(clean.shape, generator=generator)


def problem(kind: str, tasks: int, number: int) -> Problem:
    """The problem of a kind, the same whenever the arguments are."""
    seed = np.random.SeedSequence((KINDS.index(kind), tasks, number)).generate_state(1)
    generator = torch.Generator().manual_seed(int(seed[0]))
    own = torch.randn(tasks, FEATURES, generator=generator)
    scales, noise, width, heads = torch.ones(tasks), torch.full((tasks,), 0.3), 32, True
    if kind == "alike":
        own = torch.randn(1, FEATURES, generator=generator) + 0.3 * own
    elif kind == "scale":
        scales, width = torch.logspace(0, -3, tasks), (8, 16)[number % 2]
    elif kind in ("direction", "scale and direction"):
        own, heads, width = torch.randn(1, FEATURES, generator=generator) + 0.7 * own, False, 16
        if kind != "direction":
            scales = torch.logspace(0, -2, tasks)
    elif kind == "noisy task":
        noise[0], width = 3.0, (8, 16)[number % 2]
    elif kind == "capacity":
        width = max(2, tasks // 2 + number % 2)
    elif kind == "label noise":
        noise, width = torch.full((tasks,), 1.5), 16
    scales = scales[torch.randperm(tasks, generator=generator)]
    features = 2 * torch.randn(INPUTS, FEATURES, generator=generator) / INPUTS**0.5
    x = torch.randn(4096, INPUTS, generator=generator)
    own = own / (torch.tanh(x @ features) @ own.T).std(0)[:, None]
    return Problem(kind, number, features, own, scales, noise, width, heads)


class Stream:
    """A training loader: batches of a problem that depend on the seed alone."""

    def __init__(self, given: Problem, seed: int, batches: int) -> None:
        self.given, self.seed, self.batches = given, seed, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            yield self.given.draw(BATCH, generator)


class Student(MultiTaskModule):
    """A shared layer, and a linear head for each task or one for all."""

    def __init__(self, given: Problem, steps: int) -> None:
        super().__init__([f"t{t}" for t in range(given.tasks)])
        self.given, self.steps = given, steps
        self.trunk = nn.Sequential(nn.Linear(INPUTS, given.width), nn.Tanh())
        self.heads = nn.Linear(given.width, given.tasks if given.heads else 1)
        if given.heads:  # apart, so that a head belongs to one task
            self.heads = nn.ModuleList(nn.Linear(given.width, 1) for _ in range(given.tasks))

    def task_losses(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        z = self.trunk(x)
        heads = self.heads if self.given.heads else [self.heads] * self.given.tasks
        return {
            f"t{t}": self.given.scales[t] * (head(z)[:, 0] - y[:, t]).square().mean()
            for t, head in enumerate(heads)
        }

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), RATE)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
