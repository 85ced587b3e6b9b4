"""Inner products of long rows: exact for every width, dtype and place, whatever their size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl import GradientBalancer, MinNorm
from lightning_mtl.numerics.inner import along, gramian, in_blocks, norms, products
from lightning_mtl.numerics.storage import combined

WIDTHS = [0, 1, 7, 65_535, 65_536, 65_537, 400_001]


def rows_of(width: int, dtype: torch.dtype = torch.float32, tasks: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(tasks, width, generator=generator)
    return (1.0 + 0.1 * rows).to(dtype)  # sums grow, as those of squares do


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_exact_to_the_rounding_of_float64(width: int, dtype: torch.dtype) -> None:
    rows, wide = rows_of(width, dtype), rows_of(width, dtype).double()
    close = {"rtol": 1e-13, "atol": 0.0}
    torch.testing.assert_close(gramian(rows), wide @ wide.T, **close)
    torch.testing.assert_close(products(rows, rows[:2]), wide @ wide[:2].T, **close)
    torch.testing.assert_close(along(rows, rows[1]), wide @ wide[1], **close)
    torch.testing.assert_close(norms(rows), torch.linalg.vector_norm(wide, dim=1), **close)
    assert {f(rows).dtype for f in (gramian, norms)} == {torch.float64}


def test_float32_alone_is_not() -> None:
    rows = rows_of(4_000_000)
    wide = rows.double()
    plain = ((rows @ rows.T).double() / (wide @ wide.T) - 1).abs().max()
    assert plain > 1e-6 > 1e-12 > (gramian(rows) / (wide @ wide.T) - 1).abs().max()


@pytest.mark.parametrize("width", [5, 4096, 8192, 20_000, 70_000])
def test_blocks_for_a_device_are_the_same_sum(width: int) -> None:
    first, second = rows_of(width).double(), rows_of(width).double()[:2]
    torch.testing.assert_close(in_blocks(first, second), first @ second.T, rtol=1e-13, atol=0)


def test_vectors_of_another_layout_and_views() -> None:
    base = rows_of(70_000)
    view = base[:, ::2]
    torch.testing.assert_close(gramian(view), gramian(view.contiguous()), rtol=1e-13, atol=0)
    torch.testing.assert_close(gramian(base[[2, 0]]), gramian(base)[[2, 0]][:, [2, 0]])


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e38])
def test_squares_stay_within_range(size: float) -> None:
    rows = rows_of(1000) * size
    rows = rows.clamp(max=3e38)
    expected = torch.linalg.vector_norm(rows.double(), dim=1)
    torch.testing.assert_close(gramian(rows).diagonal().sqrt(), expected)
    torch.testing.assert_close(norms(rows), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    rows = rows_of(100_000)
    rows[1, 70_000] = bad
    assert gramian(rows).diagonal().isfinite().tolist() == [True, False, True]
    assert norms(rows).isfinite().tolist() == [True, False, True]


def test_a_combination_whose_weights_leave_the_range_of_float32() -> None:
    rows = torch.tensor([[1e-25, 2e-25], [1e25, 0.0]])
    found = combined(rows, torch.tensor([1e45, 1e-45], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1e20, 2e20]))
    assert combined(rows, torch.zeros(2, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_a_method_gets_one_dtype() -> None:
    """A user's method may multiply its arguments."""

    class Product(GradientBalancer):
        def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
            return gramian @ losses

    found = Product().direction(torch.eye(2, 3), torch.tensor([2.0, 3.0]))
    assert found.tolist() == [2.0, 3.0, 0.0]
    assert found.dtype == torch.float32
    assert MinNorm().direction(torch.eye(2, 3).half(), torch.ones(2)).dtype == torch.float16
