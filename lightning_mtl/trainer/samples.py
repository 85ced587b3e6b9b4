"""How many samples a batch has, whatever it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


def samples(target: Any, inputs: Any, where: str, cure: str) -> int:
    """The number of samples behind a target.

    The first dimension of a tensor, or the one that the tensors of a dict have in common; for a
    list of dicts, as in detection, its length. A list of tensors can be either, one sample each or
    one tensor for each part of a sample: the inputs tell.

    Args:
        target: of one task.
        inputs: of the same batch.
        where: what the target is, for the message.
        cure: what to do when nothing tells, for the message.

    Raises:
        ValueError: lengths that do not agree.
    """
    found = _lengths(target)
    if len(found) == 1:
        return found.pop()
    if not found and (target is None or isinstance(target, (int, float)) or _shaped(target)):
        return 1  # a number: a batch without a batch dimension
    given = _lengths(inputs)
    both = found & given if found else given
    if len(both) == 1:
        return both.pop()
    if not found:
        return 1
    raise ValueError(
        f"Expected one number of samples in {where} but found {sorted(found)} in the "
        f"{type(target).__name__} and {sorted(given)} in the inputs, so that a mean over batches "
        f"has no weights. {cure}"
    )


def samples_of_batch(batch: Any, cure: str) -> int:
    """The number of samples in a batch of any form: what its parts have in common."""
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        batch = dict(enumerate(batch))  # parts of a batch, not one sample each
    return samples(batch, None, "a batch", cure)


def _shaped(value: Any) -> bool:
    return getattr(value, "shape", None) is not None


def _lengths(value: Any) -> set[int]:
    """What the number of samples can be."""
    if _shaped(value):
        return {int(value.shape[0])} if len(value.shape) else set()
    if isinstance(value, Mapping):
        return _fields(value.values())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _fields(value)
    if isinstance(value, (list, tuple)):
        parts = _common(map(_lengths, value)) if value and all(map(_shaped, value)) else set()
        return {len(value)} | (parts if len(parts) == 1 else set())
    if dataclasses.is_dataclass(value):
        return _fields(getattr(value, field.name) for field in dataclasses.fields(value))
    return set()


def _fields(values: Iterable[Any]) -> set[int]:
    """Of parts that each have all samples; tensors go before lists, which may be names."""
    values = list(values)
    tensors = [v for v in values if _shaped(v) and len(v.shape)]
    return _common(_lengths(v) for v in tensors or values)


def _common(lengths: Iterable[set[int]]) -> set[int]:
    found = [part for part in lengths if part]
    return (set.intersection(*found) or set.union(*found)) if found else set()
