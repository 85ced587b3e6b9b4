"""Where the rows of J are kept, and their combination without a second copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.numerics.flat import real, wide

Memory = Literal["full", "bf16", "host", "blocks"]
"""``"full"``: on the device, in float32 or wider. ``"bf16"``: on the device, in half the memory.
``"host"``: in the memory of the host. ``"blocks"``: a part of the columns at a time, never all."""

_NUMBERS = 1 << 20  # in float32 at a time, where rows are narrower


def allocate(number: int, width: int, memory: Memory, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of zeros, shape ``(number, width)``.

    Args:
        number: of rows.
        width: number of columns.
        memory: where and how.
        like: gives the device.
        dtype: float32 or wider.
    """
    if memory == "bf16":
        return torch.zeros(number, width, dtype=torch.bfloat16, device=like.device)
    if memory == "host" and like.device.type != "cpu":
        pinned = like.device.type == "cuda"  # which then needs no copy of its own on the way
        return torch.zeros(number, width, dtype=dtype, pin_memory=pinned)
    return torch.zeros(number, width, dtype=dtype, device=like.device)


def narrow(
    before: Tensor | None, number: int, tensors: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Rows as wide as all of ``tensors``, in at least float32: those of before where they fit."""
    tensors = [real(t.detach()) for t in tensors]
    dtype = wide(tensors) if dtype is None else dtype
    shape, device = (number, sum(t.numel() for t in tensors)), tensors[0].device
    same = before is not None and before.shape == shape
    if before is not None and same and (before.dtype, before.device) == (dtype, device):
        return before
    return torch.empty(shape, dtype=dtype, device=device)


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """``weights @ rows``, written to ``out``, shape ``(P,)``, which may be on another device.

    Weights on the host may leave the range of float32: those of rows 1e38 apart in length do.
    """
    if weights.device.type == "cpu" and not _in_range(weights):
        exact = weights.to(rows.device, torch.float64)
        for part, columns in _wide(rows):
            out[columns].copy_(torch.mv(part.double().T, exact))
        return out
    if rows.dtype == out.dtype and rows.device == out.device:
        return torch.mv(rows.T, weights.to(out), out=out)
    for part, columns in _wide(rows):
        out[columns].copy_(torch.mv(part.T, weights.to(part)))
    return out


def combined(rows: Tensor, weights: Tensor) -> Tensor:
    """``weights @ rows``, a new tensor of shape ``(P,)`` in the dtype of the rows."""
    return combine(rows, weights, torch.empty_like(rows[0]))


def _in_range(weights: Tensor) -> bool:
    """Whether weights are zero or well inside the range of float32."""
    return all(1e-37 < abs(w) < 1e37 for w in weights.tolist() if w)


def _wide(rows: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """A few columns at a time in at least float32, and which they are."""
    step = max(1, _NUMBERS // len(rows))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    for start in range(0, rows.shape[1], step):
        columns = slice(start, min(start + step, rows.shape[1]))
        yield rows[:, columns].to(dtype), columns
