"""A fit that makes no optimiser step ends, and says what it saw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_mtl import MinNorm
from tests.common.models import Balanced, Plain, loader, resume_from, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:A loss or a gradient of optimiser step")


class Only(Balanced):
    """``losses(all of them, batch_idx)`` is what comes out."""

    def __init__(self, losses: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spoil = losses

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        return self.spoil(super().task_losses(batch, batch_idx), batch_idx)


def nothing(losses: Any, batch_idx: int) -> Any:
    return {}


def all_none(losses: Any, batch_idx: int) -> Any:
    return dict.fromkeys(losses)


def bad(losses: Any, batch_idx: int) -> Any:
    return {name: loss * math.nan for name, loss in losses.items()}


def half_bad(losses: Any, batch_idx: int) -> Any:
    return {**losses, "b": losses["b"] * math.inf}


def steep(losses: Any, batch_idx: int) -> Any:
    return {k: v + (v - v.detach()).sqrt() for k, v in losses.items()}


NO_LOSS = r"none was made after step 0: of the last 100 batches 100 returned no loss"


@pytest.mark.parametrize("balancers", [list, lambda: [MinNorm()]], ids=["none", "MinNorm"])
@pytest.mark.parametrize(
    ("spoil", "rule", "message"),
    [
        (nothing, "raise", NO_LOSS),
        (all_none, "ignore", NO_LOSS),
        (bad, "skip_step", r"'skip_step'` asks, of {'a': 100, 'b': 100} .batches by task.\. `on_b"),
        (bad, "skip_task", r"'skip_task'` asks, of {'a': 100, 'b': 100}"),
        (half_bad, "skip_step", r"'skip_step'` asks, of {'b': 100}"),
        (steep, "skip_task", r"'skip_task'` asks, of {'a': 100, 'b': 100}"),
    ],
)
def test_endless_fit_without_steps(spoil: Any, rule: Any, message: str, balancers: Any) -> None:
    module = Only(spoil, on_bad_loss=rule)
    before = weights(module)
    run = trainer(max_epochs=-1, max_steps=10, callbacks=balancers())
    with pytest.raises(RuntimeError, match=message):
        run.fit(module, loader())
    assert run.fit_loop.total_batch_idx == 99
    assert torch.equal(weights(module), before)


def test_the_number_is_an_argument_and_counts_steps_that_are_due() -> None:
    run = trainer(max_epochs=-1, max_steps=10, accumulate_grad_batches=4)
    with pytest.raises(
        RuntimeError, match=r"in every 3 but none .* 12 batches 12 returned no loss"
    ):
        run.fit(Only(nothing, max_skipped_steps=3), loader())
    assert run.fit_loop.total_batch_idx == 11
    with pytest.raises(ValueError, match=r"`max_skipped_steps` of Only to be an integer of at le"):
        Only(nothing, max_skipped_steps=0)


def test_a_step_in_between_starts_the_count_afresh() -> None:
    module = Only(lambda losses, i: losses if i % 5 == 4 else {}, max_skipped_steps=5)
    run = trainer()
    run.fit(module, loader())
    assert run.global_step == 4
    module = Only(
        lambda losses, i: losses if i < 2 else {} if i < 5 else bad(losses, i),
        max_skipped_steps=4,
        on_bad_loss="skip_step",
    )
    with pytest.raises(RuntimeError, match="after step 2: of the last 4 batches 3 returned no los"):
        trainer().fit(module, loader())


@pytest.mark.parametrize("balancers", [list, lambda: [MinNorm()]], ids=["none", "MinNorm"])
def test_a_fit_that_ends_without_a_step(balancers: Any) -> None:
    run = trainer(max_epochs=3, limit_train_batches=5, callbacks=balancers())
    with pytest.raises(RuntimeError, match=r"made no optimiser step: of the last 15 batches 15 re"):
        run.fit(Only(nothing), loader())


class Skips(Balanced):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1  # Lightning leaves the epoch


def test_what_lightning_leaves_out_by_wish_is_no_fault(tmp_path: Any) -> None:
    trainer(max_epochs=3).fit(Skips(max_skipped_steps=1), loader())
    trainer(limit_train_batches=0).fit(Balanced(), loader())
    # One that was resumed where nothing is left to do.
    first = trainer(limit_train_batches=4)
    first.fit(Balanced(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    later = trainer(limit_train_batches=4, max_epochs=2)
    later.fit(Only(nothing), loader(), **resume_from(tmp_path / "a.ckpt"))
    assert later.global_step == 4


class Scaled(MixedPrecision):
    """A gradient scaler on the CPU; autocast to bfloat16, since half is slow there."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", **kwargs))

    def autocast_context_manager(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("balancers", [list, lambda: [MinNorm()]], ids=["none", "MinNorm"])
def test_a_scaler_may_look_for_its_scale_but_not_for_ever(balancers: Any) -> None:
    big = 2.0**127  # times the losses: over float32 while the scale is above some powers of two

    def run(module: Any, scale: float, **flags: Any) -> Trainer:
        plugin = Scaled(init_scale=scale)
        found = trainer(plugins=[plugin], callbacks=balancers(), **flags)
        found.fit(module, loader())
        return found

    searching = Only(
        lambda losses, i: {k: v * 1e20 for k, v in losses.items()}, max_skipped_steps=2
    )
    searching.configure = lambda m: torch.optim.SGD(m.parameters(), lr=1e-30)
    assert run(searching, 2.0**66).global_step == 20
    hopeless = Only(lambda losses, i: {k: v * big * 4 for k, v in losses.items()})
    hopeless.on_bad_loss = "ignore"
    with pytest.raises(RuntimeError, match=r"overflowed in half precision at a loss scale below 1"):
        run(hopeless, 2.0, max_epochs=-1, max_steps=500)


# ------------------------------------------------------------- manual optimisation that was left in


class Lightnings(Balanced):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(sum(losses.values()))
        self.optimizers().step()
        return losses


class Bare(Balanced):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        sum(losses.values()).backward()
        self.optimizers(use_pl_optimizer=False).step()
        return {}


class Wrapped(Balanced):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        sum(losses.values()).backward()
        self.optimizers().step()
        return losses


@pytest.mark.parametrize("balancers", [list, lambda: [MinNorm()]], ids=["none", "MinNorm"])
@pytest.mark.parametrize("kind", [Lightnings, Bare, Wrapped])
def test_own_steps_in_task_losses(kind: Any, balancers: Any) -> None:
    module = kind()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"losses only but it calls .*Return {task"):
        trainer(callbacks=balancers()).fit(module, loader())
    assert torch.equal(weights(module), before)
    optimizer = module.optimizers(use_pl_optimizer=False)
    optimizer.step()  # afterwards it is anybody's


def test_reading_the_optimizer_in_task_losses_is_fine() -> None:
    def weighted(losses: Any, batch_idx: int) -> Any:
        lr = module.optimizers().param_groups[0]["lr"]
        return {name: loss * (lr / 0.01) for name, loss in losses.items()}

    module = Only(weighted)
    run = trainer()
    run.fit(module, loader())
    assert run.global_step == 20


# ------------------------------------------------------------------------- what callbacks are told


class Outputs(Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])


@pytest.mark.parametrize("every", [1, 3])
def test_outputs_are_those_of_plain_lightning(every: int) -> None:
    plain, ours = Outputs(), Outputs()
    trainer(callbacks=[plain], accumulate_grad_batches=every).fit(Plain(), loader(), loader(16))
    trainer(callbacks=[ours], accumulate_grad_batches=every).fit(Balanced(), loader(), loader(16))
    torch.testing.assert_close(torch.stack(ours.losses), torch.stack(plain.losses))
