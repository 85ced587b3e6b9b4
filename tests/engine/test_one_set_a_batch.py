"""One data set a batch: plain without a balancer, and a word to a balancer that does nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_mtl import (
    EqualWeighting,
    LogLoss,
    MinNorm,
    MultiTaskModule,
    Scalarization,
    UncertaintyWeighting,
)
from tests.common.models import Balanced, Batched, Network, Plain, Samples, trainer, weights
from tests.common.ranks import result, run_cases

SETS = ("a", "b", "c", "d")
# Which batches have the tasks of which set; `None` for all.
ORDERS: dict[str, list[str | None]] = {
    "in turn": [*SETS] * 3,
    "in blocks": [s for s in SETS for _ in range(3)],
    "mixed": [None, "a", "a", "b", "c", None, "d", "d", "a", "b", "c", "c", "d"],  # and a rest
}


def batches(order: str, rank: int = 0, world: int = 1) -> Batched:
    """The first has all tasks, so that all are known to every rank."""
    data, found = Samples(600, SETS), []
    for i, task in enumerate([None] * 4 + ORDERS[order] * world):
        rows = slice(4 * i, 4 * i + 4)
        found.append((data.x[rows], {t: y[rows] for t, y in data.y.items() if task in (t, None)}))
    return Batched(found[: 4 * world][rank::world] + found[4 * world :][rank::world])


class Ours(Balanced):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tasks=SETS, **kwargs)


class Lightnings(Plain):
    """What people write: the loss of the sets that are in the batch."""

    validation_step = LightningModule.validation_step

    def __init__(self) -> None:
        super().__init__(tasks=SETS)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        found = self.net(x)
        return sum(nn.functional.mse_loss(found[t], targets[t]) for t in SETS if t in targets)


class Watch(Callback):
    """Asks for task gradients at every other step, or at all."""

    def __init__(self, every: int = 2) -> None:
        self.every = every

    def wants_jacobian(self, run: Any, module: Any) -> bool:
        return run.global_step % self.every == 0


WATCHES: dict[str, Any] = {
    "none": list,
    "EqualWeighting": lambda: [EqualWeighting()],
    "monitor": lambda: [Watch()],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("watch", WATCHES)
def test_no_balancer_is_plain_lightning(order: str, every: int, watch: str) -> None:
    """The same parameters, bit for bit where nobody asks for the gradients one by one."""
    flags = {"accumulate_grad_batches": every, "gradient_clip_val": 1.0}
    ours, plain = Ours(), Lightnings()
    trainer(**flags).fit(plain, batches(order))
    trainer(callbacks=WATCHES[watch](), **flags).fit(ours, batches(order))
    tolerance = 1e-6 if watch == "monitor" else 0
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=tolerance)


class Counted(Balanced):
    """Labels of "b" are counted, those of "a" are not."""

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        found = dict(super().task_losses(batch, batch_idx))
        return {t: (loss, len(batch[0])) if t == "b" else loss for t, loss in found.items()}


def test_label_counts_ask_for_means_over_labels() -> None:
    """Of those alone: "a" is there in two of four micro-batches, "b" has nine labels in three."""
    data, parts, made = Samples(16), (range(3), range(3, 8), range(8, 10), range(10, 14)), []
    for rows, tasks in zip(parts, ("ab", "b", "a", "b"), strict=True):
        made.append((data.x[rows], {t: data.y[t][rows] for t in tasks}))
    module = Counted(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    flags = {"callbacks": [Watch()], "accumulate_grad_batches": 4}  # task gradients from the start
    trainer(**flags).fit(module, Batched(made))
    expected = Balanced()
    loss = torch.zeros(())
    for x, targets in made:
        for task, y in targets.items():
            error = (expected.net(x)[task] - y).square()
            loss = loss + (error.mean() / 4 if task == "a" else error.sum() / 12)
    loss.backward()
    with torch.no_grad():
        for p in expected.net.parameters():
            p.sub_(0.1 * p.grad)
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [LogLoss, UncertaintyWeighting, lambda: Scalarization([1] * 4)])
def test_a_loss_balancer_takes_means_over_what_is_there(make: Any) -> None:
    """Four sets in four micro-batches are one step on all of them."""
    data = Samples(16, SETS)
    apart = [
        (data.x[4 * i : 4 * i + 4], {t: data.y[t][4 * i : 4 * i + 4]}) for i, t in enumerate(SETS)
    ]

    class AtOnce(Ours):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            found = {}
            for pair in batch:
                found |= Ours.task_losses(self, pair, batch_idx)
            return found

    ours, joined = Ours(), AtOnce()
    callbacks = [make(), Watch(every=1)]
    trainer(callbacks=callbacks, accumulate_grad_batches=4).fit(ours, Batched(apart * 2))
    trainer(callbacks=[make()]).fit(joined, Batched([apart] * 2))
    torch.testing.assert_close(weights(ours), weights(joined), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------ ranks

CASES = [
    f"{kind}|{order}|{every}"
    for kind in ("ours", "plain", "monitor")
    for order, every in (("in turn", 1), ("in turn", 2), ("mixed", 2))
]


def run(case: str, rank: int, world: int) -> dict[str, Any]:
    """Parameters after a fit on this rank's batches."""
    kind, order, every = case.split("|")
    module: Any = Lightnings() if kind == "plain" else Ours()
    Trainer(
        accelerator="cpu",
        devices=world,
        strategy=DDPStrategy(find_unused_parameters=kind == "plain"),
        accumulate_grad_batches=int(every),
        callbacks=[Watch()] if kind == "monitor" else [],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, batches(order, rank, world))
    return {"weights": weights(module)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets")
    run_cases(path, CASES, "tests.engine.test_one_set_a_batch:run")
    return path


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("plain")])
def test_no_balancer_is_plain_ddp(folder: Path, case: str) -> None:
    plain = "plain" + case[case.index("|") :]
    found = [result(folder, CASES.index(case), rank)["weights"] for rank in (0, 1)]
    expected = result(folder, CASES.index(plain), 0)["weights"]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------- nothing to do


class Sets(MultiTaskModule):
    """Its shared parameters are named, so that no step has to show all tasks."""

    def __init__(self) -> None:
        super().__init__(["a", "b"])
        self.net = Network()

    def shared_parameters(self) -> Any:
        return self.net.trunk.parameters()

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        found = self.net(batch[0])
        return {t: nn.functional.mse_loss(found[t], batch[1][t]) for t in batch[1]}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def told(order: list[str], callbacks: list[Any], **flags: Any) -> list[str]:
    data = Samples(8)
    found = Batched([(data.x, {t: data.y[t] for t in tasks}) for tasks in order])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(callbacks=callbacks, **flags).fit(Sets(), found)
    return [str(w.message) for w in seen if "has had one task" in str(w.message)]


def test_a_gradient_balancer_that_never_sees_two_tasks_is_told_once() -> None:
    (word,) = told(["a", "b"] * 60, [MinNorm()])
    assert word.startswith("MinNorm has had one task in each of the first 50 optimiser steps")
    assert "accumulate_grad_batches" in word


@pytest.mark.parametrize(
    ("order", "callbacks", "flags"),
    [
        (["a", "b"] * 24, [MinNorm], {}),  # too early to tell
        (["a"] * 30 + ["ab"] + ["b"] * 40, [MinNorm], {}),
        (["a", "b"] * 60, [MinNorm], {"accumulate_grad_batches": 2}),
        (["a", "b"] * 60, [LogLoss], {}),
        (["a", "b"] * 60, [], {}),
    ],
)
def test_others_are_not_told(order: list[str], callbacks: Any, flags: dict[str, Any]) -> None:
    assert not told(order, [make() for make in callbacks], **flags)
