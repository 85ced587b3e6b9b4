"""Every precision: against plain Lightning, and overflow that leaves balancers as they were.

The scaler is a real one on the CPU: Lightning itself turns `16-mixed` into bf16 there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MinMaxMetric

from lightning_mtl import DualBalance, GradientMonitor, LogLoss, MinNorm, MultiTaskModule, Task
from tests.common.models import Balanced, Plain, Sum, loader, trainer, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`"  # plain Lightning's
)
FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "clip": {"gradient_clip_val": 0.1},
    "accumulate": {"accumulate_grad_batches": 3},
}


def fp16(initial: float) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=5)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def fit(module: Any, *callbacks: Any, initial: float = 2.0**10, **flags: Any) -> Any:
    torch.manual_seed(0)
    plugin = fp16(initial)
    run = trainer(plugins=[plugin], callbacks=list(callbacks), **flags)
    run.fit(module, loader())
    return run, weights(module), plugin.scaler.get_scale()


@pytest.mark.parametrize(
    "initial", [2.0**10, 2.0**24, 2.0**40], ids=["fits", "overflows", "always"]
)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_scaler_trains_as_in_plain_lightning(flags: dict[str, Any], initial: float) -> None:
    plain, expected, scale = fit(Plain(), initial=initial, **flags)
    for callbacks, tolerance in (([], 0.0), ([Sum()], 5e-3)):
        run, found, same = fit(Balanced(), *callbacks, initial=initial, **flags)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        assert same == scale
        assert run.global_step == plain.global_step


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: [MinNorm()],
        lambda: [DualBalance()],
        lambda: [MinNorm(), LogLoss()],
        lambda: [MinNorm(gradients="last_layer")],
    ],
    ids=["MinNorm", "DualBalance", "both", "last_layer"],
)
def test_the_scale_does_not_matter(make: Any, flags: dict[str, Any]) -> None:
    """Direction, weights and head gradients are those of unscaled losses."""
    callbacks = make()
    if flags.get("accumulate_grad_batches") and callbacks[0].gradients != "parameters":
        return  # refused

    def gradients(initial: float | None) -> Tensor:
        module = Balanced()
        if initial is None:
            trainer(callbacks=make(), max_steps=1, **flags).fit(module, loader())
        else:
            fit(module, *make(), initial=initial, max_steps=1, **flags)
        return torch.cat([p.grad.flatten() for p in module.net.parameters()])

    exact = gradients(None)
    for initial in (1.0, 2.0**12):
        torch.testing.assert_close(gradients(initial), exact, rtol=0, atol=5e-3 * exact.abs().max())


def test_an_overflow_leaves_the_balancer_and_the_parameters_as_they_were() -> None:
    module, balancer = Balanced(), DualBalance()
    before = weights(module)
    run, after, scale = fit(module, balancer, initial=2.0**40)
    assert scale == 2.0**20  # halved in each of twenty steps
    assert torch.equal(after, before)
    assert balancer.average is None
    assert int(balancer.step) == 0
    assert run.global_step == 20  # as Lightning counts
    fits, again = Balanced(), DualBalance()
    _, _, scale = fit(fits, again, initial=2.0**24)
    skipped = round(24 - torch.log2(torch.tensor(scale)).item())
    assert 0 < int(again.step) < 20
    assert weights(fits).isfinite().all()
    assert skipped > 0


def test_the_scale_of_several_optimizers_is_one() -> None:
    def configure(module: Any) -> Any:
        trunk, heads = module.net.trunk.parameters(), module.net.heads.parameters()
        return [torch.optim.SGD(trunk, lr=0.01), torch.optim.SGD(heads, lr=0.01)]

    def one(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.01)

    for callbacks in ([], [MinNorm]):
        _, expected, _ = fit(Balanced(one), *(c() for c in callbacks))
        _, found, _ = fit(Balanced(configure), *(c() for c in callbacks))
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_the_monitor_sees_unscaled_gradients(tmp_path: Any) -> None:
    found = []
    for initial in (1.0, 2.0**12):
        module = Balanced()

        class Asks(GradientMonitor):
            def wants_jacobian(self, trainer: Any, pl_module: Any) -> bool:
                return True

            def setup(self, *args: Any, **kwargs: Any) -> None:
                pass

        fit(module, MinNorm(), Asks(), initial=initial, max_steps=1)
        found.append(module.last_step)
    torch.testing.assert_close(found[0].gramian, found[1].gramian, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(found[0].direction_norm, found[1].direction_norm, rtol=2e-2, atol=0)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [MinNorm, DualBalance, LogLoss])
def test_other_precisions(precision: Any, make: Any) -> None:
    class Cast(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            x, targets = batch
            dtype = self.net.trunk[0].weight.dtype
            return super().task_losses(
                (x.to(dtype), {t: y.to(dtype) for t, y in targets.items()}), 0
            )

    torch.manual_seed(0)
    module = Cast()
    trainer(callbacks=[make()], precision=precision).fit(module, loader())
    expected = Balanced()
    trainer(callbacks=[make()]).fit(expected, loader())
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert weights(module).dtype == dtype
    assert all(p.grad.dtype == dtype for p in module.net.parameters())
    tolerance = 1e-5 if precision == "64-true" else 0.05
    torch.testing.assert_close(weights(module).float(), weights(expected), rtol=0, atol=tolerance)


def _compiled(module: Any) -> Any:
    module.net.trunk = torch.compile(module.net.trunk, backend="aot_eager")
    return module


def _checkpointed(module: Any) -> Any:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    module.net.trunk = Checkpointed(module.net.trunk)
    return module


@pytest.mark.parametrize("change", [_compiled, _checkpointed])
@pytest.mark.parametrize("make", [list, lambda: [MinNorm()], lambda: [DualBalance()]])
def test_compiled_and_checkpointed_trunks(change: Any, make: Any) -> None:
    expected = Balanced()
    trainer(callbacks=make()).fit(expected, loader(40))
    module = change(Balanced())
    trainer(callbacks=make()).fit(module, loader(40))
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-5, atol=1e-6)


class Measured(MultiTaskModule):
    """Predicts what it is given."""

    def __init__(self) -> None:
        wrapped = MinMaxMetric(MeanAbsoluteError())
        metrics = {"squares": MeanSquaredError(), "wrapped": wrapped}
        super().__init__({t: Task(nn.MSELoss(), metrics) for t in ("a", "b")})
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x * self.scale, "b": x * self.scale}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_metrics_of_more_samples_than_bfloat16_can_count(precision: str) -> None:
    """After 512 samples the sum of squares is 512; bfloat16 has nothing between that and 516."""
    sizes = [512, *[1] * 100]
    batches = [(torch.ones(n, 1), {t: torch.zeros(n, 1) for t in "ab"}) for n in sizes]
    data = DataLoader(batches, batch_size=None)
    module = Measured()
    run = trainer(precision=precision, limit_train_batches=1)
    for evaluate in (run.validate, run.fit, run.validate):
        given = [data, data] if evaluate == run.fit else [data]
        evaluate(module, *given)
        for task in ("a", "b"):
            assert run.callback_metrics[f"val/{task}/squares"] == 1
            assert run.callback_metrics[f"val/{task}/wrapped/raw"] == 1
            assert run.callback_metrics[f"val/loss/{task}"] == 1
