"""The losses of a step's batches once more, as if nobody had looked."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mtl.strategies import OneProcess

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


@dataclass
class Seen:
    """A micro-batch and the random state before its forward pass."""

    batch: Any
    batch_idx: int
    random: list[Tensor]


class Reached(BaseException):
    """Ends a forward pass at the shared representation.

    No ``Exception``, so that code which looks out for errors lets it through.
    """

    def __init__(self, representation: Tensor) -> None:
        super().__init__("The shared representation was reached.")
        self.representation = representation


def remember(module: MultiTaskModule, batch: Any, batch_idx: int) -> Seen:
    """Note a micro-batch before its forward pass."""
    states = [torch.get_rng_state()]
    if module.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(module.device))
    return Seen(batch, batch_idx, states)


def losses_again(
    module: MultiTaskModule, seen: Sequence[Seen], tasks: Sequence[str], ranks: OneProcess
) -> Tensor:
    """Mean losses of ``tasks`` over micro-batches and ranks with the parameters of now.

    Shape ``(T,)``. No graph; otherwise as :func:`replayed`. A task that gives no finite loss gets
    NaN.
    """
    sums = torch.zeros(2, len(tasks), dtype=torch.float64, device=module.device)
    for micro in seen:
        with torch.no_grad(), replayed(module, micro) as losses:
            for t, task in enumerate(tasks):
                value, count = losses.get(task), 1.0
                if isinstance(value, tuple):
                    value, count = value[0], float(value[1])
                if value is not None:
                    sums[0, t] += value.detach().double() * count
                    sums[1, t] += count
    sums = ranks.sum_(sums)
    return sums[0] / sums[1]  # NaN where nobody has labels


@contextmanager
def replayed(module: MultiTaskModule, micro: Seen) -> Iterator[Mapping[str, Any]]:
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
                losses = module.task_losses(micro.batch, micro.batch_idx)
            yield losses
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _unseen(module: MultiTaskModule) -> Iterator[None]:
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
