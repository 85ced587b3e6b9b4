"""What the engine and the trainer ask of a module: nothing below ``module.py`` imports that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mtl.numerics.storage import Memory
from lightning_mtl.task import Task

OnBadLoss = Literal["raise", "skip_task", "skip_step", "ignore"]

PACKAGES = (
    "`pytorch_lightning` and `lightning.pytorch` are different packages with the same names, and "
    "lightning_mtl works with `lightning`: import Trainer, LightningModule, callbacks and loggers "
    "from `lightning.pytorch`."
)


class Fit(Protocol):
    """The running fit, as a form of taking gradients sees it.

    Attributes:
        replaying: whether a forward pass is made again up to the representation.
    """

    replaying: bool


class Loop(Protocol):
    """Lightning's training loop, as the engine sees it: ``trainer/stepping.py``."""

    def listened(self) -> set[str]:
        """Which of the hooks that the engine calls itself reach somebody."""

    def zero_grad(self, batch_idx: int, hooks: set[str]) -> None:
        """Clear the gradients, with Lightning's hooks."""

    def step(self, batch_idx: int, closure: Callable[[Any], Callable[[], Tensor | None]]) -> bool:
        """Let every optimizer step; whether the step was taken."""

    def losses_due(self) -> bool:
        """Whether task losses are to be logged in this step."""

    def log_losses(self, names: Iterable[str], losses: Iterable[Tensor]) -> None:
        """Log task losses."""

    def check(self, balancer: Any) -> None:
        """Refuse a gradient balancer that cannot work with the flags of now."""


class TaskModule(LightningModule):
    """A module that returns a loss for each of its tasks; ``MultiTaskModule`` is the one there is.

    A base class and no ``Protocol``: what Lightning's own functions are given has to be a
    LightningModule for the type checker, and balancers can ask ``isinstance``.
    """

    if TYPE_CHECKING:  # TorchScript reads what stands in a class
        on_bad_loss: OnBadLoss
        gradient_memory: Memory
        gradient_blocks: int
        max_skipped_steps: int
        shard_gradients: bool
        names_from_batch: bool
        _flow: Any  # a `Fit`, from `setup` on
        _evaluation: Any

        @property
        def tasks(self) -> dict[str, Task]:
            """The declared tasks by name."""

        @property
        def task_names(self) -> tuple[str, ...]:
            """Names of all tasks."""

        @property
        def training_tasks(self) -> tuple[str, ...]:
            """Names of the tasks that train."""

        @property
        def unbalanced_tasks(self) -> frozenset[str]:
            """Names of the tasks outside the gradient stage."""

        def task_losses(self, batch: Any, batch_idx: int) -> Mapping[str, Any]:
            """The loss of every task in a batch."""

        def shared_parameters(self) -> Iterable[nn.Parameter] | None:
            """What is balanced; ``None`` to find it."""

        def last_shared_layer(self) -> Iterable[nn.Parameter] | None:
            """The parameters of the last shared layer; ``None`` to find them."""

        def shared_representation(self, z: Tensor) -> Tensor:
            """Mark the tensor that all heads start from."""

        def metric_directions(self) -> dict[str, dict[str, bool]]:
            """Which way metrics are better."""

        def _declare(self, names: tuple[str, ...]) -> None:
            """Take the names of the first batch for those of the tasks."""


def other_trainer(trainer: Any) -> str:
    """What is wrong with a Trainer of ``pytorch_lightning``; empty for one of ``lightning``."""
    foreign = type(trainer).__module__.partition(".")[0] == "pytorch_lightning"
    return f"The Trainer is that of `pytorch_lightning`. {PACKAGES}" if foreign else ""


def base_of(cls: type) -> Any:
    """The class that users subclass, of which ``cls`` inherits: ``MultiTaskModule``."""
    return next(base for base in cls.__mro__ if TaskModule in base.__bases__)
