"""Gradients that are nearly parallel, nearly opposite or of unlike size, in float32 as in float64.

The bounds are those of rows that are themselves rounded to float32: a combination that is a
thousandth of its terms has three digits less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import (
    IMTLG,
    AlignedMTL,
    CAGrad,
    CentralDirection,
    ConFIG,
    DualProj,
    FairGrad,
    GradVac,
    MinNorm,
    MTAdam,
    NashMTL,
    PCGrad,
    SDMGrad,
    UPGrad,
)

METHODS: list[Callable[[], Any]] = [
    ConFIG,
    IMTLG,
    CAGrad,
    NashMTL,
    lambda: FairGrad(alpha=2.0),
    UPGrad,
    DualProj,
    MinNorm,
    CentralDirection,
    SDMGrad,
    lambda: PCGrad(order="ascending"),
    lambda: GradVac(order="ascending"),
]
LOSSES = torch.ones(3)


def rows_of(kind: str, gap: float, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(3, width, generator=generator, dtype=torch.float64)
    a, b, c = drawn / drawn.norm(dim=1, keepdim=True)
    if kind == "parallel":
        rows = [a, a + gap * b, 0.7 * c - 0.4 * a]
    elif kind == "opposite":
        rows = [a, gap * b - a, 0.7 * c + 0.1 * a]
    else:
        rows = [a, gap**3 * (0.3 * a + b), c - 0.5 * a]
    return torch.stack(rows).float()


def off(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("kind", ["parallel", "opposite", "unlike"])
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("width", [3, 20_000])
def test_float32_keeps_what_float64_finds(
    make: Callable[[], Any], kind: str, gap: float, width: int
) -> None:
    rows = rows_of(kind, gap, width)
    truth = make().direction(rows.double(), LOSSES.double())
    assert off(make().direction(rows, LOSSES), truth) < 1e-6 / gap


def test_two_rows_within_a_five_hundredth() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.002, 0.0], [-0.3, 0.6, 0.7]])
    expected = torch.tensor([0.69283, 0.00069283, 1.25590])
    torch.testing.assert_close(ConFIG().direction(rows, LOSSES), expected, rtol=1e-3, atol=1e-4)


def authors_config(rows: Tensor) -> Tensor:
    """Least squares with the unit rows themselves."""
    units = rows / rows.norm(dim=1, keepdim=True)
    x = torch.linalg.lstsq(units, torch.ones(len(rows), dtype=rows.dtype)).solution
    x = x / x.norm()
    return (rows @ x).sum() * x


def authors_aligned(rows: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > values.max() * len(rows) * torch.finfo(torch.float32).eps
    values, vectors = values[kept], vectors[:, kept]
    balance = vectors @ torch.diag((values.min() / values).sqrt()) @ vectors.T
    return balance.sum(0) @ rows


def authors_imtl(rows: Tensor) -> Tensor:
    units = rows / rows.norm(dim=1, keepdim=True)
    difference, of_units = rows[:1] - rows[1:], units[:1] - units[1:]
    last = rows[0] @ of_units.T @ torch.linalg.inv(difference @ of_units.T)
    return torch.cat([1 - last.sum()[None], last]) @ rows


@pytest.mark.parametrize(
    ("make", "theirs"),
    [(ConFIG, authors_config), (AlignedMTL, authors_aligned), (IMTLG, authors_imtl)],
)
@pytest.mark.parametrize("kind", ["parallel", "opposite", "unlike"])
@pytest.mark.parametrize("gap", [1e-2, 1e-3])
@pytest.mark.parametrize("width", [3, 20_000])
def test_no_method_loses_to_the_formula_of_its_authors(
    make: Callable[[], Any],
    theirs: Callable[[Tensor], Tensor],
    kind: str,
    gap: float,
    width: int,
) -> None:
    rows = rows_of(kind, gap, width)
    ours = off(make().direction(rows, LOSSES), make().direction(rows.double(), LOSSES.double()))
    other = off(theirs(rows), theirs(rows.double()))
    assert ours <= 10 * other + 1e-6 / gap


# The length of the central direction depends on how parallel rows share their weight.
@pytest.mark.parametrize("make", [m for m in METHODS if m is not CentralDirection])
def test_rows_that_differ_by_rounding_count_as_parallel(make: Callable[[], Any]) -> None:
    """The second is three times the first but for float32's rounding, which says nothing."""
    rows = rows_of("parallel", 0.5, 200)
    rows[1] = rows[0] * 3
    exact = rows.double()
    exact[1] = exact[0] * 3
    assert not torch.equal(rows.double(), exact)
    truth = make().direction(exact, LOSSES.double())
    assert off(make().direction(rows, LOSSES), truth) < 1e-5


@pytest.mark.parametrize("ratio", [1e10, 1e30, 1e38])
@pytest.mark.parametrize(
    "make",
    [
        ConFIG,
        lambda: PCGrad(order="ascending"),
        CentralDirection,
        UPGrad,
        GradVac,
        MTAdam,
    ],
)
def test_norms_many_orders_apart(make: Callable[[], Any], ratio: float) -> None:
    small, large = 1 / ratio**0.5, ratio**0.5
    rows = torch.tensor([[small, 0.3 * small, 0.0], [-large, large, 0.2 * large]])
    truth = make().direction(rows.double(), LOSSES[:2].double())
    found = make().direction(rows, LOSSES[:2])
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)
