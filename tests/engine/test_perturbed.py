"""Task gradients at perturbed parameters: SAMO in a real fit, against the algorithm by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mtl import LogLoss, MinNorm, TaskTensioner
from lightning_mtl.gradient_balancers.samo import SAMO
from tests.common.faulty import parameters, same
from tests.common.models import Balanced, Batched, Sum, loader, resume_from, sgd, trainer, weights
from tests.common.ranks import result, run_cases
from tests.engine.test_again import Normed
from tests.engine.test_forms import Observer
from tests.ranks import samo_cases
from tests.trainer.test_resume import SavedLoader

TASKS = ("a", "b", "c")
LOCALS = ("estimate", "gradient")
RHO, BETA, RADIUS, SEED = 0.3, 0.4, 0.02, 7
each_local = pytest.mark.parametrize("local", LOCALS)


def samo(local: Any = "gradient", base: Any = None, **kwargs: Any) -> SAMO:
    return SAMO(
        base, **{"rho": RHO, "beta": BETA, "radius": RADIUS, "seed": SEED, **kwargs}, local=local
    )


def fit(module: Any, *callbacks: Any, data: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    run = trainer(callbacks=list(callbacks), **kwargs)
    run.fit(module, loader(12) if data is None else data)
    return run


def still(module: Any) -> Any:
    """An optimizer that moves nothing."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


# --------------------------------------------------------------------------- against hand


def unit(vector: Tensor) -> Tensor:
    length = vector.square().sum().sqrt()
    return vector / length if length > 0 else vector


class ByHand:
    """SAMO as the paper orders it: parameters in dicts, displaced copies, no library."""

    def __init__(self, local: str, logs: bool, base: str) -> None:
        self.net = Balanced(tasks=TASKS).net.double()
        self.local, self.logs, self.base = local, logs, base
        self.trunk = {n: p for n, p in self.net.named_parameters() if n.startswith("trunk")}
        self.generator = torch.Generator().manual_seed(SEED)

    def own(self, task: str) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.net.named_parameters() if f"head_{task}." in n}

    def loss(self, task: str, batch: Any, moved: dict[str, Tensor] | None = None) -> Tensor:
        predictions = functional_call(self.net, moved or {}, (batch[0],))
        return (predictions[task] - batch[1][task]).square().mean()

    def gradient(self, task: str, batch: Any, at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: value.detach().clone().requires_grad_() for n, value in at.items()}
        loss = self.loss(task, batch, leaves)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def step(self, batch: Any, tasks: list[str]) -> None:
        size = sum(p.numel() for p in self.trunk.values())
        probes = RADIUS * torch.randn(len(tasks), size, generator=self.generator)
        here = {t: self.gradient(t, batch, {**self.trunk, **self.own(t)}) for t in tasks}
        average = {n: sum(here[t][n] for t in tasks) / len(tasks) for n in self.trunk}
        rows, values = [], []
        for t, probe in zip(tasks, probes.double(), strict=True):
            own = here[t]
            if self.local == "estimate":
                parts = probe.split([p.numel() for p in self.trunk.values()])
                z = {
                    n: part.view_as(self.trunk[n])
                    for n, part in zip(self.trunk, parts, strict=True)
                }
                up = self.loss(t, batch, {n: p + z[n] for n, p in self.trunk.items()})
                down = self.loss(t, batch, {n: p - z[n] for n, p in self.trunk.items()})
                own = {n: (up - down).detach() * z[n] for n in z}
            mix = {
                n: (1 - BETA) * g + BETA * g.square().sum().sqrt() * unit(own[n])
                for n, g in average.items()
            }
            length = sum(m.square().sum() for m in mix.values()) ** 0.5
            there = {n: p + RHO * mix[n] / length for n, p in self.trunk.items()}
            # A head's gradient of the mean loss is the one of its task over the number of tasks.
            head = unit(torch.cat([here[t][n].flatten() for n in self.own(t)]))
            for n, p in self.own(t).items():
                there[n] = p + RHO * head[: p.numel()].view_as(p)
                head = head[p.numel() :]
            values.append(self.loss(t, batch).item())
            rows.append(self.gradient(t, batch, there))
        self.combine(tasks, rows, values)

    def combine(self, tasks: list[str], rows: list[dict[str, Tensor]], values: list[float]) -> None:
        omega = [1 / v if self.logs else 1.0 for v in values]
        flat = [
            w * torch.cat([row[n].flatten() for n in self.trunk])
            for w, row in zip(omega, rows, strict=True)
        ]
        direction = torch.stack(flat).sum(0)
        if self.base == "two":  # the shortest combination of two rows
            first, second = flat
            share = ((second - first) @ second / (first - second).square().sum()).clamp(0, 1)
            direction = share * first + (1 - share) * second
        for p in self.net.parameters():
            p.grad = None
        for p in self.trunk.values():
            p.grad, direction = direction[: p.numel()].view_as(p), direction[p.numel() :]
        for t, w, row in zip(tasks, omega, rows, strict=True):
            for n, p in self.own(t).items():
                p.grad = w * row[n]


class Missing(Balanced):
    """Some tasks are absent from some batches; the first has all. Counts, where asked for."""

    present = (TASKS, ("a", "c"), ("b", "c"))

    def __init__(self, counted: bool, pairs: bool, **kwargs: Any) -> None:
        super().__init__(tasks=TASKS, **kwargs)
        self.counted, self.pairs = counted, pairs

    def shared_parameters(self) -> Any:
        return self.net.trunk.parameters() if self.pairs else None

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        tasks = self.tasks_of(batch_idx)
        return {t: (v, 3) if self.counted else v for t, v in losses.items() if t in tasks}

    def tasks_of(self, batch_idx: int) -> tuple[str, ...]:
        return self.present[batch_idx][-2:] if self.pairs else self.present[batch_idx]


@pytest.mark.parametrize("base", ["", "two"])
@pytest.mark.parametrize("logs", [False, True], ids=["", "LogLoss"])
@each_local
def test_three_steps_are_those_of_the_algorithm_by_hand(local: str, logs: bool, base: str) -> None:
    data = list(loader(12, tasks=TASKS))
    module = Missing(counted=logs, pairs=base == "two")
    hand = ByHand(local, logs, base)
    optimizer = sgd(hand.net.parameters())
    for batch, idx in zip(data, range(3), strict=True):
        double = batch[0].double(), {t: y.double() for t, y in batch[1].items()}
        hand.step(double, list(module.tasks_of(idx)))
        optimizer.step()
    balancer = samo(local, MinNorm() if base else None)
    callbacks = [balancer, LogLoss(eps=0.0)] if logs else [balancer]
    fit(module, *callbacks, data=Batched(data), precision="64-true")
    for (name, p), q in zip(module.net.named_parameters(), hand.net.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-8, atol=1e-10, msg=name)
    plain = Missing(counted=False, pairs=base == "two")
    fit(plain, *callbacks[1:], MinNorm() if base else Sum(), data=Batched(data))
    assert (weights(plain) - weights(module)).abs().max() > 1e-3


def test_the_balancer_of_another_one_learns_and_the_record_is_of_the_perturbed_rows() -> None:
    """The Gramian that monitors see is the one that gave the weights."""

    class Keeps(MinNorm):
        def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
            self.seen = gramian.clone()
            return super().weights(gramian, losses)

    kept, module = Keeps(), Balanced()
    balancer = samo(base=kept)
    fit(module, balancer, Observer())
    torch.testing.assert_close(module.last_step.gramian, kept.seen)
    assert module.last_step.gradient_weights.sum().item() == pytest.approx(1.0)
    assert balancer.columns.sizes == kept.columns.sizes == (32, 8, 48, 6)
    tensioner = samo(base=TaskTensioner(window=1))
    assert tensioner.requires_positive_losses
    fit(Balanced(), tensioner)
    assert tensioner.base.norms.shape == (2, 2)


@each_local
def test_a_resumed_run_draws_the_same(tmp_path: Path, local: str) -> None:
    found = []
    for resume in (False, True):
        module, keep = (
            Balanced(),
            ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        )
        run = trainer(callbacks=[samo(local), keep], enable_checkpointing=True)
        run.fit(
            module, SavedLoader(24), **(resume_from(tmp_path / "step=2.ckpt") if resume else {})
        )
        found.append(weights(module))
    assert torch.equal(*found)


# ------------------------------------------------------------------------------ as if unseen


class Watched(Normed):
    """Notes the modes of its calls; a buffer that is replaced, and a layer that evaluates."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("mean", torch.zeros(()))
        self.modes: list[tuple[bool, bool]] = []

    def on_train_epoch_start(self) -> None:
        self.net.heads.eval()

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append((self.training, self.net.heads.training))
        self.mean = 0.9 * self.mean + batch[0].mean()
        return super().task_losses(batch, batch_idx)


@each_local
def test_buffers_metrics_log_random_state_and_modes_stay(tmp_path: Any, local: str) -> None:
    found = []
    for balancer in (Sum(), samo(local)):
        module = Watched(configure=still)
        logger = CSVLogger(tmp_path / type(balancer).__name__)
        run = fit(module, balancer, logger=logger, log_every_n_steps=1)
        log = next(Path(logger.save_dir).rglob("metrics.csv")).read_text()
        found.append((module, run, torch.get_rng_state(), log))
    (plain, run, random, log), (module, other, same_random, same_log) = found
    before, after = parameters(plain), parameters(module)
    assert same(after, before)
    buffers = dict(plain.named_buffers())
    assert buffers["mean"] != 0
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(random, same_random)
    assert module.seen.compute() == plain.seen.compute()
    assert module.seen._update_count == plain.seen._update_count == 3
    assert run.callback_metrics == other.callback_metrics
    assert log == same_log
    step = [(True, False)] + [(False, False)] * 4 * (local == "estimate") + [(True, False)] * 2
    assert module.modes == step * 3
    assert module.training
    assert module.norm.training
    assert not any(m.training for m in module.net.heads.modules())


def test_the_same_dropout_masks() -> None:
    """A perturbation of nearly nothing leaves plain task gradients, dropout included."""
    plain, module = Normed(), Normed()
    fit(plain, Sum(), precision="64-true")
    fit(module, samo(rho=1e-12), precision="64-true")
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-9)


class Learns(MinNorm):
    """Learns from steps, for which no losses after the step are needed."""

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        assert after is None


@each_local
def test_forward_and_backward_passes(local: str) -> None:
    module, forward, backward = Normed(), [], []
    module.net.trunk[0].register_forward_hook(lambda *_: forward.append(1))
    module.net.trunk[3].register_full_backward_hook(lambda *_: backward.append(1))
    fit(module, samo(local, Learns()), data=loader(4))
    assert len(forward) == (1 + 2 + 4 if local == "estimate" else 1 + 2)
    assert len(backward) == (1 + 2 if local == "estimate" else 2 + 2)


@pytest.mark.parametrize(
    ("call", "local"), [(c, "estimate") for c in range(1, 7)] + [(c, "gradient") for c in (1, 2)]
)
def test_an_exception_leaves_the_parameters_as_they_were(call: int, local: str) -> None:
    class Breaks(Watched):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            if len(self.modes) == call:
                moved.append(not same(parameters(self), before))
                raise KeyError("stop")
            return super().task_losses(batch, batch_idx)

    module, moved = Breaks(), []
    before = parameters(module)
    with pytest.raises(KeyError, match="stop"):
        fit(module, samo(local), data=loader(4))
    assert moved == [True]
    assert same(parameters(module), before)
    assert module.training
    assert not module.net.heads.training
    assert "log" not in vars(module)


# ---------------------------------------------------------------------------------- ranks


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    run_cases(tmp_path, samo_cases.CASES, "tests.ranks.samo_cases:run")
    for number, case in enumerate(samo_cases.CASES):
        first, second = (result(tmp_path, number, rank) for rank in (0, 1))
        assert torch.equal(first, second), case
        alone = samo_cases.run(case, 0, 1)
        torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5, msg=case)
        assert (alone - samo_cases.run(case, 0, 1, rho=1e-6)).abs().max() > 1e-2
