"""Checkpoints, balancer states and frozen parameters of another run: refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning

from lightning_mtl import DualBalance, LogLoss, MinNorm, TaskTensioner
from tests.common.faulty import batches, fitted, parameters, same, state
from tests.common.models import Balanced, Plain, loader, resume_from, sgd, trainer

SHARED = ["net.trunk.0.weight", "net.trunk.0.bias"]
THREE = ("a", "b", "c")


restarts = pytest.mark.filterwarnings("ignore:Resuming with a training loader that cannot save")


class First(Balanced):
    """Only the first layer is balanced."""

    def shared_parameters(self) -> Any:
        return self.net.trunk[0].parameters()


class Frozen(Balanced):
    """The first layer does not train; the optimizer knows it all the same."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net.trunk[0].requires_grad_(False)


def saved(folder: Path, module: Any, balancers: list[Any]) -> Path:
    run = trainer(callbacks=balancers)
    run.fit(module, batches())
    run.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


# --------------------------------------------------------------------------------- resuming a run


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
@pytest.mark.parametrize("balancer", [None, LogLoss, MinNorm, DualBalance])
@pytest.mark.parametrize(
    "other",
    [{"tasks": ("a", "c")}, {"tasks": ("b", "a")}, {"tasks": THREE}, {"active_tasks": ["a"]}],
    ids=["renamed", "reordered", "one more", "one active"],
)
def test_checkpoint_of_other_tasks(tmp_path: Path, other: dict[str, Any], balancer: Any) -> None:
    path = saved(tmp_path, Balanced(), [balancer()] if balancer else [])
    content = path.read_bytes()
    module, balancers = Balanced(**other), [balancer()] if balancer else []
    before = parameters(module)
    tasks = str(list(module.training_tasks)).replace("[", r"\[").replace("]", r"\]")
    message = (
        rf"^Expected a checkpoint of the tasks {tasks} but this one was trained on \['a', 'b'\]. "
        rf"Resume with the same tasks in the same order; to start from its weights only, use `load_"
    )
    run = trainer(callbacks=balancers, max_epochs=2)
    with pytest.raises(ValueError, match=message):
        run.fit(module, batches(), **resume_from(path))
    assert same(parameters(module), before)
    assert same([b.state_dict() for b in balancers], [balancer().state_dict()] if balancer else [])
    assert run.global_step == 0
    assert path.read_bytes() == content
    fitted(module, batches(tasks=module.task_names), balancers)  # a fit of its own goes well


def test_checkpoint_of_other_tasks_is_no_matter_to_validation(tmp_path: Path) -> None:
    path = saved(tmp_path, Balanced(), [MinNorm()])
    module = Balanced(active_tasks=["a"])
    run = trainer(callbacks=[MinNorm()])
    run.validate(module, loader(8), verbose=False, **resume_from(path))
    assert set(run.callback_metrics) == {"val/loss/a", "val/a/MeanSquaredError"}


OTHER_SHARED = [
    (Balanced, First, r"4 shared parameters of the checkpoint but .* returns 2; they differ in"),
    (First, Balanced, None),  # nothing is said here, so the checkpoint's are meant
    (
        Balanced,
        Frozen,
        r"trainable parameters .* in Frozen but \['net.trunk.0.bias', .* are missing",
    ),
    (
        Frozen,
        Balanced,
        r"trainable parameters .* in Balanced but \['net.trunk.0.bias', .* unfrozen",
    ),
]


@restarts
@pytest.mark.parametrize("balancer", [MinNorm, DualBalance])
@pytest.mark.parametrize(("before", "now", "message"), OTHER_SHARED)
def test_checkpoint_with_other_shared_parameters(
    tmp_path: Path, before: type, now: type, message: str | None, balancer: Any
) -> None:
    path = saved(tmp_path, before(), [balancer()])
    run, module = trainer(callbacks=[balancer()], max_epochs=2), now()
    if message is None:
        run.fit(module, batches(), **resume_from(path))
        whole = fitted(before(), batches(), [balancer()], max_epochs=2)
        assert same(parameters(module), whole["parameters"])
        return
    with pytest.raises(ValueError, match=rf"^Expected the {message}.*`fit` without `ckpt_path`"):
        run.fit(module, batches(), **resume_from(path))
    assert run.global_step == 6
    checkpoint = torch.load(path, weights_only=True)
    assert same(parameters(module), dict(checkpoint["state_dict"]))
    assert same([o.state_dict() for o in run.optimizers], checkpoint["optimizer_states"])
    kept = state(run, module)["balancers"]
    assert same(kept, {balancer.__name__: checkpoint["callbacks"][balancer.__name__]})


@pytest.mark.parametrize(
    ("balancer", "message"),
    [
        (
            DualBalance,
            r"DualBalance expected its state `average` in shape \(3, 94\) but found \(2, 94\)",
        ),
        (TaskTensioner, r"TaskTensioner expected its state `\w+` in shape \(3,.* found \(2,"),
    ],
)
@pytest.mark.parametrize("absent", [False, True])
def test_balancer_with_the_state_of_another_model(
    balancer: Any, message: str, absent: bool
) -> None:
    class Sparse(Balanced):
        def shared_parameters(self) -> Any:
            return self.net.trunk.parameters()

        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            return {task: loss for task, loss in losses.items() if task != "b" or not absent}

    balancer = balancer()
    trainer(callbacks=[balancer]).fit(Balanced(), batches())
    kept = balancer.state_dict()
    module = Sparse(tasks=THREE)
    run = trainer(callbacks=[balancer])
    with pytest.raises(ValueError, match=rf"^{message}.*other tasks or .*call `reset\(\)`"):
        run.fit(module, batches(tasks=THREE))
    assert same(parameters(module), parameters(Balanced(tasks=THREE)))
    assert not any(optimizer.state for optimizer in run.optimizers)
    assert same(balancer.state_dict(), kept)
    balancer.reset()  # the cure
    assert fitted(module, batches(tasks=THREE), [balancer])["steps"] == 6


# ---------------------------------------------------------------- frozen or unfrozen between epochs


class Unfreeze(Callback):
    """At the start of the second epoch."""

    def on_train_epoch_start(self, run: Any, module: Any) -> None:
        layer = module.net.trunk[0]
        if run.current_epoch == 1:
            layer.requires_grad_(not layer.weight.requires_grad)


class Finetune(BaseFinetuning):
    """Lightning's own way."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.net.trunk[0])

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.trunk[0], optimizer)


def trains(module: Any) -> Any:
    """An optimizer without the frozen parameters, as finetuning callbacks ask for."""
    return sgd([p for p in module.parameters() if p.requires_grad])


class InModule(Balanced):
    """The hook of the module itself, which runs after those of all callbacks."""

    def on_train_epoch_start(self) -> None:
        Unfreeze().on_train_epoch_start(self.trainer, self)


@pytest.mark.parametrize(
    ("make", "callback"),
    [(Balanced, Unfreeze), (Frozen, Unfreeze), (InModule, None), (Balanced, Finetune)],
)
def test_frozen_or_unfrozen_between_epochs(make: type[Balanced], callback: Any) -> None:
    configure = trains if callback is Finetune else None
    module = make(configure=configure)
    callbacks = [callback()] if callback else []
    message = (
        r"^Expected the trainable parameters of the first step but \['net.trunk.0.bias', "
        r"'net.trunk.0.weight'\] were frozen or unfrozen since, or replaced\. .*freeze before "
        r"`fit`, where layers are replaced too, and unfreeze in a new `fit`"
    )
    run = trainer(callbacks=[MinNorm(), *callbacks], max_epochs=3)
    with pytest.raises(ValueError, match=message):
        run.fit(module, batches())
    assert run.global_step == 6
    reference = make(configure=configure)
    fitted(reference, batches(), [MinNorm(), *([callback()] if callback else [])], max_epochs=1)
    assert same(parameters(module), parameters(reference))


@pytest.mark.parametrize("balancer", [None, LogLoss])
def test_unfreezing_is_fine_without_a_gradient_balancer(balancer: Any) -> None:
    module = Frozen()
    fitted(module, batches(), [Unfreeze(), *([balancer()] if balancer else [])], max_epochs=2)
    assert not same(parameters(module)[SHARED[0]], parameters(Frozen())[SHARED[0]])
    if balancer is None:
        plain = Plain()
        plain.net.trunk[0].requires_grad_(False)
        fitted(plain, batches(), [Unfreeze()], max_epochs=2)
        for name, p in plain.named_parameters():
            torch.testing.assert_close(module.get_parameter(name), p, rtol=0, atol=1e-6)
