"""Hooks, the loggers' axis and the progress bar are those of automatic optimisation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    ProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import lr_scheduler as lrs

from tests.common.models import Balanced, Plain, Sum, loader, trainer, weights
from tests.trainer.test_trainer_flags import both_ways, scheduled


class Recorder:
    """Mixed into both models: the order in which Lightning calls what users override."""

    calls: list[str]

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls.append("on_before_zero_grad")

    def on_before_backward(self, loss: Tensor) -> None:
        self.calls.append("on_before_backward")

    def on_after_backward(self) -> None:
        last = not self.trainer.fit_loop._should_accumulate()  # type: ignore[attr-defined]
        complete = all(p.grad is not None for p in self.net.parameters())  # type: ignore[attr-defined]
        self.calls.append(f"on_after_backward {last and complete}")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norm = sum(p.grad.square().sum() for p in self.net.parameters()) ** 0.5  # type: ignore[attr-defined]
        self.calls.append(f"on_before_optimizer_step {norm:.4f}")

    def configure_gradient_clipping(self, optimizer: Any, **kwargs: Any) -> None:
        self.calls.append(f"configure_gradient_clipping {sorted(kwargs.values(), key=str)}")
        self.clip_gradients(optimizer, **kwargs)  # type: ignore[attr-defined]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:  # a warm-up as in Lightning's documentation
            group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 10)  # type: ignore[attr-defined]
        optimizer.step(closure=closure)
        self.calls.append(f"optimizer_step {epoch} {batch_idx}")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.calls.append(f"optimizer_zero_grad {batch_idx}")
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.calls.append(f"lr_scheduler_step {metric}")
        scheduler.step()


class RecordedPlain(Recorder, Plain):
    pass


class RecordedBalanced(Recorder, Balanced):
    pass


class Hooks(Callback):
    """The same hooks as a callback sees them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_before_zero_grad(self, run: Any, module: Any, optimizer: Any) -> None:
        self.calls.append("on_before_zero_grad")

    def on_before_backward(self, run: Any, module: Any, loss: Tensor) -> None:
        self.calls.append(f"on_before_backward {loss:.4f}")

    def on_after_backward(self, run: Any, module: Any) -> None:
        self.calls.append("on_after_backward")

    def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
        self.calls.append("on_before_optimizer_step")

    def on_train_batch_end(
        self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.calls.append(f"on_train_batch_end {run.global_step}")


@both_ways
@pytest.mark.parametrize("every", [1, 3])
def test_hooks(every: int, rows: bool) -> None:
    configure = scheduled(lambda o, m: lrs.StepLR(o, 3, 0.7), interval="step")
    models = RecordedPlain(configure), RecordedBalanced(configure)
    hooks = Hooks(), Hooks()
    for module, hook, extra in zip(models, hooks, ([], [Sum()] * rows), strict=True):
        module.calls = []
        flags = {"accumulate_grad_batches": every, "gradient_clip_val": 0.5}
        trainer(callbacks=[hook, *extra], **flags).fit(module, loader(), loader(16))
    assert models[1].calls == models[0].calls
    assert hooks[1].calls == hooks[0].calls
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-6)


class Logs:
    """Logs in every training batch."""

    def note(self) -> None:
        self.log("seen", float(self.trainer.global_step), prog_bar=True)  # type: ignore[attr-defined]


class LoggingPlain(Logs, Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note()
        return super().training_step(batch, batch_idx)


class LoggingBalanced(Logs, Balanced):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        self.note()
        return super().task_losses(batch, batch_idx)


def logged(path: Path) -> list[tuple[str, str]]:
    with (path / "metrics.csv").open() as file:
        return [(row["step"], row["seen"]) for row in csv.DictReader(file) if row["seen"]]


@both_ways
@pytest.mark.parametrize("every", [1, 3])
def test_logger_axis(tmp_path: Path, every: int, rows: bool) -> None:
    paths = []
    for module, extra in ((LoggingPlain(), []), (LoggingBalanced(), [Sum()] * rows)):
        logger = CSVLogger(tmp_path, name=type(module).__name__)
        flags = {"accumulate_grad_batches": every, "log_every_n_steps": 2}
        trainer(callbacks=extra, logger=logger, **flags).fit(module, loader(), loader(16))
        paths.append(Path(logger.log_dir))
    assert logged(paths[1]) == logged(paths[0])


class Bar(ProgressBar):
    """What a progress bar shows at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def disable(self) -> None: ...

    def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
        super().on_train_batch_end(run, module, *args)
        self.seen.append((self.total_train_batches, self.get_metrics(run, module)))


@both_ways
@pytest.mark.parametrize("every", [1, 3])
def test_progress_bar(every: int, rows: bool) -> None:
    bars = Bar(), Bar()
    models = (LoggingPlain(), []), (LoggingBalanced(), [Sum()] * rows)
    for bar, (module, extra) in zip(bars, models, strict=True):
        flags = {"accumulate_grad_batches": every, "enable_progress_bar": True}
        trainer(callbacks=[bar, *extra], **flags).fit(module, loader(), loader(16))
    assert bars[1].seen == bars[0].seen
    assert len(bars[0].seen) == 20
