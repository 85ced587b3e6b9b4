"""The losses of a step's batches once more, as if nobody had looked."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.batches import described
from lightning_mtl.engine.keep import changed, copied, iterator_in, places, versions
from lightning_mtl.ranks import OneProcess


@dataclass
class Seen:
    """A micro-batch and the random state before its forward pass.

    Attributes:
        batch: its containers as they were; the tensors are those of the batch.
        batch_idx: its index.
        random: states of the generators.
        balancer: name of the one that asks for its losses again.
        versions: how often each tensor of the batch had been changed in place.
        tasks: indices of the tasks of which it brought a usable loss in this process.
    """

    batch: Any
    batch_idx: int
    random: list[Tensor]
    balancer: str
    versions: list[tuple[Tensor, int]]
    tasks: Sequence[int] = ()

    def check(self) -> None:
        """Refuse a batch whose tensors have changed since.

        Raises:
            ValueError: a tensor was changed in place.
        """
        if found := changed(self.versions):
            where = places(self.batch, found)[:4] or "a tensor"
            raise ValueError(
                f"Expected the batch as it was but {where} was changed in place, and "
                f"{self.balancer} needs its losses once more. No parameter was changed. Write "
                f"`x = x * 2` instead of `x.mul_(2)` in `task_losses`, or clone what is changed; "
                f"a loader that fills the same tensors again needs new ones for each batch."
            )


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Modules whose losses take gradients themselves, which needs a graph also where we need none.
_need_graph: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Modules of which it has been said that a loss was missing after a step.
_told_of_missing: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Reached(BaseException):
    """Ends a forward pass at the shared representation.

    No ``Exception``, so that code which looks out for errors lets it through.
    """

    def __init__(self, representation: Tensor) -> None:
        super().__init__("The shared representation was reached.")
        self.representation = representation


def remember(module: TaskModule, batch: Any, batch_idx: int, balancer: str) -> Seen:
    """Note a micro-batch before its forward pass.

    Raises:
        TypeError: it cannot be read twice.
    """
    if (found := iterator_in(batch)) is not None:
        raise TypeError(
            f"Expected a batch that can be used twice, since {balancer} needs its losses once "
            f"more, but it has an iterator ({found}). Put its items into a list, for example in "
            f"`collate_fn` or `on_after_batch_transfer`."
        )
    states = [torch.get_rng_state()]
    if module.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(module.device))
    return Seen(copied(batch), batch_idx, states, balancer, versions(batch))


class Changes:
    """Tells once of parameters that ``task_losses`` changes, where it is called more than once.

    A teacher's moving average, say: it would move more than once a step. Looked for in the first
    micro-batches of a fit, bit by bit, since changes through ``.data`` count no version; in more
    than one, since a teacher that equals its pupil does not move yet.

    Args:
        module: whose losses are asked for again.
        balancer: name of the one that asks; empty for none.
    """

    def __init__(self, module: TaskModule, balancer: str) -> None:
        self.module = module
        self.balancer = balancer
        self.left = 3 if balancer else 0

    def looked_for(self) -> AbstractContextManager[None]:
        """Look at the parameters before and after the block, where that is still to be done."""
        return self._look() if self.left else nullcontext()

    @contextmanager
    def _look(self) -> Iterator[None]:
        self.left -= 1
        before = self._bits()
        yield
        after = self._bits()
        moved = [name for name, bits in before.items() if after.get(name, bits) != bits]
        if moved:
            self.left = 0
            rank_zero_warn(
                f"`task_losses` of {type(self.module).__name__} changes {moved[:4]}, and "
                f"{self.balancer} calls it more than once a step: the change is made as often. "
                f"Make it in `on_train_batch_end`. What gives the same when it is made twice, such "
                f"as a bound on a norm, may stay."
            )

    def _bits(self) -> dict[str, int]:
        """A checksum of every parameter, exact whatever its size."""
        found = {}
        for name, parameter in self.module.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                continue
            here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            numbers = here.detach()
            if numbers.is_complex():
                numbers = torch.view_as_real(numbers)
            with suppress(RuntimeError, NotImplementedError):  # of a kind that has no plain bits
                bits = numbers.view(_INTEGERS[numbers.itemsize])
                found[name] = bits.sum(dtype=torch.int64)
        return {name: int(total) for name, total in found.items()}


def losses_again(
    module: TaskModule,
    seen: Sequence[Seen],
    tasks: Sequence[str],
    ranks: OneProcess,
    *,
    stepped: bool,
) -> Tensor:
    """Mean losses of ``tasks`` over micro-batches and ranks with the parameters of now.

    Shape ``(T,)``. No graph; otherwise as :func:`replayed`. A task that gives no finite loss gets
    NaN.

    Args:
        module: whose losses they are.
        seen: the micro-batches.
        tasks: whose losses are wanted.
        ranks: over which they are averaged.
        stepped: whether the step has been taken, so that a missing loss is told, once, instead.

    Raises:
        ValueError: a task has no loss when the batch comes again.
    """
    sums = torch.zeros(2, len(tasks), dtype=torch.float64, device=module.device)
    for micro in seen:
        with _without_graph(module, micro) as losses:
            for t, task in enumerate(tasks):
                count = 1.0
                value = losses.get(task)
                if module.training_tasks.index(task) in micro.tasks:
                    try:
                        value = loss_of(module, micro, losses, task)
                    except ValueError as error:
                        if not stepped:
                            raise
                        if module not in _told_of_missing:
                            _told_of_missing.add(module)
                            rank_zero_warn(f"{error} Nothing is learned about it from that batch.")
                        continue
                if isinstance(value, tuple):
                    value, count = value[0], float(value[1])
                if value is not None:
                    sums[0, t] += value.detach().double() * count
                    sums[1, t] += count
    sums = ranks.sum_(sums)
    return sums[0] / sums[1]  # NaN where nobody has labels


@contextmanager
def _without_graph(module: TaskModule, micro: Seen) -> Iterator[Mapping[str, Any]]:
    """As :func:`replayed`, without a graph unless a loss takes gradients itself."""
    with ExitStack() as stack:
        losses = None
        if module not in _need_graph:
            try:
                stack.enter_context(torch.no_grad())
                losses = stack.enter_context(replayed(module, micro))
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                _need_graph.add(module)
                stack.close()
        if losses is None:
            stack.enter_context(torch.enable_grad())
            losses = stack.enter_context(replayed(module, micro))
        yield losses


@contextmanager
def replayed(module: TaskModule, micro: Seen) -> Iterator[Mapping[str, Any]]:
    """The task losses of a micro-batch once more, with the parameters of now.

    The same dropout masks as before. Buffers (BatchNorm), metrics, random state and the log are
    put back at the end, so a backward pass belongs inside.
    """
    devices = [module.device] if module.device.type == "cuda" else []
    torch.clear_autocast_cache()  # it holds the weights of another moment
    try:
        with torch.random.fork_rng(devices), _unseen(module):
            torch.set_rng_state(micro.random[0])
            if devices:
                torch.cuda.set_rng_state(micro.random[1], module.device)
            with module.trainer.precision_plugin.train_step_context():
                losses = _losses(module, micro)
            yield losses
    finally:
        torch.clear_autocast_cache()


def _losses(module: TaskModule, micro: Seen) -> Mapping[str, Any]:
    """What ``task_losses`` returns for the batch as it was."""
    try:
        losses = module.task_losses(copied(micro.batch), micro.batch_idx)
    except Exception as error:
        note = (
            f"{micro.balancer} asked for the losses of the same batch once more, and `task_losses` "
            f"of {type(module).__name__} failed. {_cure(module)}"
        )
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(note)
        else:
            rank_zero_warn(note)
        raise
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"Expected `task_losses` to return {{task: loss}} also when {micro.balancer} asks for "
            f"the same batch once more but got {type(losses).__name__}. {_cure(module)}"
        )
    for name, value in losses.items():
        loss = value[0] if isinstance(value, tuple) else value
        if name not in module.task_names or (isinstance(loss, Tensor) and loss.numel() != 1):
            raise ValueError(
                f"Expected `task_losses` to return one scalar for some of "
                f"{list(module.task_names)} also when {micro.balancer} asks for the same batch "
                f"once more but got {name!r}, {described(value)}. {_cure(module)}"
            )
    return losses


def loss_of(module: TaskModule, micro: Seen, losses: Mapping[str, Any], task: str) -> Any:
    """The loss of a task that had one when the batch came first.

    Raises:
        ValueError: it has none now.
    """
    value = losses.get(task)
    if (value[0] if isinstance(value, tuple) else value) is None:
        raise ValueError(
            f"Expected the loss of task '{task}' once more for the same batch, which had one, but "
            f"`task_losses` of {type(module).__name__} returned {list(losses) or 'none'} when "
            f"{micro.balancer} asked again. {_cure(module)}"
        )
    return value


def _cure(module: TaskModule) -> str:
    if not module.training:  # as detectors do, which give detections there
        return (
            "It asks in evaluation mode. Where losses are given in training mode only, use "
            "`SAMO(local='gradient')`, which does not."
        )
    return (
        "Let it depend on the batch and the parameters alone, or use a balancer that does not ask "
        "again."
    )


@contextmanager
def _unseen(module: TaskModule) -> Iterator[None]:
    """Put buffers and metrics back afterwards, and log nothing."""
    # Copies take the place of buffers: the graph of the step may have saved these. With the dict
    # that holds them, since a module may put a new tensor there.
    buffers = [(m._buffers, name, b) for m in module.modules() for name, b in m._buffers.items()]
    copies = {id(b): b.clone() for _, _, b in buffers if b is not None}
    for holder, name, buffer in buffers:
        holder[name] = None if buffer is None else copies[id(buffer)]
    metrics = [(m, _metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
    own = {name: vars(module).get(name) for name in ("log", "log_dict")}
    for name in own:
        vars(module)[name] = _nothing
    try:
        yield
    finally:
        for name, before in own.items():
            if before is None:
                del vars(module)[name]
            else:
                vars(module)[name] = before
        for holder, name, buffer in buffers:
            holder[name] = buffer
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _metric_state(metric: Metric) -> Mapping[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: _copied(getattr(metric, name)) for name in names if hasattr(metric, name)}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
