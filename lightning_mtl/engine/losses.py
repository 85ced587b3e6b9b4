"""Checks on the task losses that a module returns, before anything is differentiated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.contract import OnBadLoss
from lightning_mtl.engine.gradients.graph import leads_to
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.guards import Limit, bad_loss, usable
from lightning_mtl.ranks import OneProcess


def check_task_names(names: Sequence[str]) -> tuple[str, ...]:
    """Task names as a tuple; refuses duplicates, empty lists and names that cannot be logged."""
    listed = isinstance(names, Iterable) and not isinstance(names, str)
    if not listed or not all(isinstance(n, str) for n in names):
        found = [type(n).__name__ for n in names] if listed else names
        raise TypeError(
            f"Expected task names as a list of strings but got {found!r}. Give every task its "
            f"name: {{'a': Task(...), 'b': Task(...)}}, or ['a', 'b'] beside `task_losses`."
        )
    names = tuple(names)
    if not names:
        raise ValueError("Expected at least one task but got none. Pass `tasks={name: Task(...)}`.")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"Expected each task once but found {twice} more than once in {list(names)}."
        )
    bad = [n for n in names if not n or "." in n or "/" in n]
    if bad:
        raise ValueError(f"Expected task names without '.' and '/', and not empty, but got {bad}.")
    return names


def known_tasks(given: Sequence[str], declared: Sequence[str], argument: str) -> None:
    """Refuse names in ``given`` that are not declared tasks."""
    unknown = [n for n in given if n not in declared]
    if unknown:
        raise ValueError(
            f"{argument} names the unknown task{'s' * (len(unknown) > 1)} {unknown}; the module "
            f"declares {list(declared)}. Correct the name, or declare the task in `tasks`."
        )


def check_every_task(losses: TaskLosses, tasks: Sequence[str], balancer: GradientBalancer) -> None:
    """Refuse a micro-batch without a task where a balancer takes micro-batches apart.

    Raises:
        ValueError: a task is missing, or brings a label count.
    """
    if losses.uneven(len(tasks)):
        raise ValueError(
            f"Expected every task, without label counts, in each micro-batch of "
            f"{type(balancer).__name__}(batches={balancer.batches}) but found "
            f"{[tasks[t] for t in losses.tasks]}. Let the loader bring every task, or use a "
            f"balancer of one batch, SDMGrad(batches=1) say."
        )


def read_losses(
    losses: Any,
    declared: Sequence[str],
    active: Sequence[str],
    *,
    limit: Limit | None,
    on_bad_loss: OnBadLoss,
    step: int,
    ranks: OneProcess,
    lockstep: str = "",
    late: bool = False,
    from_batch: bool = False,
) -> TaskLosses:
    """Validate what ``task_losses`` returned.

    Args:
        losses: ``{task: loss}``, ``{task: (mean, n_valid)}``; a missing key or ``None`` is an
            absent task.
        declared: names of all tasks.
        active: names of the tasks that train.
        limit: what a balancer asks of losses, if one does.
        on_bad_loss: what a loss that cannot be used leads to.
        step: the optimiser step, for messages.
        ranks: the processes of the run, which agree on every loss.
        late: leave finite numbers to a later check, with what else the host needs of the step.
        from_batch: whether nobody declared the tasks, and they are those of the first batch.
        lockstep: why all of them have to run the same backward passes; empty where they need not.

    Raises:
        TypeError: the value is no mapping, or a loss is no tensor.
        ValueError: an undeclared task, a loss that is no scalar, or one without a graph.
        BadLossError: a loss that cannot be used, with ``on_bad_loss="raise"``.
    """
    wrong = None
    try:
        read = _read(losses, declared, active, from_batch)
    except (TypeError, ValueError) as error:
        if ranks.alone:
            raise
        read, wrong = TaskLosses([], [], []), error
    read.late = late
    if late or (on_bad_loss == "ignore" and ranks.alone):
        return read
    values = _to_host(read.values)
    bad = {t for t, v in zip(read.tasks, values, strict=True) if not usable(v, limit)}
    bad = set() if on_bad_loss == "ignore" else bad
    if not ranks.alone:
        bad = _agree(read, values, bad, active, ranks, wrong)
        if lockstep:
            _check_lockstep(read, bad, active, ranks, lockstep)
    if bad:
        if on_bad_loss == "raise":
            pairs = zip(read.tasks, values, strict=True)
            own = {active[t]: v for t, v in pairs if not usable(v, limit)}
            raise bad_loss(_everywhere(own, ranks), limit, step)
        _drop_bad(read, bad, on_bad_loss)
    return read


def _everywhere(own: dict[str, float], ranks: OneProcess) -> dict[str, Any]:
    """The bad losses of all ranks, by task: with several, which rank has them."""
    if ranks.alone:
        return own
    found: dict[str, list[str]] = {}
    for rank, values in enumerate(ranks.gather(own)):
        for task, value in values.items():
            found.setdefault(task, []).append(f"{value} on rank {rank}")
    return {task: ", ".join(values) for task, values in found.items()}


def _read(
    losses: Any, declared: Sequence[str], active: Sequence[str], from_batch: bool
) -> TaskLosses:
    """The losses of the tasks that are there, with their counts."""
    if losses is None:
        rank_zero_warn(
            "`task_losses` returned None, which leaves the batch out, like {}. If that was on "
            "purpose, ignore this; else a `return` is missing."
        )
        losses = {}
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"Expected `task_losses` to return a dict {{task: loss}} but got "
            f"{type(losses).__name__}. {_cure(losses, list(declared))}"
        )
    later = [task for task in losses if task not in declared]
    if later:
        check_total(losses, declared)
    if later and from_batch:
        raise ValueError(
            f"`task_losses` returned a loss of {later}, which the first batch had not: without "
            f"declared tasks, those of the first batch, {list(declared)}, are the tasks. Declare "
            f"all of them, `super().__init__(tasks={[*declared, *later]})`, or return None for "
            f"those without labels in the first batch."
        )
    if later:
        known_tasks(list(losses), declared, "The dict that `task_losses` returned")
    read = TaskLosses([], [], [])
    for index, task in enumerate(active):
        value, count = losses.get(task), 1.0
        if isinstance(value, tuple):
            value, count = _with_count(task, value)
            read.counted.add(index)
        if value is None or count == 0:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Expected the loss of task '{task}' to be a tensor but got "
                f"{type(value).__name__}. Return the loss itself, not `.item()`; for a task "
                f"without labels return None; log what is no loss by `self.log`."
            )
        if value.numel() != 1:
            raise ValueError(
                f"Expected the loss of task '{task}' to be a scalar but got shape "
                f"{tuple(value.shape)}. Reduce it, for example with `.mean()`; leave out what is "
                f"no loss."
            )
        if value.is_complex():
            raise ValueError(
                f"Expected the loss of task '{task}' to be a real number but got "
                f"{value.dtype}. Return its real part or its absolute value."
            )
        if not value.requires_grad:
            raise ValueError(
                f"Expected the loss of task '{task}' to have a graph but it does not depend on any "
                f"trainable parameter. Return None for a task without labels, leave it out with "
                f"`active_tasks`, and look for `.detach()`, `torch.no_grad()` or a fully frozen "
                f"model."
            )
        read.tasks.append(index)
        read.values.append(value if value.ndim == 0 else value.reshape(()))
        read.counts.append(count)
    return read


def _cure(losses: Any, tasks: list[str]) -> str:
    """What to return in place of something that has no names."""
    names = tasks or ["a", "b"]
    if isinstance(losses, (list, tuple)):
        if any(isinstance(item, Mapping) for item in losses):
            return "Return the dict of the task losses alone, without their sum before it."
        if len(losses) == len(names) or not tasks:
            pairs = ", ".join(f"'{task}': ..." for task in names)
            return f"Give every loss its name: {{{pairs}}}."
    return f"Return one scalar loss for each of {tasks or 'your tasks'}."


def check_total(losses: Any, declared: Sequence[str] = ()) -> None:
    """Refuse a sum of the losses among them, as Lightning's `training_step` returns it.

    Args:
        losses: what ``task_losses`` returned.
        declared: names of the tasks that the user has declared; what is among them is meant.

    Raises:
        ValueError: an undeclared "loss" beside others, or a value made of all the others.
    """
    if not isinstance(losses, Mapping) or len(losses) < 2:
        return
    values = {name: v[0] if isinstance(v, tuple) and v else v for name, v in losses.items()}
    nodes = {n: v.grad_fn for n, v in values.items() if isinstance(v, Tensor) and v.grad_fn}
    for name in sorted(values, key=lambda name: name != "loss"):
        if name in declared:
            continue
        others = {node for other, node in nodes.items() if other != name}
        made = name in nodes and len(others) > 0 and leads_to(nodes[name], others)
        if name == "loss" or made:
            found = [other for other in losses if other != name]
            reason = (
                "is made of the losses of" if made else "is Lightning's name for the total beside"
            )
            raise ValueError(
                f"Expected one loss a task but '{name}' {reason} {found}, and the tasks would "
                f"count twice. Leave it out of what `task_losses` returns; if it is a task, "
                f"declare them all: `super().__init__(tasks={[*losses]})`."
            )


def _agree(
    read: TaskLosses,
    values: list[float],
    bad: set[int],
    active: Sequence[str],
    ranks: OneProcess,
    wrong: Exception | None,
) -> set[int]:
    """Sum losses and counts over ranks; returns the tasks whose loss is bad on any of them."""
    table = torch.zeros(5, len(active), dtype=torch.float64)
    table[3] = wrong is not None
    table[4, list(read.counted)] = 1
    for t, value, count in zip(read.tasks, values, read.counts, strict=True):
        usable = t not in bad
        table[:3, t] = torch.tensor([value * count if usable else 0.0, count, not usable])
    table = ranks.sum_(table.to(ranks.device))
    read.joint, read.size = table[0].to(ranks.dtype), ranks.size
    _, read.joint_counts, flags, refused, counted = table.tolist()
    read.counted = {t for t, number in enumerate(counted) if number}
    if wrong is not None or any(refused):
        _raise_together(wrong, ranks)
    return {t for t, number in enumerate(flags) if number}


def _check_lockstep(
    read: TaskLosses, bad: set[int], active: Sequence[str], ranks: OneProcess, lockstep: str
) -> None:
    """Refuse a task, other than a bad one, that some ranks have and others have not."""
    here = torch.zeros(len(active), device=ranks.device)
    here[read.tasks] = 1
    found = [int(n) for n in ranks.sum_(here).tolist()]
    some = [t for t, n in enumerate(found) if n not in (0, ranks.size) and t not in bad]
    if some:
        cure = "`strategy='ddp'`" if lockstep == "FSDP2" else "`sync_batchnorm=False`"
        raise ValueError(
            f"Expected every task on all ranks or on none under {lockstep} but task "
            f"{[active[t] for t in some]} is there on {[found[t] for t in some]} of {ranks.size} "
            f"ranks: the ranks would wait for each other's gradients. Use {cure}, or batches with "
            f"labels of every task on every rank."
        )


def _raise_together(wrong: Exception | None, ranks: OneProcess) -> None:
    """End every rank when one cannot use its losses; the others would wait for it."""
    told = ranks.gather(None if wrong is None else str(wrong))
    if wrong is not None:
        raise wrong
    rank = next(r for r, message in enumerate(told) if message is not None)
    raise ValueError(f"Rank {rank} cannot use what its `task_losses` returned: {told[rank]}")


def _drop_bad(read: TaskLosses, bad: set[int], on_bad_loss: OnBadLoss) -> None:
    read.dropped, read.bad = True, bad
    if on_bad_loss == "skip_step":
        read.skip = True
        return
    pairs = zip(read.tasks, read.values, strict=True)
    read.left_out = [(t, value) for t, value in pairs if t in bad]
    keep = [i for i, t in enumerate(read.tasks) if t not in bad]
    read.tasks = [read.tasks[i] for i in keep]
    read.values = [read.values[i] for i in keep]
    read.counts = [read.counts[i] for i in keep]
    if read.joint is not None:
        read.joint_counts = [0.0 if t in bad else c for t, c in enumerate(read.joint_counts)]


def _to_host(values: list[Tensor]) -> list[float]:
    """The losses as numbers, in one transfer."""
    if all(v.device.type == "cpu" for v in values):
        return [v.item() for v in values]
    return list(torch.stack([v.detach().double() for v in values]).tolist())


def as_count(value: Any) -> float:
    """A number of labels, NumPy's and tensors' included; NaN for what is not one number."""
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return float(value) if single or isinstance(value, Real) else math.nan


def _with_count(task: str, value: tuple[Any, ...]) -> tuple[Any, float]:
    """Mean and number of valid labels from a pair."""
    if len(value) == 2 and 0 <= (count := as_count(value[1])) < math.inf:
        return value[0], count
    raise ValueError(
        f"Expected the loss of task '{task}' as a scalar or as (mean, number of valid labels), a "
        f"finite number of at least 0, but got {value!r}."
    )
