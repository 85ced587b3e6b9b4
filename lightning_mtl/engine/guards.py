"""What a loss or a gradient that cannot be used leads to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_mtl.balancer import Balancer
from lightning_mtl.contract import OnBadLoss

_LOOK = (
    "Look for a square root or a division at zero in that loss, or lower the learning rate; "
    "`on_bad_loss='skip_task'` or 'skip_step' goes on without it."
)


class BadLossError(ValueError):
    """A task's loss or its gradient is not finite, or not positive under a logarithm."""


class NotFiniteError(ValueError):
    """Weights or a direction that are not finite, from losses and gradients that are."""


class Limit(NamedTuple):
    """What a balancer asks of losses beyond finite numbers.

    Attributes:
        balancer: its name.
        zero: whether it can do with a loss of zero; with a negative one it cannot.
    """

    balancer: str
    zero: bool


def limit_of(balancers: Iterable[Balancer]) -> Limit | None:
    """What the strictest of some balancers, and of those they wrap, asks of losses."""
    found: Limit | None = None
    for balancer in balancers:
        own = None
        if balancer.requires_positive_losses or balancer.requires_nonnegative_losses:
            own = Limit(type(balancer).__name__, not balancer.requires_positive_losses)
        for limit in (own, limit_of(balancer.nested().values())):
            if limit is not None and (found is None or (found.zero and not limit.zero)):
                found = limit
    return found


def usable(value: float, limit: Limit | None = None) -> bool:
    """Whether a loss is finite, and above or at zero where it has to be."""
    if value - value != 0.0:
        return False
    return limit is None or value > 0.0 or (limit.zero and value == 0.0)


def bad_loss(found: Mapping[str, Any], limit: Limit | None, step: int) -> BadLossError:
    """The error for losses that cannot be used."""
    expected, other = "finite", ""
    if limit is not None and limit.zero:
        expected = f"finite and non-negative (for {limit.balancer})"
        other = f", and a balancer other than {limit.balancer} may accept negative ones"
    elif limit is not None:
        expected = f"finite and positive (for {limit.balancer})"
        other = ", and a balancer that takes no logarithm accepts zero and negative ones"
    return BadLossError(
        f"Expected {expected} losses at optimiser step {step} but found {found}. No parameter "
        f"was changed. Look at this batch's targets and the learning rate; "
        f"`on_bad_loss='skip_task'` or 'skip_step' goes on without such a loss{other}."
    )


def bad_losses(
    values: Mapping[int, float],
    tasks: Sequence[str],
    limit: Limit | None,
    *,
    on_bad_loss: OnBadLoss,
    step: int,
) -> set[int]:
    """Indices of the tasks whose loss cannot be used, where that is looked at late.

    Args:
        values: losses by index of the task.
        tasks: names of all tasks.
        limit: what a balancer asks of them, if one does.
        on_bad_loss: ``"raise"`` raises here.
        step: the optimiser step, for messages.

    Raises:
        BadLossError: one of them is bad, with ``on_bad_loss="raise"``.
    """
    bad = {t for t, value in values.items() if not usable(value, limit)}
    if bad and on_bad_loss == "raise":
        raise bad_loss({tasks[t]: values[t] for t in sorted(bad)}, limit, step)
    return bad


def bad_gradients(
    sizes: Sequence[float],
    counts: Sequence[float],
    tasks: Sequence[str],
    squared: bool,
    *,
    on_bad_loss: OnBadLoss,
    step: int,
) -> set[int]:
    """Indices of present tasks whose gradient is not finite.

    Args:
        sizes: a norm of each task's gradient.
        counts: 0 for absent tasks.
        tasks: their names.
        squared: whether a finite gradient may have a size that is not: the square of a float64
            number beyond 1e154.
        on_bad_loss: ``"raise"`` raises here.
        step: the optimiser step, for messages.

    Raises:
        BadLossError: one of them is not finite, with ``on_bad_loss="raise"``.
    """
    bad = {t for t, size in enumerate(sizes) if counts[t] and not usable(size)}
    if bad and on_bad_loss == "raise":
        beyond = ", or is longer than 1e154, whose square is not" if squared else ""
        raise BadLossError(
            f"Expected finite gradients at optimiser step {step} but the gradient of "
            f"{[tasks[t] for t in sorted(bad)]} is not{beyond}, though the loss is. No "
            f"parameter was changed. {_LOOK}"
        )
    return bad


def bad_sum(tasks: Sequence[str], *, on_bad_loss: OnBadLoss, step: int) -> None:
    """Refuse the gradient of a summed loss, in which the task at fault cannot be told.

    Raises:
        BadLossError: with ``on_bad_loss="raise"``.
    """
    if on_bad_loss == "raise":
        raise BadLossError(
            f"Expected finite gradients at optimiser step {step} but the gradient of the summed "
            f"losses of {list(tasks)} is not, though each loss is. No parameter was changed. "
            f"{_LOOK} With GradientMonitor(every_n_steps=1) among the callbacks this message names "
            f"the task."
        )
