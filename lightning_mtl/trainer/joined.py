"""What several processes have measured, joined to what one process has on all of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_mean
from torchmetrics.wrappers.abstract import WrapperMetric

State = list[dict[str, Any]]


def alone(trainer: Trainer) -> bool:
    """Whether a run has one process."""
    return trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized())


def of_all(trainer: Trainer, mine: Any) -> list[Any]:
    """What every process has, in the order of ranks; tensors have to be on the host."""
    if alone(trainer):
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def agreed(trainer: Trainer, make: Callable[[], Any]) -> Any:
    """What the first process makes of joined data, where all make the same.

    A metric that draws random numbers gives each process a value of its own; and one that fails in
    a single process would leave the others waiting.

    Raises:
        RuntimeError: it fails in another process.
    """
    if alone(trainer):
        return make()
    mine, wrong = None, None
    try:
        mine = make()
    except Exception as error:  # raised below, in every process
        wrong = error
    told = of_all(
        trainer, (None if wrong is None else str(wrong), mine if dist.get_rank() == 0 else None)
    )
    if wrong is not None:
        raise wrong
    for rank, (message, _) in enumerate(told):
        if message is not None:
            raise RuntimeError(f"Rank {rank} cannot evaluate: {message}")
    return told[0][1]


class Means:
    """Means of named numbers: sums and counts, which add up over batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, float]] = {}

    def add(self, name: str, mean: Any, count: float) -> None:
        """Add a mean over ``count`` samples; nothing waits for the device."""
        value = torch.as_tensor(mean).detach().reshape(())
        if value.device.type != "mps":  # which has no float64
            value = value.double()
        total, number = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * count, number + count)

    def sums(self) -> dict[str, tuple[float, float]]:
        """Sums and counts as numbers."""
        return {name: (float(total), count) for name, (total, count) in self._sums.items()}


def means(found: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Means of what several processes have, each name at the place where it first occurs."""
    joined: dict[str, tuple[float, float]] = {}
    for sums in found:
        for name, (total, count) in sums.items():
            before = joined.get(name, (0.0, 0.0))
            joined[name] = (before[0] + total, before[1] + count)
    return {name: total / count for name, (total, count) in joined.items()}


def widen(metrics: Iterable[Any]) -> None:
    """Keep the sums of metrics in float32 or wider, whatever the module was cast to.

    With ``precision="bf16-true"`` Lightning casts them with the module: a sum of ones then ends
    at 256, where bfloat16 has no next number. Before the first update of an evaluation.
    """
    for metric in metrics:
        for part in metric.modules():
            for name, default in getattr(part, "_defaults", {}).items():
                if isinstance(default, Tensor) and _narrow(default):
                    with torch.inference_mode(False):
                        part._defaults[name] = default.float()
                value = getattr(part, name)
                if isinstance(value, Tensor) and _narrow(value):
                    setattr(part, name, value.float())


def _narrow(value: Tensor) -> bool:
    return value.is_floating_point() and value.itemsize < 4


def state_of(metric: Metric) -> State:
    """The state of a metric, and of metrics inside it, on the host."""
    return [
        {
            # a wrapper's own updates are not counted as those of other metrics are
            "updates": getattr(part, "_num_vals_seen", part.update_count),
            "state": apply_to_collection(
                {name: getattr(part, name) for name in part._reductions}, Tensor, Tensor.cpu
            ),
        }
        for part in _parts(metric)
    ]


def compute(metric: Metric, found: Sequence[State]) -> Any:
    """The value of a metric on the data of all processes.

    torchmetrics gathers state by state, every process at its own place in the list: it waits for
    ever where one process has more entries than another, or none. Here all states are there
    already, and processes that saw no data do not count.

    Args:
        metric: which keeps its own state; its value is cached.
        found: :func:`state_of` it of every process; one for a run of one process.

    Raises:
        ValueError: it has no states, so that its value would be that of one process.
    """
    if len(found) == 1:
        return metric.compute()
    parts = list(_parts(metric))
    _check_states(metric, parts)
    kept = [{name: getattr(part, name) for name in part._reductions} for part in parts]
    metric._computed = None
    try:
        for part, given in zip(parts, zip(*found, strict=True), strict=True):
            part._computed = None
            part._to_sync = False
            part._update_count = sum(g["updates"] for g in given)
            _load(part, [g for g in given if g["updates"]] or given[:1])
        return metric.compute()
    finally:
        for part, state in zip(parts, kept, strict=True):
            part._to_sync = part.sync_on_compute
            for name, value in state.items():
                setattr(part, name, value)


def _parts(metric: Metric) -> Iterator[Metric]:
    """The metrics that have a state to be joined, in one order on every process.

    Not wrappers whose state is that of the metric inside; ``Running`` has a window of its own.
    Left to themselves are those that are told how to synchronise, or not to.
    """
    for part in metric.modules():
        if not isinstance(part, Metric):
            continue
        if isinstance(part, WrapperMetric) and not part._reductions:
            continue
        sync = type(part)._sync_dist
        usual = sync is Metric._sync_dist or sync.__module__.startswith("torchmetrics.")
        told = part.process_group is not None or part.dist_sync_fn is not None
        told |= part.distributed_available_fn is not jit_distributed_available
        if usual and not told and part.sync_on_compute:
            yield part


def _check_states(metric: Metric, parts: Sequence[Metric]) -> None:
    """Refuse a metric that counts in plain attributes, of which nobody else knows."""
    joinable = any(part is metric for part in parts)  # `==` makes another metric
    inside = (part for part in metric.modules() if isinstance(part, Metric))
    if joinable and not any(part._reductions for part in inside):
        name = type(metric).__name__
        raise ValueError(
            f"Expected the metric {name} to keep what it counts in states, which several processes "
            f"can join, but it has none: its value would be that of one process. Declare them in "
            f"its constructor, `self.add_state(name, default, dist_reduce_fx='sum')`, or pass "
            f"`sync_on_compute=False` if {name} synchronises by itself."
        )


def _load(metric: Metric, given: Sequence[dict[str, Any]]) -> None:
    for name, reduction in metric._reductions.items():
        values = [g["state"][name] for g in given]
        joined = values[0]
        if len(values) > 1:
            joined = _reduced(values, reduction, [g["updates"] for g in given])
        host = metric.compute_on_cpu and isinstance(metric._defaults[name], list)
        device = "cpu" if host else metric.device
        setattr(metric, name, apply_to_collection(joined, Tensor, Tensor.to, device))


def _reduced(values: list[Any], reduction: Any, updates: list[int]) -> Any:
    """One state of several processes, by the rule that torchmetrics has for it."""
    if any(isinstance(value, list) for value in values):
        entries = [e for v in values for e in (v if isinstance(v, list) else [v])]
        return reduction(entries) if entries and reduction is not None else entries
    if reduction is dim_zero_cat:
        return dim_zero_cat(values)
    if all(value.numel() == 1 for value in values):  # some metrics add a dimension on the way
        values = list(torch.broadcast_tensors(*values))
    stacked = torch.stack(values)
    if reduction is dim_zero_mean:  # over updates, as within one process
        share = torch.tensor(updates, dtype=torch.float64) / sum(updates)
        weighted = stacked * share.view(-1, *[1] * (stacked.ndim - 1))
        return weighted.sum(0).to(stacked.dtype)
    return stacked if reduction is None else reduction(stacked)


class _Value(Metric):
    """A number that is final: Lightning would ask for a sum over processes of a plain one."""

    higher_is_better = None

    def __init__(self, value: Tensor, forget: Callable[[], Any] | None) -> None:
        super().__init__()
        self.value, self.forget = value, forget
        self._update_count = 1

    def update(self) -> None:
        """It is final."""

    def compute(self) -> Tensor:
        return self.value

    def reset(self) -> None:
        """Called when Lightning resets what was logged."""
        if self.forget is not None:
            self.forget()


def log(
    module: LightningModule, name: str, value: Any, forget: Callable[[], Any] | None = None
) -> None:
    """Log a number that is the same on every process already."""
    number = torch.as_tensor(value).detach().reshape(())
    if module.device.type == "mps":  # which has no float64
        number = number.float()
    holder = _Value(number.to(module.device), forget)
    module.log(name, holder, metric_attribute=name, batch_size=1)
