"""Cases at the edge of Lightning and autograd, each compared with plain Lightning or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_mtl import (
    BadLossError,
    DualBalance,
    GradientBalancer,
    LogLoss,
    LossBalancer,
    MinNorm,
    MultiTaskModule,
    Task,
)
from lightning_mtl.engine.gradients.host import all_finite
from tests.common.models import Balanced, Plain, Sum, loader, resume_from, sgd, trainer, weights
from tests.engine.test_flow import Linear, Watcher, one_step
from tests.trainer.test_resume import SavedLoader


def fit_both(
    make: Any, data: Any = None, callbacks: Any = lambda: [Sum()], **flags: Any
) -> tuple[Any, Any]:
    """The same change of the network under plain Lightning and under ours, with rows."""
    modules = make(Plain), make(Balanced)
    for module, extra in zip(modules, ([], callbacks()), strict=True):
        trainer(callbacks=extra, **flags).fit(module, data or loader(), loader(16))
    return modules


@pytest.mark.parametrize("expanded", [False, True], ids=["one tensor for two", "stride 0"])
def test_head_gradients_are_tensors_of_their_own(expanded: bool) -> None:
    """Autograd hands out one tensor twice, or an expanded one; clipping works in place."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first, self.second = (nn.Parameter(torch.randn(6)) for _ in range(2))

        def forward(self, z: Tensor) -> Tensor:
            if expanded:
                return z @ self.first + self.first.sum() + self.second.sum()
            return z @ (self.first + self.second)

    def make(base: Any) -> Any:
        module = base()
        module.net.heads["head_a"] = Head()
        module.net.forward = lambda x: {
            name[5:]: head(module.net.trunk(x)).reshape(len(x))
            for name, head in module.net.heads.items()
        }
        return module

    plain, ours = fit_both(make, gradient_clip_val=0.1)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)


class Steep(Balanced):
    """A finite loss with an endless gradient, from the third batch on."""

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = dict(super().task_losses(batch, batch_idx))
        if batch_idx == 2:
            parameter = next(self.net.parameters())
            losses["a"] = losses["a"] + (parameter.sum() - parameter.sum()).sqrt()
        return losses


@pytest.mark.parametrize("balancers", [list, lambda: [LogLoss()]], ids=["none", "LogLoss"])
def test_the_gradient_of_a_sum_is_checked(balancers: Any) -> None:
    module = Steep()
    message = r"step 3 but the gradient of the summed losses of \['a', 'b'\] is not"
    with pytest.raises(BadLossError, match=message):
        trainer(callbacks=balancers()).fit(module, loader(), loader(16))
    assert weights(module).isfinite().all()

    skipping = Steep(on_bad_loss="skip_task")
    run = trainer(callbacks=balancers())
    with pytest.warns(UserWarning, match="A loss or a gradient of optimiser step 3 cannot be used"):
        run.fit(skipping, loader(), loader(16))
    assert run.global_step == 19
    assert weights(skipping).isfinite().all()


def test_all_finite_looks_at_every_dense_real_tensor() -> None:
    good = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(2).bfloat16()]
    other = [torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()]
    assert all_finite([])
    assert all_finite(good + other)
    for tensor in good:
        tensor[-1] = torch.inf
        assert not all_finite(good + other)
        tensor[-1] = 1.0


class Endless(LossBalancer):
    def loss_weights(self, losses: Tensor) -> Tensor:
        return losses / 0


class TooMany(GradientBalancer):
    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        return torch.ones(len(losses), 1)


@pytest.mark.parametrize(
    ("balancers", "message"),
    [
        ([Endless()], r"finite weights from Endless but got \[inf, inf\] for \['a', 'b'\]"),
        ([Endless(), MinNorm()], r"finite weights from Endless but got \[inf, inf\]"),
        ([TooMany()], r"TooMany to return one weight for each of \['a', 'b'\], shape \(2,\)"),
    ],
)
def test_weights_are_checked(balancers: list[Callback], message: str) -> None:
    module = Balanced()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=balancers).fit(module, loader(), loader(16))
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(Balanced):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = x.requires_grad_()
            z = checkpoint(self.net.trunk, x, use_reentrant=reentrant).tanh()
            return {name[5:]: head(z).squeeze(-1) for name, head in self.net.heads.items()}

    module, plain = Checkpointed(), Plain()
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            trainer(callbacks=[MinNorm()]).fit(module, loader())
        return
    trainer().fit(plain, loader(), loader(16))
    trainer(callbacks=[Sum()]).fit(module, loader())
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


THREE = ("a", "b", "c")


def with_block(base: Any) -> Any:
    """Tasks a and b share a block that c does not reach."""
    module = base(lambda m: torch.optim.AdamW(m.net.parameters(), lr=0.01), THREE)
    torch.manual_seed(5)
    module.net.block = nn.Linear(6, 6)

    def forward(x: Tensor) -> dict[str, Tensor]:
        z = module.net.trunk(x).tanh()
        inputs = {"a": module.net.block(z), "b": module.net.block(z), "c": z}
        return {t: module.net.heads[f"head_{t}"](inputs[t]).squeeze(-1) for t in THREE}

    module.net.forward = forward
    return module


def sometimes(missing: Any, size: int = 40) -> DataLoader:
    """Batches from which tasks are missing, by batch index."""
    batches = []
    for i, (x, targets) in enumerate(loader(size, tasks=THREE)):
        batches.append((x, {t: y for t, y in targets.items() if t not in missing(i)}))
    return DataLoader(batches, batch_size=None)


class PlainSometimes(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        predictions = self.net(x)
        return sum(nn.functional.mse_loss(predictions[t], y) for t, y in targets.items())


@pytest.mark.parametrize("callbacks", [lambda: [Sum()], lambda: [Watcher()]])
def test_what_no_task_reaches_is_not_stepped(callbacks: Any) -> None:
    """Adam moves a parameter whose gradient is zero, and leaves one alone that has none."""
    data = sometimes(lambda i: ("a", "b") if i % 2 else ())
    plain, ours = with_block(PlainSometimes), with_block(Balanced)
    trainer().fit(plain, data, loader(16, tasks=THREE))
    trainer(callbacks=callbacks()).fit(ours, data, loader(16, tasks=THREE))
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=2e-6)


def test_a_layout_found_without_a_task_is_not_kept() -> None:
    class FromSecond(Watcher):
        def wants_jacobian(self, run: Any, module: Any) -> bool:
            return run.global_step > 0

    module = with_block(Balanced)
    data = sometimes(lambda i: ("b",) if i == 1 else ())
    trainer(callbacks=[FromSecond()]).fit(module, data, loader(16, tasks=THREE))
    assert "net.block.weight" in module._flow.state_dict()["shared"]


def test_a_gradient_balancer_on_a_checkpoint_without_one_finds_what_is_shared(
    tmp_path: Path,
) -> None:
    run = trainer()
    run.fit(with_block(Balanced), sometimes(lambda i: ()), loader(16, tasks=THREE))
    run.save_checkpoint(tmp_path / "equal.ckpt")
    later = trainer(callbacks=[MinNorm()], max_epochs=2)
    without_b = sometimes(lambda i: ("b",))
    module = with_block(Balanced)
    later.fit(module, without_b, **resume_from(tmp_path / "equal.ckpt"))
    assert module._flow.state_dict()["met"][1] is False
    assert len(module.last_step.gradient_weights) == 2


def test_an_observer_finds_heads_of_a_compiled_network() -> None:
    class Compiled(Balanced):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            if not hasattr(self, "_compiled"):
                # In a list: it is the same network, not a second one to register.
                self._compiled = [torch.compile(self.net, backend="aot_eager")]
            return self._compiled[0](x)

    module = Compiled()
    trainer(callbacks=[Watcher()]).fit(module, loader(), loader(16))
    assert all("trunk" in name for name in module._flow.state_dict()["shared"])


def by_step(module: Any) -> Any:
    optimizer = sgd(module.net.parameters())
    return [optimizer], [lrs.ExponentialLR(optimizer, 0.5)]


def test_an_epoch_that_a_hook_skips() -> None:
    """Schedulers go on, and micro-batches of the epoch before do not leak into the next."""

    def make(base: Any) -> Any:
        class Skipping(base):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
                return -1 if self.current_epoch == 1 and batch_idx == 4 else None

        return Skipping(by_step)

    for every in (1, 3):
        plain, ours = fit_both(make, max_epochs=4, accumulate_grad_batches=every)
        torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)


def test_names_of_the_first_batch_are_in_the_checkpoint(tmp_path: Path) -> None:
    class Undeclared(Linear):
        def __init__(self, backwards: bool) -> None:
            super().__init__([2.0, 0.5], [[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0]])
            self._declared, self.backwards, self.lr = None, backwards, 0.01

        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = list(super().task_losses(batch, batch_idx).items())
            return dict(reversed(losses) if self.backwards else losses)

    ends = []
    for backwards in (False, True):
        module, run = Undeclared(False), trainer(callbacks=[DualBalance()])
        run.fit(module, DataLoader(range(1)))
        run.save_checkpoint(tmp_path / "first.ckpt")
        resumed = Undeclared(backwards)
        later = trainer(callbacks=[DualBalance()], max_epochs=2)
        later.fit(resumed, DataLoader(range(1)), **resume_from(tmp_path / "first.ckpt"))
        assert resumed.task_names == ("t0", "t1")
        ends.append(resumed.theta.detach())
    assert torch.equal(*ends)


def test_several_validation_loaders_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"one val loader.*override `validation_step`"):
        trainer().validate(Balanced(), [loader(8), loader(8)], verbose=False)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": nn.MSELoss()}, "task 'a' to be a Task but got MSELoss. Wrap its loss"),
        (dict.fromkeys("ab", Task(nn.MSELoss())), r"a Task of its own for each of \['a', 'b'\]"),
    ],
)
def test_tasks_are_tasks(tasks: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MultiTaskModule(tasks)


def test_parameters_of_no_optimizer_do_not_count() -> None:
    module = Balanced(lambda m: sgd([*m.net.trunk[3].parameters(), *m.net.heads.parameters()]))
    trainer(callbacks=[MinNorm()]).fit(module, loader(), loader(16))
    assert module._flow.state_dict()["shared"] == ["net.trunk.3.weight", "net.trunk.3.bias"]


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), "many"])
def test_label_counts_are_numbers(count: Any) -> None:
    class Counting(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = dict(super().task_losses(batch, batch_idx))
            return {**losses, "b": (losses["b"], count)}

    with pytest.raises(ValueError, match=r"loss of task 'b' as a scalar or as \(mean, number of"):
        trainer().fit(Counting(), loader())


def test_training_losses_can_be_watched() -> None:
    stopping = EarlyStopping("train/loss/a", check_on_train_epoch_end=True, patience=10)
    run = trainer(callbacks=[stopping], max_epochs=2)
    run.fit(Balanced(), loader(), loader(16))
    assert float(run.callback_metrics["train/loss/a"]) > 0


def test_a_checkpoint_after_validation_keeps_the_layout(tmp_path: Path) -> None:
    module, run = Balanced(), trainer(callbacks=[MinNorm()])
    run.fit(module, loader(), loader(16))
    run.validate(module, loader(16), verbose=False)
    run.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]["TrainerFlags"]
    assert len(saved["flow"]["shared"]) == 4
    assert "rng" in saved


def test_another_module_under_the_same_trainer() -> None:
    run = trainer()
    run.fit(Balanced(by_step), loader(), loader(16))
    alone, after = Plain(), Plain()
    trainer().fit(alone, loader(), loader(16))
    run.fit_loop.epoch_progress.reset()
    run.fit(after, loader(), loader(16))
    assert torch.equal(weights(after), weights(alone))


class Mixin:
    def configure_callbacks(self) -> list[Callback]:
        return [ModelCheckpoint(every_n_epochs=100)]


def test_a_mixin_may_bring_callbacks(tmp_path: Path) -> None:
    class Mixed(Mixin, Balanced):
        pass

    module, plain = Mixed(), Plain()
    flags = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    trainer(tmp_path, enable_checkpointing=True, **flags).fit(module, loader(), loader(16))
    trainer(**flags).fit(plain, loader(), loader(16))
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


def test_active_tasks_stay_during_a_fit() -> None:
    class Changing(Balanced):
        def on_train_epoch_start(self) -> None:
            self.active_tasks = ["a"]

    with pytest.raises(RuntimeError, match="Set it before `fit`"):
        trainer().fit(Changing(), loader(), loader(16))


def test_resume_when_the_schedule_asks_for_the_number_of_steps(tmp_path: Path) -> None:
    """Lightning then sets up the loaders before it has read where they were."""

    def configure(module: Any) -> Any:
        optimizer = sgd(module.net.parameters())
        steps = int(module.trainer.estimated_stepping_batches)
        scheduler = lrs.OneCycleLR(optimizer, 0.02, total_steps=steps, cycle_momentum=False)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def fit(resume: Path | None = None) -> Any:
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = Balanced(configure)
        run = trainer(callbacks=[MinNorm(), keep], max_epochs=3, enable_checkpointing=True)
        run.fit(module, SavedLoader(), **(resume_from(resume) if resume else {}))
        return module

    whole = fit()
    for step in (7, 20):
        assert torch.equal(weights(fit(tmp_path / f"step={step}.ckpt")), weights(whole)), step


def test_one_step_is_not_kept_alive() -> None:
    module = one_step(Linear([2.0, 0.5], [[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0]]), MinNorm())
    record = module.last_step
    for value in (record.losses, record.loss_weights, record.gradient_weights, record.gramian):
        assert not value.requires_grad
