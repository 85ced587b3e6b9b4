"""IGBv2: its reward, what its agent sees and when it acts and learns, its state, Lightning."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mtl.loss_balancers import improvable_gap_v2 as module
from lightning_mtl.loss_balancers.improvable_gap_v2 import ImprovableGapV2, improvable_gap_reward
from tests.common.method_rows.agent import acting
from tests.common.models import Balanced, loader, resume_from, trainer, weights
from tests.methods.test_state import saved
from tests.trainer.test_resume import SavedLoader

STEPS = [[4.0, 1.0, 2.0], [2.0, 0.5, 1.5], [1.8, 0.45, 1.6], [1.5, 0.4, 1.2]]
TASKS = "abc"


def losses(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def step(balancer: ImprovableGapV2, values: list[float], present: Any = None) -> Tensor:
    """What the flow does with the losses of a step that is taken."""
    with balancer.only(TASKS, present):
        found = balancer.loss_weights(losses(values))
        balancer.update(losses(values))
    return found


def with_bases(**arguments: Any) -> ImprovableGapV2:
    """After an epoch of one step with the losses 4, 1 and 2, which are then the base losses."""
    balancer = ImprovableGapV2(base_epoch=0, **arguments)
    step(balancer, STEPS[0])
    balancer.end_epoch()
    return balancer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reward_of_the_authors_code(dtype: torch.dtype) -> None:
    first, second, third = (torch.tensor(v, dtype=dtype) for v in STEPS[1:])
    base = torch.tensor([4.0, 1.0, 2.0], dtype=dtype)
    for expected, found in (
        (-0.05, improvable_gap_reward(first, second, base)),
        (0.05, improvable_gap_reward(second, third, base)),
        (0.1, improvable_gap_reward(second, third, base, lr_ratio=2.0)),
    ):
        assert found.dtype == dtype
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_transitions() -> None:
    balancer = with_bases()
    actions = [balancer.action]
    for values in STEPS[1:]:
        drawn = step(balancer, values) * losses(values)
        actions.append(balancer.action)
        torch.testing.assert_close(drawn.float(), balancer.action)
    base = torch.tensor(STEPS[0])
    seen = torch.tensor(STEPS) / base
    torch.testing.assert_close(balancer.buffer[:, 6], torch.tensor([0.25, -0.05, 0.05]))
    torch.testing.assert_close(balancer.buffer[:, :3], seen[:-1])
    torch.testing.assert_close(balancer.buffer[:, 3:6], torch.stack(actions[:-1]))
    torch.testing.assert_close(balancer.buffer[:, 7:], seen[1:])


def test_no_transition_before_there_are_base_losses() -> None:
    balancer = ImprovableGapV2(base_epoch=1)
    for epoch in range(3):
        assert balancer.buffer is None, epoch
        for values in STEPS[:2]:
            step(balancer, values)
        balancer.end_epoch()
    # The base losses are the means of epoch 1; the first step of epoch 2 follows one of epoch 1.
    assert torch.equal(balancer.progress[:, 2], (losses(STEPS[0]) + losses(STEPS[1])) / 2)
    assert len(balancer.buffer) == 2
    for values in STEPS[2:]:
        step(balancer, values)
    balancer.end_epoch()
    assert torch.equal(balancer.progress[:, 2], (losses(STEPS[0]) + losses(STEPS[1])) / 2)


def test_reward_has_the_learning_rate_of_the_step_that_earned_it() -> None:
    balancer = with_bases()
    for ratio, values in zip((2.0, 4.0, 8.0), STEPS[1:], strict=True):
        balancer.lr_ratio = ratio
        step(balancer, values)
    torch.testing.assert_close(balancer.buffer[:, 6], torch.tensor([0.25, 2 * -0.05, 4 * 0.05]))


def test_an_exploded_loss_leaves_the_agent_usable() -> None:
    balancer = acting()
    for values in (*STEPS, [1e30, 1.0, 1.0], *STEPS, *STEPS):
        assert step(balancer, values).isfinite().all()
    assert balancer.buffer.isfinite().all()
    assert balancer.learned.isfinite().all()


def sensitive(balancer: ImprovableGapV2) -> bool:
    """Whether the weights of the logarithms depend on the losses."""
    first, second = (balancer.loss_weights(losses(v)) * losses(v) for v in STEPS[1:3])
    for found in (first, second):
        assert (found > 0).all()
        torch.testing.assert_close(found.sum(), losses([3.0])[0], rtol=1e-6, atol=0)
    return not torch.allclose(first, second, rtol=1e-9, atol=0)


def test_acts_from_its_epoch_on() -> None:
    balancer = ImprovableGapV2(acting_epoch=3)
    for epoch in range(5):
        for values in STEPS:
            assert sensitive(balancer) == (epoch >= 3), epoch
            step(balancer, values)
        balancer.end_epoch()


def test_waits_for_the_base_losses_of_every_task() -> None:
    balancer = ImprovableGapV2(base_epoch=0, acting_epoch=0)
    for _ in range(3):
        step(balancer, [1.0, 2.0], present=[0, 2])
        balancer.end_epoch()
        assert not sensitive(balancer)
    assert balancer.buffer is None
    step(balancer, STEPS[0])
    assert not sensitive(balancer)
    balancer.end_epoch()
    assert sensitive(balancer)
    assert balancer.progress[:, 2].tolist() == [1.0, 1.0, 2.0]


def test_random_weights_are_a_softmax_of_normal_numbers() -> None:
    balancer = ImprovableGapV2(seed=3)
    drawn = torch.stack([step(balancer, [1.0, 1.0, 1.0]) for _ in range(3000)])
    log_ratio = (drawn[:, 0] / drawn[:, 1]).log()
    assert abs(float(log_ratio.mean())) < 0.1
    assert float(log_ratio.std()) == pytest.approx(math.sqrt(2), abs=0.08)


@pytest.mark.parametrize(
    ("kept", "capacity", "updates", "size"), [(0, 100, 10, 4), (100, 100, 20, 8), (50, 100, 15, 6)]
)
def test_rounds_of_updates(monkeypatch, kept: int, capacity: int, updates: int, size: int) -> None:
    balancer = with_bases(learning_epoch=2, learn_every=20, batch_size=8, capacity=capacity)
    shapes = []
    monkeypatch.setattr(module, "learn", lambda *args: shapes.append(tuple(args[3].shape)))
    step(balancer, STEPS[1])
    balancer.buffer = balancer.buffer.expand(max(kept, 1), -1).clone()
    while balancer.step < 20:
        monkeypatch.setattr(balancer, "_keep", lambda transition: None)
        step(balancer, STEPS[1])
    assert not shapes  # epoch 1: it learns from epoch 2 on
    balancer.end_epoch()
    for _ in range(19):
        step(balancer, STEPS[1])
    assert not shapes
    step(balancer, STEPS[1])
    assert shapes == [(size, 10)] * updates


def test_nothing_to_learn_from() -> None:
    balancer = ImprovableGapV2(base_epoch=9, learning_epoch=0, learn_every=2)
    for values in STEPS:
        step(balancer, values)
    assert balancer.buffer is None


def test_learning_changes_the_weights() -> None:
    balancer = acting()
    for values in STEPS:
        step(balancer, values)
    before = balancer.learned.clone()
    step(balancer, STEPS[0])
    assert torch.equal(balancer.learned, before)
    step(balancer, STEPS[1])
    assert not torch.equal(balancer.learned, before)


def test_the_newest_transitions_are_kept() -> None:
    balancer = with_bases(capacity=3)
    for k in range(5):
        step(balancer, [4.0 - 0.4 * k, 0.1, 0.1])
    torch.testing.assert_close(balancer.buffer[:, 7], torch.tensor([0.8, 0.7, 0.6]))
    smaller = ImprovableGapV2(base_epoch=0, capacity=2)
    with pytest.warns(UserWarning, match="`capacity=3` and continues with `capacity=2`"):
        smaller.load_state_dict(saved(balancer))
    step(smaller, [2.0, 0.1, 0.1])
    torch.testing.assert_close(smaller.buffer[:, 7], torch.tensor([0.6, 0.5]))


def test_weights_are_drawn_once_a_step() -> None:
    balancer = acting()
    for values in (*STEPS, *STEPS):
        first = balancer.loss_weights(losses(values))
        balancer.loss_weights(losses([1.0, 1.0, 1.0]))  # a step that is skipped
        assert torch.equal(balancer.loss_weights(losses(values)), first)
        kept = copy.deepcopy(saved(balancer)["state"])
        balancer.loss_weights(losses(values))
        for name, value in saved(balancer)["state"].items():
            assert torch.equal(value, kept[name]) if isinstance(value, Tensor) else True, name
        step(balancer, values)
        assert not torch.equal(balancer.loss_weights(losses(values)), first)


def test_its_random_numbers_are_its_own() -> None:
    def run(seed: int | None, start: int) -> Tensor:
        torch.manual_seed(start)
        balancer = acting()
        balancer._seed = seed
        found = torch.stack([step(balancer, values) for values in (*STEPS, *STEPS)])
        assert torch.equal(torch.rand(3), torch.rand(3, generator=_seeded(start)))
        return found

    assert torch.equal(run(1, 5), run(1, 6))
    assert not torch.equal(run(1, 5), run(2, 5))
    assert torch.equal(run(None, 5), run(None, 5))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resumed_while_it_acts_and_learns() -> None:
    data = [losses(v) * (1 + 0.1 * k) for k in range(4) for v in STEPS]
    whole = acting()
    expected = [step(whole, v.tolist()) for v in data]
    for stop in (1, 2, 5, 10):
        first, second = acting(), acting()
        for values in data[:stop]:
            step(first, values.tolist())
        second.load_state_dict(saved(first))
        for values, other in zip(data[stop:], expected[stop:], strict=True):
            assert torch.equal(step(second, values.tolist()), other)


def test_losses_that_cannot_be_used_move_nothing() -> None:
    balancer = acting()
    for values in STEPS:
        step(balancer, values)
    kept = saved(balancer)["state"]
    for values in ([1.0, math.nan, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.inf, 1.0]):
        ImprovableGapV2.update(balancer, losses(values))
    for name, value in saved(balancer)["state"].items():
        assert torch.equal(value, kept[name]) if isinstance(value, Tensor) else True, name


@pytest.mark.parametrize("make", [ImprovableGapV2, acting])
def test_a_loss_without_logarithm_gets_no_weight(make) -> None:
    balancer = make()
    for values in STEPS:
        step(balancer, values)
    found = balancer.loss_weights(losses([1.0, -1.0, 0.0]))
    assert found.isnan().tolist() == [False, True, True]


def test_absent_tasks_in_a_transition() -> None:
    balancer = with_bases(acting_epoch=1)
    step(balancer, STEPS[1])
    found = step(balancer, [1.0, 1.2], present=[0, 2])
    assert found.shape == (2,)
    # Task b keeps the loss 0.5 in what the agent sees, and does not count in the reward.
    seen = torch.tensor([0.25, 0.5, 0.6])
    torch.testing.assert_close(balancer.buffer[-1, 7:], seen)
    assert float(balancer.buffer[-1, 6]) == pytest.approx(0.15)
    assert balancer.action.shape == (3,)
    torch.testing.assert_close(balancer.action[[0, 2]], (found * losses([1.0, 1.2])).float())
    step(balancer, [0.4], present=[1])
    assert float(balancer.buffer[-1, 6]) == pytest.approx(0.1)
    torch.testing.assert_close(balancer.buffer[-1, :3], seen)
    assert balancer.progress[:, 3].tolist() == [1.0, 0.4, 1.2]


def test_absent_tasks_do_not_change_what_the_agent_thinks() -> None:
    balancer = with_bases(acting_epoch=1)
    step(balancer, STEPS[1])
    everyone = balancer.loss_weights(losses([1.0, 0.5, 1.2]))
    with balancer.only(TASKS, [0, 2]):
        some = balancer.loss_weights(losses([1.0, 1.2]))
    assert torch.equal(some, everyone[[0, 2]])


def test_mean_losses_of_an_epoch_are_over_the_steps_a_task_is_in() -> None:
    balancer = ImprovableGapV2(base_epoch=0)
    step(balancer, STEPS[0])
    step(balancer, [3.0], present=[1])
    balancer.end_epoch()
    assert balancer.progress[:, 2].tolist() == [4.0, 2.0, 2.0]


def batch_start(balancer: ImprovableGapV2, **group: Any) -> float:
    optimizer = SimpleNamespace(param_groups=[group])
    run = SimpleNamespace(optimizers=[optimizer], current_epoch=0)
    balancer.on_train_batch_start(run, None, None, 0)
    return balancer.lr_ratio


def test_learning_rate_ratio() -> None:
    balancer = ImprovableGapV2()
    assert balancer.lr_ratio == 1.0
    assert batch_start(balancer, lr=0.1) == 1.0
    assert batch_start(balancer, lr=0.05) == 2.0
    assert batch_start(balancer, lr=torch.tensor(0.025)) == pytest.approx(4.0)
    assert batch_start(balancer, lr=0.0) == 1.0
    resumed = ImprovableGapV2()
    resumed.load_state_dict(saved(balancer))
    assert batch_start(resumed, lr=0.05) == 2.0
    scheduled = ImprovableGapV2()
    assert batch_start(scheduled, lr=0.05, initial_lr=0.2) == 4.0
    scheduled.on_train_batch_start(SimpleNamespace(optimizers=[], current_epoch=0), None, None, 0)
    assert scheduled.lr_ratio == 4.0


def fitted(folder: Path, resume: Path | None = None, **flags: Any) -> tuple[Any, ImprovableGapV2]:
    """Four epochs of ten steps; a checkpoint after every step, and after each validation."""
    balancer = ImprovableGapV2(
        base_epoch=0, learning_epoch=1, acting_epoch=2, learn_every=4, batch_size=8
    )
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    validated = ModelCheckpoint(
        folder,
        every_n_epochs=1,
        save_on_train_epoch_end=False,
        save_top_k=-1,
        filename="validated-{step}",
    )
    net = Balanced()
    run = trainer(
        callbacks=[balancer, keep, validated], max_epochs=4, enable_checkpointing=True, **flags
    )
    run.fit(net, SavedLoader(), loader(16), **(resume_from(resume) if resume else {}))
    return net, balancer


def test_in_a_trainer(tmp_path: Path) -> None:
    net, balancer = fitted(tmp_path)
    assert int(balancer.epoch) == 4
    assert int(balancer.step) == 40
    assert len(balancer.buffer) == 30
    assert float(balancer.moments[0, 2]) == 8 * 2  # two updates at steps 12, 16, ... 40
    assert weights(net).isfinite().all()
    for name in ("step=7", "validated-step=20", "step=20", "step=33"):
        other, resumed = fitted(tmp_path, tmp_path / f"{name}.ckpt")
        assert torch.equal(weights(other), weights(net)), name
        assert torch.equal(resumed.learned, balancer.learned), name
        assert int(resumed.epoch) == 4, name


def test_accumulated_steps_count_once(tmp_path: Path) -> None:
    _, balancer = fitted(tmp_path, accumulate_grad_batches=5)
    assert int(balancer.step) == 8
    assert int(balancer.epoch) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_epoch": -1}, "`base_epoch` of ImprovableGapV2 .* at least 0, found -1"),
        ({"learning_epoch": 1.5}, "`learning_epoch` of ImprovableGapV2 .* found 1.5"),
        ({"acting_epoch": True}, "`acting_epoch` of ImprovableGapV2 .* found True"),
        ({"learn_every": 1}, "`learn_every` of ImprovableGapV2 .* at least 2, found 1"),
        ({"capacity": 0}, "`capacity` of ImprovableGapV2 .* at least 1, found 0"),
        ({"batch_size": 1}, "`batch_size` of ImprovableGapV2 .* at least 2, found 1"),
        ({"lr": 0.0}, "`lr` of ImprovableGapV2 .* above 0, found 0.0"),
        ({"lr": math.nan}, "`lr` of ImprovableGapV2 .* found nan"),
        ({"seed": -1}, "`seed` of ImprovableGapV2 .* at least 0 or None, found -1"),
    ],
)
def test_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImprovableGapV2(**arguments)


def test_traits() -> None:
    balancer = ImprovableGapV2(seed=3)
    assert balancer.requires_positive_losses
    assert balancer.needs_current_losses
    assert balancer.hyperparameters()["seed"] == 3
