"""State of every method: saved and restored bit for bit, frozen for absent tasks, checked."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer
from lightning_mtl.gradient_balancers import DualBalance, MinNorm, TaskTensioner
from lightning_mtl.loss_balancers import LogLoss, Scalarization
from tests.common.methods import METHODS, TASKS, Method, direction, named

SIZE, WIDTH, STEPS = 4, 6, 7
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
with_state = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.has_state], ids=lambda m: m.name
)


def steps(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(SIZE, WIDTH, generator=generator).to(dtype),
            torch.rand(SIZE, generator=generator).to(dtype) + 0.1,
        )
        for _ in range(STEPS)
    ]


def saved(balancer: Balancer) -> dict:
    """The state after a round trip through a checkpoint file."""
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@each_method
def test_resumed_bit_for_bit(method: Method, dtype: torch.dtype) -> None:
    data = steps(dtype)
    whole = named(method, SIZE)
    expected = [direction(whole, *step) for step in data]
    for stop in (0, 1, 3, 6):
        first = named(method, SIZE)
        for step in data[:stop]:
            direction(first, *step)
        state = saved(first)
        for step in data:  # the saved state is a copy: training on does not reach it
            direction(first, *step)
        second = named(method, SIZE)
        second.load_state_dict(state)
        for step, other in zip(data[stop:], expected[stop:], strict=True):
            assert torch.equal(direction(second, *step), other)


@with_state
def test_state_matters(method: Method) -> None:
    data = steps()
    balancer = named(method, SIZE)
    for step in data[:-1]:
        direction(balancer, *step)
    assert not torch.equal(
        direction(balancer, *data[-1]), direction(named(method, SIZE), *data[-1])
    )


@with_state
def test_reset_starts_afresh(method: Method) -> None:
    data = steps()
    balancer = named(method, SIZE)
    expected = [direction(balancer, *step) for step in data]
    balancer.reset()
    assert all(
        torch.equal(direction(balancer, *step), other)
        for step, other in zip(data, expected, strict=True)
    )


def per_task(balancer: Balancer) -> dict[str, Tensor]:
    return {name: getattr(balancer, name).clone() for name in sorted(balancer._per_task)}


@with_state
def test_absent_tasks_keep_their_state(method: Method) -> None:
    data = steps()
    balancer = method.make()
    for jacobian, losses in data[:3]:
        with balancer.only(TASKS[:SIZE]):
            direction(balancer, jacobian, losses)
    before = per_task(balancer)
    present = [0, 2]
    with balancer.only(TASKS[:SIZE], present):
        direction(balancer, data[3][0][present], data[3][1][present])
    after = per_task(balancer)
    assert before.keys() == after.keys()
    for name, state in after.items():
        assert torch.equal(state[[1, 3]], before[name][[1, 3]]), name
        assert state.shape == before[name].shape
    moved = [name for name in after if not torch.equal(after[name][present], before[name][present])]
    assert moved


@with_state
def test_first_step_without_some_tasks(method: Method) -> None:
    jacobian, losses = steps()[0]
    balancer = method.make()
    with balancer.only(TASKS[:SIZE], [1, 3]):
        direction(balancer, jacobian[[1, 3]], losses[[1, 3]])
    for name, state in per_task(balancer).items():
        assert len(state) == SIZE
        unseen = state[[0, 2]]
        assert torch.equal(unseen, torch.full_like(unseen, balancer._defaults[name])), name
        assert state[[1, 3]].any(), name


@with_state
def test_state_of_other_tasks_is_refused(method: Method) -> None:
    jacobian, losses = steps()[0]
    balancer = named(method, SIZE)
    direction(balancer, jacobian, losses)
    with pytest.raises(ValueError, match=r"expected its state `\w+` in shape \(3,.*reset\(\)"):
        direction(balancer, jacobian[:3], losses[:3])


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (DualBalance(beta=0.5), DualBalance(), "DualBalance was saved with `beta=0.5`"),
        (LogLoss(eps=0.0), LogLoss(), "LogLoss was saved with `eps=0.0`"),
        (MinNorm("l2"), MinNorm(), "MinNorm was saved with `normalization=l2`"),
        (TaskTensioner(alpha=0.5), TaskTensioner(), "TaskTensioner was saved with `alpha=0.5`"),
        (
            TaskTensioner(MinNorm("l2")),
            TaskTensioner(MinNorm()),
            "MinNorm was saved with `normalization=l2`",
        ),
        (
            Scalarization({"a": 2.0}),
            Scalarization({"a": 3.0}),
            r"Scalarization was saved with `weights=\{'a': 2.0\}`",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_changed_hyperparameter_is_reported(before, after, change) -> None:
    with pytest.warns(UserWarning, match=change):
        after.load_state_dict(saved(before))


@pytest.mark.parametrize("window", [2, 6])
def test_tensioner_keeps_the_newest_norms_in_another_window(window: int) -> None:
    data = steps()
    first = TaskTensioner(window=4)
    for step in data[:-1]:
        first.direction(*step)
    second = TaskTensioner(window=window)
    with pytest.warns(UserWarning, match="`window=4` and continues with"):
        second.load_state_dict(saved(first))
    kept = min(window, 4) + 1
    assert second.norms.shape == (SIZE, window + 1)
    assert torch.equal(second.norms[:, -kept:], first.norms[:, -kept:])
    assert second.count.tolist() == [kept] * SIZE
    fresh = TaskTensioner(window=window)
    for step in data[:-1]:
        fresh.direction(*step)
    # A shorter window goes on at once, a longer one waits until it is full again.
    expected = fresh if window < 4 else second.base
    assert torch.equal(second.direction(*data[-1]), expected.direction(*data[-1]))
