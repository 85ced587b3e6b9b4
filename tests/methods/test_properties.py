"""What every method promises on structured Jacobians: finite, fair to order, scaled by its law.

Tolerances are relative to the largest weighted row, the size of what cancels in a direction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.common.methods import METHODS, Method, direction, named, total_weights

WIDTH = 16
SIZES = [1, 2, 3, 5, 8, 12]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def full_rank(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal((size, WIDTH))


def rank_deficient(rng: np.random.Generator, size: int) -> np.ndarray:
    rank = max(1, size // 2)
    return rng.standard_normal((size, rank)) @ rng.standard_normal((rank, WIDTH))


def dominated(rng: np.random.Generator, size: int) -> np.ndarray:
    rows = rng.standard_normal((size, WIDTH))
    return np.arange(1.0, size + 1)[:, None] * (3 * rows[0] + 0.1 * rows)


def opposite(rng: np.random.Generator, size: int) -> np.ndarray:
    rows = rng.standard_normal((size, WIDTH))
    rows[-1] = -2 * rows[0]
    return rows


def identical(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.repeat(rng.standard_normal((1, WIDTH)), size, axis=0)


def zero_rows(rng: np.random.Generator, size: int) -> np.ndarray:
    rows = rng.standard_normal((size, WIDTH))
    rows[:: max(2, size // 2)] = 0
    return rows


def all_zero(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.zeros((size, WIDTH))


def far_apart(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal((size, WIDTH)) * np.logspace(-8, 8, size)[:, None]


STRUCTURES = [
    full_rank,
    rank_deficient,
    dominated,
    opposite,
    identical,
    zero_rows,
    all_zero,
    far_apart,
]
INDEPENDENT = [full_rank, dominated, far_apart]


def methods(having: Callable[[Method], object] = lambda m: True) -> pytest.MarkDecorator:
    """Run a test for every method with a trait."""
    return pytest.mark.parametrize("method", list(filter(having, METHODS)), ids=lambda m: m.name)


def cases(
    dtype: torch.dtype = torch.float64, independent: bool = False
) -> list[tuple[str, Tensor, Tensor]]:
    """A Jacobian and losses from 0.1 to 10 for every structure (of independent rows) and size."""
    rng = np.random.default_rng(0)
    return [
        (
            f"{draw.__name__}, T={size}",
            torch.from_numpy(draw(rng, size)).to(dtype),
            torch.from_numpy(10 ** rng.uniform(-1, 1, size)).to(dtype),
        )
        for draw in (INDEPENDENT if independent else STRUCTURES)
        for size in SIZES
    ]


def warmed(method: Method, jacobian: Tensor, losses: Tensor):
    """A fresh balancer after its warm-up: gradient norms shrank towards this step."""
    balancer = named(method, len(losses))
    for k in range(method.warm_up, 0, -1):
        direction(balancer, jacobian * (1 + 0.1 * k), losses)
    return balancer


def size_of_terms(method: Method, jacobian: Tensor, losses: Tensor) -> Tensor:
    """The largest weighted row; 1e-30 where all of them are zero."""
    norms = jacobian.norm(dim=1)
    if method.weighted:
        norms = norms * total_weights(warmed(method, jacobian, losses), jacobian, losses).abs()
    else:
        norms = norms / losses.clamp(max=1.0)
    return norms.max().clamp(min=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@methods()
def test_finite_in_the_dtype_of_the_input(method: Method, dtype: torch.dtype) -> None:
    for name, jacobian, losses in cases(dtype):
        balancer = warmed(method, jacobian, losses)
        found = direction(balancer, jacobian, losses)
        assert found.dtype == dtype, name
        assert found.shape == (WIDTH,), name
        assert found.isfinite().all(), name
        if method.weighted:
            weights = total_weights(warmed(method, jacobian, losses), jacobian, losses)
            assert weights.dtype == dtype, name
            assert weights.isfinite().all(), name


@methods(lambda m: m.weighted)
def test_weights_give_the_direction(method: Method) -> None:
    for name, jacobian, losses in cases():
        weights = total_weights(warmed(method, jacobian, losses), jacobian, losses)
        found = direction(warmed(method, jacobian, losses), jacobian, losses)
        tolerance = 1e-9 * float(size_of_terms(method, jacobian, losses))
        torch.testing.assert_close(
            found, weights @ jacobian, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@methods(lambda m: m.equivariant)
def test_order_of_the_tasks_does_not_matter(method: Method) -> None:
    rng = np.random.default_rng(1)
    for name, jacobian, losses in cases(independent=not method.unique):
        order = torch.from_numpy(rng.permutation(len(losses)))
        found = direction(warmed(method, jacobian, losses), jacobian, losses)
        moved = direction(
            warmed(method, jacobian[order], losses[order]), jacobian[order], losses[order]
        )
        tolerance = 1e-6 * float(size_of_terms(method, jacobian, losses))
        torch.testing.assert_close(
            moved, found, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@methods(lambda m: m.scale is not None)
def test_law_of_scale(method: Method, dtype: torch.dtype, tolerance: float) -> None:
    for name, jacobian, losses in cases(dtype, not method.unique):
        if dtype == torch.float32 and name.startswith("far_apart"):
            continue  # squares of 1e-8 * 1e-6 are not float32 numbers
        expected = direction(warmed(method, jacobian, losses), jacobian, losses)
        bound = tolerance * float(size_of_terms(method, jacobian, losses))
        # In float32 powers of two, which round nothing: rows that are exactly opposite stay so, and
        # a projection jumps where they are nearly so.
        wide = dtype == torch.float64
        for s in (1e-6, 1e-3, 1e3, 1e6) if wide else (2.0**-20, 2.0**-10, 2.0**10, 2.0**20):
            found = direction(
                warmed(method, s * jacobian, s * losses), s * jacobian, s * losses
            ) / (s**method.scale)
            torch.testing.assert_close(
                found, expected, rtol=0, atol=bound, msg=lambda m, n=f"{name}, s={s}": f"{n}: {m}"
            )


@methods(lambda m: m.nonconflicting)
def test_no_task_increases(method: Method) -> None:
    for name, jacobian, losses in cases(independent=method.nonconflicting == "independent"):
        found = direction(warmed(method, jacobian, losses), jacobian, losses)
        slopes = jacobian @ found / jacobian.norm(dim=1).clamp(min=1e-30)
        assert (slopes >= -1e-7 * size_of_terms(method, jacobian, losses)).all(), name


@methods(lambda m: m.stationary_fixed_point)
def test_opposite_gradients_cancel(method: Method) -> None:
    jacobian = torch.tensor([[1.0, 2.0, -1.0], [-3.0, -6.0, 3.0]], dtype=torch.float64)
    losses = torch.tensor([2.0, 0.5], dtype=torch.float64)
    found = direction(warmed(method, jacobian, losses), jacobian, losses)
    assert found.norm() < 1e-6 * jacobian.norm()


@methods()
def test_input_is_left_alone(method: Method) -> None:
    _, jacobian, losses = cases()[4]
    before = jacobian.clone(), losses.clone()
    direction(warmed(method, jacobian, losses), jacobian, losses)
    assert torch.equal(jacobian, before[0])
    assert torch.equal(losses, before[1])
