"""What is special to TaskTensioner: when it acts, its history, its three kinds of feasibility."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.gradient_balancers import (
    TaskTensioner,
    central_direction_weights,
    tension_weights,
)
from tests.common.methods import TASKS, fixture


def random_step(rng: np.random.Generator, size: int, width: int = 5) -> tuple[Tensor, Tensor]:
    rows = rng.standard_normal((size, width)) * 10 ** rng.uniform(-1, 1, (size, 1))
    return torch.from_numpy(rows), torch.from_numpy(10 ** rng.uniform(-1, 1, size))


def tensioned(jacobian: Tensor, losses: Tensor, feasibility: str) -> Tensor:
    gramian = jacobian @ jacobian.T
    base = central_direction_weights(gramian)
    ratios = torch.linspace(0.8, 1.2, len(losses), dtype=losses.dtype)
    return tension_weights(gramian, base, losses, ratios, 1.0, feasibility) @ jacobian


@pytest.mark.parametrize("window", [1, 3, 10])
def test_acts_from_the_call_after_the_window(window: int) -> None:
    jacobian, losses = fixture("E3")
    tensioner = TaskTensioner(window=window)
    base = tensioner.base.direction(jacobian, losses)
    for _ in range(window):
        assert torch.equal(tensioner.direction(jacobian, losses), base)
    assert not torch.allclose(tensioner.direction(jacobian, losses), base)


def test_waits_for_a_task_that_was_absent() -> None:
    jacobian, losses = fixture("E3")
    tensioner = TaskTensioner(window=2)
    for _ in range(2):
        with tensioner.only(TASKS[:3], [0, 1]):
            tensioner.direction(jacobian[:2], losses[:2])
    with tensioner.only(TASKS[:3]):
        base = tensioner.base.direction(jacobian, losses)
        assert torch.equal(tensioner.direction(jacobian, losses), base)
    with tensioner.only(TASKS[:3], [0, 1]):
        base = tensioner.base.direction(jacobian[:2], losses[:2])
        assert not torch.allclose(tensioner.direction(jacobian[:2], losses[:2]), base)


@pytest.mark.parametrize("history", ["mean", "ema", lambda window: window.median(dim=1).values])
def test_history_over_the_window(history) -> None:
    jacobian, losses = fixture("E3")
    factors = [3.0, 1.0, 2.0, 1.5]
    tensioner = TaskTensioner(window=3, history=history, feasibility="none")
    for factor in factors:
        found = tensioner.direction(factor * jacobian, losses)
    if history == "mean":
        ratio = (1.0 + 2.0 + 1.5) / (3.0 + 1.0 + 2.0)
    elif history == "ema":  # smoothing 2 / (3 + 1): shares 1/4, 1/2, 1
        ratio = (1.0 / 4 + 2.0 / 2 + 1.5) / (3.0 / 4 + 1.0 / 2 + 2.0)
    else:
        ratio = 1.5 / 2.0
    rows = factors[-1] * jacobian
    gramian = rows @ rows.T
    base = central_direction_weights(gramian)
    ratios = torch.full((3,), ratio, dtype=losses.dtype)
    expected = tension_weights(gramian, base, losses, ratios, feasibility="none") @ rows
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_exact_is_the_nearest_direction_without_conflict(size: int) -> None:
    rng = np.random.default_rng(size)
    corrected = 0
    for _ in range(50):
        jacobian, losses = random_step(rng, size)
        free, exact = (tensioned(jacobian, losses, f) for f in ("none", "exact"))
        scale = float(free.norm()) * jacobian.norm(dim=1)
        assert (jacobian @ exact >= -1e-9 * scale).all()
        # Optimality of a projection on a cone: the residual is orthogonal to the point, and the
        # cone's own generators for it are the conflicting rows, with multipliers of at least zero.
        residual = exact - free
        assert float(residual @ exact) == pytest.approx(0.0, abs=1e-9 * float(free.norm()) ** 2)
        corrected += bool((jacobian @ free < -1e-9 * scale).any())
        for _ in range(20):  # no sampled point of the cone is nearer
            other = exact + 0.1 * float(free.norm()) * torch.from_numpy(rng.standard_normal(5))
            if (jacobian @ other >= 0).all():
                assert (other - free).norm() >= residual.norm() * (1 - 1e-9)
    assert corrected >= 5


def test_published_lets_conflicts_remain_with_three_tasks_or_more() -> None:
    rng = np.random.default_rng(0)
    left = {2: 0, 3: 0, 5: 0}
    for size in left:
        for _ in range(200):
            jacobian, losses = random_step(rng, size)
            found = tensioned(jacobian, losses, "published")
            left[size] += bool((jacobian @ found < -1e-9 * found.norm()).any())
    assert left[2] == 0
    assert 0 < left[3] < left[5]


def test_weights_sum_to_one_without_projection() -> None:
    for name in ("E2", "E3", "F2"):
        jacobian, losses = fixture(name)
        for feasibility in ("published", "none"):
            tensioner = TaskTensioner(window=1, feasibility=feasibility)
            for _ in range(2):
                weights = tensioner.weights(jacobian @ jacobian.T, losses)
            assert float(weights.sum()) == pytest.approx(1.0)


def test_without_alpha_two_tasks_have_the_base_direction_and_three_have_not() -> None:
    for name, same in (("E2", True), ("E3", False)):
        jacobian, losses = fixture(name)
        tensioner = TaskTensioner(window=1, alpha=0.0)
        for _ in range(2):
            found = tensioner.direction(jacobian, losses)
        assert torch.allclose(found, tensioner.base.direction(jacobian, losses)) is same


def test_tension_of_two_tasks_is_off_when_both_losses_are_small() -> None:
    jacobian, _ = fixture("E2")
    small = torch.tensor([1e-3, 2e-3], dtype=torch.float64)
    found = tensioned(jacobian, small, "none")
    base = central_direction_weights(jacobian @ jacobian.T) @ jacobian
    torch.testing.assert_close(found, base, rtol=0, atol=1e-2)
    assert (tensioned(jacobian, 1e3 * small, "none") - base).norm() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tension_where_it_is_undefined(dtype: torch.dtype) -> None:
    row = torch.tensor([[0.3, -1.7, 2.9]], dtype=dtype)
    for jacobian in (row, row.repeat(3, 1)):
        tensioner = TaskTensioner(window=1)
        for _ in range(2):
            found = tensioner.direction(jacobian, torch.full((len(jacobian),), 2.0, dtype=dtype))
        torch.testing.assert_close(found, row[0])


def test_norms_that_were_zero_do_not_spoil_the_ratio() -> None:
    jacobian, losses = fixture("E2")
    tensioner = TaskTensioner(window=1)
    for rows in (0 * jacobian, 0 * jacobian, jacobian, 0 * jacobian):
        found = tensioner.direction(rows, losses)
        assert math.isfinite(float(found.norm()))
