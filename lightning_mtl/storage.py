"""Where the rows of J are kept, and arithmetic on them that needs no second copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

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


def gramian(rows: Tensor) -> Tensor:
    """Inner products of rows, shape ``(T, T)``, in at least float32."""
    if rows.dtype.itemsize >= 4:
        return rows @ rows.T
    sums = torch.zeros(len(rows), len(rows), device=rows.device)
    for part, _ in _wide(rows):
        sums.addmm_(part, part.T)
    return sums


def norms(rows: Tensor) -> Tensor:
    """Euclidean norms of rows, shape ``(T,)``, in at least float32."""
    found: Tensor
    if rows.dtype.itemsize >= 4:
        found = torch.linalg.vector_norm(rows, dim=1)
        return found
    # With a dtype, PyTorch's own norm makes a wider copy of all rows first.
    parts = [torch.zeros(len(rows), device=rows.device)]
    parts += [torch.linalg.vector_norm(part, dim=1) for part, _ in _wide(rows)]
    found = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return found


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """``weights @ rows``, written to ``out``, shape ``(P,)``, which may be on another device."""
    if rows.dtype == out.dtype and rows.device == out.device:
        return torch.mv(rows.T, weights.to(out), out=out)
    for part, columns in _wide(rows):
        out[columns].copy_(torch.mv(part.T, weights.to(part)))
    return out


def along(rows: Tensor, vector: Tensor) -> Tensor:
    """``rows @ vector``, shape ``(T,)``, in at least float32."""
    vector = vector.to(rows.device)
    if rows.dtype == vector.dtype and rows.dtype.itemsize >= 4:
        return rows @ vector
    sums = torch.zeros(len(rows), device=rows.device)
    for part, columns in _wide(rows):
        sums.add_(part @ vector[columns].to(part))
    return sums


def _wide(rows: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """A few columns at a time in at least float32, and which they are."""
    step = max(1, _NUMBERS // len(rows))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    for start in range(0, rows.shape[1], step):
        columns = slice(start, min(start + step, rows.shape[1]))
        yield rows[:, columns].to(dtype), columns
