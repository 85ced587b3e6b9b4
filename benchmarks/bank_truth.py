"""What balancing brings on a problem of the bank: many trainings at once, in one batched product.

All methods, seeds and single-task runs of a problem are trained side by side, a stack of networks.
Weights come from the same functions as the balancers' own; Adam works element by element, so that
a stack of networks is that of many optimizers. tests/diagnose/test_bank.py holds a training of
this kind against the Trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from bank_problems import BATCH, INPUTS, RATE, Problem
from torch import Tensor

from lightning_mtl.diagnose.families import FAMILIES, Family

EVALUATED = 4096
_HEADS = {"LogLoss", "NashMTL"}  # whose weights the heads get too


def initial(given: Problem, seed: int) -> list[Tensor]:
    """Parameters of one network, as ``nn.Linear`` draws them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    outputs = given.tasks if given.heads else 1

    def uniform(*shape: int, fan: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan)

    return [
        uniform(INPUTS, given.width, fan=INPUTS),
        uniform(given.width, fan=INPUTS),
        uniform(given.width, outputs, fan=given.width),
        uniform(outputs, fan=given.width),
    ]


def errors(given: Problem, parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of every network and task, shape ``(N, T)``."""
    w, b, v, c = parameters
    out = torch.tanh(x @ w + b[:, None]) @ v + c[:, None]
    return (out - y).square().mean(1)


def step_weights(family: Family | None, gramians: Tensor, losses: Tensor) -> Tensor:
    """Weights of some networks under one family, shape ``(N, T)``."""
    if family is None:
        return torch.ones_like(losses)
    return torch.stack([family.weights(m, v) for m, v in zip(gramians, losses, strict=True)])


def as_long(found: Tensor, plain: Tensor) -> Tensor:
    """Vectors, one a network, each as long as its other one."""
    lengths = plain.norm(dim=1) / found.norm(dim=1).clamp_min(1e-30)
    return found * lengths[:, None]


def train(
    given: Problem,
    fixed: npt.NDArray[np.float64],
    seeds: int,
    steps: int,
    *,
    own_length: bool = False,
) -> dict[str, npt.NDArray[np.float64]]:
    """Test errors after a training, ``{method: (seeds, T)}``; ``single`` has each task alone.

    Args:
        given: the problem.
        fixed: weights of the row ``fixed``, shape ``(T,)``.
        seeds: initial weights and batches; the same for all methods.
        steps: of Adam, whose rate falls to zero along a cosine.
        own_length: leave every direction as long as its method makes it. By default all are as
            long as the sum of the gradients: a length is a learning rate, and under Adam a method
            whose direction does not shrink with the gradients trains faster on one task too.
    """
    size = given.tasks
    names = ["equal", "fixed", *(f.example for f in FAMILIES)] + ["single"] * size
    families = [None, None, *FAMILIES] + [None] * size
    start = [initial(given, seed) for seed in range(seeds)]
    stacked = [torch.stack([s[i] for s in start] * len(names)) for i in range(4)]
    parameters = [p.clone().requires_grad_() for p in stacked]
    shared = parameters if not given.heads else parameters[:2]
    heads = [] if not given.heads else parameters[2:]
    optimizer = torch.optim.Adam(parameters, RATE)
    streams = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    omega = torch.ones(len(names), seeds, size)
    omega[1] = torch.from_numpy(fixed).float()
    omega[-size:] = torch.eye(size)[:, None, :]
    omega = omega.reshape(-1, size)
    alone = torch.tensor([name == "single" for name in names]).repeat_interleave(seeds)[:, None]
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batches = [given.draw(BATCH, stream) for stream in streams]
        x = torch.stack([b[0] for b in batches]).repeat(len(names), 1, 1)
        y = torch.stack([b[1] for b in batches]).repeat(len(names), 1, 1)
        losses = errors(given, parameters, x, y) * given.scales
        rows, head_rows = [], []
        for t in range(size):
            found = torch.autograd.grad(losses[:, t].sum(), [*shared, *heads], retain_graph=True)
            rows.append(torch.cat([g.flatten(1) for g in found[: len(shared)]], 1))
            head_rows.append(found[len(shared) :])
        J = torch.stack(rows, 1)
        weights, head_weights = omega.clone(), omega.clone()
        wide = J[2 * seeds : -size * seeds].double()
        gramians = wide @ wide.mT
        values = losses[2 * seeds : -size * seeds].detach().double()
        for i, family in enumerate(families[2:-size]):
            part = slice(i * seeds, (i + 1) * seeds)
            found = step_weights(family, gramians[part], values[part]).float()
            place = slice((i + 2) * seeds, (i + 3) * seeds)
            weights[place] = found
            if family.example in _HEADS:
                head_weights[place] = found
        direction = (weights[:, None, :] @ J)[:, 0]
        if not own_length:
            direction = torch.where(alone, direction, as_long(direction, J.sum(1)))
        for p, part in zip(shared, direction.split([p[0].numel() for p in shared], 1), strict=True):
            p.grad = part.reshape(p.shape)
        if heads:
            both = [torch.cat([g.flatten(1) for g in r], 1) for r in head_rows]
            H = torch.stack(both, 1)
            found = (head_weights[:, None, :] @ H)[:, 0]
            if not own_length:
                found = torch.where(alone, found, as_long(found, H.sum(1)))
            for p, part in zip(heads, found.split([p[0].numel() for p in heads], 1), strict=True):
                p.grad = part.reshape(p.shape)
        optimizer.step()
        decay.step()
    with torch.no_grad():
        x, y = given.draw(EVALUATED, torch.Generator().manual_seed(77))
        networks = ([q[i : i + 1] for q in parameters] for i in range(len(omega)))
        final = torch.cat([errors(given, network, x, y) for network in networks])
    table = final.double().numpy().reshape(len(names), seeds, size)
    found = {name: table[i] for i, name in enumerate(names[:-size])}
    found["single"] = np.stack([table[len(names) - size + t, :, t] for t in range(size)], 1)
    return found
