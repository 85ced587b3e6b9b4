"""Checks of constructor arguments, and numbers that users give by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from torch import Tensor

T = TypeVar("T")

Scale = Literal["mean", "sum"]
"""``"mean"``: as long as one task gradient (weights that sum to one, or an average over tasks).
``"sum"``: ``T`` times that, as long as the gradient of the summed losses."""


def in_range(
    owner: object,
    name: str,
    value: float,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = True,
) -> float:
    """``value`` if it is a number between ``low`` and ``high``, of which infinity never is.

    Raises:
        ValueError: it is not; names the argument, its owner, the range and the value.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and math.isfinite(value):
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if above and below:
            return float(value)
    if math.isinf(high):
        bounds = f"finite and {'above' if open_low else 'at least'} {low:g}"
    else:
        bounds = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    raise ValueError(
        f"Expected `{name}` of {type(owner).__name__} to be {bounds}, found {value!r}."
    )


def one_of(owner: object, name: str, value: T, choices: Sequence[T]) -> T:
    """``value`` if it is one of ``choices``.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(
            f"Expected `{name}` of {type(owner).__name__} to be one of {tuple(choices)}, "
            f"found {value!r}."
        )
    return value


def whole(owner: object, name: str, value: int, at_least: int = 1) -> int:
    """``value`` if it is an integer of at least ``at_least``.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or value < at_least:
        raise ValueError(
            f"Expected `{name}` of {type(owner).__name__} to be an integer of at least "
            f"{at_least}, found {value!r}."
        )
    return value


def rescaled(weights: Tensor, scale: Scale, own: Scale) -> Tensor:
    """Weights of a method whose formula is of the kind ``own``, brought to ``scale``.

    Args:
        weights: shape ``(T,)``.
        scale: what the user asked for.
        own: ``"mean"`` if the formula gives a direction as long as one task gradient, ``"sum"`` if
            it is ``T`` times as long.
    """
    if scale == own:
        return weights
    return weights * len(weights) if scale == "sum" else weights / len(weights)


class PerTask:
    """A number for each task, given by name, in the order of the tasks, or not at all.

    Args:
        owner: the balancer.
        name: of the argument.
        values: by task name; one number a task in order; or ``None``. Finite.
        unnamed: the number of tasks that are not named, of all for ``None``.
        positive: whether numbers must be above zero.

    Raises:
        ValueError: a number is out of range, or there are none.
    """

    def __init__(
        self,
        owner: object,
        name: str,
        values: Mapping[str, float] | Sequence[float] | None,
        unnamed: float = 1.0,
        *,
        positive: bool = True,
    ) -> None:
        self.owner, self.name, self.unnamed = type(owner).__name__, name, unnamed
        if values is not None and not len(values):
            raise ValueError(
                f"Expected `{name}` of {self.owner} to hold a number for each task, found none. "
                f"Leave it out to treat all tasks alike."
            )
        items = values.items() if isinstance(values, Mapping) else enumerate(values or ())
        for key, value in items:
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or (positive and value <= 0):
                wanted = "finite and above 0" if positive else "finite"
                raise ValueError(
                    f"Expected every entry of `{name}` of {self.owner} to be {wanted}, "
                    f"found {value!r} for task {key!r}."
                )
        self.by_name = dict(values) if isinstance(values, Mapping) else None
        self.in_order = (
            None if values is None or isinstance(values, Mapping) else [float(v) for v in values]
        )

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Compare with all tasks of the run, and give numbers in order their names.

        Raises:
            ValueError: a number is for an unknown task, or there are more or fewer than tasks.
        """
        if self.in_order is not None:
            if len(self.in_order) != len(tasks):
                raise ValueError(
                    f"Expected `{self.name}` of {self.owner} to hold one number for each of the "
                    f"{len(tasks)} tasks {list(tasks)}, found {len(self.in_order)}. Give one "
                    f"number a task, or numbers by task name."
                )
            self.by_name = dict(zip(tasks, self.in_order, strict=True))
        elif self.by_name is not None and (unknown := sorted(set(self.by_name) - set(tasks))):
            raise ValueError(
                f"`{self.name}` of {self.owner} names the unknown tasks {unknown}; the tasks are "
                f"{list(tasks)}. Correct the names."
            )

    def of(self, tasks: Sequence[str], size: int) -> list[float]:
        """The numbers of the tasks of a call.

        Args:
            tasks: their names; empty when used by hand.
            size: how many there are.

        Raises:
            ValueError: numbers in order of another length, or names without tasks.
        """
        if self.by_name is None and self.in_order is None:
            return [self.unnamed] * size
        if self.by_name is not None and tasks:
            return [self.by_name.get(task, self.unnamed) for task in tasks]
        if self.in_order is None or len(self.in_order) != size:
            raise ValueError(
                f"Expected `{self.name}` of {self.owner} for {size} tasks but found "
                f"{self.by_name or self.in_order}. Used by hand, give one number a task in order; "
                f"in a run, let MultiTaskModule tell the task names."
            )
        return self.in_order
