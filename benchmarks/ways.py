"""Ways of making one training step of a network: what people do, and what we do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from networks import Model, Network
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_mtl as mtl
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.gradient_balancers.min_norm import min_norm_weights

Time = Callable[[int], float]  # seconds of a step, from so many
Way = Callable[[Model], Time]

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def optimizer(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)


def now(model: Model) -> float:
    """The time, when the device has done what it was told."""
    if model.device != "cpu":
        torch.cuda.synchronize()
    return model.clock()


# --------------------------------------------------------------------- loops in plain PyTorch


def repeat(model: Model, step: Callable[[], Any]) -> Time:
    """Time of ``step``, which two calls have warmed up."""

    def timed(number: int) -> float:
        start = now(model)
        for _ in range(number):
            step()
        return (now(model) - start) / number

    timed(2)
    return timed


def loop(model: Model, backward: Callable[[Network, list[Tensor]], None]) -> Time:
    """A loop of ``backward``, which fills ``.grad`` from a batch, and step."""
    network, batch = model.network(), model.batch()
    steps = optimizer(network)

    def step() -> None:
        steps.zero_grad()
        backward(network, batch)
        steps.step()

    return repeat(model, step)


def total(network: Network, batch: list[Tensor]) -> Tensor:
    return torch.stack(list(network.losses(batch).values())).sum()


def plain(model: Model) -> Time:
    """One backward pass of the sum: what all others are multiples of."""
    return loop(model, lambda network, batch: total(network, batch).backward())


def forward(model: Model) -> Time:
    """The forward pass alone, for the limit."""
    return repeat(model, partial(total, model.network(), model.batch()))


def spread(direction: Tensor, shared: list[torch.nn.Parameter]) -> None:
    """Copy a flat direction to the ``.grad`` of the shared parameters."""
    parts = direction.split([p.numel() for p in shared])
    for p, part in zip(shared, parts, strict=True):
        p.grad = part.view_as(p).to(p.dtype, copy=True)


def textbook(model: Model) -> Time:
    """Most published code: a backward pass a task, copies, a stack, and here min-norm weights."""

    def backward(network: Network, batch: list[Tensor]) -> None:
        losses = list(network.losses(batch).values())
        shared = list(network.trunk.parameters())
        rows = []
        for i, loss in enumerate(losses):
            loss.backward(retain_graph=i < len(losses) - 1)
            rows.append(torch.cat([p.grad.flatten() for p in shared]))
            for p in shared:
                p.grad = None
        jacobian = torch.stack(rows)
        spread(min_norm_weights(jacobian @ jacobian.T) @ jacobian, shared)

    return loop(model, backward)


def batched(model: Model) -> Time:
    """One backward pass of all tasks at once (``is_grads_batched``) instead of one a task."""

    def backward(network: Network, batch: list[Tensor]) -> None:
        losses = torch.stack(list(network.losses(batch).values()))
        shared, heads = list(network.trunk.parameters()), list(network.heads.parameters())
        each = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        grads = torch.autograd.grad(losses, shared, each, retain_graph=True, is_grads_batched=True)
        for p, grad in zip(heads, torch.autograd.grad(losses.sum(), heads), strict=True):
            p.grad = grad
        jacobian = torch.cat([grad.flatten(1) for grad in grads], dim=1)
        spread(min_norm_weights(jacobian @ jacobian.T) @ jacobian, shared)

    return loop(model, backward)


def ours(model: Model) -> Time:
    """What MultiTaskModule does with MinNorm, without Lightning around it."""
    made: list[TaskGradients] = []
    tasks = list(range(model.tasks))

    def backward(network: Network, batch: list[Tensor]) -> None:
        losses = list(network.losses(batch).values())
        if not made:
            made.append(TaskGradients(dict(network.named_parameters()), len(tasks)))
            made[0].discover(TaskLosses(tasks=tasks, values=losses, counts=[1.0] * len(tasks)))
        gradients = made[0]
        gradients.begin()
        for t, loss in enumerate(losses):
            gradients.add(t, loss, retain_graph=t < tasks[-1])
        jacobian = gradients.finish()
        direction = gradients.combine(min_norm_weights(jacobian @ jacobian.T))
        gradients.write_shared(direction, every_column=False)
        gradients.write_heads(None)

    return loop(model, backward)


def torchjd(model: Model, aggregator: str, engine: str) -> Time:
    """TorchJD in a plain loop: its engine of Jacobians or its engine of Gramians."""
    from torchjd import aggregation as jd
    from torchjd import autogram, autojac

    aggregate = getattr(jd, aggregator)()
    weigh = getattr(jd, f"{aggregator}Weighting")()

    def jacobians(network: Network, batch: list[Tensor]) -> None:
        marked: list[Tensor] = []
        losses = network.losses(batch, lambda z: marked.append(z) or z)
        shared = list(network.trunk.parameters())
        heads = [list(head.parameters()) for head in network.heads.values()]
        autojac.mtl_backward(
            list(losses.values()), features=marked, tasks_params=heads, shared_params=shared
        )
        autojac.jac_to_grad(shared, aggregate)

    made: list[autogram.Engine] = []

    def gramians(network: Network, batch: list[Tensor]) -> None:
        if not made:
            made.append(autogram.Engine(network.trunk, batch_dim=None))
        values = torch.stack(list(network.losses(batch).values()))
        values.backward(weigh(made[0].compute_gramian(values)))

    return loop(model, {"autojac": jacobians, "autogram": gramians}[engine])


# -------------------------------------------------------------------------- Trainer.fit


class Plain(LightningModule):
    """Automatic optimisation of the summed loss."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.net = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return total(self.net, batch)

    def configure_optimizers(self) -> Any:
        return optimizer(self)


class Jacobians(Plain):
    """TorchJD in Lightning, as its documentation says: manual optimisation, min-norm weights."""

    def __init__(self, network: Network) -> None:
        from torchjd import aggregation as jd

        super().__init__(network)
        self.automatic_optimization = False
        self.aggregate = jd.MGDA()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        from torchjd import autojac

        marked: list[Tensor] = []
        losses = self.net.losses(batch, lambda z: marked.append(z) or z)
        steps: Any = self.optimizers()
        steps.zero_grad()
        autojac.mtl_backward(list(losses.values()), features=marked)
        autojac.jac_to_grad(list(self.net.trunk.parameters()), self.aggregate)
        steps.step()


class Balanced(mtl.MultiTaskModule):
    """The same network under MultiTaskModule."""

    def __init__(self, network: Network, **options: Any) -> None:
        super().__init__(list(network.heads), **options)
        self.net = network

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.net.losses(batch, self.shared_representation)

    def configure_optimizers(self) -> Any:
        return optimizer(self)


class Clock(Callback):
    """Time of the batches after the first few; calls ``started`` when those are over."""

    def __init__(self, model: Model, warm_up: int, started: Callable[[], Any]) -> None:
        self.model = model
        self.warm_up = warm_up
        self.started = started

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if args[-1] == self.warm_up - 1:
            self.started()
            self.start = now(self.model)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.seconds = now(self.model) - self.start


def fit(
    model: Model,
    callbacks: Callable[[], list[Any]] | None,
    *,
    plain: type[Plain] = Plain,
    accumulate: int = 1,
    started: Callable[[], Any] = lambda: None,
    **options: Any,
) -> Time:
    """``Trainer.fit``: ``plain`` with ``callbacks=None``, else MultiTaskModule."""
    network, batch = model.network(), model.batch()
    warm_up = 2 * accumulate

    def timed(number: int) -> float:
        clock = Clock(model, warm_up, started)
        trainer = Trainer(
            accelerator=model.device,
            devices=1,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            callbacks=[clock, *(callbacks() if callbacks else [])],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = plain(network) if callbacks is None else Balanced(network, **options)
        trainer.fit(module, DataLoader([batch] * (number * accumulate + warm_up), None))
        return clock.seconds / number

    return timed


def balanced(balancer: str, **options: Any) -> Way:
    """``Trainer.fit`` with one of our balancers."""
    return partial(fit, callbacks=lambda: [getattr(mtl, balancer)()], **options)


PLAIN, LIMIT, LIGHTNING, MINNORM = "plain PyTorch", "limit", "plain Lightning", "MinNorm"

TORCHJD = find_spec("torchjd") is not None  # compared with where it is installed

LOOPS: dict[str, Way] = {
    PLAIN: plain,
    "textbook loop": textbook,
    **{
        f"TorchJD {aggregator}, {engine}": partial(torchjd, aggregator=aggregator, engine=engine)
        for aggregator in ("Mean", "MGDA")
        for engine in ("autojac", "autogram")
        if TORCHJD
    },
    "batched backward": batched,
    "our engine, MinNorm": ours,
}
FITS: dict[str, Way] = {
    LIGHTNING: partial(fit, callbacks=None),
    **(
        {"Lightning, TorchJD MGDA": partial(fit, callbacks=None, plain=Jacobians)}
        if TORCHJD
        else {}
    ),
    "MultiTaskModule, no balancer": partial(fit, callbacks=list),
    f"MultiTaskModule, {MINNORM}": balanced(MINNORM),
}
