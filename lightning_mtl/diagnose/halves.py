"""Two halves of a batch of any structure, where its tensors say what a sample is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

_ATOMS = (str, bytes, int, float, complex, bool, type(None))


class UnsplittableError(Exception):
    """A batch whose samples cannot be told apart; the message says why."""


def halves(batch: Any) -> tuple[Any, Any, int]:
    """Every other sample of a batch, and the rest: two batches of the same size, and that size.

    Samples are the rows of the tensors (and arrays), which all have to have as many; of an odd
    number the last is left out. Dicts, lists, tuples and dataclasses are gone through at any depth,
    numbers and texts stay with both halves, and so do tensors without a dimension. A list of texts
    or numbers that is as long as the batch is divided too.

    Args:
        batch: anything; it stays as it is, and halves share the memory of its tensors.

    Raises:
        UnsplittableError: no tensor, tensors of different length, fewer than 2 samples, or an
            object of an unknown kind, such as a graph.
    """
    sizes = {len(leaf) for leaf in _arrays(batch) if leaf.ndim}
    if len(sizes) != 1:
        what = f"first dimensions of {sorted(sizes)[:6]}" if sizes else "no tensor with rows"
        raise UnsplittableError(
            f"its tensors have {what}, where one number of samples was expected"
        )
    count = sizes.pop()
    if count < 2:
        raise UnsplittableError("it has 1 sample")
    half = count // 2
    even, odd = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    return _take(batch, even, count), _take(batch, odd, count), half


def _arrays(value: Any) -> Iterator[Any]:
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif not isinstance(value, _ATOMS):
        for part in _parts(value):
            yield from _arrays(part)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    raise UnsplittableError(f"it holds a {type(value).__name__}, whose samples are not known")


def _take(value: Any, rows: slice, count: int) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        return value[rows] if value.ndim else value
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, (list, tuple)) and len(value) == count and _plain(value):
        return value[rows]
    if isinstance(value, tuple):
        parts = [_take(part, rows, count) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, list):
        return [_take(part, rows, count) for part in value]
    new = copy.copy(value)
    if isinstance(value, Mapping):
        for key, part in value.items():
            new[key] = _take(part, rows, count)
    else:
        for field in dataclasses.fields(value):
            part = _take(getattr(value, field.name), rows, count)
            object.__setattr__(new, field.name, part)  # frozen ones too
    return new


def _plain(values: Any) -> bool:
    return all(isinstance(value, _ATOMS) for value in values)
