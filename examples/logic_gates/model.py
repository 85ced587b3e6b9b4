"""Two neurons that AND and XOR share, and what the paper compares, for the ordinary Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from examples.logic_gates.data import GATES
from lightning_mtl import GradientBalancer, MinNorm, MultiTaskModule, Task

INITIAL = 136  # the seed of the initial weights, which are the same in every run
ALMOST = 0.999  # the largest weight that the authors' solver gives to a task


class Network(nn.Module):
    """A shared layer of two sigmoids and one linear unit a gate.

    Args:
        gates: which gates there are; the weights of a single one are drawn as if it were alone.
    """

    def __init__(self, gates: Sequence[str] = GATES) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(INITIAL)
            self.encoder = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
            self.heads = nn.ModuleDict({gate: nn.Linear(2, 1) for gate in gates})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        code = self.encoder(inputs)
        return {gate: head(code) for gate, head in self.heads.items()}


class LogicGates(MultiTaskModule):
    """AND and XOR from two shared neurons, by squared error.

    Args:
        lr: learning rate of SGD (the paper's best, 0.05).
        momentum: of SGD.
        gates: which gates are trained.
        baseline: single-task results for Δp, as in :class:`~lightning_mtl.MultiTaskModule`.
    """

    def __init__(
        self,
        lr: float = 0.05,
        momentum: float = 0.9,
        gates: Sequence[str] = GATES,
        baseline: str | None = None,
    ) -> None:
        super().__init__(
            {gate: Task(nn.MSELoss(), MeanSquaredError()) for gate in gates}, baseline=baseline
        )
        self.save_hyperparameters()
        self.network = Network(gates)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return self.network(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams.lr, self.hparams.momentum)


class Uniform(GradientBalancer):
    """The paper's uniform weighting: the mean of the task gradients, heads left plain."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        return torch.full_like(losses, 1 / len(losses))


class ClampedMinNorm(MinNorm):
    """Min-norm of two tasks as the authors' solver has it: never the whole weight to one task.

    Where the shortest vector is one of the two gradients, exact weights are 1 and 0. They stop the
    other task altogether, and with targets times 10 XOR then is not learned.
    """

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        return clamped(super().weights(gramian, losses))


def clamped(weights: Tensor) -> Tensor:
    """Weights of two tasks, shape ``(..., 2)``, with 0.999 and 0.001 for exactly 1 and 0."""
    weights = torch.where(weights == 1, ALMOST, weights)
    return torch.where(weights == 0, 1 - ALMOST, weights)


class Convergence(Callback):
    """Stop as the paper's code does, and tell in which epoch each task was learned.

    A task is learned in the first epoch whose mean loss is below ``0.002`` times the number of
    tasks: the code adds the losses of both batches, divides by four times the number of tasks, and
    compares with ``1e-3``.

    Attributes:
        epochs: the epoch by task, counted from zero; ``None`` where it was not learned.
    """

    def __init__(self) -> None:
        self.epochs: dict[str, int | None] = {}
        self.sums: dict[str, list[float]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: MultiTaskModule) -> None:
        self.epochs = dict.fromkeys(pl_module.training_tasks)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: MultiTaskModule) -> None:
        self.sums = {task: [] for task in self.epochs}

    def on_train_batch_end(self, trainer: Trainer, pl_module: MultiTaskModule, *args: Any) -> None:
        for task, loss in zip(self.epochs, pl_module.last_step.losses.tolist(), strict=True):
            self.sums[task].append(loss)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: MultiTaskModule) -> None:
        for task, losses in self.sums.items():
            if self.epochs[task] is None and learned(sum(losses) / len(losses), len(self.sums)):
                self.epochs[task] = trainer.current_epoch
        trainer.should_stop = None not in self.epochs.values()


def learned(mean: Any, tasks: int) -> Any:
    """Whether an epoch with this mean loss counts as learned, for a number or a tensor."""
    return mean < 0.002 * tasks
