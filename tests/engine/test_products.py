"""A Gramian at the representation that is corrected by exact products in forward mode."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import CAGrad, GradientBalancer, LogLoss, MinNorm, NashMTL, UPGrad
from lightning_mtl.engine.forms.products import Products
from tests.common.models import Balanced, loader, trainer, weights
from tests.engine.test_forms import Observer

TASKS = ("a", "b", "c")


class Marked(Balanced):
    """A trunk with BatchNorm and dropout, and its representation marked."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tasks=TASKS, **kwargs)
        torch.manual_seed(2)
        self.net.trunk = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 6)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.shared_representation(self.net.trunk(x).tanh())
        return {t: self.net.heads[f"head_{t}"](z).squeeze(-1) for t in TASKS}


class Attending(Marked):
    """A transformer, whose attention has fused kernels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.net.trunk = nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), layer, nn.Flatten(), nn.Linear(8, 6)
        )


class Spy(GradientBalancer):
    """MinNorm that keeps the Gramians it was given."""

    def __init__(self, gradients: Any) -> None:
        super().__init__(gradients=gradients)
        self.seen: list[Tensor] = []
        self.add_state("calls", 0.0, per_task=True)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.seen.append(gramian)
        self.per_task_state("calls", losses).add_(1)
        return MinNorm().weights(gramian, losses)


def fit(balancer: Any, *others: Any, module: Any = None, **kwargs: Any) -> Any:
    module = Marked() if module is None else module
    torch.manual_seed(7)
    run = trainer(callbacks=[*others, balancer], **kwargs)
    run.fit(module, loader(tasks=TASKS, batch_size=8))
    return module


def seen(level: str, *others: Any, module: Any = None) -> list[Tensor]:
    spy = Spy(level)
    fit(spy, *others, module=module, max_steps=1)
    return spy.seen


@pytest.mark.parametrize("model", [Marked, Attending])
@pytest.mark.parametrize("others", [[], [LogLoss()]])
def test_the_products_are_those_of_all_parameters(model: Any, others: list[Any]) -> None:
    (exact,) = seen("parameters", *others, module=model())
    first, second, third = seen("representation+2", *others, module=model())
    for trial, after in ((first, second), (first, third), (second, third)):
        w = MinNorm().weights(trial, torch.ones(3))
        torch.testing.assert_close(after @ w, exact @ w, rtol=1e-4, atol=1e-5)
        assert torch.linalg.eigvalsh(after.double()).min() > -1e-6


def test_the_other_estimate_is_that_of_a_linear_layer_behind() -> None:
    """Exact for the weights of such a layer, with no more activations than components."""

    class Kept(Products):
        def _of_activations(self) -> Tensor:
            found.append((super()._of_activations(), self.rows.clone(), self.tensors[0].detach()))
            return found[-1][0]

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_mtl.engine.forms.probe.Products", Kept)
        fit(MinNorm(gradients="representation+2"), max_steps=1)
    ((estimate, rows, z),) = found  # once a step
    layers = torch.einsum("tbo,bi->toi", rows.view(3, *z.shape), z).flatten(1)
    torch.testing.assert_close(estimate, (layers @ layers.T).double(), rtol=1e-4, atol=1e-6)


def test_trials_leave_no_trace() -> None:
    """State, BatchNorm and random numbers are those of a run without products."""
    spy = Spy("representation+2")
    corrected_run = fit(spy)
    assert len(spy.seen) == 3 * 10
    assert spy.calls.tolist() == [10.0] * 3  # type: ignore[attr-defined]
    plain = fit(Spy("representation"), max_steps=1)
    once = fit(Spy("representation+2"), max_steps=1)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(once.named_buffers())[name], buffer, msg=name)
    assert weights(corrected_run).isfinite().all()


@pytest.mark.parametrize("make", [MinNorm, CAGrad, NashMTL, UPGrad])
def test_nearer_to_the_exact_direction(make: Any) -> None:
    """Three tasks span so little that two products find nearly all of the Gramian."""
    start = weights(Marked())
    steps = {
        level: weights(fit(make(gradients=level), max_steps=1)) - start
        for level in ("parameters", "representation", "representation+2")
    }
    exact = steps["parameters"]
    far, near = ((steps[k] - exact).norm() for k in ("representation", "representation+2"))
    assert near <= far + 1e-7
    assert near < 0.1 * exact.norm()


def test_recorded() -> None:
    observer = Observer()
    fit(MinNorm(gradients="representation+1"), observer, max_steps=3)
    for record in observer.records:
        assert record.gramian.isfinite().all()


def test_a_task_is_missing() -> None:
    class Holes(Marked):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = dict(super().task_losses(batch, batch_idx))
            if batch_idx % 2:
                del losses["b"]
            return losses

    assert weights(fit(MinNorm(gradients="representation+1"), module=Holes())).isfinite().all()


def test_what_cannot_be_made_again_is_said() -> None:
    class Changing(Marked):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            again = getattr(self, "again", False)
            self.again = True
            return super().forward(x.square() if again else x)

    module = Changing()
    before = weights(module)
    with pytest.raises(ValueError, match=r"squared length .* in forward mode"):
        fit(MinNorm(gradients="representation+1"), module=module, max_steps=1)
    assert torch.equal(weights(module), before)
    assert all(isinstance(p, nn.Parameter) for p in module.net.trunk[0]._parameters.values())


def test_a_layer_without_forward_mode_is_said() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Odd(Marked):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.shared_representation(Backward.apply(self.net.trunk(x)))
            return {t: self.net.heads[f"head_{t}"](z).squeeze(-1) for t in TASKS}

    with pytest.raises((RuntimeError, NotImplementedError), match="Expected forward-mode deriv"):
        fit(MinNorm(gradients="representation+1"), module=Odd(), max_steps=1)


def test_what_catches_the_end_of_the_pass_is_said() -> None:
    class Careless(Marked):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.net.trunk(x).tanh()
            with contextlib.suppress(BaseException):  # a user's mistake
                z = self.shared_representation(z)
            return {t: self.net.heads[f"head_{t}"](z).squeeze(-1) for t in TASKS}

    with pytest.raises(ValueError, match=r"something caught what ends the forward pass"):
        fit(MinNorm(gradients="representation+1"), module=Careless(), max_steps=1)


def test_an_estimate_that_overflows_is_left_out() -> None:
    """The other one then takes on the product alone."""
    found: dict[str, Tensor] = {}
    for name, value in (("zeros", 0.0), ("overflow", torch.inf)):
        with pytest.MonkeyPatch.context() as patch:
            estimate = torch.full((3, 3), value)
            patch.setattr(Products, "_of_activations", lambda self, estimate=estimate: estimate)
            found[name] = weights(fit(MinNorm(gradients="representation+2"), max_steps=3))
    assert torch.equal(found["zeros"], found["overflow"])
    assert found["zeros"].isfinite().all()
