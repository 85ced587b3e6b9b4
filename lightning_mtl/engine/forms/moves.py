"""Where the gradient of each task is to be taken, and parameters that are moved there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_mtl.balancer import Perturbing, at_least_float32
from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.again import losses_again
from lightning_mtl.engine.gradients.host import all_finite
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.numerics.flat import real, with_places

# Parameters as real tensors, and what is to be added to them for a while.
Moves = list[tuple[Tensor, Tensor]]


def moves_of(
    module: TaskModule,
    balancer: Perturbing,
    gradients: TaskGradients,
    losses: TaskLosses,
    group: Group,
    scale: float,
) -> list[Moves]:
    """Where each present task's gradient is to be taken; nowhere else if that is not finite."""
    present = group.present()
    gradients.begin()
    if balancer.local == "gradient":
        for t, value, count, last in losses:
            gradients.add(t, value * (count * scale), retain_graph=not last)
        local = gradients.finish()[present]
        counts = local.new_tensor([group.counts[t] * scale for t in present])
        local = local.div_(counts[:, None])
        average = local.mean(0)
    else:
        average = _average(gradients, losses, len(present), scale)
        local = balancer.probes(average, len(present))
        local.mul_(_rises(module, gradients, group, local).to(local)[:, None])
    own = [
        (names, flat / (group.counts[t] * scale * len(present)))
        for t, (names, flat) in zip(present, _own_gradients(gradients, present), strict=True)
    ]
    rows = balancer.perturbations(average, local)
    heads = [balancer.head_perturbation(flat) if names else flat for names, flat in own]
    if not all_finite([rows, *heads]):
        return [[] for _ in present]
    return [
        _of_trunk(gradients, row) + _of_heads(gradients, names, head)
        for row, head, (names, _) in zip(rows, heads, own, strict=True)
    ]


def _average(
    gradients: TaskGradients, losses: TaskLosses, num_present: int, scale: float
) -> Tensor:
    """Gradient of the mean loss, shape ``(P,)``; head gradients of each task are collected."""
    for t, value, count, _ in losses:
        gradients.add(t, value * (count * scale), retain_graph=True, shared=False)
    if losses.tasks:
        values = losses.stacked()
        mean = values @ values.new_tensor(losses.shares()) * (scale / num_present)
        gradients.add(0, mean, retain_graph=False, heads=False)
    return gradients.combined() / scale


def _rises(module: TaskModule, gradients: TaskGradients, group: Group, probes: Tensor) -> Tensor:
    """How much higher each task's loss is at one end of its probe than at the other.

    In evaluation mode. Zero where one of the two is not finite.
    """
    found = []
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        for t, probe in zip(group.present(), probes, strict=True):
            ends = []
            for end in (probe, -probe):
                with moved(_of_trunk(gradients, end)):
                    name = module.training_tasks[t]
                    again = losses_again(module, group.seen, [name], gradients.ranks, stepped=False)
                    ends.append(again)
            found.append(ends[0] - ends[1])
    finally:
        for m, training in modes:
            m.training = training
    rises = torch.cat(found)
    return torch.where(rises.isfinite(), rises, 0.0)


def _own_gradients(
    gradients: TaskGradients, present: Sequence[int]
) -> list[tuple[list[str], Tensor]]:
    """Each task's own parameters by name, and its gradient by them as a vector, over all ranks."""
    heads, ranks = [gradients.heads.by_task[t] for t in present], gradients.ranks
    names = [list(found) for found in heads]
    if not ranks.alone:  # ranks may have met different tasks
        shared = set(gradients.shared or ())
        others = [name for name in gradients.parameters if name not in shared]
        table = torch.tensor([[n in found for n in others] for found in heads], dtype=torch.uint8)
        table = ranks.max_(table.to(ranks.device)) if others else table
        names = [[others[int(i)] for i in row.nonzero()[:, 0]] for row in table.cpu()]
    flat = []
    for own, found in zip(names, heads, strict=True):
        parts = [found[n] if n in found else torch.zeros_like(gradients.parameters[n]) for n in own]
        joined = torch.cat([real(p).flatten() for p in parts]) if parts else torch.zeros(0)
        flat.append(ranks.sum_(at_least_float32(joined)) if parts else joined)
    return list(zip(names, flat, strict=True))


def _of_trunk(gradients: TaskGradients, row: Tensor) -> Moves:
    shared = [real(gradients.parameters[name].detach()) for name in gradients.shared or ()]
    return list(zip(shared, with_places(row, shared), strict=True))


def _of_heads(gradients: TaskGradients, names: Sequence[str], flat: Tensor) -> Moves:
    own = [real(gradients.parameters[name].detach()) for name in names]
    parts = flat.split([p.numel() for p in own]) if own else ()
    return [(p, part.view(p.shape)) for p, part in zip(own, parts, strict=True)]


@contextmanager
def moved(moves: Moves) -> Iterator[None]:
    """Parameters moved for a while, then as they were, bit for bit."""
    parameters = [p for p, _ in moves]
    before = [p.clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, move in moves:
                p.add_(move)
        yield
    finally:
        with torch.no_grad():
            for p, copied in zip(parameters, before, strict=True):
                p.copy_(copied)
