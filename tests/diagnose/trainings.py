"""A short training with `diagnose`'s callbacks, on models that the tests bring."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule
from lightning_mtl.diagnose.study import Study, study


def fit(
    make: Callable[[], MultiTaskModule],
    data: Callable[[], Iterable[Any]],
    callbacks: Iterable[Any] = (),
    task: str | None = None,
    **flags: Any,
) -> MultiTaskModule:
    seed_everything(0, verbose=False)
    model = make()
    model.active_tasks = None if task is None else [task]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_steps": 1000, **flags},
    )
    trainer.fit(model, DataLoader(data(), batch_size=None))
    return model


def studied(make: Any, data: Any, steps: int, measured: int, **options: Any) -> Study:
    alone = options.pop("alone", False)

    def train(callbacks: Any, task: str | None) -> None:
        fit(make, data, callbacks, task, **options)

    return study(train, steps, measured, alone=alone)
