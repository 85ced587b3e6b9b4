"""Task gradients at perturbed parameters, a place for each task; the parameters return from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, Perturbing, at_least_float32
from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.again import losses_again, replayed
from lightning_mtl.engine.gradients.host import all_finite
from lightning_mtl.engine.gradients.layout import no_shared
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.numerics.flat import real, with_places

# Parameters as real tensors, and what is to be added to them for a while.
Moves = list[tuple[Tensor, Tensor]]


def perturbed_rows(
    module: TaskModule,
    balancer: GradientBalancer,
    gradients: TaskGradients,
    losses: TaskLosses,
    group: Group,
    scale: float,
) -> None:
    """Collect the gradient of each task at parameters of its own, as if it were that of now.

    In this order, on one batch: the gradient of the mean loss (or of each), two losses of each
    task for the estimate, and a forward and backward pass a task. All forward passes but the first
    go unseen. A step whose perturbations are not finite is left unperturbed: the check of task
    gradients that follows names the task.

    Args:
        module: whose tasks are balanced.
        balancer: a :class:`Perturbing` one.
        gradients: where rows and head gradients are collected.
        losses: of the batch, with their graph, which is used up.
        group: of the batch alone, which it has seen.
        scale: what losses are multiplied by against underflow in half precision.

    Raises:
        ValueError: nothing is shared; or a task has no loss when the batch comes again.
    """
    if not gradients.shared:
        raise ValueError(no_shared(module, type(balancer).__name__))
    tasks, present = module.training_tasks, group.present()
    balancer.tell(gradients)
    with balancer.only(tasks, None if len(present) == len(tasks) else present):
        moves = _moves(module, balancer, gradients, losses, group, scale)
    gradients.begin()
    factors = {t: count * scale for t, _, count, _ in losses}
    found: dict[int, Tensor] = {}
    for t, move in zip(present, moves, strict=True):
        value = _add_row(module, gradients, group, t, factors.get(t), move)
        if value is not None:
            found[t] = value
    if found:
        finite = torch.stack([value.double() for value in found.values()]).isfinite().tolist()
        for t, usable in zip(found, finite, strict=True):
            if not usable:
                assert gradients.rows is not None
                gradients.rows[t].fill_(torch.nan)  # its gradient may look as if nothing were


def _moves(
    module: TaskModule,
    balancer: GradientBalancer,
    gradients: TaskGradients,
    losses: TaskLosses,
    group: Group,
    scale: float,
) -> list[Moves]:
    """Where each present task's gradient is to be taken; nowhere else if that is not finite."""
    assert isinstance(balancer, Perturbing)
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
                with _moved(_of_trunk(gradients, end)):
                    name = module.training_tasks[t]
                    ends.append(losses_again(module, group.seen, [name], gradients.ranks))
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


def _add_row(
    module: TaskModule,
    gradients: TaskGradients,
    group: Group,
    task: int,
    factor: float | None,
    moves: Moves,
) -> Tensor | None:
    """Add a task's gradient at moved parameters; its loss there. ``None`` on ranks without it.

    They make the forward pass nevertheless: it may exchange something (SyncBatchNorm).
    """
    (micro,), name = group.seen, module.training_tasks[task]
    marked = len(group.representation)
    with _moved(moves), replayed(module, micro) as losses:
        value = losses.get(name) if factor is not None else None
        if factor is not None:
            value = value[0] if isinstance(value, tuple) else value
            if value is None:
                raise ValueError(
                    f"Expected the loss of task '{name}' once more for the same batch but "
                    f"`task_losses` returned none at perturbed parameters. Let the tasks that it "
                    f"returns depend on the batch alone."
                )
            value = value.reshape(())
            gradients.add(task, value * factor, retain_graph=False)
            value = value.detach()
        del group.representation[marked:]  # each would keep a graph
    return value


@contextmanager
def _moved(moves: Moves) -> Iterator[None]:
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
