"""Modules of other libraries, ported as their users would: plain Lightning, balanced, resumed.

Each file beside this one has the module as it is trained without us (`Plain`) and ported
(`Ported`), the names of its tasks, and batches. A library that is missing fails here.
"""

from __future__ import annotations

import csv
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_mtl import (
    Balancer,
    DualBalance,
    GradientMonitor,
    MinNorm,
    TaskTensioner,
    UncertaintyWeighting,
)
from tests.common.models import Batched, trainer
from tests.trainer.test_resume import states

MODULES = [
    "mask_rcnn",
    "retinanet",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mpnn", "bert", "gcn")),
]
BALANCERS: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "DualBalance": lambda: [DualBalance()],
    "MinNorm": lambda: [MinNorm()],
    "TaskTensioner": lambda: [TaskTensioner(MinNorm(), window=2)],
    "UncertaintyWeighting": lambda: [UncertaintyWeighting()],
    "GradientMonitor": lambda: [GradientMonitor(every_n_steps=1)],
}
FLAGS: dict[str, dict[str, Any]] = {
    "clip": {"gradient_clip_val": 0.05},
    "accumulate": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
}


class Rotated:
    """Batches in another order every epoch; knows its position."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self):  # the checkpoint was written at the end of an epoch
            self.epoch, self.position = self.epoch + 1, 0
        return self._rest(self.epoch, self.position)

    def _rest(self, epoch: int, position: int) -> Iterator[Any]:
        for batch in (self.batches[epoch:] + self.batches[:epoch])[position:]:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Reached(Callback):
    """Names of the parameters that get a gradient."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
        named = module.named_parameters()
        self.names |= {name for name, p in named if p.grad is not None and p.grad.any()}


@pytest.fixture(params=MODULES)
def ported(request: Any) -> Any:
    with warnings.catch_warnings():
        # What a library calls deprecated in another while it is imported is not ours to repair.
        warnings.simplefilter("ignore")
        return importlib.import_module(f"tests.ported.{request.param}")


def fit(
    ported: Any, version: str, resume: Path | None = None, *, validate: bool = False, **flags: Any
) -> tuple[Any, Any]:
    """Two epochs of either version from the same start, on the same random numbers."""
    seed_everything(0, verbose=False)
    module, batches = getattr(ported, version)(), ported.batches(5)
    run = trainer(max_epochs=2, **flags)
    # A resumed run starts from other random numbers: the checkpoint has to bring its own.
    seed_everything(1 if resume is None else 99, verbose=False)
    validate |= ported.Plain.validation_step is not LightningModule.validation_step
    # Hyperparameters of some hold classes; lightning before 2.6 never looks at that.
    looks = "weights_only" in inspect.signature(Trainer.fit).parameters
    run.fit(
        module,
        Rotated(batches),
        Batched(batches[:2]) if validate else None,
        ckpt_path=resume,
        **({"weights_only": False} if looks else {}),
    )
    return run, module


def tensors(module: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {k: v.detach() for k, v in (*module.named_parameters(), *module.named_buffers())}


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    """Names that are in one of them only, or whose values differ in a bit."""
    both = found.keys() & expected.keys()
    changed = {name for name in both if not torch.equal(found[name], expected[name])}
    return changed | (found.keys() ^ expected.keys())


@functools.cache
def unbalanced(ported: Any) -> tuple[dict[str, Tensor], set[str]]:
    """How their own training ends without a flag, and which parameters got a gradient in it."""
    reached = Reached()
    _, plain = fit(ported, "Plain", callbacks=[reached])
    return tensors(plain), reached.names


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_no_balancer_is_their_own_training_step(ported: Any, flags: dict[str, Any]) -> None:
    theirs, plain = fit(ported, "Plain", **flags)
    ours, module = fit(ported, "Ported", **flags)
    assert different(tensors(module), tensors(plain)) == set()
    assert ours.global_step == theirs.global_step
    added = {f"train/loss/{task}" for task in ported.TASKS}
    logged = {k: v for k, v in ours.callback_metrics.items() if k not in added}
    assert different(logged, theirs.callback_metrics) == set()
    assert different(tensors(plain), unbalanced(ported)[0])  # the flag is one that acts here


@pytest.mark.parametrize("ported", ["mask_rcnn", "retinanet"], indirect=True)
@pytest.mark.parametrize("balancer", [list, lambda: [MinNorm()]], ids=["none", "MinNorm"])
def test_a_validation_loader_alone_validates_nothing(ported: Any, balancer: Any) -> None:
    """Detectors give detections in evaluation mode, no losses; theirs have no validation step."""
    for version, callbacks in (("Plain", []), ("Ported", balancer())):
        with pytest.warns(UserWarning, match=r"val_dataloader.*no `validation_step`"):
            run, module = fit(ported, version, validate=True, callbacks=callbacks)
        assert run.global_step == 10
        assert not [name for name in run.callback_metrics if name.startswith("val")]
        if not callbacks:
            assert different(tensors(module), unbalanced(ported)[0]) == set()


@pytest.mark.parametrize("balancer", BALANCERS.values(), ids=BALANCERS)
def test_all_that_got_a_gradient_moves(
    ported: Any, balancer: Callable[[], list[Callback]], tmp_path: Path
) -> None:
    _, reached = unbalanced(ported)
    logger = CSVLogger(tmp_path)
    run, module = fit(ported, "Ported", callbacks=balancer(), logger=logger, log_every_n_steps=1)
    assert run.global_step == 10
    assert module.task_names == ported.TASKS
    seed_everything(0, verbose=False)
    start = tensors(ported.Ported())
    end = tensors(module)
    assert all(value.isfinite().all() for value in end.values())
    assert len(reached) > len(ported.TASKS)
    assert reached - different(start, end) == set()
    with Path(logger.log_dir, "metrics.csv").open() as rows:
        columns = csv.DictReader(rows).fieldnames
    watched = any(isinstance(c, GradientMonitor) for c in run.callbacks)
    quantities = ["train/loss", *(["mtl/grad_norm", "mtl/angle_to_direction"] if watched else [])]
    assert {f"{q}/{task}" for q in quantities for task in ported.TASKS} <= set(columns)


@pytest.mark.parametrize("balancer", BALANCERS.values(), ids=BALANCERS)
def test_resumed_is_never_stopped(
    ported: Any, balancer: Callable[[], list[Callback]], tmp_path: Path
) -> None:
    def run_on(resume: Path | None = None) -> tuple[Any, Any]:
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return fit(
            ported,
            "Ported",
            resume,
            callbacks=[*balancer(), keep],
            accumulate_grad_batches=2,
            enable_checkpointing=True,
            logger=CSVLogger(tmp_path),
        )

    run, module = run_on()
    assert run.global_step == 6  # the third step of an epoch has one micro-batch
    for step in (2, 3):  # in the middle of an epoch, and at its end
        again, resumed = run_on(tmp_path / f"step={step}.ckpt")
        assert again.global_step == run.global_step
        assert different(tensors(resumed), tensors(module)) == set(), f"stopped after {step}"
        for before, after in zip(run.callbacks, again.callbacks, strict=True):
            if isinstance(before, Balancer):
                torch.testing.assert_close(states(after), states(before), rtol=0, atol=0)
