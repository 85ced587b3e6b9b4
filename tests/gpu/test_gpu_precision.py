"""Half precision on the device: the real gradient scaler, overflow, bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_mtl import DualBalance, LogLoss, MinNorm, NashMTL
from tests.common.models import Balanced, Plain, Sum, loader
from tests.gpu.fits import fit, parameters, trainer_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "clip": {"gradient_clip_val": 0.1},
    "accumulate": {"accumulate_grad_batches": 3},
}
flagged = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


def scaled(module: Any, device: str, initial: float, *callbacks: Any, **flags: Any) -> Any:
    """Trainer, parameters and last scale of a fit in float16; the scale may grow after 5 steps."""
    scaler = torch.amp.GradScaler(device, init_scale=initial, growth_interval=5)
    plugin = MixedPrecision("16-mixed", device, scaler=scaler)
    run = trainer_on(device, *callbacks, plugins=[plugin], **flags)
    run.fit(module, loader())
    return run, parameters(module.cpu().net), scaler.get_scale()


@pytest.mark.parametrize(
    "initial", [2.0**10, 2.0**24, 2.0**40], ids=["fits", "overflows", "always"]
)
@flagged
def test_the_scaler_trains_as_in_plain_lightning(
    device: str, flags: dict[str, Any], initial: float
) -> None:
    plain, expected, scale = scaled(Plain(), device, initial, **flags)
    for callbacks, tolerance in (([], 0.0), ([Sum()], 5e-3)):
        run, found, same = scaled(Balanced(), device, initial, *callbacks, **flags)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        assert same == scale
        assert run.global_step == plain.global_step


def test_lightnings_own_scaler(device: str) -> None:
    """`precision="16-mixed"` and nothing else; on the processor Lightning makes bfloat16 of it."""
    if device == "cpu":
        pytest.skip("only a GPU has what this test looks at")
    plain = fit(Plain(), loader(), device, precision="16-mixed")
    for make, tolerance in ((list, 0.0), (lambda: [Sum()], 5e-3)):
        module = fit(Balanced(), loader(), device, *make(), precision="16-mixed")
        torch.testing.assert_close(
            parameters(module.net), parameters(plain.net), rtol=0, atol=tolerance
        )


@flagged
@pytest.mark.parametrize(
    "make",
    [
        lambda: [MinNorm()],
        lambda: [DualBalance()],
        lambda: [NashMTL()],
        lambda: [MinNorm(), LogLoss()],
    ],
    ids=["MinNorm", "DualBalance", "NashMTL", "MinNorm+LogLoss"],
)
def test_the_scale_does_not_matter(device: str, make: Any, flags: dict[str, Any]) -> None:
    """Balancers see unscaled gradients: the direction is that of a fit in float32."""

    def gradients(initial: float | None) -> Tensor:
        module = Balanced()
        if initial is None:
            trainer_on(device, *make(), max_steps=1, **flags).fit(module, loader())
        else:
            scaled(module, device, initial, *make(), max_steps=1, **flags)
        return torch.cat([p.grad.flatten().cpu() for p in module.net.parameters()])

    exact = gradients(None)
    for initial in (1.0, 2.0**12):
        torch.testing.assert_close(gradients(initial), exact, rtol=0, atol=5e-3 * exact.abs().max())


def test_an_overflow_leaves_the_balancer_and_the_parameters_as_they_were(device: str) -> None:
    module, balancer = Balanced(), DualBalance()
    before = parameters(module.net)
    run, after, scale = scaled(module, device, 2.0**40, balancer)
    assert scale == 2.0**20  # halved in each of twenty steps
    assert torch.equal(after, before)
    assert balancer.average is None
    assert int(balancer.step) == 0
    assert run.global_step == 20  # as Lightning counts
    fits, again = Balanced(), DualBalance()
    _, found, _ = scaled(fits, device, 2.0**24, again)
    assert 0 < int(again.step) < 20  # the first steps overflow, the others do not
    assert found.isfinite().all()


@flagged
@pytest.mark.parametrize("make", [MinNorm, DualBalance, LogLoss, NashMTL])
def test_bfloat16(device: str, make: Any, flags: dict[str, Any]) -> None:
    """Within its three digits of the processor in bfloat16, and of the device in float32."""
    mixed = parameters(fit(Balanced(), loader(), device, make(), precision="bf16-mixed", **flags))
    there = parameters(fit(Balanced(), loader(), "cpu", make(), precision="bf16-mixed", **flags))
    whole = parameters(fit(Balanced(), loader(), device, make(), **flags))
    torch.testing.assert_close(mixed, there, rtol=0, atol=0.05)
    torch.testing.assert_close(mixed, whole, rtol=0, atol=0.05)


def test_gramians_are_no_half_precision(device: str) -> None:
    """Weights come from float32, also where the network runs in half precision."""

    dtypes: set[torch.dtype] = set()

    class Looks(MinNorm):
        def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
            dtypes.add(gramian.dtype)
            return super().weights(gramian, losses)

    fit(Balanced(), loader(), device, Looks(), precision="bf16-mixed", max_steps=3)
    assert min(dtype.itemsize for dtype in dtypes) >= 4
