"""What a loss or a gradient that cannot be used leads to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

OnBadLoss = Literal["raise", "skip_task", "skip_step", "ignore"]

_LOOK = (
    "Look for a square root or a division at zero in that loss, or lower the learning rate; "
    "`on_bad_loss='skip_task'` or 'skip_step' goes on without it."
)


class BadLossError(ValueError):
    """A task's loss or its gradient is not finite, or not positive under a logarithm."""


def usable(value: float, positive: bool) -> bool:
    """Whether a loss is finite, and above zero where it has to be."""
    finite = value - value == 0.0
    return finite and (value > 0.0 or not positive)


def bad_loss(found: Mapping[str, Any], positive_for: str | None, step: int) -> BadLossError:
    """The error for losses that cannot be used."""
    expected, other = "finite", ""
    if positive_for:
        expected = f"finite and positive (for {positive_for})"
        other = ", and a balancer that takes no logarithm accepts zero and negative ones"
    return BadLossError(
        f"Expected {expected} losses at optimiser step {step} but found {found}. No parameter "
        f"was changed. Look at this batch's targets and the learning rate; "
        f"`on_bad_loss='skip_task'` or 'skip_step' goes on without such a loss{other}."
    )


def bad_losses(
    values: Mapping[int, float],
    tasks: Sequence[str],
    positive_for: str | None,
    *,
    on_bad_loss: OnBadLoss,
    step: int,
) -> set[int]:
    """Indices of the tasks whose loss cannot be used, where that is looked at late.

    Args:
        values: losses by index of the task.
        tasks: names of all tasks.
        positive_for: name of the balancer that needs positive losses, if there is one.
        on_bad_loss: ``"raise"`` raises here.
        step: the optimiser step, for messages.

    Raises:
        BadLossError: one of them is bad, with ``on_bad_loss="raise"``.
    """
    bad = {t for t, value in values.items() if not usable(value, bool(positive_for))}
    if bad and on_bad_loss == "raise":
        raise bad_loss({tasks[t]: values[t] for t in sorted(bad)}, positive_for, step)
    return bad


def bad_gradients(
    sizes: Sequence[float],
    counts: Sequence[float],
    tasks: Sequence[str],
    *,
    on_bad_loss: OnBadLoss,
    step: int,
) -> list[int]:
    """Indices of present tasks whose gradient is not finite.

    Args:
        sizes: a norm of each task's gradient.
        counts: 0 for absent tasks.
        tasks: their names.
        on_bad_loss: ``"raise"`` raises here.
        step: the optimiser step, for messages.

    Raises:
        BadLossError: one of them is not finite, with ``on_bad_loss="raise"``.
    """
    bad = [t for t, size in enumerate(sizes) if counts[t] and not usable(size, False)]
    if bad and on_bad_loss == "raise":
        raise BadLossError(
            f"Expected finite gradients at optimiser step {step} but the gradient of "
            f"{[tasks[t] for t in bad]} is not, though the loss is. No parameter was changed. "
            f"{_LOOK}"
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
