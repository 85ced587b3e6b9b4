"""A task that takes no part in the gradient stage: by wish, or for want of a way to the trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_mtl import LogLoss, MinNorm, MultiTaskModule, Task
from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.engine.group import Group
from tests.common.methods import METHODS
from tests.common.models import (
    Balanced,
    Network,
    Samples,
    loader,
    resume_from,
    sgd,
    trainer,
    weights,
)
from tests.trainer.test_resume import SavedLoader

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
THREE = ("a", "b", "d")
NAMED = ("preference", "minimum", "MetaBalance(shrink)")  # rows of the table with other task names


class Critic(MultiTaskModule):
    """`d` looks at what the trunk says and trains its head only."""

    def __init__(self, tasks: Any = THREE, detach: bool = True, **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        torch.manual_seed(1)
        self.net, self.detach = Network(THREE), detach

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        z = self.shared_representation(self.net.trunk(x).tanh())
        found = {}
        for name in self.training_tasks or THREE:
            seen = z.detach() if name == "d" and self.detach else z
            output = self.net.heads[f"head_{name}"](seen).squeeze(-1)
            found[name] = nn.functional.mse_loss(output, targets[name])
        return found


class Absent(Critic):
    """The task is gone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(active_tasks=["a", "b"], **kwargs)


def fit(module: Any, *balancers: Any, **flags: Any) -> Any:
    run = trainer(callbacks=list(balancers), **flags)
    run.fit(module, loader(tasks=THREE))
    return module


def of(module: Any, part: str) -> Tensor:
    found = [p.detach().flatten() for n, p in module.named_parameters() if part in n]
    return torch.cat(found)


gradient = [
    m
    for m in METHODS
    if isinstance(m.make(), GradientBalancer) and not any(word in m.name for word in NAMED)
]


@pytest.mark.parametrize("method", gradient, ids=[m.name for m in gradient])
def test_the_others_train_as_if_it_were_not_there(method: Any) -> None:
    module, alone = (
        fit(kind(), method.make(), limit_train_batches=6, **method.flags)
        for kind in (Critic, Absent)
    )
    if "SAMO" not in method.name:  # which moves the shared parameters for each task, three or two
        torch.testing.assert_close(of(module, "trunk"), of(alone, "trunk"), rtol=0, atol=1e-5)
    record = module.last_step
    if record.gradient_weights is not None:
        assert record.gradient_weights[2] == 1
    assert not torch.equal(of(module, "head_d"), of(alone, "head_d"))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("balancer", [MinNorm, lambda: MinNorm(gradients="last_layer")])
def test_a_head_that_looks_on_does_not_stop_the_trunk(balancer: Any, every: int) -> None:
    method = balancer()
    if every > 1 and method.gradients != "parameters":
        pytest.skip("a level")
    module = fit(Critic(), method, accumulate_grad_batches=every)
    assert module._flow.state_dict()["outside"] == [2]
    assert float(module.last_step.gradient_weights[:2].max()) > 0
    assert not torch.equal(of(module, "trunk"), of(Critic(), "trunk"))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("memory", ["full", "blocks"])
def test_a_task_that_stays_out_by_wish_is_added_as_it_is(
    declared: bool, every: int, memory: Any
) -> None:
    if every > 1 and memory == "blocks":
        pytest.skip("refused")
    tasks: Any = THREE
    kwargs: Any = {"unbalanced_tasks": ["d"]}
    if declared:
        kwargs = {}
        tasks = {t: Task(nn.MSELoss(), balance=t != "d") for t in THREE}
    module = fit(
        Critic(tasks, detach=False, gradient_memory=memory, **kwargs),
        MinNorm(),
        accumulate_grad_batches=every,
    )
    assert module.last_step.gradient_weights[2] == 1

    class ByHand(GradientBalancer):
        """Weights of two rows, and a third row as it is."""

        def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
            two = MinNorm().weights(gramian[:2, :2], losses[:2])
            return torch.cat([two, two.new_ones(1)])

    hand = fit(Critic(detach=False), ByHand(), accumulate_grad_batches=every)
    torch.testing.assert_close(weights(module), weights(hand), rtol=0, atol=1e-6)


def test_loss_weights_apply_to_it() -> None:
    module = fit(Critic(), LogLoss(), MinNorm())
    record = module.last_step
    torch.testing.assert_close(record.loss_weights.float(), 1 / record.losses)


def test_a_zero_gradient_by_value_is_still_warned_about() -> None:
    class Zero(Critic):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            z = self.net.trunk(batch[0]).sum()
            return {**losses, "d": losses["d"] + 0 * z}

    with pytest.warns(
        UserWarning, match=r"gradient of \['d'\] is exactly zero.*`unbalanced_tasks`"
    ):
        module = fit(Zero(), MinNorm())
    assert module._flow.state_dict()["outside"] == []


def test_a_task_that_reaches_the_trunk_later_is_balanced_from_then_on() -> None:
    class Later(Critic):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            self.detach = batch_idx < 5
            return super().task_losses(batch, batch_idx)

    module = Later()
    seen = []
    module.on_train_batch_end = lambda *_: seen.append(module.last_step.gradient_weights[2].item())
    fit(module, MinNorm())
    assert seen[:5] == [1.0] * 5
    assert all(weight != 1 for weight in seen[5:])


def test_a_checkpoint_keeps_it_out(tmp_path: Any) -> None:
    class Three(SavedLoader):
        def __init__(self) -> None:
            super().__init__()
            self.data = Samples(40, THREE)

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    whole, later = Critic(), Critic()
    trainer(callbacks=[MinNorm(), saving], enable_checkpointing=True).fit(whole, Three())
    trainer(callbacks=[MinNorm()]).fit(later, Three(), **resume_from(tmp_path / "step=5.ckpt"))
    assert torch.equal(weights(later), weights(whole))
    assert later.last_step.gradient_weights[2] == 1


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`unbalanced_tasks` names the unknown task \['e'\]"):
        Critic(unbalanced_tasks=["e"])
    with pytest.raises(ValueError, match=r"`unbalanced_tasks` names the unknown task \['e'\]"):
        fit(Critic(None, unbalanced_tasks=["e"]), MinNorm())
    module = Balanced(unbalanced_tasks=["b"])
    assert module.unbalanced_tasks == {"b"}
    trainer(callbacks=[MinNorm()]).fit(module, loader())  # one is left: it trains as it is
    assert module.last_step.gradient_weights.tolist() == [1.0, 1.0]


def test_the_group_says_who_is_balanced() -> None:
    group = Group(False, [None] * 3, [1.0, 0.0, 2.0], outside={2})
    assert group.balanced() == [0]
    assert Balanced().unbalanced_tasks == frozenset()
