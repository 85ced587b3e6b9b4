"""Whatever an optimizer holds is trained: outside the module too, and frozen or not at any step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_mtl import (
    SAMO,
    DualBalance,
    Every,
    MinNorm,
    MultiTaskModule,
)
from tests.common.faulty import batches, fitted, parameters, same
from tests.common.models import Balanced, Plain, Sum, loader, resume_from, sgd, trainer


class Outside(MultiTaskModule):
    """A criterion of one task and a layer in a list, which the module does not hold."""

    def __init__(self, inside: bool = False, **kwargs: Any) -> None:
        super().__init__(tasks=("a", "b"), **kwargs)
        torch.manual_seed(1)
        self.trunk, self.heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
        self.layers = [nn.Linear(6, 6), nn.Linear(6, 6)]  # shared, and of task "b"
        if inside:
            self.held = nn.ModuleList(self.layers)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        z = self.layers[0](self.trunk(x).tanh()).tanh()
        z = self.shared_representation(z)
        found = [self.heads[0](z), self.heads[1](self.layers[1](z))]
        return {
            t: (f.squeeze(-1) - y).square().mean()
            for f, (t, y) in zip(found, targets.items(), strict=True)
        }

    def configure_optimizers(self) -> Any:
        own = [*self.trunk.parameters(), *self.heads.parameters()]
        return sgd([*own, *(p for layer in self.layers for p in layer.parameters())])

    def all(self) -> list[Tensor]:
        modules = [self.trunk, self.heads, *self.layers]
        return [p.detach().clone() for m in modules for p in m.parameters()]


FORMS: dict[str, Any] = {
    "no balancer": (lambda: None, {}),
    "rows": (MinNorm, {}),
    "direction": (DualBalance, {}),
    "perturbed": (lambda: SAMO(seed=1), {}),
    "blocks": (MinNorm, {"gradient_memory": "blocks"}),
    "representation": (lambda: MinNorm(gradients="representation"), {}),
    "reuse": (lambda: Every(3, MinNorm()), {}),
}
ACCUMULATED = ("no balancer", "rows", "direction", "reuse")


@pytest.mark.parametrize(
    ("form", "every"), [*((form, 1) for form in FORMS), *((form, 2) for form in ACCUMULATED)]
)
def test_outside_the_module_as_inside(form: str, every: int) -> None:
    make, options = FORMS[form]
    runs = []
    for inside in (False, True):
        module, balancer = Outside(inside, **options), make()
        callbacks = [balancer] if balancer is not None else []
        fitted(module, batches(8), callbacks, accumulate_grad_batches=every)
        runs.append(module.all())
    for found, expected, start in zip(*runs, Outside().all(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, start)


def test_the_last_layer_is_one_of_the_module() -> None:
    module = Outside()
    fitted(module, batches(2), [MinNorm(gradients="last_layer")])
    assert all(not torch.equal(p, q) for p, q in zip(module.all(), Outside().all(), strict=True))


def test_forward_mode_needs_them_inside() -> None:
    module = Outside()
    with pytest.raises(ValueError, match=r"but 2 of them are held by an optimizer alone, out"):
        fitted(module, batches(2), [MinNorm(gradients="representation+1")])
    assert same(module.all(), Outside().all())


@pytest.mark.filterwarnings("ignore:Resuming with a training loader that cannot save")
def test_a_checkpoint_knows_them_by_number(tmp_path: Path) -> None:
    run = trainer(callbacks=[DualBalance()])
    run.fit(Outside(), loader(8))
    run.save_checkpoint(tmp_path / "run.ckpt")
    layout = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]["TrainerFlags"]
    assert layout["flow"]["shared"][-2:] == [f"parameter {i} of optimizer 0" for i in (6, 7)]
    run = trainer(callbacks=[DualBalance()], max_epochs=2)
    run.fit(Outside(), loader(8), **resume_from(tmp_path / "run.ckpt"))
    assert run.global_step == 4


# ------------------------------------------------------------------- frozen or unfrozen in an epoch


class Flip(Callback):
    """Freezes or unfreezes a layer at step 2, in one of the hooks of a batch."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def flip(self, run: Any, module: Any) -> None:
        if run.global_step == 2:
            layer = module.net.trunk[0]
            layer.requires_grad_(not module.frozen)

    def on_train_batch_start(self, run: Any, module: Any, *args: Any) -> None:
        if self.hook == "on_train_batch_start":
            self.flip(run, module)

    def on_before_zero_grad(self, run: Any, module: Any, *args: Any) -> None:
        if self.hook == "on_before_zero_grad":
            self.flip(run, module)

    def on_before_backward(self, run: Any, module: Any, *args: Any) -> None:
        if self.hook == "on_before_backward":
            self.flip(run, module)

    def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
        if self.hook == "on_train_batch_end":
            self.flip(run, module)


class Frozen(Balanced):
    def __init__(self, frozen: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frozen = not frozen  # what it becomes
        self.net.trunk[0].requires_grad_(not frozen)


HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_train_batch_end")


@pytest.mark.parametrize(
    ("hook", "form", "every"),
    [
        *((hook, "rows", 1) for hook in HOOKS),
        ("on_train_batch_start", "rows", 2),
        ("on_before_backward", "direction", 2),
        *(("on_train_batch_start", form, 1) for form in ("direction", "perturbed", "blocks")),
        ("on_train_batch_end", "reuse", 1),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_refused_at_any_step_and_hook(hook: str, form: str, every: int, frozen: bool) -> None:
    make, options = FORMS[form]
    module = Frozen(frozen, **options)
    run = trainer(callbacks=[make(), Flip(hook)], accumulate_grad_batches=every)
    message = (
        r"^Expected the trainable parameters of the first step but \['net.trunk.0.bias', "
        r"'net.trunk.0.weight'\] were frozen or unfrozen since. .*freeze before `fit`"
    )
    with pytest.raises(ValueError, match=message):
        run.fit(module, loader(80))
    assert run.global_step == 2
    reference = Frozen(frozen, **options)
    fitted(reference, loader(80), [make()], accumulate_grad_batches=every, max_steps=2)
    assert same(parameters(module), parameters(reference))


class Looks(Callback):
    """Wants to see task gradients in every step."""

    def wants_jacobian(self, run: Any, module: Any) -> bool:
        return True


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("watched", [False, True])
def test_plain_without_a_balancer(watched: bool, frozen: bool, hook: str) -> None:
    """Who looks at task gradients is told of the layout of now."""
    module, plain = Frozen(frozen), Plain()
    plain.frozen = not frozen
    plain.net.trunk[0].requires_grad_(not frozen)
    fitted(module, loader(80), [Flip(hook), *([Looks()] if watched else [])])
    run = trainer(callbacks=[Flip(hook)])
    run.fit(plain, loader(80))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), p, rtol=1e-5, atol=1e-6)


def test_parameters_added_in_an_epoch() -> None:
    class Adds(Callback):
        def on_train_batch_start(self, run: Any, module: Any, *args: Any) -> None:
            if run.global_step == 2:
                run.optimizers[0].add_param_group({"params": [module.more]})

    class More(Balanced):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Parameter(torch.ones(()))

        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            return {t: loss * self.more for t, loss in losses.items()}

    with pytest.raises(ValueError, match=r"\['more'\] was frozen or unfrozen since"):
        fitted(More(), loader(80), [Sum(), Adds()])


def test_parameters_replaced_in_an_epoch() -> None:
    class Replaces(Callback):
        def on_train_batch_start(self, run: Any, module: Any, *args: Any) -> None:
            if run.global_step == 2:
                module.net.trunk[0] = nn.Linear(4, 8)
                run.optimizers[0].add_param_group({"params": module.net.trunk[0].parameters()})

    with pytest.raises(
        ValueError,
        match=r"were frozen or unfrozen since, or replaced\. .*before `fit`, where layers",
    ):
        fitted(Balanced(), loader(80), [Sum(), Replaces()])


# -------------------------------------------------------------------------- gradients that are kept


class Keep(Callback):
    """Gradients by reference and by value, in two hooks."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_after_backward(self, run: Any, module: Any) -> None:
        self.keep(module)

    def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
        self.keep(module)

    def keep(self, module: Any) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        self.kept.append([(g.detach(), g.clone()) for g in grads])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_may_be_kept(form: str) -> None:
    make, options = FORMS[form]
    balancer, keep = make(), Keep()
    callbacks = [balancer, keep] if balancer is not None else [keep]
    fitted(Outside(True, **options), batches(5), callbacks)
    assert len(keep.kept) == 10
    assert all(torch.equal(kept, then) for step in keep.kept for kept, then in step)
    first = [step[0][1] for step in keep.kept[1::2]]
    assert all(not torch.equal(a, b) for a, b in pairwise(first))
