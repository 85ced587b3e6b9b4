"""The two stages of balancing as Lightning callbacks: loss weights, then one direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mtl.arguments import PerTask, one_of
from lightning_mtl.changed import settle
from lightning_mtl.contract import TaskModule, other_trainer
from lightning_mtl.numerics import inner, storage
from lightning_mtl.state import Stateful

Level = Literal[
    "parameters", "last_layer", "representation", "representation+1", "representation+2"
]


@dataclass(frozen=True)
class Columns:
    """What the columns of a Jacobian are: the shared parameters, in order.

    Attributes:
        names: of the parameters.
        sizes: how many columns each has.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]


@runtime_checkable
class Perturbing(Protocol):
    """A gradient balancer that says where the gradient of each task is to be taken.

    Attributes:
        local: what :meth:`perturbations` gets of each task: its ``"gradient"``, or an
            ``"estimate"`` from two losses.
    """

    local: Literal["estimate", "gradient"]

    def probes(self, like: Tensor, count: int) -> Tensor:
        """Displacements of the shared parameters for the estimate, shape ``(T, P)``.

        A new tensor, which may be overwritten.
        """

    def perturbations(self, average: Tensor, local: Tensor) -> Tensor:
        """Perturbations of the shared parameters, shape ``(T, P)``."""

    def head_perturbation(self, gradient: Tensor) -> Tensor:
        """Perturbation of a task's own parameters, shape ``(P_t,)``."""


# What Lightning calls in every step. It enters a profiler's context for each that can be called.
_STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Balancer(Stateful):
    """What loss balancers and gradient balancers share: declared state and its checkpoint.

    A balancer is an ordinary callback: the Trainer saves and restores its state under its class
    name. It never steps, reduces over ranks or touches a parameter;
    :class:`~lightning_mtl.MultiTaskModule` calls it once an optimiser step.

    Attributes:
        tasks: names of the tasks of the current call, in the order of its rows; empty when used by
            hand.
        requires_positive_losses: a loss at or below zero is then a bad loss (the method takes its
            logarithm).
        requires_nonnegative_losses: a loss below zero is then a bad loss.
    """

    requires_positive_losses: bool = False
    requires_nonnegative_losses: bool = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that would never call the balancer; hide hooks with nothing to do."""
        if wrong := other_trainer(trainer):
            raise TypeError(wrong)
        if stage == "fit" and not isinstance(pl_module, TaskModule):
            raise TypeError(
                f"Expected {type(self).__name__} beside a MultiTaskModule but found "
                f"{type(pl_module).__name__}, which would train as if it were not there. Let it "
                f"inherit from lightning_mtl.MultiTaskModule, and return its losses as a dict from "
                f"`task_losses` instead of `training_step`."
            )
        self._begin("alone")
        for hook in _STEP_HOOKS:
            if getattr(type(self), hook) is getattr(Callback, hook):
                vars(self).setdefault(hook, None)

    @property
    def learns(self) -> bool:
        """Whether it, or one that it wraps, defines :meth:`update`."""
        own = type(self).update is not Balancer.update
        return own or any(nested.learns for nested in self.nested().values())

    def _begin(self, fitting: str) -> None:
        """Take up changed arguments, those of wrapped balancers first; the fit reads them."""
        for nested in self.nested().values():
            nested._begin("inside")
        settle(self)
        self._fitting = fitting

    def _end(self) -> None:
        self._fitting = ""
        for nested in self.nested().values():
            nested._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the hooks again that :meth:`setup` hid."""
        self._end()
        self._show_hooks()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As :meth:`teardown`, which does not follow an error."""
        self._end()
        self._show_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles that are made during a fit have all hooks."""
        super().__setstate__(state)
        self._show_hooks()

    def _show_hooks(self) -> None:
        for hook in _STEP_HOOKS:
            if vars(self).get(hook, self) is None:
                del vars(self)[hook]

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Compare what the constructor was given for each task with all tasks of the run.

        Args:
            tasks: every task of the run, in order.

        Raises:
            ValueError: a number is for an unknown task, or there are more or fewer than tasks.
        """
        for value in vars(self).values():
            if isinstance(value, PerTask):
                value.check_tasks(tasks)

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        """Learn from an optimiser step that was taken; wrapped balancers learn too.

        The one place where a loss balancer may move its state: a step that is skipped moves
        nothing.

        Args:
            losses: task losses that the step was made from, means over its micro-batches, shape
                ``(T,)``, detached.
            after: the same after the step, for balancers with ``needs_losses_after``.
        """
        for nested in self.nested().values():
            nested.update(losses, after)


class LossBalancer(Balancer):
    r"""First stage: a weight for every task loss, :math:`\omega = f(\ell)`.

    Rows of the Jacobian and head gradients are multiplied by :math:`\omega`. A method is one class
    with :meth:`loss_weights`.

    Attributes:
        needs_current_losses: ``False`` when the weights do not depend on this step's losses; such
            a balancer always trains with one backward pass.
        stateless: whether :meth:`loss_weights` reads and changes nothing but its argument, and can
            do with numbers that are not finite or not positive; it may then be called before the
            losses are looked at, which saves a transfer to the host. A class says it for itself,
            not for its subclasses.
        needs_losses_after: whether :meth:`update` gets the losses of the same batch after the
            step, which costs one more forward pass.
    """

    needs_current_losses: bool = True
    stateless: bool = False
    needs_losses_after: bool = False

    @property
    def all_ones(self) -> bool:
        """Whether its weights are ones always, so that nothing has to be multiplied."""
        return False

    def loss_weights(self, losses: Tensor) -> Tensor:
        r"""Loss weights :math:`\omega`, shape ``(T,)``.

        Args:
            losses: task losses of the step, shape ``(T,)``, detached, any float dtype and device.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss_weights(losses)`.")


class GradientBalancer(Balancer):
    r"""Second stage: one direction from the task gradients.

    A method defines :meth:`weights` when its direction is :math:`J^\top w` with :math:`w = f(J
    J^\top, \ell)`, and :meth:`direction` otherwise.

    Args:
        gradients: what the task gradients that it sees are taken by: all shared ``"parameters"``;
            the parameters of the ``"last_layer"`` that is shared; or the shared
            ``"representation"``. The last two suit methods with weights from the Gramian: the
            weights then apply to the gradients of all shared parameters, which take one trunk
            backward pass whatever :math:`T` is. ``"representation+1"`` and ``"+2"`` estimate the
            Gramian of all parameters from the representation and one or two exact products with
            it, each one more trunk backward pass and one forward pass in forward mode.

    Attributes:
        weight_heads: multiply the gradients of task ``t``'s own parameters by :math:`w_t` too.
        needs_jacobian: ``False`` when the task gradients are not needed apart, so that one
            backward pass is enough.
        batches: number of micro-batches of a step whose Jacobians :meth:`direction` gets apart,
            stacked to ``(batches, T, P)``; 1 for their mean, ``(T, P)``.
        columns: what the columns of the Jacobian are; ``None`` when used by hand.
        representation: the shared representation that the columns stand for, detached, with
            ``gradients="representation"``; ``None`` otherwise.
    """

    weight_heads: bool = False
    needs_jacobian: bool = True
    batches: int = 1

    def __init__(self, gradients: Level = "parameters") -> None:
        super().__init__()
        self.gradients: Level = one_of(self, "gradients", gradients, get_args(Level))
        self.columns: Columns | None = None
        self.products = int(gradients.partition("+")[2] or 0)
        self.representation: Tensor | None = None
        self._told_by: Any = None  # the task gradients that have set these

    def tell(self, gradients: Any) -> None:
        """Learn what the columns of the Jacobian are, from what takes the task gradients.

        Wrapped balancers do, too. The flow calls it before every use.
        """
        if vars(self).get("_told_by") is gradients:  # copies have none
            return  # as in every step but the first
        self._told_by = gradients
        self.columns = gradients.columns
        self.sum_shards = gradients.sum_shards  # type: ignore[method-assign] # for this run
        self.shards = gradients.shards
        self.representation = gradients.representation
        for nested in self.nested().values():
            if isinstance(nested, GradientBalancer):
                nested.tell(gradients)

    def forget(self) -> None:
        """Let go of the task gradients that it was told of."""
        self._told_by = self.representation = None
        vars(self).pop("sum_shards", None)
        for nested in self.nested().values():
            if isinstance(nested, GradientBalancer):
                nested.forget()

    @property
    def gramian_weighted(self) -> bool:
        r"""Whether the direction is :math:`J^\top w` with weights from the Gramian."""
        return type(self).direction is GradientBalancer.direction

    @property
    def own_head_weights(self) -> bool:
        """Whether head gradients get other weights than the direction."""
        return type(self).head_weights is not GradientBalancer.head_weights

    @property
    def perturbs(self) -> bool:
        """Whether it says where the gradient of each task is to be taken (:class:`Perturbing`)."""
        return isinstance(self, Perturbing)

    @property
    def needs_all_rows(self) -> bool:
        """Whether it needs all task gradients in every step: it defines no way to do with fewer."""
        kind, base = type(self), GradientBalancer
        return kind.reused_weights is base.reused_weights and kind.wanted is base.wanted

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        r"""Weights :math:`w`, shape ``(T,)``, of the task gradients in the direction.

        Args:
            gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.
            losses: task losses, shape ``(T,)``, detached.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `weights(gramian, losses)` or "
            f"`direction(jacobian, losses)`."
        )

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        r"""The vector written to the gradients of the shared parameters, shape ``(P,)``.

        Args:
            jacobian: task gradients :math:`J`, shape ``(T, P)``, one row a task.
            losses: task losses, shape ``(T,)``, detached.
        """
        wide = jacobian if jacobian.dtype.itemsize >= 4 else jacobian.float()
        gramian = inner.gramian(wide)
        weights = self.weights(gramian, losses.to(gramian))
        return storage.combined(wide, weights.to(gramian)).to(jacobian.dtype)

    def head_weights(self) -> Tensor:
        """Weights of the head gradients, shape ``(T,)``, after :meth:`direction`.

        For a method with ``weight_heads`` whose direction is none of :meth:`weights`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `head_weights()`.")

    def sum_shards(self, partial: Tensor) -> Tensor:
        """Sums over columns that this process has, completed over the others.

        In most runs each process has every column, and nothing is done. Norms and inner products
        that a method takes of rows go through here; element by element it need not care.
        """
        return partial

    def row_norms(self, rows: Tensor) -> Tensor:
        """Euclidean norms of rows over all columns, float64, shape ``(T,)``."""
        norms = inner.norms(rows)
        return norms if self.shards is None else self.sum_shards(norms.square()).sqrt()

    def tensor_norms(self, jacobian: Tensor) -> Tensor:
        """Norms of every row on every tensor of :attr:`columns`, shape ``(T, number of tensors)``.

        By hand, all columns are one tensor. In float64, and complete over processes.
        """
        sizes = [jacobian.shape[1]] if self.columns is None else list(self.columns.sizes)
        norms = torch.stack([inner.norms(part) for part in jacobian.split(sizes, dim=1)], dim=1)
        return norms if self.shards is None else self.sum_shards(norms.square()).sqrt()

    def reused_weights(self) -> Tensor | None:
        """Weights of an earlier step that hold for this one, so that it needs no Jacobian.

        Shape ``(T,)``; ``None`` when they have to be computed. Changes nothing.
        """
        return None

    def wanted(self, present: int) -> Sequence[int] | None:
        """Rows whose gradients this step needs; ``None`` for all. Changes nothing.

        Args:
            present: number of tasks that are there.
        """
        return None


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in its own dtype where that is float32 or wider, else in float32."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def as_weights(weights: Any, like: Tensor) -> Tensor:
    """NumPy weights as a tensor on the device and in the dtype of ``like``."""
    return torch.from_numpy(np.asarray(weights)).to(like)
