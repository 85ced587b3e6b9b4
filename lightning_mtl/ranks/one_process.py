"""A run of one process: there is nobody to agree with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OneProcess:
    """What the flow asks of the processes of a run; with one, every answer is its own.

    Attributes:
        alone: whether there are no others, and no wrapper that expects some.
        sharded_parameters: whether each process has a part of every parameter only (FSDP2).
        size: number of processes.
        rank: number of this one.
        device: where collectives run.
        dtype: of the losses that the ranks agree on.
    """

    alone: bool = True
    sharded_parameters: bool = False
    size: int = 1
    rank: int = 0
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place and returned."""
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], Any]:
        """Begin the sum over processes, in place; call what is returned before it is used."""
        return _nothing

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest value over processes, in place and returned."""
        return tensor

    def copy_first(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of the first process."""

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of ranks; plain values only."""
        return [value]

    def scatter(self, row: Tensor, part: Tensor) -> Tensor:
        """This process's part of the sum of ``row`` over processes, written to ``part``."""
        return part.copy_(row)

    def start_scatter(self, row: Tensor, part: Tensor) -> Callable[[], Any]:
        """Begin what :meth:`scatter` does; call what is returned before ``part`` is used."""
        part.copy_(row)
        return _nothing

    def gather_columns(self, part: Tensor, row: Tensor) -> Tensor:
        """All processes' parts in the order of ranks, written to ``row``."""
        return row.copy_(part)


def _nothing() -> None:
    pass
