"""Ways of making one training step of a network: what people do, and what we do."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from networks import Model, Network
from torch import Tensor
from torch.utils.data import DataLoader
from torchjd import aggregation as jd
from torchjd import autogram, autojac

import lightning_mtl as mtl
from lightning_mtl.gradient_balancers.min_norm import min_norm_weights

Time = Callable[[int], float]  # seconds of a step, from so many

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def optimizer(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)


# --------------------------------------------------------------------- loops in plain PyTorch


def loop(model: Model, backward: Callable[[Network, list[Tensor]], None]) -> Time:
    """A loop of ``backward``, which fills ``.grad`` from a batch, and step."""
    network, batch = model.network(), model.batch()
    steps = optimizer(network)

    def timed(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            steps.zero_grad()
            backward(network, batch)
            steps.step()
        return (time.perf_counter() - start) / number

    timed(2)
    return timed


def total(network: Network, batch: list[Tensor]) -> Tensor:
    return torch.stack(list(network.losses(batch).values())).sum()


def plain(model: Model) -> Time:
    """One backward pass of the sum: what all others are multiples of."""
    return loop(model, lambda network, batch: total(network, batch).backward())


def forward(model: Model) -> Time:
    """The forward pass alone, for the limit."""
    network, batch = model.network(), model.batch()

    def timed(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            total(network, batch)
        return (time.perf_counter() - start) / number

    timed(2)
    return timed


def textbook(model: Model) -> Time:
    """The loop of most published code: a backward pass a task, copies, a stack, min-norm weights."""

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
        weights = min_norm_weights(jacobian @ jacobian.T)
        direction, offset = weights @ jacobian, 0
        for p in shared:
            p.grad = direction[offset : offset + p.numel()].view_as(p).clone()
            offset += p.numel()

    return loop(model, backward)


def torchjd(model: Model, aggregator: str, engine: str) -> Time:
    """TorchJD in a plain loop: its engine of Jacobians or its engine of Gramians."""
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
        return torch.stack(list(self.net.losses(batch).values())).sum()

    def configure_optimizers(self) -> Any:
        return optimizer(self)


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
    """Time of the steps after the first few."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if args[-1] == self.warm_up - 1:
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def fit(
    model: Model, callbacks: Callable[[], list[Any]] | None, warm_up: int = 2, **options: Any
) -> Time:
    """``Trainer.fit``: plain Lightning with ``callbacks=None``, else MultiTaskModule."""
    network, batch = model.network(), model.batch()

    def timed(number: int) -> float:
        clock = Clock(warm_up)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=[clock, *(callbacks() if callbacks else [])],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Plain(network) if callbacks is None else Balanced(network, **options)
        trainer.fit(module, DataLoader([batch] * (number + warm_up), None))
        return clock.seconds / number

    return timed
