"""FAMO: what it learns from the losses before and after a step, and what it refuses to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mtl.loss_balancers.famo import FAMO
from tests.methods.test_loss_balancers import (
    INF,
    NAN,
    reloaded,
    same_state,
    slope,
    some_losses,
    wide,
)


def test_learning_follows_the_softmax() -> None:
    losses, after, xi = some_losses(4), some_losses(4, 1), some_losses(4, 2).log()
    fall = (losses + 1e-8).log() - (after + 1e-8).log()
    expected = slope(lambda x: torch.softmax(x, 0) @ fall, xi) + 0.01 * xi
    balancer = FAMO(gamma=0.01)
    balancer.logits = xi.clone()
    balancer.update(losses, after)
    torch.testing.assert_close(balancer.moments[:, 0], 0.1 * expected)


def test_the_task_that_fell_least_gains() -> None:
    balancer, losses = FAMO(), wide(1.0, 1.0, 1.0)
    balancer.update(losses, wide(0.9, 0.5, 0.7))
    found = balancer.loss_weights(losses)
    assert found[0] > 1 / 3 > found[1]


def test_units_do_not_matter_without_eps() -> None:
    units = wide(1e-20, 1.0, 1e20)
    ours, theirs = FAMO(eps=0.0), FAMO(eps=0.0)
    for k in range(5):
        losses, after = some_losses(3, k), some_losses(3, k + 10)
        found = ours.loss_weights(losses)
        other = theirs.loss_weights(units * losses) * units
        torch.testing.assert_close(other / other.sum(), found)
        ours.update(losses, after)
        theirs.update(units * losses, units * after)


@pytest.mark.parametrize("minimum", [{"a": -3.0, "c": 0.25}, [-3.0, 0.0, 0.25]])
def test_minimum_is_subtracted(minimum: Any) -> None:
    tasks, shift = ["a", "b", "c"], wide(-3.0, 0.0, 0.25)
    ours, theirs = FAMO(minimum=minimum), FAMO()
    ours.check_tasks(tasks)
    for present in (None, [0, 2], None, [1, 2]):
        rows = present or [0, 1, 2]
        losses, after = some_losses(3)[rows], some_losses(3, 1)[rows]
        with ours.only(tasks, present), theirs.only(tasks, present):
            found = ours.loss_weights(losses + shift[rows])
            torch.testing.assert_close(found, theirs.loss_weights(losses))
            ours.update(losses + shift[rows], after + shift[rows])
            theirs.update(losses, after)
    with ours.only(tasks):
        assert ours.loss_weights(wide(-3.5, 1.0, 1.0)).isnan().any()


@pytest.mark.parametrize("bad", [NAN, INF, -1.0, -1e-8])
def test_a_step_into_bad_losses_teaches_nothing(bad: float) -> None:
    balancer = FAMO()
    balancer.update(wide(1.0, 2.0), wide(0.5, 1.5))
    before = reloaded(balancer, FAMO)
    balancer.update(wide(1.0, 2.0), wide(0.5, bad))
    balancer.update(wide(1.0, bad), wide(0.5, 1.0))
    assert same_state(balancer, before)
    balancer.update(wide(1.0, 2.0), wide(0.5, 0.0))  # a loss that is solved does teach
    assert not same_state(balancer, before)


def test_losses_after_are_needed() -> None:
    with pytest.raises(ValueError, match=r"after the optimiser step but got none\. Pass"):
        FAMO().update(torch.ones(2))


def test_scale() -> None:
    one, total = FAMO(), FAMO(scale="sum")
    for k in range(3):
        losses, after = some_losses(4, k), some_losses(4, k + 10)
        found = one.loss_weights(losses)
        torch.testing.assert_close(found.sum(), wide(1.0)[0])
        torch.testing.assert_close(total.loss_weights(losses), 4 * found)
        one.update(losses, after)
        total.update(losses, after)


def test_one_task_weighs_one() -> None:
    balancer = FAMO()
    for after in (0.5, 3.0):
        balancer.update(wide(2.0), wide(after))
        assert balancer.logits.tolist() == [0.0]
        assert balancer.loss_weights(wide(2.0)).tolist() == [1.0]
