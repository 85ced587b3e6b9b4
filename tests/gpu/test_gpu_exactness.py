"""Every method, and no balancer at all: the same training on the device as on the processor."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import DualBalance, GradientBalancer, MinNorm
from tests.common.method_rows.row import Method
from tests.common.methods import METHODS, direction, fixture, named
from tests.common.models import Balanced, Plain, loader
from tests.gpu.fits import Images, fit, images, parameters, states
from tests.ranks.rank_cases import Labelled, batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
STEPS = 6
# A start that differs in the last digit moves the parameters by 5e-7 and 3e-15 in six steps.
CLOSE = {"32-true": 1e-5, "64-true": 1e-12}
each = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def train(method: Method, precision: str, device: str) -> tuple[Tensor, list[Tensor]]:
    """Parameters and the balancer's state after a few steps."""
    torch.manual_seed(5)
    module, balancer = Labelled(False), method.make()
    flags = {"precision": precision, "max_steps": STEPS, **method.flags}
    fit(module, batches(0, 1, False), device, balancer, **flags)
    return parameters(module), states(balancer)


@functools.cache
def start() -> Tensor:
    torch.manual_seed(5)
    return parameters(Labelled(False))


@each
@pytest.mark.parametrize("precision", CLOSE)
def test_every_method_trains_as_on_the_processor(
    device: str, precision: str, method: Method
) -> None:
    found, state = train(method, precision, device)
    expected, other = train(method, precision, "cpu")
    close = CLOSE[precision]
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    assert len(state) == len(other)
    for mine, theirs in zip(state, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=100 * close, atol=100 * close)
    assert (found - start()).abs().max() > 1e-3  # it trained


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_method_by_hand(device: str, dtype: torch.dtype, method: Method) -> None:
    """A direction from a Jacobian and losses that are on the device."""
    jacobian, losses = fixture("E3", dtype)
    here, there = named(method, len(jacobian)), named(method, len(jacobian))
    for _ in range(1 + method.warm_up):
        found = direction(here, jacobian.to(device, copy=True), losses.to(device))
        expected = direction(there, jacobian.clone(), losses)
    assert found.device.type == device
    assert found.dtype == dtype
    close = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        found.cpu(), expected, rtol=close, atol=close * float(expected.norm())
    )


FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "clip": {"gradient_clip_val": 0.1},
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "float64": {"precision": "64-true"},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_no_balancer_is_plain_lightning(device: str, flags: dict[str, Any]) -> None:
    found = parameters(fit(Balanced(), loader(), device, **flags).net)
    expected = parameters(fit(Plain(), loader(), device, **flags).net)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("make", [list, lambda: [MinNorm()], lambda: [DualBalance()]])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_convolutions_in_both_layouts(device: str, channels_last: bool, make: Any) -> None:
    """As on the processor; a gradient in the wrong strides would be another one."""
    found = fit(Images(channels_last), images(), device, *make())
    expected = fit(Images(), images(), "cpu", *make())
    torch.testing.assert_close(parameters(found), parameters(expected), rtol=1e-4, atol=1e-5)


class Seen(GradientBalancer):
    """Keeps the Gramians that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gramians: list[Tensor] = []

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.gramians.append(gramian.clone())
        return torch.ones_like(losses)


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_gramians_are_float32_whatever_the_network_multiplies_in(device: str, setting: str) -> None:
    """`set_float32_matmul_precision` is the network's; three digits are too few for a Gramian."""

    class Exact(Images):
        """Its backward pass has no matrix product that the setting is about."""

        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            p = self.trunk[3].weight
            return {"a": (p * self.first).sum(), "b": (p * self.second).sum()}

    module = Exact(width=64)
    torch.manual_seed(3)
    for name in ("first", "second"):
        module.register_buffer(name, torch.randn_like(module.trunk[3].weight))
    first, second = module.first.double().flatten(), module.second.double().flatten()
    balancer, before = Seen(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        fit(module, images(1), device, balancer, max_steps=1)
    finally:
        torch.set_float32_matmul_precision(before)
    rows = torch.stack([first, second])
    exact = rows @ rows.T
    norms = exact.diagonal().sqrt()
    error = (balancer.gramians[0].cpu().double() - exact) / torch.outer(norms, norms)
    assert error.abs().max() < 1e-6, float(error.abs().max())
