"""What every function here takes, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def as_scores(values: Any, seeds: int = 2) -> Array:
    """``values`` as float64 ``(..., methods, seeds)``.

    Args:
        values: anything that numpy makes such an array of.
        seeds: how many there have to be.

    Raises:
        ValueError: another shape, too few seeds, or a score that is no finite number.
    """
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected scores to be numbers of shape (methods, seeds), as many seeds for every "
            f"method, but found something else: {error}. Leave out methods that lack a seed."
        ) from error
    if scores.ndim < 2 or scores.shape[-2] < 1:
        raise ValueError(
            f"Expected scores of shape (methods, seeds) but found {scores.shape}. Give a row for "
            f"each method and a column for each seed."
        )
    if scores.shape[-1] < seeds:
        raise ValueError(
            f"Expected at least {seeds} seeds but found {scores.shape[-1]}. Of one run nothing is "
            f"known about chance: run more seeds."
        )
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        where = ", ".join(f"method {b[-2]} seed {b[-1]}" for b in bad[:3])
        raise ValueError(
            f"Expected finite scores but found {len(bad)} that are not, at {where}. Give a run "
            f"that failed a value chosen beforehand, or leave its method out."
        )
    return scores


def check_level(name: str, value: float) -> None:
    """Refuse what is no probability.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0.0 < value < 1.0:
        raise ValueError(f"Expected `{name}` between 0 and 1 but found {value}.")


def check_margin(value: float) -> None:
    """Refuse what is no margin.

    Raises:
        ValueError: it is not above 0, or not finite.
    """
    if not (np.isfinite(value) and value > 0.0):
        raise ValueError(
            f"Expected `margin` to be a finite number above 0 but found {value}. Give the smallest "
            f"difference that matters."
        )
