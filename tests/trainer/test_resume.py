"""Stop at any optimiser step and resume: bit for bit the run that never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mtl import (
    Balancer,
    CentralDirection,
    DualBalance,
    EqualWeighting,
    LogLoss,
    MinNorm,
    Scalarization,
    TaskTensioner,
)
from tests.common.models import Balanced, Samples, resume_from, trainer, weights

BALANCERS: dict[str, list[type[Balancer] | Any]] = {
    "none": [],
    "EqualWeighting": [EqualWeighting],
    "Scalarization": [lambda: Scalarization({"b": 3.0})],
    "LogLoss": [LogLoss],
    "MinNorm": [MinNorm],
    "CentralDirection": [CentralDirection],
    "TaskTensioner": [lambda: TaskTensioner(window=3)],
    "TaskTensioner(MinNorm)": [lambda: TaskTensioner(MinNorm(), window=3, feasibility="exact")],
    "DualBalance": [DualBalance],
    "LogLoss + MinNorm": [LogLoss, MinNorm],
}


class SavedLoader:
    """Shuffled batches from a generator of its own; knows its position."""

    def __init__(self, size: int = 40, batch_size: int = 4) -> None:
        self.data, self.batch_size = Samples(size), batch_size
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self):  # the checkpoint was written at the end of an epoch
            self.epoch, self.position = self.epoch + 1, 0
        return self._batches(self.epoch, self.position)  # from where it is now

    def _batches(self, epoch: int, position: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(self.data), generator=generator).split(self.batch_size)
        for rows in order[position:]:
            self.position += 1
            yield self.data.x[rows], {task: y[rows] for task, y in self.data.y.items()}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class StartsOver:
    """Batches in a fixed order from a loader that cannot save its position."""

    def __init__(self) -> None:
        self.batches = list(SavedLoader())

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def fit(
    balancers: list[Any],
    every: int,
    folder: Path,
    resume: Path | None = None,
    make_loader: Any = SavedLoader,
) -> tuple[Any, Any]:
    module = Balanced(dropout=0.3)
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(
        callbacks=[*(make() for make in balancers), keep],
        accumulate_grad_batches=every,
        max_epochs=3,
        enable_checkpointing=True,
    )
    # A resumed run starts from other random numbers: the checkpoint has to bring its own.
    torch.manual_seed(7 if resume is None else 99)
    run.fit(module, make_loader(), **(resume_from(resume) if resume else {}))
    return run, module


def states(balancer: Balancer) -> list[Any]:
    """The state of a balancer and of those it wraps."""
    saved = balancer.state_dict()["state"]
    return [saved, *(states(nested) for nested in balancer.nested().values())]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("balancers", BALANCERS.values(), ids=BALANCERS)
def test_bit_for_bit(tmp_path: Path, balancers: list[Any], every: int) -> None:
    run, module = fit(balancers, every, tmp_path)
    steps_per_epoch = 10 if every == 1 else 4
    assert run.global_step == 3 * steps_per_epoch
    middle = steps_per_epoch + 1 + int(torch.randint(steps_per_epoch - 1, ()))
    for step in (1, middle, 2 * steps_per_epoch):
        saved = tmp_path / f"step={step}.ckpt"
        resumed_run, resumed = fit(balancers, every, tmp_path, saved)
        assert resumed_run.global_step == run.global_step
        assert torch.equal(weights(resumed), weights(module)), f"stopped after step {step}"
        for before, after in zip(run.callbacks, resumed_run.callbacks, strict=True):
            if isinstance(before, Balancer):
                torch.testing.assert_close(states(after), states(before), rtol=0, atol=0)


def test_a_loader_that_starts_over_is_named_with_its_cure(tmp_path: Path) -> None:
    fit([MinNorm], 1, tmp_path, make_loader=StartsOver)
    saved = tmp_path / "step=10.ckpt"
    with pytest.warns(UserWarning, match=r"cannot save its position.*StatefulDataLoader"):
        fit([MinNorm], 1, tmp_path, saved, make_loader=StartsOver)


def test_a_changed_hyperparameter_is_reported_and_the_state_kept(tmp_path: Path) -> None:
    fit([DualBalance], 1, tmp_path)
    saved = tmp_path / "step=20.ckpt"
    with pytest.warns(UserWarning, match=r"`beta=0\.9`.*`beta=0\.5`"):
        run, _ = fit([lambda: DualBalance(beta=0.5)], 1, tmp_path, saved)
    balancer = next(c for c in run.callbacks if isinstance(c, DualBalance))
    assert balancer.beta == 0.5
    assert int(balancer.step) == 30


def test_shared_parameters_come_from_the_checkpoint(tmp_path: Path) -> None:
    """A task missing from the first resumed step does not turn its trunk into heads."""
    fit([MinNorm], 1, tmp_path)

    class WithoutB(SavedLoader):
        def __iter__(self) -> Iterator[Any]:
            for x, targets in super().__iter__():
                yield x, {"a": targets["a"]}

    saved = tmp_path / "step=5.ckpt"
    resumed, _ = fit([MinNorm], 1, tmp_path, saved, make_loader=WithoutB)
    before = torch.load(saved, weights_only=True)["callbacks"]["TrainerFlags"]["flow"]["shared"]
    path = resumed.checkpoint_callback.best_model_path
    after = torch.load(path, weights_only=True)["callbacks"]["TrainerFlags"]["flow"]["shared"]
    assert after == before
    assert all(name.startswith("net.trunk") for name in before)
    assert len(before) == 4
