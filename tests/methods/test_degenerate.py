"""Problems at the edge: zero, opposite, identical gradients, one task, nothing shared."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import (
    IMTL,
    IMTLL,
    SAMO,
    STCH,
    CAGrad,
    CentralDirection,
    DualBalance,
    FairGrad,
    GradientBalancer,
    GradientMonitor,
    ImprovableGapV1,
    ImprovableGapV2,
    LogLoss,
    MinNorm,
    MoCo,
    MomentumConFIG,
    MTAdam,
    MultiTaskModule,
    NashMTL,
    UncertaintyWeighting,
)
from tests.common.faulty import Faulty, batches, change, fitted, parameters, same
from tests.common.methods import METHODS, Method
from tests.common.models import Balanced, Plain, trainer

PAIR = ("a", "c")  # names that the table of methods has weights for
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def finite(module: Any) -> bool:
    return all(bool(p.isfinite().all()) for p in module.parameters())


# ------------------------------------------------------------------------------------ zero gradient


@each_method
def test_zero_gradient_warns_once_by_name(method: Method) -> None:
    fault = change("c", lambda loss: loss * 0 + 1)
    module = Faulty(dict.fromkeys(range(6), fault), tasks=PAIR)
    balancer = method.make()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted(module, batches(6, tasks=PAIR), [balancer], **method.flags)
    told = [str(w.message) for w in found if "exactly zero" in str(w.message)]
    needed = isinstance(balancer, GradientBalancer) and balancer.needs_jacobian
    if needed and type(balancer).wanted is not GradientBalancer.wanted:
        return  # rows that it does not ask for are not there to be looked at
    assert len(told) == needed
    if needed:
        assert told[0].startswith("The gradient of ['c'] is exactly zero on the shared parameters")
        assert "at optimiser step 1." in told[0]
        assert "leave the task out with `active_tasks`" in told[0]
    assert finite(module)
    assert not same(parameters(module), parameters(Balanced(tasks=PAIR)))


def test_zero_gradient_stops_the_trunk_under_min_norm() -> None:
    def configure(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    fault = change("c", lambda loss: loss * 0 + 1)
    module = Faulty(dict.fromkeys(range(6), fault), tasks=PAIR, configure=configure)
    before = parameters(module)
    with pytest.warns(UserWarning, match=r"gradient of \['c'\] is exactly zero"):
        fitted(module, batches(6, tasks=PAIR), [MinNorm()])
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"net.heads.head_a.weight", "net.heads.head_a.bias"}


# ----------------------------------------------------------------- opposite and identical gradients


class Pulled(MultiTaskModule):
    """Two losses whose gradients are `1` and `sign` times one vector; all parameters are shared."""

    def __init__(self, sign: float) -> None:
        super().__init__(PAIR)
        torch.manual_seed(1)
        self.net = nn.Linear(4, 1)
        self.sign = sign

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        score = self.score(batch)
        return {"a": 5 + score, "c": 5 + self.sign * score}

    def score(self, batch: Any) -> Tensor:
        return self.net(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@each_method
def test_opposite_gradients(method: Method) -> None:
    module = Pulled(-1.0)
    before = parameters(module)
    one = DataLoader([*batches(1)] * 6, batch_size=None)  # else an average is of other directions
    fitted(module, one, [method.make()], **method.flags)
    assert finite(module)
    if method.stationary_fixed_point:
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)


@each_method
def test_identical_gradients(method: Method) -> None:
    module = Pulled(1.0)
    batch = next(iter(batches()))
    before = module.score(batch).item()
    fitted(module, batches(), [method.make()], **method.flags)
    assert finite(module)
    assert module.score(batch).item() < before - 1e-4


# ----------------------------------------------------------------------------------------- one task


class Alone(Plain):
    """Automatic optimisation of one task's loss."""

    def __init__(self, logarithm: float | None, weight: float) -> None:
        super().__init__(tasks=PAIR)
        self.logarithm, self.weight = logarithm, weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0])["a"], batch[1]["a"])
        return self.weight * loss if self.logarithm is None else (loss + self.logarithm).log()


# What one task trains on is its loss. Here it is the logarithm of the loss,
LOGARITHMS = (LogLoss, ImprovableGapV1, ImprovableGapV2, STCH)
# and here the length of a step is the method's own: learned, smoothed, or fixed by its equation;
# or (SAMO) the gradient is taken at other parameters.
OWN_LENGTH = (
    *(CAGrad, FairGrad, IMTL, IMTLL, MoCo, MomentumConFIG, MTAdam, NashMTL, UncertaintyWeighting),
    SAMO,
)


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
@each_method
def test_one_task_trains_as_it_would_alone(method: Method) -> None:
    """Descent on its loss or its logarithm; smoothing and fixed scales only stay finite."""
    balancer: Any = method.make()
    module = Balanced(tasks=PAIR, active_tasks=["a"])
    fitted(module, batches(tasks=PAIR), [balancer], **method.flags)
    assert finite(module)
    assert not same(parameters(module), parameters(Balanced(tasks=PAIR)))
    smooths = isinstance(balancer, DualBalance) and balancer.gradient_part
    last_batch = getattr(balancer, "batches", 1) == 3  # the gradient of one of three micro-batches
    if (
        isinstance(balancer, OWN_LENGTH)
        or last_batch
        or (smooths and (balancer.beta > 0 or balancer.scale == "constant"))
    ):
        return
    logs = isinstance(balancer, LOGARITHMS) or getattr(balancer, "normalization", "") == "log"
    logs |= getattr(balancer, "loss_part", False)
    weight = balancer.weights["a"] if method.name == "Scalarization" else 1.0
    plain = Alone(getattr(balancer, "eps", 0.0) if logs else None, weight)
    fitted(plain, batches(tasks=PAIR), **method.flags)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), p, rtol=0, atol=2e-6)


# --------------------------------------------------------------------- nothing shared, frozen trunk


class Apart(Balanced):
    """Two tasks with a network each."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.cat([x, x[:, :2]], 1)
        return {name: self.net.heads[f"head_{name}"](z).squeeze(-1) for name in ("a", "b")}


class Frozen(Balanced):
    """A frozen trunk."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net.trunk.requires_grad_(False)


NEEDING = [MinNorm, CentralDirection, DualBalance]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("balancer", NEEDING)
@pytest.mark.parametrize("model", [Apart, Frozen])
def test_nothing_shared(model: type[Balanced], balancer: type[Callback], every: int) -> None:
    module, attached = model(), balancer()
    frozen = (
        r"; frozen are \['net.trunk.0.weight', .*'net.trunk.3.bias'\]" if model is Frozen else ""
    )
    message = (
        rf"^Expected parameters that two or more of the tasks \['a', 'b'\] share but found none, "
        rf"so {balancer.__name__} has no gradients to balance{frozen}. Unfreeze the trunk.*name "
        rf"the parameters in `shared_parameters\(\)`, or train without a gradient balancer."
    )
    run = trainer(callbacks=[attached], accumulate_grad_batches=every)
    with pytest.raises(ValueError, match=message):
        run.fit(module, batches())
    assert same(parameters(module), parameters(model()))
    assert not any(o.state for o in run.optimizers)
    assert same(attached.state_dict(), balancer().state_dict())
    fitted(module, batches())  # the cure
    assert not same(parameters(module), parameters(model()))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("balancer", [None, LogLoss])
@pytest.mark.parametrize("model", [Apart, Frozen])
def test_nothing_shared_without_a_gradient_balancer(
    tmp_path: Any, model: type[Balanced], balancer: Any, every: int
) -> None:
    """Trains as ever, also while a monitor looks for shared gradients in vain."""
    ends = []
    for monitors in ([], [GradientMonitor(every_n_steps=1)]):
        module = model()
        balancers = [balancer()] if balancer else []
        flags = {"accumulate_grad_batches": every, "logger": CSVLogger(tmp_path)}
        fitted(module, batches(), [*balancers, *monitors], **flags)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-6)
    untouched = torch.cat([p.detach().flatten() for p in model().parameters()])
    assert not torch.equal(ends[0], untouched)
    assert math.isfinite(ends[0].sum())


def test_shared_parameters_that_are_none() -> None:
    class Other(Frozen):
        def shared_parameters(self) -> Any:
            return self.net.trunk.parameters()

    module = Other()
    message = (
        r"^Expected `shared_parameters\(\)` to return trainable parameters of Other but 4 of 4 are "
        r"not. Return for example `self.encoder.parameters\(\)`, without frozen ones."
    )
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[MinNorm()]).fit(module, batches())
    assert same(parameters(module), parameters(Other()))


def test_frozen_altogether() -> None:
    module = Balanced()
    module.net.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"loss of task 'a' to have a graph .* a fully frozen model"
    ):
        trainer().fit(module, batches())
    assert same(parameters(module), parameters(Balanced()))
