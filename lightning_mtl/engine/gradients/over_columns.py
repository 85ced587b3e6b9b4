"""Sums over the columns of task gradients, whoever has them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_mtl.numerics import inner

# Weights, shape (T,), to the Gramian of all shared parameters times them, and estimates of it.
Product = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class OverColumns:
    """Inner products and sizes of rows, complete over the processes that have other columns."""

    @property
    def product(self) -> Product | None:
        """What knows more of the Gramian than these rows; ``None`` where they are all of it."""
        return None

    def sum_shards(self, partial: Tensor) -> Tensor:
        """Sums over columns, completed over the processes that have others: here, nobody has."""
        return partial

    def gramian(self, rows: Tensor) -> Tensor:
        """Inner products of the rows, shape ``(T, T)``, float64."""
        return self.sum_shards(inner.gramian(rows))

    def along(self, rows: Tensor, direction: Tensor) -> Tensor:
        """Inner products of the rows with the direction, shape ``(T,)``."""
        return self.sum_shards(inner.along(rows, direction))

    def length(self, direction: Tensor) -> Tensor:
        """Norm of the direction."""
        return self.sum_shards(inner.gramian(direction[None])[0, 0]).sqrt()

    def sizes(self, rows: Tensor) -> Tensor:
        """Not finite for rows that are not, zero for rows of zeros, shape ``(T,)``, float64."""
        return self.sum_shards(inner.largest(rows))
