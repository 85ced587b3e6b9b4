"""What all forms of a fit stand on: module, precision, layout and the two balancers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, LossBalancer
from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.gradients.layout import Layout
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.guards import Limit
from lightning_mtl.engine.record import StepRecord


class Setting:
    """What the forms of a fit share, and the one record of its last step.

    Args:
        module: whose losses are balanced.
        trainer: whose flags and precision apply.
        layout: which parameters are shared.
        loss_balancer: first stage.
        gradient_balancer: second stage, if there is one.
        limit: what a balancer asks of losses.
    """

    def __init__(
        self,
        module: TaskModule,
        trainer: Trainer,
        layout: Layout,
        loss_balancer: LossBalancer,
        gradient_balancer: GradientBalancer | None,
        limit: Limit | None,
    ) -> None:
        self.module = module
        self.trainer = trainer
        self.layout = layout
        self.loss_balancer = loss_balancer
        self.gradient_balancer = gradient_balancer
        self.limit = limit
        # Asked once a fit: what a protocol holds takes Python ten microseconds to see.
        self.perturbs = gradient_balancer is not None and gradient_balancer.perturbs
        # An absent task then counts for zero, as when users add the losses up themselves.
        self.plain = loss_balancer.all_ones and gradient_balancer is None
        self.scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        self.hooks: set[str] = set()  # those of a backward pass that somebody listens to
        self.told: StepRecord | Callable[[], StepRecord] | None = None  # of the last step
        self.zero_gradient: set[str] = set()  # tasks of which that has been said
        self.told_of_repeats = False  # of backward passes, for want of places to cut the graph

    def gradients(self) -> TaskGradients:
        """Buffers for the task gradients."""
        return self.layout.gradients(self.trainer.optimizers)

    def rows_of(self, present: list[int]) -> tuple[tuple[str, ...], list[int] | None]:
        """Names of all tasks, and which of them are there; ``None`` for all."""
        tasks = self.module.training_tasks
        return tasks, None if len(present) == len(tasks) else present

    def outside(self) -> set[int]:
        """Tasks that take no part in the gradient stage: by wish, or for want of a path to it."""
        names, found = self.module.unbalanced_tasks, set(self.layout.outside)
        if names:
            found |= {t for t, name in enumerate(self.module.training_tasks) if name in names}
        return found

    @property
    def scale(self) -> float:
        """What losses are multiplied by, so that half-precision gradients do not vanish."""
        return float(self.scaler.get_scale()) if self.scaler is not None else 1.0

    def trained(self) -> list[Tensor]:
        """Every parameter of every optimizer."""
        groups = [group for o in self.trainer.optimizers for group in o.param_groups]
        return [p for group in groups for p in group["params"]]

    def record(self) -> StepRecord | None:
        """What the last optimiser step did; put together when somebody asks."""
        if callable(self.told):
            self.told = self.told()
        return self.told
