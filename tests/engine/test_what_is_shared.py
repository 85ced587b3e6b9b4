"""Which tasks, shared parameters and heads a module has, as declared and as found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import (
    GradientBalancer,
    MinNorm,
    Scalarization,
    Task,
)
from tests.common.models import Balanced, Samples, trainer, weights
from tests.engine.test_flow import LOSSES, ROWS, Linear, Watcher, one_step


def test_active_tasks_trains_the_single_task_baseline() -> None:
    class Single(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Balanced().net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0])["b"], batch[1]["b"])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    data = DataLoader(Samples(80), batch_size=4)
    single = Single()
    trainer().fit(single, data)
    module = Balanced(lambda m: torch.optim.Adam(m.parameters(), lr=0.01), active_tasks=["b"])
    trainer().fit(module, data)
    assert module.training_tasks == ("b",)
    assert torch.equal(weights(module), weights(single))
    module.active_tasks = None
    assert module.training_tasks == ("a", "b")


def test_heads_and_trunk_are_found_from_the_graph() -> None:
    module = Balanced()
    run = trainer(callbacks=[MinNorm()])
    run.fit(module, DataLoader(Samples(8), batch_size=4))
    shared = module._flow.state_dict()["shared"]
    assert shared == [f"net.trunk.{name}" for name in ("0.weight", "0.bias", "3.weight", "3.bias")]


def test_shared_parameters_can_be_a_part_of_the_trunk() -> None:
    """What is left out of it gets the sum of the task gradients, as a head of every task."""

    class LastLayer(Balanced):
        def shared_parameters(self) -> Any:
            return self.net.trunk[3].parameters()

    plain_sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.01)  # noqa: E731
    start, equal = Balanced(), Balanced(plain_sgd)
    balanced = LastLayer(plain_sgd)
    data = DataLoader(Samples(4), batch_size=4)
    trainer().fit(equal, data)
    trainer(callbacks=[MinNorm()]).fit(balanced, data)
    for name, parameter in balanced.net.named_parameters():
        same = torch.allclose(parameter, equal.net.get_parameter(name), atol=1e-7)
        assert same != name.startswith("trunk.3"), name
        assert not torch.equal(parameter, start.net.get_parameter(name)), name


def test_a_module_that_declares_nothing_takes_the_names_of_its_first_batch() -> None:
    class Undeclared(Linear):
        def __init__(self) -> None:
            super().__init__(LOSSES["E2"], ROWS[:2])
            self._declared = None

    module = one_step(Undeclared(), Scalarization({"t1": 3.0}))
    assert module.task_names == ("t0", "t1")
    assert [-psi.item() for psi in module.psi] == [1.0, 3.0]


def test_task_names_may_be_names_of_methods() -> None:
    module = Balanced(tasks=("keys", "type"))
    data = DataLoader(Samples(8, ("keys", "type")), batch_size=4)
    trainer(callbacks=[MinNorm()]).fit(module, data)
    assert set(module.tasks) == {"keys", "type"}


def test_a_balancer_of_ten_lines() -> None:
    class InverseNorm(GradientBalancer):
        """Weights that give every task gradient the length one."""

        def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
            return gramian.diagonal().rsqrt()

    module = one_step(Linear(LOSSES["E2"], ROWS[:2]), InverseNorm())
    rows = module.rows / module.rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(-module.theta.detach(), rows.sum(0))


def test_aggregation_is_outside_autocast() -> None:
    """Under bf16-mixed the Gramian has float32 digits: autocast would leave three."""

    class Checked(MinNorm):
        seen: Tensor

        def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
            self.seen = gramian
            assert not torch.is_autocast_enabled("cpu")
            return super().weights(gramian, losses)

    balancer = Checked()
    module = Balanced()
    run = trainer(callbacks=[balancer, Watcher()], precision="bf16-mixed")
    run.fit(module, DataLoader(Samples(4), batch_size=4))
    assert balancer.seen.dtype == torch.float64
    rounded = balancer.seen.bfloat16().double()
    assert not torch.equal(rounded, balancer.seen)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.net.parameters())


def test_a_compiled_encoder_finds_its_shared_parameters() -> None:
    eager, compiled = Balanced(), Balanced()
    compiled.net.trunk = torch.compile(compiled.net.trunk, backend="aot_eager")
    data = DataLoader(Samples(40), batch_size=4)
    for module in (eager, compiled):
        trainer(callbacks=[MinNorm()]).fit(module, data)
    assert len(compiled._flow.state_dict()["shared"]) == 4
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=0, atol=1e-6)


def test_a_task_reads_its_target_and_metrics_by_name() -> None:
    from torchmetrics import MeanAbsoluteError, MeanSquaredError

    class Named(Balanced):
        def __init__(self) -> None:
            super().__init__()
            metrics = {"mae": MeanAbsoluteError(), "mse": MeanSquaredError()}
            self._tasks["task_a"] = Task(nn.MSELoss(), metrics, target="b")

    module = Named()
    run = trainer()
    run.validate(module, DataLoader(Samples(8), batch_size=4), verbose=False)
    x, y = Samples(8)[:]
    error = module(x)["a"].detach() - y["b"]
    assert float(run.callback_metrics["val/a/mae"]) == pytest.approx(float(error.abs().mean()))
    assert float(run.callback_metrics["val/a/mse"]) == pytest.approx(float(error.square().mean()))
    assert module.metric_directions()["a"] == {"val/a/mae": False, "val/a/mse": False}
