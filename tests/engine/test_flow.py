"""The flow against arithmetic done by hand: directions, heads, accumulation, absent tasks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import (
    CentralDirection,
    DualBalance,
    EqualWeighting,
    LogLoss,
    MinNorm,
    MultiTaskModule,
    Scalarization,
    TaskTensioner,
)
from tests.common.models import Balanced, Samples, trainer, weights
from tests.common.places import DATA

VECTORS = json.loads((DATA / "vectors.json").read_text())["vectors"]
LOSSES = {"E2": [2.0, 0.5], "E3": [2.0, 0.5, 1.5]}
ROWS = [[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, 1.0, 3.0]]


class Linear(MultiTaskModule):
    """Task ``t`` has the loss ``l_t + g_t . theta + psi_t``: any gradients that a test wants."""

    lr = 1.0

    def __init__(self, losses: list[float], rows: list[list[float]], **kwargs: Any) -> None:
        self.names = [f"t{i}" for i in range(len(losses))]
        super().__init__(self.names, **kwargs)
        self.losses, self.rows = losses, torch.tensor(rows, dtype=torch.float64)
        self.theta = nn.Parameter(torch.zeros(len(rows[0]), dtype=torch.float64))
        self.psi = nn.ParameterList(
            nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in losses
        )

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {
            name: loss + row @ self.theta + psi
            for name, loss, row, psi in zip(
                self.names, self.losses, self.rows, self.psi, strict=True
            )
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def one_step(module: Any, *callbacks: Callback, batches: int = 1, **flags: Any) -> Any:
    """Fit for one optimiser step; with lr 1 from zero the parameters are minus the direction."""
    run = trainer(callbacks=list(callbacks), **flags)
    run.fit(module, DataLoader(range(batches)))
    return module


E2_LOG = [1 / 2.0, 1 / 0.5]
COMPOSED: dict[str, tuple[str, list[Callback], Any, list[float]]] = {
    "none": ("E3", [], "E3.ew", [1, 1, 1]),
    "EqualWeighting": ("E3", [EqualWeighting()], "E3.ew", [1, 1, 1]),
    "Scalarization": ("E2", [Scalarization([2.0, 0.5])], [1, 4.25, -1.5], [2, 0.5]),
    "LogLoss": ("E3", [LogLoss()], "E3.si.d", [0.5, 2, 2 / 3]),
    "MinNorm": ("E3", [MinNorm()], "E3.mgda.none.draw", [1, 1, 1]),
    "MinNorm l2": ("E3", [MinNorm("l2")], "E3.mgda.l2.draw", [1, 1, 1]),
    "MinNorm loss+": ("E3", [MinNorm("loss+")], "E3.mgda.loss+.draw", [1, 1, 1]),
    "MinNorm, heads weighted": (
        "E2",
        [MinNorm(weight_heads=True)],
        "E2.mgda.none.draw",
        [0.47540984, 0.52459016],
    ),
    "CentralDirection": ("E3", [CentralDirection()], "E3.edm.d", [1, 1, 1]),
    "TaskTensioner, first step": ("E3", [TaskTensioner()], "E3.edm.d", [1, 1, 1]),
    "DualBalance": ("E3", [DualBalance(beta=0.0)], "E3.db.d", [0.5, 2, 2 / 3]),
    "DualBalance, averaging": ("E3", [DualBalance()], "db.0.5.1.d", [0.5, 2, 2 / 3]),
    "DualBalance, gradient part": (
        "E3",
        [DualBalance(beta=0.0, loss_part=False)],
        "E3.db.nolog.d",
        [1, 1, 1],
    ),
    "DualBalance, loss part": (
        "E3",
        [DualBalance(gradient_part=False)],
        "E3.si.d",
        [0.5, 2, 2 / 3],
    ),
    "LogLoss + MinNorm E2": ("E2", [LogLoss(), MinNorm()], [-0.094339623, 1, -0.16981132], E2_LOG),
    "MinNorm + LogLoss E3": (
        "E3",
        [MinNorm(), LogLoss()],
        [0.072731471, 0.94550912, 0.13091665],
        [0.5, 2, 2 / 3],
    ),
    "LogLoss + CentralDirection": (
        "E3",  # IMTL-G's row of METHODS: the same direction where the central one is interior
        [LogLoss(), CentralDirection()],
        [-0.23700811, 0.94459734, 0.30957926],
        [0.5, 2, 2 / 3],
    ),
}


@pytest.mark.parametrize(
    ("fixture", "callbacks", "direction", "heads"), COMPOSED.values(), ids=COMPOSED
)
def test_composition(
    fixture: str, callbacks: list[Callback], direction: Any, heads: list[float]
) -> None:
    expected = VECTORS[direction] if isinstance(direction, str) else direction
    losses = LOSSES[fixture]
    module = one_step(Linear(losses, ROWS[: len(losses)]), *callbacks)
    assert (-module.theta).tolist() == pytest.approx(expected, rel=2e-7, abs=2e-8)
    assert [-psi.item() for psi in module.psi] == pytest.approx(heads, rel=2e-7)
    assert module.last_step.losses.tolist() == losses


ALL = {
    "none": list,
    "Scalarization": lambda: [Scalarization({"a": 2.0})],
    "LogLoss": lambda: [LogLoss()],
    "MinNorm": lambda: [MinNorm()],
    "MinNorm loss": lambda: [MinNorm("loss")],
    "CentralDirection": lambda: [CentralDirection()],
    "TaskTensioner": lambda: [TaskTensioner(window=2)],
    "DualBalance": lambda: [DualBalance()],
    "LogLoss + CentralDirection": lambda: [LogLoss(), CentralDirection()],
}


class Counted(Balanced):
    """Returns ``(mean, number of valid labels)``; a target of NaN is no label."""

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        predictions, losses = self(x), {}
        for task, target in targets.items():
            valid = ~target.isnan()
            if valid.any():
                loss = nn.functional.mse_loss(predictions[task][valid], target[valid])
                losses[task] = (loss, int(valid.sum()))
        return losses


def fit_splits(module: Any, callbacks: list[Callback], splits: list[int], every: int) -> Any:
    """Fit on the same 48 samples cut into the given batch sizes, three times over."""
    data = Samples(48)
    data.y["b"][3:30] = torch.nan  # whole micro-batches without a label of b, others with some
    batches, start = [], 0
    for size in splits * 3:
        rows = [i % 48 for i in range(start, start + size)]
        batches.append((data.x[rows], {task: y[rows] for task, y in data.y.items()}))
        start += size
    run = trainer(callbacks=callbacks, accumulate_grad_batches=every)
    run.fit(module, DataLoader(batches, batch_size=None))
    return module


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_micro_batches_are_one_batch(make: Any) -> None:
    """Uneven micro-batches with missing labels: the same as the joined batch, for every method."""
    whole = fit_splits(Counted(), make(), [24], every=1)
    parts = fit_splits(Counted(), make(), [4, 12, 8], every=3)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=2e-6)
    assert (weights(whole) - weights(Counted())).abs().max() > 0.01


class SometimesB(Linear):
    """Task t1 is missing from the batches that `absent` names."""

    absent: tuple[int, ...] = ()
    lr = 0.01

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = super().task_losses(batch, batch_idx)
        if batch_idx in self.absent:
            losses["t1"] = None
        return losses


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_an_absent_task_is_left_out(make: Any) -> None:
    """A step without t1 is the step of a problem that has no t1."""
    callbacks = [
        Scalarization([2.0, 1.0, 1.0]) if isinstance(c, Scalarization) else c for c in make()
    ]
    module = SometimesB(LOSSES["E3"], ROWS)
    module.absent = (1,)
    with torch.random.fork_rng():
        one_step(module, *callbacks, batches=1)
    state = [c.state_dict() for c in callbacks if isinstance(c, (DualBalance, TaskTensioner))]
    before = module.theta.detach().clone()
    assert "t1" in module.last_step.tasks
    run = trainer(callbacks=callbacks, max_epochs=1)
    module.absent = (0,)
    module.shared_parameters = lambda: [module.theta]  # type: ignore[method-assign]
    run.fit(module, DataLoader(range(1)))
    assert module.last_step.tasks == ("t0", "t2")
    assert module.psi[1].grad is None
    assert not torch.equal(module.theta, before)
    for saved, balancer in zip(
        state, [c for c in callbacks if isinstance(c, (DualBalance, TaskTensioner))], strict=True
    ):
        now = balancer.state_dict()["state"]
        for name in balancer._per_task:
            assert torch.equal(now[name][1], saved["state"][name][1]), name
            if name != "average":
                assert not torch.equal(now[name][0], saved["state"][name][0]), name


def test_a_last_group_that_is_not_full_steps_on_its_share() -> None:
    module = one_step(
        Linear(LOSSES["E2"], ROWS[:2]), MinNorm(), batches=1, accumulate_grad_batches=4
    )
    expected = [d / 4 for d in VECTORS["E2.mgda.none.draw"]]
    assert (-module.theta).tolist() == pytest.approx(expected, rel=2e-7)
    assert [-psi.item() for psi in module.psi] == [0.25, 0.25]


class Passes(Balanced):
    """Counts backward passes through the trunk."""

    passes = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.net.trunk(x)
        if z.requires_grad:
            z.register_hook(self.count)
        heads = self.net.heads.items()
        return {name[5:]: head(z.tanh()).squeeze(-1) for name, head in heads}

    def count(self, grad: Tensor) -> None:
        self.passes += 1


@pytest.mark.parametrize(
    ("callbacks", "every", "passes"),
    [
        ([], 1, 20),
        ([EqualWeighting()], 4, 20),
        ([Scalarization({"b": 2.0})], 4, 20),
        ([LogLoss()], 1, 20),
        ([DualBalance(gradient_part=False)], 1, 20),
        ([LogLoss()], 4, 40),  # the log of a mean needs the gradients apart
        ([MinNorm()], 1, 40),
        ([LogLoss(), MinNorm()], 1, 40),
    ],
)
def test_backward_passes(callbacks: list[Callback], every: int, passes: int) -> None:
    module = Passes()
    trainer(callbacks=callbacks, accumulate_grad_batches=every).fit(
        module, DataLoader(Samples(80), batch_size=4)
    )
    assert module.passes == passes


class Watcher(Callback):
    """Asks for the Jacobian at every step, as a monitor does."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def wants_jacobian(self, run: Any, module: Any) -> bool:
        return True

    def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
        self.records.append(module.last_step)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_an_observer_sees_gradients_and_changes_nothing(make: Any) -> None:
    data = DataLoader(Samples(40), batch_size=4)
    alone, watched, watcher = Balanced(), Balanced(), Watcher()
    trainer(callbacks=make()).fit(alone, data)
    trainer(callbacks=[*make(), watcher]).fit(watched, data)
    torch.testing.assert_close(weights(watched), weights(alone), rtol=0, atol=1e-6)

    callbacks = [
        Scalarization([2.0, 1.0, 1.0]) if isinstance(c, Scalarization) else c for c in make()
    ]
    module = one_step(Linear(LOSSES["E3"], ROWS), *callbacks, watcher)
    record, rows = watcher.records[-1], module.rows
    torch.testing.assert_close(record.gramian, rows @ rows.T)
    torch.testing.assert_close(record.alignment, rows @ -module.theta.detach())
    torch.testing.assert_close(record.direction_norm, module.theta.detach().norm())


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_one_task_is_plain_training(make: Any) -> None:
    """T = 1: the direction is the gradient, times the loss weight if there is one."""
    module = one_step(Linear([2.0], [[1.0, 2.0, -1.0]]), *make_for_one(make))
    (loss_weight,) = module.last_step.loss_weights.tolist()
    scale = 0.1 if any(isinstance(c, DualBalance) for c in make()) else 1.0  # (1 - beta) at first
    expected = [loss_weight * scale * g for g in (1.0, 2.0, -1.0)]
    assert (-module.theta).tolist() == pytest.approx(expected, rel=1e-6)


def make_for_one(make: Any) -> list[Callback]:
    return [Scalarization([2.0]) if isinstance(c, Scalarization) else c for c in make()]
