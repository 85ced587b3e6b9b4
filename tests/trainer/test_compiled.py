"""``torch.compile(module)``: the same training, with forward passes and losses compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_mtl import FAMO, SAMO, DualBalance, LogLoss, MinNorm
from tests.common.models import Balanced, loader, trainer, weights


class Watch(Callback):
    """Asks for task gradients, as a monitor does."""

    def wants_jacobian(self, run: Any, module: Any) -> bool:
        return True


CALLBACKS: dict[str, Any] = {
    "none": list,
    "LogLoss": lambda: [LogLoss()],
    "MinNorm": lambda: [MinNorm()],
    "DualBalance": lambda: [DualBalance()],
    "monitor": lambda: [Watch()],
    "FAMO": lambda: [FAMO()],
    "SAMO": lambda: [SAMO()],
}


class Own(Balanced):
    """Losses of its own, which count how often they run as Python."""

    runs = 0

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        if not torch.compiler.is_compiling():
            type(self).runs += 1
        found = self(batch[0])
        return {name: nn.functional.mse_loss(found[name], batch[1][name]) for name in found}


class Marked(Balanced):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.shared_representation(self.net.trunk(x).tanh())
        return {name[5:]: head(z).squeeze(-1) for name, head in self.net.heads.items()}


def fitted(module: Any, callbacks: list[Any], fits: int = 1, **flags: Any) -> Tensor:
    """Parameters after fits with validation."""
    for _ in range(fits):
        trainer(callbacks=callbacks, **flags).fit(module, loader(16), loader(8))
    return weights(getattr(module, "_orig_mod", module))


@pytest.fixture(autouse=True)
def _forget() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


slow = pytest.mark.slow
CASES = [(Own, name) for name in CALLBACKS] + [(Balanced, "none"), (Balanced, "MinNorm")]
CASES = [pytest.param(*c, marks=[slow] if c[1] in ("FAMO", "SAMO") else []) for c in CASES]


@pytest.mark.parametrize(("make", "name"), CASES)
def test_the_same_parameters(make: Any, name: str) -> None:
    callbacks = CALLBACKS[name]
    expected = fitted(make(), callbacks())
    found = fitted(torch.compile(make(), backend="aot_eager"), callbacks())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["a whole graph", "twice", "parts", "in place"])
def test_other_ways(way: str) -> None:
    expected = fitted(Own(), [MinNorm()], 1 + (way == "twice"))
    module: Any = Own()
    backend = "aot_eager"
    if way == "parts":
        module.net.trunk = torch.compile(module.net.trunk, backend=backend)
        module.task_losses = torch.compile(module.task_losses, backend=backend)
    elif way == "in place":
        module.compile(backend=backend)
    else:
        module = torch.compile(module, backend=backend, fullgraph=way == "a whole graph")
    found = fitted(module, [MinNorm()], 1 + (way == "twice"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_losses_are_compiled() -> None:
    Own.runs = 0
    fitted(torch.compile(Own(), backend="eager", fullgraph=True), [MinNorm()])
    assert Own.runs == 1  # shared parameters are found without compilation


# Said by torch of every tensor that crosses a break between two compiled graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("gradients", ["representation", "representation+1"])
def test_gradients_at_a_part(gradients: str) -> None:
    expected = fitted(Marked(), [MinNorm(gradients=gradients)])
    module = torch.compile(Marked(), backend="aot_eager")
    found = fitted(module, [MinNorm(gradients=gradients)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_accumulation_validation_and_test() -> None:
    expected, module = Balanced(), torch.compile(Balanced(), backend="aot_eager")
    assert torch.allclose(
        fitted(expected, [MinNorm()], accumulate_grad_batches=2),
        fitted(module, [MinNorm()], accumulate_grad_batches=2),
        atol=1e-6,
    )
    run = trainer()
    (one,) = run.test(expected, loader(8), verbose=False)
    (other,) = run.test(module, loader(8), verbose=False)
    assert other == pytest.approx(one)


@pytest.mark.slow
def test_inductor() -> None:
    expected = fitted(Balanced(), [MinNorm()])
    found = fitted(torch.compile(Balanced()), [MinNorm()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
