"""Whose turn it is in MomentumConFIG: a round robin for any number of tasks and turns."""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice

import pytest
import torch

from lightning_mtl import MomentumConFIG
from tests.common.methods import TASKS


def step(balancer: MomentumConFIG, size: int, present: list[int] | None = None) -> list[str]:
    """The tasks of a step, by name, in ascending order."""
    with balancer.only(TASKS[:size], present):
        count = size if present is None else len(present)
        chosen = [balancer.tasks[t] for t in balancer.wanted(count)]
        balancer.direction(torch.randn(count, 5), torch.ones(count))
    return chosen


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("turns", range(1, 9))
def test_the_selector_of_the_authors(size: int, turns: int) -> None:
    """Slices of 0, 1, ..., T - 1, 0, 1, ..., one after the other."""
    balancer, taken = MomentumConFIG(rows_per_step=turns), min(turns, size)
    queue = cycle(TASKS[:size])
    for _ in range(3 * size):
        assert step(balancer, size) == sorted(islice(queue, taken))


def test_three_tasks_and_two_turns() -> None:
    balancer = MomentumConFIG(rows_per_step=2)
    found = [step(balancer, 3) for _ in range(60)]
    assert found[:3] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert Counter(t for tasks in found for t in tasks) == {"a": 40, "b": 40, "c": 40}


@pytest.mark.parametrize("after", [1, 2, 4])
def test_restored_in_the_middle_of_a_round(after: int) -> None:
    balancer, other = (MomentumConFIG(rows_per_step=2) for _ in range(2))
    for _ in range(after):
        step(balancer, 5)
    other.load_state_dict(balancer.state_dict())
    assert [step(other, 5) for _ in range(10)] == [step(balancer, 5) for _ in range(10)]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_even_with_tasks_that_come_and_go(turns: int) -> None:
    balancer, counts = MomentumConFIG(rows_per_step=turns), Counter[str]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        away = int(torch.randint(5, (), generator=generator))
        counts.update(step(balancer, 5, [t for t in range(5) if t != away]))
    assert max(counts.values()) - min(counts.values()) <= 0.1 * 200 * turns / 5


def test_a_task_that_was_away_has_its_turn_before_those_that_were_served() -> None:
    balancer = MomentumConFIG(rows_per_step=2)
    assert step(balancer, 4) == ["a", "b"]
    assert step(balancer, 4, [0, 1, 3]) == ["a", "d"]
    assert step(balancer, 4) == ["b", "c"]
    assert step(balancer, 4) == ["a", "d"]
