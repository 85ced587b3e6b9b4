"""Loss balancers that look back at epochs: what each keeps of them, in any run and when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mtl.loss_balancers.dynamic_weight_average import (
    DynamicWeightAverage,
    dynamic_average_weights,
)
from lightning_mtl.loss_balancers.improvable_gap_v1 import ImprovableGapV1
from lightning_mtl.loss_balancers.stch import STCH, stch_weights
from tests.common.models import Balanced, resume_from, trainer, weights
from tests.methods.test_loss_balancers import reloaded, same_state, slope, some_losses, wide
from tests.trainer.test_resume import SavedLoader

EPOCHS = {
    "DynamicWeightAverage": DynamicWeightAverage,
    "ImprovableGapV1": ImprovableGapV1,
    "STCH": lambda: STCH(warm_up=1),
}
each_with_epochs = pytest.mark.parametrize("make", EPOCHS.values(), ids=EPOCHS)


def epoch(balancer: Any, *steps: Tensor) -> None:
    for losses in steps:
        balancer.update(losses)
    balancer.end_epoch()


class TestDynamicWeightAverage:
    @pytest.mark.parametrize("size", range(1, 13))
    def test_ones_in_the_first_two_epochs(self, size: int) -> None:
        balancer = DynamicWeightAverage()
        for k in range(2):
            for dtype in (torch.float32, torch.float64):
                assert (balancer.loss_weights(some_losses(size).to(dtype)) == 1).all()
            epoch(balancer, some_losses(size, k))
        if size > 1:
            assert (balancer.loss_weights(some_losses(size)) != 1).all()

    def test_means_of_epochs_of_other_lengths(self) -> None:
        balancer = DynamicWeightAverage(temperature=0.7)
        epoch(balancer, wide(9.0, 9.0))
        epoch(balancer, wide(5.0, 1.0), wide(3.0, 1.0))
        epoch(balancer, wide(1.0, 2.0), wide(2.0, 0.1), wide(3.0, 0.6))
        balancer.update(wide(50.0, 60.0))  # the epoch that goes on has no say
        ratio = wide(2.0 / 4.0, 0.9 / 1.0)
        expected = 2 * torch.exp(ratio / 0.7) / torch.exp(ratio / 0.7).sum()
        torch.testing.assert_close(balancer.loss_weights(ratio), expected)

    def test_zero_mean_counts_as_no_change(self) -> None:
        found = dynamic_average_weights(wide(3.0, 0.5, 0.0), wide(0.0, 0.5, 0.0))
        assert found.tolist() == [1.0, 1.0, 1.0]

    def test_a_task_that_missed_an_epoch_keeps_its_means(self) -> None:
        tasks, ours, theirs = ["a", "b"], DynamicWeightAverage(), DynamicWeightAverage()
        for k, both in enumerate((True, False, True, False)):
            losses = wide(1.0 + k, 5.0 - k)
            with ours.only(tasks, None if both else [0]):
                ours.update(losses if both else losses[:1])
            ours.end_epoch()
            if both:
                epoch(theirs, losses[1:])
        assert torch.equal(ours.history[1], theirs.history[0])
        assert ours.history[0].tolist() == [0.0, 0.0, 4.0, 3.0]

    def test_window_counts_steps_of_each_task(self) -> None:
        tasks, balancer = ["a", "b"], DynamicWeightAverage(window=2)
        for k in range(4):
            with balancer.only(tasks, None if k % 2 else [1]):
                balancer.update(wide(10.0 * k, 2.0**k) if k % 2 else wide(2.0**k))
            balancer.end_epoch()  # loader epochs do not matter
        assert balancer.history.tolist() == [[0.0, 0.0, 20.0, 0.0], [0.0, 0.0, 6.0, 1.5]]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("cls", [ImprovableGapV1, STCH])
def test_losses_of_one_epoch_are_kept(cls: Any, first: int) -> None:
    balancer = cls(**{"base_epoch" if cls is ImprovableGapV1 else "warm_up": first})
    losses = some_losses(3)
    for k in range(first + 3):
        for _ in range(2):
            found = balancer.loss_weights(losses)
            same = torch.allclose(found, 1 / losses, rtol=1e-12, atol=0)
            assert same == (k <= first), k
        epoch(balancer, (k + 1) * wide(1.0, 2.0, 3.0), (k + 2) * wide(1.0, 2.0, 3.0))
    kept = balancer.base if cls is ImprovableGapV1 else balancer.nadir
    torch.testing.assert_close(kept[:, 2], (first + 1.5) * wide(1.0, 2.0, 3.0))
    assert balancer.epoch == first + 3


def test_improvable_gap_of_a_task_that_comes_late() -> None:
    tasks, balancer = ["a", "b"], ImprovableGapV1()
    for present, losses in ((None, wide(8.0, 9.0)), ([0], wide(4.0))):
        with balancer.only(tasks, present):
            balancer.update(losses)
        balancer.end_epoch()
    with balancer.only(tasks):
        losses = wide(2.0, 0.5)
        share = torch.softmax(wide(0.5, 1.0), 0)  # nothing improved yet where nothing is known
        torch.testing.assert_close(balancer.loss_weights(losses), 2 * share / losses)
        balancer.update(losses)
    balancer.end_epoch()
    assert balancer.base[:, 2].tolist() == [4.0, 0.5]


def test_stch_of_a_task_that_comes_late() -> None:
    tasks, balancer, losses = ["a", "b", "c"], STCH(warm_up=0), wide(2.0, 0.5, 1.0)
    with balancer.only(tasks, [0, 2]):
        balancer.update(wide(4.0, 8.0))
    balancer.end_epoch()
    with balancer.only(tasks):
        torch.testing.assert_close(balancer.loss_weights(losses), 1 / losses)
    with balancer.only(tasks, [0, 2]):
        expected = stch_weights(wide(2.0, 1.0), wide(4.0, 8.0))
        torch.testing.assert_close(balancer.loss_weights(wide(2.0, 1.0)), expected)
    with balancer.only(tasks):
        balancer.update(losses)
    balancer.end_epoch()
    assert balancer.nadir[:, 2].tolist() == [4.0, 0.5, 8.0]


class TestSTCH:
    @pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
    def test_objective_is_differentiated(self, mu: float) -> None:
        losses, nadir, preference = some_losses(4), some_losses(4, 1), some_losses(4, 2)

        def objective(x: Tensor) -> Tensor:
            return 4 * mu * ((preference * x / nadir) ** (1 / mu)).sum().log()

        found = stch_weights(losses, nadir, mu, preference)
        torch.testing.assert_close(found, slope(objective, losses))
        torch.testing.assert_close(found, stch_weights(losses, nadir, mu, 7 * preference))

    def test_closed_form_and_maximum(self) -> None:
        losses, nadir, preference = wide(2.0, 0.5, 1.5), wide(4.0, 1.0, 2.0), wide(1.0, 3.0, 1.0)
        shares = preference / nadir
        expected = 3 * shares / (shares @ losses)
        torch.testing.assert_close(stch_weights(losses, nadir, 1.0, preference), expected)
        found = stch_weights(losses, nadir, 1e-3, preference)
        torch.testing.assert_close(found, wide(0.0, 6.0, 0.0), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("given", [{"a": 3.0, "c": 0.5}, [3.0, 1.0, 0.5]])
    def test_preference_by_task(self, given: Any) -> None:
        tasks, losses, nadir = ["a", "b", "c"], wide(0.2, 0.1, 0.3), wide(4.0, 1.0, 2.0)
        found = {}
        for name, preference in (("given", given), ("none", None), ("ones", [1.0, 1.0, 1.0])):
            balancer = STCH(warm_up=0, preference=preference)
            balancer.check_tasks(tasks)
            with balancer.only(tasks):
                balancer.update(nadir)
            balancer.end_epoch()
            with balancer.only(tasks):
                found[name] = balancer.loss_weights(losses)
        expected = stch_weights(losses, nadir, 1.0, wide(3.0, 1.0, 0.5))
        torch.testing.assert_close(found["given"], expected)
        assert found["given"][0] > found["none"][0]  # also far below the nadir
        assert torch.equal(found["ones"], found["none"])


# ------------------------------------------------------------------------------ stop and resume


@each_with_epochs
def test_resumed_in_any_epoch(make: Any) -> None:
    """Bit for bit, with tasks that are missing from steps and from epochs."""
    tasks = ["a", "b", "c"]

    def step(balancer: Any, k: int) -> Tensor:
        present = [None, [0, 2], [1, 2]][k % 3] if k > 3 else [0, 2]
        losses = some_losses(3, k)[present or [0, 1, 2]]
        with balancer.only(tasks, present):
            found = balancer.loss_weights(losses)
            balancer.update(losses)
        if k % 3 == 2:
            balancer.end_epoch()
        return found

    whole = make()
    expected = [step(whole, k) for k in range(15)]
    for stop in range(15):
        first = make()
        for k in range(stop):
            step(first, k)
        second = reloaded(first, make)
        for k in range(stop, 15):
            assert torch.equal(step(second, k), expected[k])
        assert same_state(second, whole)


class Recorder(Callback):
    """Mean losses of each epoch, and how often epochs end."""

    def __init__(self, balancer: Any) -> None:
        self.steps: dict[int, list[Tensor]] = {}
        self.ends = 0
        learn, end = balancer.update, balancer.end_epoch

        def update(losses: Tensor, after: Tensor | None = None) -> None:
            self.steps.setdefault(self.epoch, []).append(losses.clone())
            learn(losses, after)

        def end_epoch() -> None:
            self.ends += 1
            end()

        balancer.update, balancer.end_epoch = update, end_epoch

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.epoch = trainer.current_epoch

    def means(self) -> list[Tensor]:
        return [torch.stack(losses).mean(0) for losses in self.steps.values()]


def fit(make: Any, folder: Path, resume: Path | None = None, flags: Any = None, **when: Any) -> Any:
    """A run that keeps checkpoints, its balancer and what the balancer was told."""
    balancer, module = make(), Balanced(dropout=0.3)
    recorder = Recorder(balancer)
    keep = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", **when)
    flags = {"max_epochs": 4, "enable_checkpointing": True, **(flags or {})}
    torch.manual_seed(7 if resume is None else 99)
    validation = SavedLoader(8) if when.get("save_on_train_epoch_end") is False else None
    trainer(callbacks=[balancer, recorder, keep], **flags).fit(
        module, SavedLoader(), validation, **(resume_from(resume) if resume else {})
    )
    return balancer, recorder, weights(module)


@each_with_epochs
def test_epochs_of_a_run(make: Any, tmp_path: Path) -> None:
    balancer, recorder, _ = fit(make, tmp_path)
    means = recorder.means()
    assert [len(steps) for steps in recorder.steps.values()] == [10] * 4
    assert recorder.ends == 4
    if isinstance(balancer, DynamicWeightAverage):
        torch.testing.assert_close(balancer.history[:, 2:], torch.stack([means[3], means[2]], 1))
    else:
        kept = balancer.base if isinstance(balancer, ImprovableGapV1) else balancer.nadir
        torch.testing.assert_close(kept[:, 2], means[1])
        assert balancer.epoch == 4


@pytest.mark.parametrize(
    "flags", [{}, {"max_epochs": -1, "max_steps": 40}], ids=["epochs", "steps"]
)
@pytest.mark.parametrize(
    "when",
    [
        {"every_n_train_steps": 1},
        {"save_on_train_epoch_end": True},
        {"save_on_train_epoch_end": False},
    ],
    ids=["every step", "end of epoch", "end of validation"],
)
@pytest.mark.parametrize("make", [DynamicWeightAverage, ImprovableGapV1])
def test_epochs_of_a_resumed_run(make: Any, when: Any, flags: Any, tmp_path: Path) -> None:
    """Lightning may leave out the end of the epoch that a checkpoint is of, or repeat it."""
    whole, _, expected = fit(make, tmp_path, flags=flags, **when)
    saved = {int(path.stem.rpartition("=")[2]): path for path in tmp_path.glob("*.ckpt")}
    for step in sorted(saved.keys() & {1, 10, 15, 20}):
        resumed, _, found = fit(make, tmp_path, saved[step], flags, **when)
        assert torch.equal(found, expected), step
        assert same_state(resumed, whole), step


def test_epochs_of_one_run_after_another() -> None:
    balancer = ImprovableGapV1()
    recorder = Recorder(balancer)
    for ends in (1, 2, 3):
        trainer(callbacks=[balancer, recorder]).fit(Balanced(), SavedLoader())
        assert recorder.ends == balancer.epoch == ends
