"""GradientMonitor with the real Trainer and real loggers: the numbers, the names, the axis."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_mtl import DualBalance, GradientMonitor, LogLoss, MinNorm, StepRecord
from lightning_mtl.monitor import step_metrics
from tests.common.models import Balanced, Plain, loader, trainer, weights

ROWS = torch.tensor([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, 1.0, 3.0]])
DIRECTION = torch.tensor([1.0, 1.0, 0.0])


def record(**changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "tasks": ("a", "b", "c"),
        "losses": torch.tensor([2.0, 0.5, 1.5]),
        "loss_weights": torch.tensor([0.5, 2.0, 1.0]),
        "gradient_weights": torch.tensor([0.2, 0.3, 0.5]),
        "gramian": ROWS @ ROWS.T,
        "alignment": ROWS @ DIRECTION,
        "direction_norm": DIRECTION.norm(),
    }
    return StepRecord(**{**values, **changes})


def angle(row: Tensor) -> float:
    return float(torch.rad2deg(torch.acos(row @ DIRECTION / row.norm() / DIRECTION.norm())))


def test_numbers_of_a_record() -> None:
    found = step_metrics(record())
    expected = {}
    for i, task in enumerate("abc"):
        expected[f"mtl/grad_norm/{task}"] = float(ROWS[i].norm())
        expected[f"mtl/loss_weight/{task}"] = [0.5, 2.0, 1.0][i]
        expected[f"mtl/gradient_weight/{task}"] = [0.2, 0.3, 0.5][i]
        expected[f"mtl/angle_to_direction/{task}"] = angle(ROWS[i])
        for j in range(i + 1, 3):
            cosine = torch.nn.functional.cosine_similarity(ROWS[i], ROWS[j], dim=0)
            expected[f"mtl/grad_cosine/{task}-{'abc'[j]}"] = float(cosine)
    expected["mtl/conflict_rate"] = 2 / 3  # a against b and a against c
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_a_record_lacks_is_left_out() -> None:
    summed = record(gramian=None, alignment=None, direction_norm=None, gradient_weights=None)
    assert set(step_metrics(summed)) == {f"mtl/loss_weight/{task}" for task in "abc"}


def test_a_zero_gradient_has_a_norm_and_no_angle() -> None:
    rows = ROWS * torch.tensor([[1.0], [0.0], [1.0]])
    found = step_metrics(record(gramian=rows @ rows.T, alignment=rows @ DIRECTION))
    assert found["mtl/grad_norm/b"] == 0.0
    assert "mtl/angle_to_direction/b" not in found
    assert "mtl/grad_cosine/a-b" not in found
    assert found["mtl/conflict_rate"] == 1.0  # of the one pair that has a cosine


def rows_of(logger: CSVLogger, key: str) -> list[tuple[int, float]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [(int(r["step"]), float(r[key])) for r in csv.DictReader(file) if r.get(key)]


@pytest.mark.parametrize(
    ("balancers", "weighted"),
    [([], False), ([LogLoss()], False), ([MinNorm()], True), ([DualBalance()], False)],
    ids=["none", "LogLoss", "MinNorm", "DualBalance"],
)
def test_logs_the_first_step_and_every_nth(
    tmp_path: Path, balancers: list[Any], weighted: bool
) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=[*balancers, GradientMonitor(5)], logger=logger)
    run.fit(Balanced(), loader(), loader(16))
    assert [step for step, _ in rows_of(logger, "mtl/grad_norm/a")] == [0, 4, 9, 14, 19]
    cosines = [value for _, value in rows_of(logger, "mtl/grad_cosine/a-b")]
    conflicts = [value for _, value in rows_of(logger, "mtl/conflict_rate")]
    assert conflicts == [float(cosine < 0) for cosine in cosines]
    assert all(0 <= value <= 180 for _, value in rows_of(logger, "mtl/angle_to_direction/b"))
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        header = next(csv.reader(file))
    assert ("mtl/gradient_weight/a" in header) == weighted


def test_the_first_norm_is_that_of_the_first_gradient(tmp_path: Path) -> None:
    module, logger = Balanced(), CSVLogger(tmp_path)
    x, targets = next(iter(loader()))
    loss = torch.nn.functional.mse_loss(module(x)["a"], targets["a"])
    grads = torch.autograd.grad(loss, list(module.net.trunk.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    trainer(callbacks=[GradientMonitor()], logger=logger).fit(module, loader(), loader(16))
    ((step, value),) = rows_of(logger, "mtl/grad_norm/a")
    assert (step, value) == (0, pytest.approx(float(norm), rel=1e-5))


def test_micro_batches_count_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = GradientMonitor(2)
    flags = {"accumulate_grad_batches": 3, "logger": logger}
    trainer(callbacks=[MinNorm(), monitor], **flags).fit(Balanced(), loader(), loader(16))
    assert [step for step, _ in rows_of(logger, "mtl/conflict_rate")] == [0, 1, 3, 5]


def test_every_logger_of_the_trainer(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    run = trainer(callbacks=[MinNorm(), GradientMonitor(10)], logger=[board, table])
    run.fit(Balanced(), loader(), loader(16))
    events = EventAccumulator(board.log_dir)
    events.Reload()
    seen = [(e.step, e.value) for e in events.Scalars("mtl/gradient_weight/a")]
    assert seen == [
        (step, pytest.approx(value, rel=1e-5))
        for step, value in rows_of(table, "mtl/gradient_weight/a")
    ]
    assert [step for step, _ in seen] == [0, 9, 19]


def test_without_a_logger_it_warns_and_asks_for_nothing() -> None:
    alone, watched = Balanced(), Balanced()
    trainer().fit(alone, loader(), loader(16))
    monitor = GradientMonitor(1)
    with pytest.warns(UserWarning, match="expected a logger but the Trainer has none.*CSVLogger"):
        trainer(callbacks=[monitor]).fit(watched, loader(), loader(16))
    assert torch.equal(weights(watched), weights(alone))


def test_one_task(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = Balanced(active_tasks=["b"])
    trainer(callbacks=[GradientMonitor(10)], logger=logger).fit(module, loader(), loader(16))
    assert len(rows_of(logger, "mtl/grad_norm/b")) == 3
    angles = [value for _, value in rows_of(logger, "mtl/angle_to_direction/b")]
    assert angles == pytest.approx([0, 0, 0], abs=0.1)  # degrees: acos near 1, from float32
    assert rows_of(logger, "mtl/conflict_rate") == []


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_wrong_interval(every: Any) -> None:
    with pytest.raises(ValueError, match="`every_n_steps` of GradientMonitor to be a whole number"):
        GradientMonitor(every)


def test_another_module_is_refused() -> None:
    with pytest.raises(TypeError, match="watch a MultiTaskModule but found Plain"):
        trainer(callbacks=[GradientMonitor()]).fit(Plain(), loader(), loader(16))


class Gaps(Balanced):
    """Task `b` is absent from every second batch."""

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        losses = dict(super().task_losses(batch, batch_idx))
        return losses if batch_idx % 2 == 0 else {"a": losses["a"]}


def test_absent_tasks_are_left_out(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=[MinNorm(), GradientMonitor(1)], logger=logger)
    run.fit(Gaps(), loader(), loader(16))
    assert [step for step, _ in rows_of(logger, "mtl/grad_norm/a")] == list(range(20))
    for key in ("mtl/grad_norm/b", "mtl/gradient_weight/b", "mtl/conflict_rate"):
        assert [step for step, _ in rows_of(logger, key)] == list(range(0, 20, 2))


class TwoBad(Balanced):
    """The losses of the sixth and the seventh batch cannot be used."""

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        losses = dict(super().task_losses(batch, batch_idx))
        return {t: v * float("nan") for t, v in losses.items()} if batch_idx in (5, 6) else losses


@pytest.mark.filterwarnings("ignore:A loss or a gradient of optimiser step 6 cannot be used")
def test_a_skipped_step_is_not_logged_again(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=[MinNorm(), GradientMonitor(5)], logger=logger)
    run.fit(TwoBad(on_bad_loss="skip_step"), loader(), loader(16))
    assert run.global_step == 18
    norms = [value for _, value in rows_of(logger, "mtl/grad_norm/a")]
    assert len(norms) == len(set(norms)) == 4  # steps 1, 5, 10 and 15


def test_the_axis_is_that_of_self_log(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = trainer(callbacks=[GradientMonitor(5)], logger=logger, log_every_n_steps=5)
    run.fit(Balanced(), loader(), loader(16))
    own = [step for step, _ in rows_of(logger, "mtl/grad_norm/a")]
    assert [step for step, _ in rows_of(logger, "train/loss/a")] == own[1:] == [4, 9, 14, 19]


def test_watching_does_not_change_training(tmp_path: Path) -> None:
    alone, watched = Balanced(), Balanced()
    trainer(callbacks=[LogLoss()]).fit(alone, loader(), loader(16))
    run = trainer(callbacks=[LogLoss(), GradientMonitor(1)], logger=CSVLogger(tmp_path))
    run.fit(watched, loader(), loader(16))
    torch.testing.assert_close(weights(watched), weights(alone), atol=1e-6, rtol=0)


def test_mixed_precision(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    flags = {"precision": "bf16-mixed", "logger": logger}
    trainer(callbacks=[MinNorm(), GradientMonitor(10)], **flags).fit(Balanced(), loader(), None)
    assert len(rows_of(logger, "mtl/angle_to_direction/a")) == 3


def test_barebones_warns_and_trains() -> None:
    run = {"barebones": True, "accelerator": "cpu", "max_epochs": 1}
    with pytest.warns(UserWarning, match="the Trainer has none.*not `barebones=True`"):
        Trainer(callbacks=[GradientMonitor(1)], **run).fit(Balanced(), loader())
