"""Trainer flags mean what they mean under automatic optimisation: the same parameters."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader

from tests.common.models import Balanced, Plain, Sum, loader, resume_from, sgd, trainer, weights


def one_optimizer(module: Any) -> torch.optim.Optimizer:
    """One optimizer of two groups: what two optimizers are compared with."""
    return torch.optim.SGD(
        [{"params": module.net.trunk.parameters()}, {"params": module.net.heads.parameters()}],
        lr=0.01,
        momentum=0.9,
    )


def two_optimizers(module: Any) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(part.parameters(), lr=0.01, momentum=0.9)
        for part in (module.net.trunk, module.net.heads)
    ]


def scheduled(make: Any, **options: Any) -> Any:
    """configure_optimizers that returns a dict with the scheduler `make` builds."""

    def configure(module: Any) -> dict[str, Any]:
        optimizer = sgd(module.net.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make(optimizer, module), **options},
        }

    return configure


def two_lists(module: Any) -> Any:
    optimizer = sgd(module.net.parameters())
    return [optimizer], [lrs.StepLR(optimizer, 1, 0.5)]


def dict_with_monitor(module: Any) -> Any:
    optimizer = sgd(module.net.parameters())
    return {
        "optimizer": optimizer,
        "lr_scheduler": lrs.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
        "monitor": "val/loss/a",
    }


def one_cycle(optimizer: Any, module: Any) -> Any:
    steps = int(module.trainer.estimated_stepping_batches)
    return lrs.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps, cycle_momentum=False)


SCHEDULERS = {
    "two lists": two_lists,
    "dict": scheduled(lambda o, m: lrs.StepLR(o, 1, 0.5)),
    "step": scheduled(lambda o, m: lrs.StepLR(o, 3, 0.7), interval="step"),
    "frequency": scheduled(lambda o, m: lrs.StepLR(o, 1, 0.7), interval="step", frequency=4),
    "one cycle": scheduled(one_cycle, interval="step"),
    "plateau": scheduled(
        lambda o, m: lrs.ReduceLROnPlateau(o, patience=0, threshold=0.5), monitor="val/loss/a"
    ),
    "plateau by step": scheduled(
        lambda o, m: lrs.ReduceLROnPlateau(o, patience=1, threshold=0.9),
        monitor="val/loss/a",
        interval="step",
        frequency=2,
    ),
    "dict with monitor": dict_with_monitor,
}

FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip by norm": {"gradient_clip_val": 0.5},
    "clip by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "accumulate, last group not full": {"accumulate_grad_batches": 3},
    "accumulate and clip": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5},
    "max_steps": {"max_epochs": 3, "max_steps": 27},
    "max_steps and accumulation": {"max_epochs": 9, "max_steps": 20, "accumulate_grad_batches": 3},
    "limit_train_batches": {"max_epochs": 4, "limit_train_batches": 5},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "bf16-true": {"precision": "bf16-true"},
}


def pair(rows: bool, configure: Any = None, plain_configure: Any = None, **flags: Any) -> Any:
    """Fit both models under the same flags; `rows` takes one gradient a task."""
    plain, balanced = Plain(plain_configure or configure), Balanced(configure)
    callbacks = flags.pop("callbacks", list)
    first = trainer(callbacks=callbacks(), **flags)
    second = trainer(callbacks=callbacks() + [Sum()] * rows, **flags)
    first.fit(plain, loader(), loader(16))
    second.fit(balanced, loader(), loader(16))
    return first, second, plain, balanced


def assert_same(first: Any, second: Any, plain: Any, balanced: Any, atol: float = 1e-6) -> None:
    assert second.global_step == first.global_step
    assert second.estimated_stepping_batches == first.estimated_stepping_batches
    assert [g["lr"] for o in second.optimizers for g in o.param_groups][:1] == [
        g["lr"] for o in first.optimizers for g in o.param_groups
    ][:1]
    torch.testing.assert_close(weights(balanced), weights(plain), rtol=0, atol=atol)


both_ways = pytest.mark.parametrize("rows", [False, True], ids=["one backward", "rows"])


@both_ways
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_flags(flags: dict[str, Any], rows: bool) -> None:
    precision = flags.get("precision", "")
    # Summing in another order can move a parameter by one unit of a bfloat16 gradient.
    atol = {"bf16-mixed": 2e-3, "bf16-true": 4e-2}.get(precision, 1e-6) if rows else 1e-6
    assert_same(*pair(rows, **flags), atol=atol)


@both_ways
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("configure", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(configure: Any, every: int, rows: bool) -> None:
    first, second, plain, balanced = pair(
        rows,
        configure,
        max_epochs=3,
        limit_train_batches=7,
        val_check_interval=1,
        accumulate_grad_batches=every,
    )
    assert_same(first, second, plain, balanced)
    before = first.lr_scheduler_configs[0].scheduler.state_dict()
    after = second.lr_scheduler_configs[0].scheduler.state_dict()
    assert after["last_epoch"] == before["last_epoch"]
    assert after["_last_lr"] == before["_last_lr"]


@both_ways
@pytest.mark.parametrize("every", [1, 3])
def test_two_optimizers(every: int, rows: bool) -> None:
    result = pair(rows, two_optimizers, one_optimizer, accumulate_grad_batches=every)
    assert_same(*result)
    assert len(result[1].optimizers) == 2


@both_ways
def test_two_optimizers_stop_at_max_steps(rows: bool) -> None:
    assert_same(*pair(rows, two_optimizers, one_optimizer, max_epochs=5, max_steps=23))


class StepsPlain(Plain):
    steps: list[int]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append(self.trainer.global_step)
        return super().training_step(batch, batch_idx)


class StepsBalanced(Balanced):
    steps: list[int]

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        self.steps.append(self.trainer.global_step)
        return super().task_losses(batch, batch_idx)


@both_ways
def test_global_step_inside_a_training_step(rows: bool) -> None:
    models = StepsPlain(one_optimizer), StepsBalanced(two_optimizers)
    for module, extra in zip(models, ([], [Sum()] * rows), strict=True):
        module.steps = []
        trainer(callbacks=extra, accumulate_grad_batches=2).fit(module, loader(), loader(16))
    assert models[1].steps == models[0].steps == [i // 2 for i in range(20)]


@both_ways
def test_second_fit_and_validate_first(rows: bool) -> None:
    plain, balanced = Plain(), Balanced()
    flags = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    for module, extra in ((plain, []), (balanced, [Sum()] * rows)):
        run = trainer(callbacks=extra, **flags)
        run.validate(module, loader(16), verbose=False)
        run.fit(module, loader(), loader(16))
        assert run.accumulate_grad_batches == 2
        assert run.gradient_clip_val == 0.5
        run.fit_loop.max_epochs = 2
        run.fit(module, loader(), loader(16))
        assert run.global_step == 20
    torch.testing.assert_close(weights(balanced), weights(plain), rtol=0, atol=1e-6)


def early_stopping() -> list[Callback]:
    return [EarlyStopping("val/loss/b", patience=0, min_delta=0.5)]


CALLBACKS = {
    "EarlyStopping": early_stopping,
    "GradientAccumulationScheduler": lambda: [GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})],
    "SWA": lambda: [StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)],
}
if hasattr(lightning.pytorch.callbacks, "WeightAveraging"):  # from lightning 2.6 on
    CALLBACKS["WeightAveraging"] = lambda: [lightning.pytorch.callbacks.WeightAveraging()]


@both_ways
@pytest.mark.parametrize("callbacks", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks(callbacks: Any, rows: bool) -> None:
    assert_same(*pair(rows, callbacks=callbacks, max_epochs=4, limit_train_batches=5))


@both_ways
def test_swa_refreshes_batch_norm(rows: bool) -> None:
    plain, balanced = Plain(), Balanced()
    for module in (plain, balanced):
        module.net.trunk.append(torch.nn.BatchNorm1d(6))
    for module, extra in ((plain, []), (balanced, [Sum()] * rows)):
        swa = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)
        run = trainer(callbacks=[swa, *extra], max_epochs=3, limit_train_batches=6)
        run.fit(module, loader(batch_size=8), loader(16))
    torch.testing.assert_close(weights(balanced), weights(plain), rtol=0, atol=1e-6)
    for name, buffer in plain.net.named_buffers():
        torch.testing.assert_close(balanced.net.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


@both_ways
def test_model_checkpoint(tmp_path: Path, rows: bool) -> None:
    def saved(module: Any, name: str, extra: list[Callback]) -> dict[str, Any]:
        keep = ModelCheckpoint(
            tmp_path / name, every_n_train_steps=3, save_top_k=-1, filename="{step}"
        )
        timed = ModelCheckpoint(
            tmp_path / f"{name}-timed",
            train_time_interval=timedelta(microseconds=1),
            save_top_k=-1,
            filename="{step}",
        )
        run = trainer(callbacks=[keep, timed, *extra], enable_checkpointing=True)
        run.fit(module, loader(), loader(16))
        return {
            str(p.relative_to(tmp_path)).replace(name, ""): torch.load(p, weights_only=True)
            for p in sorted(tmp_path.glob(f"{name}*/*.ckpt"))
        }

    plain = saved(Plain(), "plain", [])
    balanced = saved(Balanced(), "balanced", [Sum()] * rows)
    assert list(balanced) == list(plain)
    assert any("timed" in name for name in plain)
    for name, checkpoint in plain.items():
        assert balanced[name]["global_step"] == checkpoint["global_step"]
        for key, value in checkpoint["state_dict"].items():
            torch.testing.assert_close(balanced[name]["state_dict"][key], value, rtol=0, atol=1e-6)


def test_resumes_from_a_checkpoint_of_automatic_optimisation(tmp_path: Path) -> None:
    plain = Plain()
    run = trainer()
    run.fit(plain, loader(), loader(16))
    run.save_checkpoint(tmp_path / "plain.ckpt")
    longer = trainer(max_epochs=2)
    longer.fit(plain, loader(), loader(16), **resume_from(tmp_path / "plain.ckpt"))

    balanced = Balanced()
    run = trainer(max_epochs=2)
    run.fit(balanced, loader(), loader(16), **resume_from(tmp_path / "plain.ckpt"))
    assert run.global_step == longer.global_step == 40
    torch.testing.assert_close(weights(balanced), weights(plain), rtol=0, atol=1e-6)


@both_ways
def test_channels_last_with_a_fused_optimizer(rows: bool) -> None:
    """A direction in the wrong strides would be 0.1 to 0.3 off after 20 steps."""

    def images(size: int = 80) -> Any:
        batches = [(x[:, None, None].expand(-1, 3, 4, -1).clone(), y) for x, y in loader(size)]
        return DataLoader(batches, batch_size=None)

    results = []
    for make in (Plain, Balanced):
        module = make(lambda m: torch.optim.AdamW(m.net.parameters(), lr=0.01, fused=True))
        torch.manual_seed(2)
        module.net.trunk = torch.nn.Sequential(
            torch.nn.Conv2d(3, 5, 3, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(5, 6, 2),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        ).to(memory_format=torch.channels_last)
        run = trainer(callbacks=[Sum()] * (rows and make is Balanced))
        run.fit(module, images(), images(16))
        results.append(weights(module))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-6)
