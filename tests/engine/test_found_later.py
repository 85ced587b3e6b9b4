"""Layers that the first step skips are balanced once two tasks have reached them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import (
    DualBalance,
    ExcessMTL,
    GradientBalancer,
    GradNorm,
    GradVac,
    MetaBalance,
    MinNorm,
    MoCo,
    MomentumConFIG,
    MTAdam,
    Smooth,
)
from tests.common.faulty import batches, fitted, parameters, same
from tests.common.models import Balanced, resume_from, trainer
from tests.ranks.layout_cases import Continued, Saver

LATE = ("net.heads.skipped.weight", "net.heads.skipped.bias")
BALANCERS: dict[str, Any] = {
    "MinNorm": MinNorm,
    "DualBalance": DualBalance,
    "MoCo": MoCo,
    "MTAdam": MTAdam,
    "MetaBalance": MetaBalance,
    "GradVac(layer)": lambda: GradVac(groups="layer"),
    "GradVac(tensor)": lambda: GradVac(groups="tensor"),
    "ExcessMTL": ExcessMTL,
    "MomentumConFIG": MomentumConFIG,
    "Smooth(MinNorm)": lambda: Smooth(MinNorm()),
    "GradNorm": lambda: GradNorm(gradients="parameters"),
}


def plain_sgd(module: Any) -> Any:
    return torch.optim.SGD(module.net.parameters(), lr=0.01)


class Skipping(Balanced):
    """A layer between trunk and heads that takes part from batch 2 on, there with gradient zero."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(plain_sgd, **kwargs)
        self.net.heads["skipped"] = nn.Linear(6, 6)

    def strengths(self, batch_idx: int) -> dict[str, float | None]:
        """What the layer counts for in each task; ``None`` where it takes no part."""
        return dict.fromkeys("ab", (None, None, 0.0, 1.0)[min(batch_idx, 3)])

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        z, losses = self.net.trunk(x).tanh(), {}
        for task, strength in self.strengths(batch_idx).items():
            more = z if strength is None else z + strength * self.net.heads["skipped"](z).tanh()
            prediction = self.net.heads[f"head_{task}"](more).squeeze(-1)
            losses[task] = nn.functional.mse_loss(prediction, targets[task])
        return losses


class Named(Skipping):
    """Its user says so from the start."""

    def shared_parameters(self) -> Any:
        return [*self.net.trunk.parameters(), *self.net.heads["skipped"].parameters()]


class Routed(Skipping):
    """In batches 1 and 2 a task each goes through it: in no step do both."""

    def strengths(self, batch_idx: int) -> dict[str, float | None]:
        return {"a": (None, 0.0)[batch_idx in (1, 3, 4, 5)], "b": (None, 0.0)[batch_idx > 1]}


class Left(Skipping):
    """Its user balances the trunk only."""

    def shared_parameters(self) -> Any:
        return self.net.trunk.parameters()


class Watched(GradientBalancer):
    """Equal weights; notes the columns of each step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[tuple[str, ...]] = []

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        assert self.columns is not None
        self.seen.append(self.columns.names)
        return torch.ones_like(losses)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, dict):
        return [tensor for value in found.values() for tensor in _tensors(value)]
    return [found] if isinstance(found, Tensor) else []


@pytest.mark.parametrize("name", BALANCERS)
def test_as_if_it_had_been_named_from_the_start(name: str) -> None:
    late, named = Skipping(), Named()
    found = fitted(late, batches(8), [BALANCERS[name]()])
    expected = fitted(named, batches(8), [BALANCERS[name]()])
    for key, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][key], value, rtol=1e-5, atol=1e-6)
    states = [_tensors(run["balancers"]) for run in (found, expected)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)
    assert not same(parameters(late)[LATE[0]], parameters(Skipping())[LATE[0]])


@pytest.mark.parametrize("memory", ["full", "bf16", "host", "blocks"])
@pytest.mark.parametrize("gradients", ["parameters", "last_layer"])
def test_every_form(memory: Any, gradients: Any) -> None:
    late, named = (
        fitted(model(gradient_memory=memory), batches(8), [MinNorm(gradients=gradients)])
        for model in (Skipping, Named)
    )
    for key, value in named["parameters"].items():
        torch.testing.assert_close(late["parameters"][key], value, rtol=1e-3, atol=1e-4)


def test_tasks_that_come_one_by_one() -> None:
    balancer = Watched()
    fitted(Routed(), batches(6), [balancer])
    assert [len(names) for names in balancer.seen] == [4, 4, 4, 6, 6, 6]
    assert balancer.seen[-1][4:] == LATE
    balancer = Watched()
    fitted(Routed(), batches(6), [balancer], accumulate_grad_batches=3)
    assert [len(names) for names in balancer.seen] == [6, 6]  # one step has seen both


def test_what_the_user_leaves_out_stays_out() -> None:
    balancer = Watched()
    fitted(Left(), batches(6), [balancer])
    assert {len(names) for names in balancer.seen} == {4}


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
def test_one_task() -> None:
    class One(Skipping):
        def strengths(self, batch_idx: int) -> dict[str, float | None]:
            return {"a": super().strengths(batch_idx)["a"]}

    balancer = Watched()
    fitted(One(active_tasks=["a"]), batches(6), [balancer])
    assert [len(names) for names in balancer.seen] == [6, 6, 6, 8, 8, 8]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("model", [Skipping, Routed])
def test_resumes_bit_for_bit(tmp_path: Path, model: Any, stop: int) -> None:
    data, path = list(batches(6)), tmp_path / "stop.ckpt"
    whole, again = model(), model()
    run = trainer(callbacks=[DualBalance(), Saver(path, stop)])
    run.fit(whole, Continued(data))
    run = trainer(callbacks=[DualBalance()])
    run.fit(again, Continued(data), **resume_from(path))
    assert run.global_step == 6
    assert same(parameters(again), parameters(whole))


@pytest.mark.parametrize("level", ["representation", "representation+1", "representation+2"])
def test_behind_a_representation_it_is_said_once(level: str) -> None:
    class Marked(Skipping):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            x, targets = batch
            z = self.net.trunk(x).tanh()
            if batch_idx > 1:
                z = z + self.net.heads["skipped"](z).tanh()
            z = self.shared_representation(z)
            heads = {t: self.net.heads[f"head_{t}"](z).squeeze(-1) for t in targets}
            return {t: nn.functional.mse_loss(heads[t], y) for t, y in targets.items()}

    module = Marked()
    with pytest.warns(UserWarning, match="turned out to be shared after the first step") as told:
        fitted(module, batches(6), [MinNorm(gradients=level)])
    (message,) = [str(w.message) for w in told if "turned out" in str(w.message)]
    assert message.startswith(f"{list(LATE)} turned out")
    assert "Name them in `shared_parameters()`" in message
    assert not same(parameters(module)[LATE[0]], parameters(Marked())[LATE[0]])


@pytest.mark.parametrize("balancer", [Watched, DualBalance])
def test_zeros_of_a_compiled_graph_are_no_paths(balancer: Any) -> None:
    """They stand where a task does not reach a head; a layer that is reached later still shows."""

    class Compiled(Skipping):
        def strengths(self, batch_idx: int) -> dict[str, float | None]:
            return dict.fromkeys("ab", None if batch_idx < 2 else 1.0)

        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            if not hasattr(self, "compiled"):
                self.compiled = [torch.compile(self.predictions, backend="aot_eager")]
            x, targets = batch
            found = self.compiled[0](x, batch_idx > 1)
            return {t: nn.functional.mse_loss(found[t], y) for t, y in targets.items()}

        def predictions(self, x: Tensor, more: bool) -> dict[str, Tensor]:
            z = self.net.trunk(x).tanh()
            z = z + self.net.heads["skipped"](z).tanh() if more else z
            return {t: self.net.heads[f"head_{t}"](z).squeeze(-1) for t in "ab"}

    module = Compiled()
    fitted(module, batches(6), [balancer()])
    assert module._flow is not None
    names = module._flow.state_dict()["shared"]
    assert [n for n in names if "trunk" not in n] == list(LATE)
