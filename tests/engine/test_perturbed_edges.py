"""Perturbed parameters at the edge: bad values, precisions, strides, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_mtl import BadLossError, GradientBalancer, Smooth, TaskTensioner
from lightning_mtl.gradient_balancers.samo import SAMO
from lightning_mtl.trainer.supported import check_batches
from tests.common.faulty import Faulty, batches, change, parameters, same
from tests.common.models import Balanced, Sum, loader, sgd, trainer, weights
from tests.engine.test_forms import Marked
from tests.engine.test_perturbed import BETA, TASKS, each_local, fit, samo
from tests.methods.test_degenerate import Apart
from tests.trainer.test_precision import _checkpointed, _compiled, fp16

# ------------------------------------------------------------------------------- bad values


class There(Balanced):
    """``fault`` changes the losses of some calls of a batch: 0 is the first forward pass."""

    def __init__(self, fault: Any, calls: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(tasks=TASKS, **kwargs)
        self.fault, self.calls, self.done = fault, calls, 0

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = dict(super().task_losses(batch, batch_idx))
        if self.done in self.calls:
            losses = self.fault(losses)
        self.done += 1
        return losses


BAD = {
    "nan": change("b", lambda loss: loss * float("nan")),
    "inf": change("b", lambda loss: loss + float("inf")),  # its gradient is finite
    "gradient": change("b", lambda loss: loss + (loss - loss).sqrt()),
}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
@pytest.mark.parametrize("rule", ["raise", "skip_task", "skip_step"])
def test_a_bad_loss_or_gradient_at_perturbed_parameters(rule: Any, fault: Any) -> None:
    module = There(fault, (1, 2, 3), on_bad_loss=rule)  # passes of the three tasks
    before = parameters(module)
    data = loader(4, tasks=TASKS)
    if rule == "raise":
        with pytest.raises(BadLossError, match=r"gradient of \['b'\] is not, though the loss is"):
            fit(module, samo(), data=data)
    else:
        none = pytest.raises(RuntimeError, match=r"no optimiser step.*\{'b': 1\}")
        told = pytest.warns(UserWarning, match="cannot be used and is left out")
        with told, none if rule == "skip_step" else nullcontext():
            fit(module, samo(), data=data)
    moved = {n.split(".")[-2] for n, p in parameters(module).items() if not same(p, before[n])}
    assert moved == ({"0", "3", "head_a", "head_c"} if rule == "skip_task" else set())
    assert all(p.isfinite().all() for p in module.parameters())


@each_local
def test_a_gradient_that_is_bad_everywhere_names_its_task(local: str) -> None:
    module = There(BAD["gradient"], range(99))
    before = parameters(module)
    with pytest.raises(BadLossError, match=r"step 1 but the gradient of \['b'\] is not"):
        fit(module, samo(local), data=loader(4, tasks=TASKS))
    assert same(parameters(module), before)
    skips, without = (
        There(BAD["gradient"], range(99), on_bad_loss="skip_task"),
        Balanced(tasks=TASKS),
    )
    with pytest.warns(UserWarning, match="cannot be used and is left out"):
        fit(skips, samo(local), data=loader(4, tasks=TASKS))
    fit(without, Sum(), data=loader(4, tasks=TASKS))  # that step was left unperturbed
    for task, equal in (("a", True), ("b", False), ("c", True)):
        one, other = (m.net.heads[f"head_{task}"].weight for m in (skips, without))
        assert torch.allclose(one, other) == equal


def test_probes_without_a_finite_loss_count_for_nothing() -> None:
    class OnlyTrains(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            return losses if self.training else {t: v * torch.nan for t, v in losses.items()}

    found = []
    for module, beta in ((OnlyTrains(), BETA), (Balanced(), 0.0), (Balanced(), BETA)):
        fit(module, samo("estimate", beta=beta))
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert (found[0] - found[2]).abs().max() > 1e-4


def test_a_task_that_has_no_loss_the_second_time() -> None:
    module = There(lambda losses: {t: v for t, v in losses.items() if t != "b"}, (2,))
    before = parameters(module)
    with pytest.raises(ValueError, match=r"loss of task 'b' once more for the same batch"):
        fit(module, samo(), data=loader(4, tasks=TASKS))
    assert same(parameters(module), before)


# ------------------------------------------------------------------------------- precision


def far(one: Any, other: Any) -> float:
    return float((weights(one).float() - weights(other).float()).abs().max())


def trained(balancer: Any, module: Any = None, **kwargs: Any) -> Any:
    module = Balanced() if module is None else module
    fit(module, balancer, data=loader(40), **kwargs)
    return module


@each_local
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16", "64-true"])
def test_precision(precision: Any, local: str) -> None:
    """Close to float32, and closer than training without the perturbation is."""
    flags: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        flags = {"plugins": [fp16(2.0**10)]}
    exact, plain = trained(samo(local)), trained(Sum())
    assert far(trained(samo(local), **flags), exact) < 0.3 * far(plain, exact)


@each_local
def test_autocast_of_the_module_keeps_no_weights_of_other_places(local: str) -> None:
    class Own(Balanced):
        cache = True

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=self.cache):
                return super().forward(x)

    cached, plain = Own(), Own()
    plain.cache = False
    for module in (cached, plain):
        fit(module, samo(local), precision="bf16-mixed")
    assert torch.equal(weights(cached), weights(plain))


def test_an_overflow_leaves_the_step_out() -> None:
    module, balancer = Balanced(), samo("estimate", TaskTensioner(window=1))
    before = weights(module)
    plugin = fp16(2.0**40)
    fit(module, balancer, plugins=[plugin])
    assert torch.equal(weights(module), before)
    assert balancer.base.norms is None
    assert plugin.scaler.get_scale() == 2.0**37


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed])
@each_local
def test_compiled_and_checkpointed_trunks(local: str, wrap: Any) -> None:
    expected = trained(samo(local))
    torch.testing.assert_close(
        weights(trained(samo(local), wrap(Balanced()))), weights(expected), rtol=1e-5, atol=1e-6
    )


def test_parameters_in_other_strides() -> None:
    class Images(Balanced):
        def __init__(self, last: bool) -> None:
            super().__init__(configure=lambda m: sgd(m.parameters()))
            self.conv = nn.Conv2d(3, 4, 3)
            if last:
                self.conv = self.conv.to(memory_format=torch.channels_last)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            images = x.repeat(1, 12)[:, :48].view(-1, 3, 4, 4)
            return self.net(self.conv(images).mean((2, 3)))

    found = []
    for last in (False, True):
        module = Images(last)
        fit(module, samo())
        found.append((weights(module), module.conv.weight.detach().clone(), module.conv.weight))
    assert found[0][2].stride() != found[1][2].stride()
    for one, other in zip(*(f[:2] for f in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- refused


def test_refused_at_set_up() -> None:
    for kwargs, message in (
        ({"accumulate_grad_batches": 2}, r"`accumulate_grad_batches=1` with SAMO but found 2.*Use"),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})], "max_epochs": 2}, "=1` with SAMO"),
    ):
        callbacks = [*kwargs.pop("callbacks", []), samo()]
        with pytest.raises(MisconfigurationException, match=message):
            trainer(callbacks=callbacks, **kwargs).fit(Balanced(), batches())
    with pytest.raises(MisconfigurationException, match=r"`shard_gradients=False` with SAMO.*Set"):
        fit(Balanced(shard_gradients=True), samo())
    for outer in (Smooth(samo()), SAMO(Smooth(SAMO()))):
        name = type(outer).__name__
        with pytest.raises(MisconfigurationException, match=rf"SAMO outermost .* inside {name},"):
            fit(Balanced(), outer)
    run: Any = SimpleNamespace(accumulate_grad_batches=1, strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"found FSDP2.*strategy='ddp'"):
        check_batches(run, samo())


@each_local
def test_nothing_shared(local: str) -> None:
    with pytest.raises(ValueError, match="share but found none, so SAMO has no gradients"):
        fit(Apart(), samo(local))


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
@each_local
def test_one_task_and_parameters_of_several_tasks_outside_the_rows(local: str) -> None:
    """Such a parameter moves along with each of its tasks, and gets the sum of their gradients."""

    class Half(Balanced):
        def shared_parameters(self) -> Any:
            return self.net.trunk[0].parameters()

    class Kept(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, _: Any) -> None:
            self.grads = [p.grad.clone() for p in module.net.parameters()]

    kept, limit = Kept(), Kept()
    fit(Half(), samo(local, rho=1e-9), kept, data=loader(4))
    fit(Half(), Sum(), limit, data=loader(4))
    for one, other in zip(kept.grads, limit.grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    module = Balanced(active_tasks=["a"])
    fit(module, samo(local))
    assert weights(module).isfinite().all()


def test_representations_of_the_replays_are_not_kept() -> None:
    module = Marked()
    fit(module, samo("estimate"))
    assert len(module._flow._representation) == 1


def test_a_balancer_of_ones_own() -> None:
    """What it is asked, and with what: the gradient of the mean loss, and each task's own."""

    class Own(GradientBalancer):
        local = "gradient"

        def probes(self, like: Tensor, count: int) -> Tensor:
            raise AssertionError

        def perturbations(self, average: Tensor, local: Tensor) -> Tensor:
            self.got = (average.clone(), local.clone(), self.tasks)
            return torch.zeros_like(local)

        def head_perturbation(self, gradient: Tensor) -> Tensor:
            self.head = gradient.clone()
            return torch.zeros_like(gradient)

        def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
            self.rows = jacobian.clone()
            return jacobian.sum(0)

    balancer, plain, module = Own(), Balanced(), Faulty({0: lambda x: {"b": (x["b"], 5)}})
    module.shared_parameters = module.net.trunk.parameters  # type: ignore[method-assign]
    fit(module, balancer, data=loader(4))
    fit(plain, Sum(), data=loader(4))
    average, local, tasks = balancer.got
    assert tasks == ("b",)
    assert torch.equal(average, local[0])
    torch.testing.assert_close(balancer.rows, local)
    torch.testing.assert_close(
        balancer.head, torch.cat([p.grad.flatten() for p in plain.net.heads["head_b"].parameters()])
    )
