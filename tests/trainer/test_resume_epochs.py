"""Resuming at an epoch's end with an ordinary DataLoader: bit for bit the run that went on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_mtl import DualBalance, RandomWeighting
from tests.common.models import Balanced, Batched, Samples, loader, resume_from, trainer, weights


def data(**kwargs: Any) -> DataLoader:
    return DataLoader(Samples(40), batch_size=4, **kwargs)


def fit(
    folder: Path, batches: Any, seed: int, path: Path | None = None, by_step: bool = False
) -> Any:
    seed_everything(seed, verbose=False)
    module = Balanced(dropout=0.5)
    when = {"every_n_train_steps": 5} if by_step else {"every_n_epochs": 1}
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, **when)
    run = trainer(
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[DualBalance(loss_part=False), saving],
    )
    validation = None if by_step else loader(16)
    run.fit(module, batches, validation, **({} if path is None else resume_from(path)))
    return module


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_an_epochs_end(tmp_path: Path, shuffle: bool, workers: int, by_step: bool) -> None:
    def batches() -> DataLoader:
        return data(shuffle=shuffle, num_workers=workers)

    whole = fit(tmp_path, batches(), 3, by_step=by_step)
    resumed = fit(tmp_path, batches(), 99, tmp_path / "step=10.ckpt", by_step)  # no warning
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda: data(shuffle=True), 5),  # in the middle of an epoch
        (lambda: data(shuffle=True, generator=torch.Generator()), 10),
    ],
    ids=["middle", "own generator"],
)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_where_other_batches_come(tmp_path: Path, make: Any, step: int) -> None:
    fit(tmp_path, make(), 3, by_step=True)
    with pytest.warns(UserWarning, match=r"cannot save its position.*sees other batches"):
        fit(tmp_path, make(), 99, tmp_path / f"step={step}.ckpt", True)


def test_what_a_step_that_is_left_out_draws() -> None:
    """Nothing, also when a later micro-batch is bad: the weights of the next step are these."""

    class Bad(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            return {k: v * torch.nan for k, v in losses.items()} if batch_idx in (1, 4) else losses

    found = []
    for rule, batches in (("skip_step", loader(48)), ("raise", list(loader(48))[6:])):
        module = (Bad if rule == "skip_step" else Balanced)(on_bad_loss=rule)
        balancer = RandomWeighting(seed=5)
        run = trainer(callbacks=[balancer], accumulate_grad_batches=3)
        with (
            pytest.warns(UserWarning, match="is left out") if rule == "skip_step" else nullcontext()
        ):
            run.fit(module, Batched(batches))
        found.append((weights(module), balancer.generator.get_state()))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])
