"""The forms a backward pass can take: each against gradients taken by hand in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_mtl import GradientBalancer, LogLoss
from lightning_mtl.gradient_balancers import min_norm_weights
from tests.common.models import TASKS, Balanced, Batched, Sum, loader, trainer, weights


class Fixed(GradientBalancer):
    """Weights .3 and .7; from the second step on they are reused."""

    def __init__(self, reuse: bool, weight_heads: bool = False) -> None:
        super().__init__()
        self.reuse, self.weight_heads = reuse, weight_heads
        self.add_state("step", 0)
        self.calls = 0

    def _of_tasks(self) -> Tensor:
        known = {"a": 0.3, "b": 0.7}
        return torch.tensor([known[t] for t in self.tasks])

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.calls += 1
        return self._of_tasks().to(gramian)

    def reused_weights(self) -> Tensor | None:
        return self._of_tasks() if self.reuse and self.step else None

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        self.step += 1


class FixedHeads(Fixed):
    """As Fixed, with other weights for the heads."""

    def head_weights(self) -> Tensor:
        return torch.tensor([{"a": 2.0, "b": 5.0}[t] for t in self.tasks])


class WithoutB(Balanced):
    """Task b is missing from every fourth batch."""

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = dict(super().task_losses(batch, batch_idx))
        if batch_idx % 4 == 3:
            del losses["b"]
        return losses


class Marked(Balanced):
    """Marks the tensor that the heads start from."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.shared_representation(self.net.trunk(x).tanh())
        return {name[5:]: head(z).squeeze(-1) for name, head in self.net.heads.items()}


def fit(module: Any, *callbacks: Any, size: int = 40, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    trainer(callbacks=list(callbacks), **kwargs).fit(module, loader(size))
    return module


def count_passes(module: Any) -> list[int]:
    """Counts backward passes through the first layer of the trunk."""
    passes: list[int] = []
    module.net.trunk[1].register_full_backward_hook(lambda *_: passes.append(1))
    return passes


# ------------------------------------------------------------------ weights that are reused


@pytest.mark.parametrize("cls", [Fixed, FixedHeads])
@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("losses", [[], [LogLoss]], ids=["", "LogLoss"])
def test_reused_weights_train_as_recomputed_ones(
    cls: Any, weight_heads: bool, every: int, losses: list[Any]
) -> None:
    found = []
    for reuse in (False, True):
        balancer = cls(reuse, weight_heads)
        module = fit(
            Balanced(),
            balancer,
            *(b() for b in losses),
            accumulate_grad_batches=every,
            max_epochs=2,
        )
        found.append((weights(module), balancer.calls, balancer.step))
    (expected, calls, steps), (reused, fewer, same) = found
    torch.testing.assert_close(reused, expected, rtol=1e-5, atol=1e-6)
    assert steps == same == (20 if every == 1 else 8)
    assert calls == steps
    # Under accumulation, rows are needed for losses of the whole group; the last has one batch.
    assert fewer == (6 if every > 1 and losses else 1)


@pytest.mark.parametrize("weight_heads", [False, True])
def test_reused_weights_with_a_task_missing(weight_heads: bool) -> None:
    expected, reused = (
        weights(fit(WithoutB(), Fixed(reuse, weight_heads), max_epochs=2))
        for reuse in (False, True)
    )
    torch.testing.assert_close(reused, expected, rtol=1e-5, atol=1e-6)
    balancer = Fixed(reuse=True, weight_heads=weight_heads)
    with pytest.warns(UserWarning, match="takes it for a zero loss"):
        fit(WithoutB(), balancer, accumulate_grad_batches=2, max_epochs=2)
    assert balancer.calls > 2  # from then on, means over what is there


def test_reused_weights_take_one_trunk_backward_pass() -> None:
    module = Balanced()
    passes = count_passes(module)
    fit(module, Fixed(reuse=True), size=20)
    assert len(passes) == 2 + 4  # five steps: two rows at first, then one pass each


class Observer(Callback):
    """Asks for the task gradients of every step, and keeps the records."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def wants_jacobian(self, trainer: Any, pl_module: Any) -> bool:
        return True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.records.append(pl_module.last_step)


def test_an_observer_gets_its_rows_also_when_weights_are_reused() -> None:
    plain = fit(Balanced(), Fixed(reuse=True))
    seen = fit(Balanced(), Fixed(reuse=True), Observer())
    torch.testing.assert_close(weights(seen), weights(plain), rtol=1e-5, atol=1e-6)
    assert seen.last_step.gramian.shape == (2, 2)
    assert plain.last_step.gramian is None
    assert plain.last_step.gradient_weights.tolist() == pytest.approx([0.3, 0.7])


# ------------------------------------------------------- last layer and representation


class AtLevel(GradientBalancer):
    """Min-norm that keeps what it saw."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.seen = gramian.clone()
        self.found = min_norm_weights(gramian)
        return self.found


def by_hand(level: str, batch: Any, omega: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Gramian at a level, min-norm weights of it, and the gradients they lead to."""
    net = Marked().net
    x, targets = batch
    z = net.trunk(x).tanh()
    losses = [
        nn.functional.mse_loss(net.heads[f"head_{t}"](z).squeeze(-1), targets[t]) for t in TASKS
    ]
    scales = omega(torch.stack(losses).detach())
    trunk = list(net.trunk.parameters())
    at = [z] if level == "representation" else trunk[-2:]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(s * loss, at, retain_graph=True)])
        for s, loss in zip(scales, losses, strict=True)
    ]
    gramian = torch.stack(rows) @ torch.stack(rows).T
    w = min_norm_weights(gramian)
    total = sum(w[i] * scales[i] * loss for i, loss in enumerate(losses))
    shared = torch.autograd.grad(total, trunk, retain_graph=True)
    heads = [
        torch.autograd.grad(s * loss, list(net.heads[f"head_{t}"].parameters()), retain_graph=True)
        for s, t, loss in zip(scales, TASKS, losses, strict=True)
    ]
    return {"gramian": gramian, "weights": w, "shared": shared, "heads": heads}


@pytest.mark.parametrize("losses", [[], [LogLoss]], ids=["", "LogLoss"])
@pytest.mark.parametrize("level", ["last_layer", "representation"])
def test_levels(level: Any, losses: list[Any]) -> None:
    data = loader(4)
    module, balancer = Marked(), AtLevel(gradients=level)
    passes = count_passes(module)
    trainer(callbacks=[balancer, *(b() for b in losses)]).fit(module, data)
    omega = (lambda values: 1 / values) if losses else torch.ones_like
    expected = by_hand(level, next(iter(data)), omega)
    gramian, w = expected["gramian"], expected["weights"]
    torch.testing.assert_close(balancer.seen.to(gramian), gramian, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(balancer.found.to(w), w, rtol=1e-4, atol=0)
    for p, grad in zip(module.net.trunk.parameters(), expected["shared"], strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
    for task, grads in zip(TASKS, expected["heads"], strict=True):
        head = module.net.heads[f"head_{task}"]
        for p, grad in zip(head.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
    # One pass through the whole trunk, or, for the last layer, one more a task through its end.
    assert len(passes) == 1
    scales = omega(module.last_step.losses)
    raw = gramian / torch.outer(scales, scales)
    torch.testing.assert_close(module.last_step.gramian.to(raw), raw, rtol=1e-3, atol=1e-7)


def test_levels_differ_from_all_parameters() -> None:
    found = [
        weights(fit(Marked(), AtLevel(gradients=level)))
        for level in ("parameters", "last_layer", "representation")
    ]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[1], found[2])


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
@pytest.mark.parametrize("level", ["last_layer", "representation"])
def test_levels_with_observer_absent_tasks_and_one_task(level: Any) -> None:
    class Missing(Marked):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = dict(super().task_losses(batch, batch_idx))
            return losses if batch_idx % 2 == 0 else {"b": losses["b"]}

    observer = Observer()
    plain = fit(Missing(), AtLevel(gradients=level))
    watched = fit(Missing(), AtLevel(gradients=level), observer)
    torch.testing.assert_close(weights(watched), weights(plain))
    assert [record.tasks for record in observer.records[:3]] == [("a", "b"), ("b",), ("a", "b")]
    assert all(record.alignment.isfinite().all() for record in observer.records)
    # With one task there is nothing to weigh: plain training.
    alone = fit(Marked(tasks=("a",)), AtLevel(gradients=level))
    torch.testing.assert_close(weights(alone), weights(fit(Marked(tasks=("a",)))))


@pytest.mark.parametrize("level", ["last_layer", "representation"])
def test_levels_refuse_accumulation(level: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=1.*found 2"):
        fit(Marked(), AtLevel(gradients=level), accumulate_grad_batches=2)


def test_representation_has_to_be_marked_once() -> None:
    class Twice(Marked):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.shared_representation(self.net.trunk(x))
            return super().forward(x)

    for model, number in ((Balanced, 0), (Twice, 2)):
        module = model()
        before = weights(module)
        with pytest.raises(ValueError, match=rf"found {number}\. Write `z = self.shared_repr"):
            fit(module, AtLevel(gradients="representation"))
        assert torch.equal(weights(module), before)


def test_representation_has_to_carry_every_path() -> None:
    class Past(Balanced):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.shared_representation(self.net.trunk[0](x).tanh())
            z = self.net.trunk[3](z).tanh()
            return {name[5:]: head(z).squeeze(-1) for name, head in self.net.heads.items()}

    with pytest.raises(
        ValueError, match=r"reach \['net.trunk.3.bias', 'net.trunk.3.weight'\] past"
    ):
        fit(Past(), AtLevel(gradients="representation"))


def test_last_shared_layer_can_be_named() -> None:
    class First(Balanced):
        def last_shared_layer(self) -> Any:
            return self.net.trunk[0].parameters()

    class Wrong(Balanced):
        def last_shared_layer(self) -> Any:
            return self.net.heads["head_a"].parameters()

    balancer = AtLevel(gradients="last_layer")
    fit(First(), balancer, size=4)
    assert sum(balancer.columns.sizes) == 8 * 4 + 8
    assert balancer.columns.names == ("net.trunk.0.weight", "net.trunk.0.bias")
    with pytest.raises(ValueError, match=r"`last_shared_layer\(\)` of Wrong to return shared"):
        fit(Wrong(), AtLevel(gradients="last_layer"))


def test_bad_gradients_in_the_trunk_never_reach_it() -> None:
    """Finite at the representation, not finite behind it."""

    class Root(Marked):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.net.trunk[0](x)
            z = self.shared_representation((hidden - hidden).abs().sqrt() @ torch.ones(8, 6))
            return {name[5:]: head(z).squeeze(-1) for name, head in self.net.heads.items()}

    module = Root()
    before = weights(module)
    with pytest.raises(ValueError, match="gradient of the summed"):
        fit(module, AtLevel(gradients="representation"))
    assert torch.equal(weights(module), before)


# ------------------------------------------------------------- several batches a step


class Batches(GradientBalancer):
    """The sum of the rows of the last batch; keeps what it got."""

    def __init__(self, batches: int = 2) -> None:
        super().__init__()
        self.batches = batches
        self.got: list[Tensor] = []

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        self.got.append(jacobian.clone())
        return jacobian[-1].sum(0)


class Keeps(Sum):
    """Equal weighting that keeps its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[Tensor] = []

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        self.got.append(jacobian.clone())
        return jacobian.sum(0)


@pytest.mark.parametrize("losses", [[], [LogLoss]], ids=["", "LogLoss"])
def test_batches_apart(losses: list[Any]) -> None:
    apart, rows = Batches(), Keeps()
    batches = list(loader(12))
    for balancer, data in ((apart, batches), (rows, None)):
        for part in [batches[:2]] if data else [[b] for b in batches[:2]]:
            module = Balanced()
            extra = [b() for b in losses] if data else []
            steps = {"accumulate_grad_batches": 2} if data else {}
            trainer(callbacks=[balancer, *extra], **steps).fit(module, Batched(part))
    expected = torch.stack(rows.got)
    if losses:
        values = torch.tensor(_losses(batches[:2]))
        expected = expected / values.mean(0)[:, None]
    torch.testing.assert_close(apart.got[0], expected, rtol=1e-5, atol=1e-7)


def _losses(batches: Any) -> list[list[float]]:
    module = Balanced()
    return [[v.item() for v in module.task_losses(b, 0).values()] for b in batches]


def test_a_short_last_group_gives_fewer_batches() -> None:
    balancer = Batches()
    module = fit(Balanced(), balancer, size=12, accumulate_grad_batches=2)
    assert [len(j) for j in balancer.got] == [2, 1]
    assert weights(module).isfinite().all()


def test_batches_need_accumulation_and_every_task() -> None:
    with pytest.raises(MisconfigurationException, match=r"=2` with Batches\(batches=2\) but f.* 1"):
        fit(Balanced(), Batches())
    with pytest.raises(ValueError, match=r"every task, .* in each micro-batch of Batches"):
        fit(WithoutB(), Batches(), accumulate_grad_batches=2)


# ---------------------------------------------------------------- one row a step


class InTurn(GradientBalancer):
    """One task's gradient a step."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("step", 0)
        self.got: list[Tensor] = []

    def wanted(self, present: int) -> list[int]:
        return [self.step % present]

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        self.got.append(jacobian.clone())
        return jacobian[self.step % len(jacobian)]

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        self.step += 1


def test_only_the_wanted_row_is_computed_and_all_heads() -> None:
    module, balancer = Balanced(), InTurn()
    passes = count_passes(module)
    fit(module, balancer, size=20)
    assert len(passes) == 5
    for step, jacobian in enumerate(balancer.got):
        assert jacobian[step % 2].abs().sum() > 0
        assert jacobian[1 - step % 2].abs().sum() == 0
    assert all(p.grad.abs().sum() > 0 for p in module.net.heads.parameters())
