"""Losses of a batch after the step, computed as if nobody had looked; and who learns when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_mtl import GradientBalancer, LossBalancer, MinNorm
from tests.common.models import Balanced, Batched, loader, trainer, weights


class Learner(LossBalancer):
    """Weights of one; keeps what it is told."""

    def __init__(self, again: bool = True) -> None:
        super().__init__()
        self.needs_losses_after = again
        self.told: list[tuple[tuple[str, ...], Tensor, Any]] = []

    def loss_weights(self, losses: Tensor) -> Tensor:
        return torch.ones_like(losses)

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        self.told.append((self.tasks, losses.clone(), after))


class Normed(Balanced):
    """With BatchNorm, dropout, a metric in the loss, and logging in it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dropout=0.5, **kwargs)
        self.norm = nn.BatchNorm1d(4)
        self.seen = MeanMetric()
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.net(self.norm(x))

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        losses = super().task_losses(batch, batch_idx)
        total = sum(loss.detach() for loss in losses.values())
        self.seen.update(total)
        self.log("mine", total, on_step=True, on_epoch=True)
        self.log_dict({"more": total})
        return losses


def fit(module: Any, *callbacks: Any, data: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    run = trainer(callbacks=list(callbacks), **kwargs)
    run.fit(module, loader(40) if data is None else data)
    return run


@pytest.mark.parametrize("every", [1, 2])
def test_looking_again_changes_nothing_else(tmp_path: Any, every: int) -> None:
    found = []
    for again in (False, True):
        module, learner = Normed(), Learner(again)
        folder = tmp_path / str(again)
        run = fit(
            module,
            learner,
            accumulate_grad_batches=every,
            max_epochs=2,
            logger=CSVLogger(folder),
            log_every_n_steps=1,
        )
        found.append((module, learner, run, torch.get_rng_state()))
    (plain, one, run, random), (looked, two, again, same) = found
    assert looked.calls == 2 * plain.calls
    assert torch.equal(weights(looked), weights(plain))
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(looked.named_buffers())[name], buffer), name
    assert torch.equal(random, same)
    assert looked.seen._update_count == plain.seen._update_count
    assert looked.seen.compute() == plain.seen.compute()
    assert run.callback_metrics == again.callback_metrics
    logs = [next((tmp_path / str(a)).rglob("metrics.csv")).read_text() for a in (False, True)]
    assert logs[0] == logs[1]
    assert "log" not in vars(looked)
    assert len(two.told) == len(one.told) == (20 if every == 1 else 10)
    assert all(after is None for _, _, after in one.told)


def test_the_losses_are_those_of_the_new_parameters_with_the_same_dropout() -> None:
    frozen, learner = Normed(configure=lambda m: torch.optim.SGD(m.parameters(), lr=0.0)), Learner()
    fit(frozen, learner)
    for _, before, after in learner.told:
        torch.testing.assert_close(after, before)
    moving, learner = Balanced(), Learner()
    losses: list[Tensor] = []

    class Check(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, _: Any, batch: Any, idx: int
        ) -> None:
            with torch.no_grad():
                losses.append(torch.stack(list(module.task_losses(batch, idx).values())))

    fit(moving, learner, Check())
    for (_, before, after), expected in zip(learner.told, losses, strict=True):
        torch.testing.assert_close(after, expected)
        assert not torch.equal(after, before)


def test_means_over_micro_batches_with_counts_and_absent_tasks() -> None:
    class Counted(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            found = dict(super().task_losses(batch, batch_idx))
            found["a"] = (found["a"], 1 + batch_idx % 2)
            if batch_idx % 4 >= 2:
                del found["b"]
            return found

    module = Counted(configure=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    learner = Learner()
    batches = list(loader(16))
    with torch.no_grad():
        by_hand = [[v.item() for v in Balanced().task_losses(b, 0).values()] for b in batches]
    fit(module, learner, data=Batched(batches), accumulate_grad_batches=2)
    assert [tasks for tasks, _, _ in learner.told] == [("a", "b"), ("a",)]
    (_, before, after), (_, second, again) = learner.told
    expected = [(by_hand[0][0] + 2 * by_hand[1][0]) / 3, (by_hand[0][1] + by_hand[1][1]) / 2]
    assert before.tolist() == pytest.approx(expected)
    assert after.tolist() == pytest.approx(expected)
    assert second.tolist() == pytest.approx([(by_hand[2][0] + 2 * by_hand[3][0]) / 3])
    assert again.tolist() == pytest.approx(second.tolist())


def test_a_loss_that_breaks_after_the_step_is_nan_and_told_once() -> None:
    class Leaves(Balanced):
        calls = 0

        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            found = dict(super().task_losses(batch, batch_idx))
            if self.calls % 2 == 0:
                del found["b"]
            return found

    learner = Learner()
    with pytest.warns(UserWarning, match=r"loss of task 'b' once more.*Nothing is learned") as told:
        fit(Leaves(), learner)
    assert len([w for w in told if "once more" in str(w.message)]) == 1
    assert all(after[0].isfinite() and after[1].isnan() for _, _, after in learner.told)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("gradient", [[], [MinNorm]], ids=["", "MinNorm"])
def test_nothing_is_learned_from_a_step_that_is_skipped(every: int, gradient: list[Any]) -> None:
    class Bad(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            found = dict(super().task_losses(batch, batch_idx))
            if batch_idx in (2, 5):
                found["a"] = found["a"] * float("nan")
            return found

    learner = Learner(again=False)
    with pytest.warns(UserWarning, match="cannot be used and is left out"):
        run = fit(
            Bad(on_bad_loss="skip_step"),
            learner,
            *(g() for g in gradient),
            accumulate_grad_batches=every,
        )
    assert len(learner.told) == run.global_step == (8 if every == 1 else 3)


def test_gradient_balancers_and_wrapped_ones_learn_too() -> None:
    class Inner(MinNorm):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("count", 0)

        def update(self, losses: Tensor, after: Tensor | None = None) -> None:
            self.count += 1

    class Outer(GradientBalancer):
        def __init__(self) -> None:
            super().__init__()
            self.base = Inner()

        def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
            return self.base.weights(gramian, losses)

    balancer = Outer()
    fit(Balanced(), balancer)
    assert balancer.base.count == 10
