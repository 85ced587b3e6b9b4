"""Balance the task gradients of a step: loss weights, then a direction, then ``.grad``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Protocol, overload

import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer, Columns, GradientBalancer, LossBalancer
from lightning_mtl.engine.gradients.over_columns import Product
from lightning_mtl.engine.guards import NotFiniteError
from lightning_mtl.engine.record import StepRecord
from lightning_mtl.numerics.estimate import estimated
from lightning_mtl.state import Shards


class Rows(Protocol):
    """Task gradients as the two stages see them, whichever way they were taken.

    Attributes:
        num_tasks: T.
        kept: whether the rows are those of the whole fit, begun anew in each step.
        product: what knows more of the Gramian than these rows, if anything does.
        columns: what the columns of the rows are.
        shards: how columns are divided over processes.
        representation: what the columns stand for, if it is the shared representation.
    """

    num_tasks: int
    kept: bool

    @property
    def columns(self) -> Columns:
        """What the columns of the rows are."""

    @property
    def shards(self) -> Shards | None:
        """How columns are divided over processes."""

    @property
    def representation(self) -> Tensor | None:
        """The shared representation, if the columns stand for it."""

    @property
    def product(self) -> Product | None:
        """The Gramian of all shared parameters times weights, and estimates of that Gramian."""

    def sum_shards(self, partial: Tensor) -> Tensor:
        """Sums over columns, completed over processes."""

    def along(self, rows: Tensor, direction: Tensor) -> Tensor:
        """Inner products of rows with the direction."""

    def length(self, direction: Tensor) -> Tensor:
        """Norm of the direction."""

    def combine(self, weights: Tensor) -> Tensor:
        """The weighted sum of the rows."""

    def write_shared(self, direction: Tensor, *, every_column: bool) -> None:
        """Make the direction the ``.grad`` of the shared parameters."""

    def write_heads(self, weights: Tensor | None) -> None:
        """Make the weighted head gradients the ``.grad`` of the other parameters."""

    def note_late(self) -> None:
        """Look for parameters that turn out to be shared."""


def aggregate(
    gradients: Rows,
    jacobian: Tensor,
    losses: Tensor,
    counts: Sequence[float],
    tasks: Sequence[str],
    loss_balancer: LossBalancer,
    gradient_balancer: GradientBalancer | None,
    gramian: Tensor | None,
    *,
    share: float,
    loss_scale: float,
    observed: bool,
    apart: Tensor | None = None,
    look: bool = True,
    outside: Collection[int] = (),
) -> Callable[[], StepRecord]:
    r"""Write the balanced gradients of a step; returns what tells what was done.

    Row ``t`` of the Jacobian is a sum over micro-batches; divided by ``counts[t]`` it is the
    gradient of the mean loss. Every nonlinear stage sees these means; ``share`` scales the result
    back, as Lightning scales a last group that is not full. Weights multiply rows only where a
    method needs the rows themselves.

    What has one number a task is arithmetic on the host, in float64: squares of float32 numbers and
    products of weights leave the range of float32. The device gets the weights.

    Args:
        gradients: where the direction and the head gradients are written.
        jacobian: sums of task gradients, shape ``(T, P)``; rows of absent tasks are zero. May be
            overwritten.
        losses: mean losses of the present tasks, in their order.
        counts: what each row has to be divided by, 0 for an absent task; length T.
        tasks: names of all T tasks.
        loss_balancer: first stage.
        gradient_balancer: second stage, if there is one.
        gramian: ``jacobian @ jacobian.T`` where it is at hand, float64.
        share: received micro-batches over those of a full group.
        loss_scale: of the gradient scaler, which the optimiser step divides by; head gradients
            carry it already.
        observed: whether a callback wants to see gradients and direction.
        apart: the Jacobians of the micro-batches, shape ``(batches, T, P)``, for a balancer that
            takes them apart; all tasks are then present in each.
        look: whether weights and the direction are looked at for finite numbers.
        outside: tasks that take no part in the second stage: their gradients are added as they are.

    Raises:
        NotFiniteError: weights or a direction that are not finite; nothing has been written.
    """
    present = [t for t, count in enumerate(counts) if count]
    rows = None if len(present) == len(tasks) else present
    inside, part = rows, None  # rows of the second stage, and their places among those present
    if outside and any(t in outside for t in present):
        inside = [t for t in present if t not in outside]
        part = [i for i, t in enumerate(present) if t not in outside]
        gradient_balancer = gradient_balancer if inside else None
    # What multiplies the rows: 1 / count, and the loss weights. ``None`` stands for ones.
    means = omega = weights = None
    if any(counts[t] != 1 for t in present):
        means = losses.new_tensor([1.0 / counts[t] for t in present], dtype=torch.float64)
    if not loss_balancer.all_ones:
        with loss_balancer.only(tasks, rows):
            found = loss_balancer.loss_weights(losses)
            omega = checked(found, loss_balancer, losses, look=look).double()
    scale = head_weights = _product(means, omega)
    if gramian is not None:
        gramian = gramian if rows is None else gramian[rows][:, rows]
        gramian = gramian if means is None else gramian * torch.outer(means, means)

    if gradient_balancer is not None:
        gradient_balancer.tell(gradients)
    with gradient_balancer.only(tasks, inside) if gradient_balancer else nullcontext():
        if gradient_balancer is not None and not gradient_balancer.gramian_weighted:
            every_column = True  # an average of earlier steps moves what this one does not reach
            scaled = jacobian if rows is None else jacobian[rows]
            if scale is not None:
                scaled.mul_(scale.to(jacobian)[:, None])
            seen = scaled
            if apart is not None:
                each = _product(None if means is None else means * len(apart), omega)
                seen = apart if each is None else apart * each.to(apart)[:, None]
            told = losses.to(jacobian.device)
            if part is None:
                direction = gradient_balancer.direction(seen, told)
            else:
                direction = gradient_balancer.direction(seen[..., part, :], told[part])
                others = [i for i in range(len(present)) if i not in part]
                direction = direction + scaled[others].sum(0).to(direction)
            if look:
                _check_direction(direction, gradients, gradient_balancer)
            if gradient_balancer.weight_heads:
                found = gradient_balancer.head_weights()
                weights = _among(found, part, gradient_balancer, losses, look=look)
                head_weights = _product(scale, weights)
            alignment = gradients.along(scaled, direction) if observed else None
            if alignment is not None and omega is not None:
                alignment = alignment / omega.to(alignment)
        else:
            combined = scale
            if gradient_balancer is not None:
                assert gramian is not None
                exact = losses.double()
                if gradients.product is not None:
                    gramian = _by_products(
                        gradients, gradient_balancer, gramian, exact, means, omega, rows, part
                    )
                weighted, told = _outer(gramian, omega), exact
                if part is not None:
                    weighted, told = weighted[part][:, part], exact[part]
                found = gradient_balancer.weights(weighted, told)
                weights = _among(found, part, gradient_balancer, exact)
                combined = _product(scale, weights)
                head_weights = combined if gradient_balancer.weight_heads else scale
                if gradient_balancer.weight_heads and gradient_balancer.own_head_weights:
                    own = gradient_balancer.head_weights()
                    head_weights = _product(scale, _among(own, part, gradient_balancer, exact))
            every_column = False
            direction = gradients.combine(of_all(combined, rows, len(tasks), losses))
            if look and not _within_range(combined, gramian):
                _check_direction(direction, gradients, gradient_balancer or loss_balancer)
            alignment = gradients.along(jacobian, direction) if observed else None
            if alignment is not None:
                alignment = alignment.to(losses.device)
                alignment = _product(alignment if rows is None else alignment[rows], means)
    norm = gradients.length(direction) if observed else None
    if share * loss_scale != 1.0:
        direction = direction * (share * loss_scale)
    if share != 1.0:
        head_weights = losses.new_full((len(present),), share) * (
            1.0 if head_weights is None else head_weights
        )
    gradients.write_shared(direction, every_column=every_column)
    gradients.note_late()
    if head_weights is not None:
        head_weights = of_all(head_weights, rows, len(tasks), losses).to(losses)
    gradients.write_heads(head_weights)
    if gradient_balancer is not None and not gradients.kept:
        gradient_balancer.forget()  # its rows are those of one step
    return lambda: StepRecord(
        tasks=tuple(tasks[t] for t in present),
        losses=losses,
        loss_weights=losses.new_ones(len(present)).double() if omega is None else omega,
        gradient_weights=None if weights is None else weights.double(),
        gramian=gramian,
        alignment=alignment,
        direction_norm=norm,
    )


def _outer(gramian: Tensor, factors: Tensor | None) -> Tensor:
    return gramian if factors is None else gramian * torch.outer(factors, factors)


def _by_products(
    gradients: Rows,
    balancer: GradientBalancer,
    gramian: Tensor,
    losses: Tensor,
    means: Tensor | None,
    omega: Tensor | None,
    rows: list[int] | None,
    part: list[int] | None,
) -> Tensor:
    """The Gramian of all shared parameters, fitted to products with trial weights."""
    ask, asked, found = gradients.product, [], []
    assert ask is not None
    for _ in range(balancer.products):
        weights = _product(omega, _trial(balancer, _outer(gramian, omega), losses, part))
        asked.append(weights)
        each = of_all(_product(means, weights), rows, gradients.num_tasks, losses)
        product, estimates = ask(each)
        if rows is not None:
            product, estimates = product[rows], [e[rows][:, rows] for e in estimates]
        found.append(_product(product, means))
        gramian = estimated([_outer(e, means) for e in estimates], asked, found)
    return gramian


def _trial(
    balancer: GradientBalancer, gramian: Tensor, losses: Tensor, part: list[int] | None
) -> Tensor:
    """Weights from an estimate, of which the balancer remembers nothing."""
    state = balancer.state_dict()
    told = losses if part is None else losses[part]
    weights = balancer.weights(gramian if part is None else gramian[part][:, part], told)
    weights = _among(weights, part, balancer, losses)
    balancer.load_state_dict(state)
    return weights


def checked(weights: Tensor, balancer: Balancer, losses: Tensor, *, look: bool = True) -> Tensor:
    """Weights as a finite vector of one number a task, in the dtype of ``losses``.

    ``look=False`` trusts that they are finite, and does not wait for them.

    Raises:
        ValueError: another shape.
        NotFiniteError: a weight that is not finite.
    """
    name, tasks = type(balancer).__name__, list(balancer.tasks)
    if weights.shape != losses.shape:
        raise ValueError(
            f"Expected {name} to return one weight for each of {tasks}, shape "
            f"{tuple(losses.shape)}, but got shape {tuple(weights.shape)}."
        )
    if look and not all(map(math.isfinite, weights.tolist())):
        raise NotFiniteError(
            f"Expected finite weights from {name} but got {weights.tolist()} for {tasks} with the "
            f"losses {losses.tolist()}. No parameter was changed. Look at the scale of the losses, "
            f"or use another balancer."
        )
    weights = weights.detach()
    same = weights.dtype == losses.dtype and weights.device == losses.device
    return weights if same else weights.to(losses)


def _within_range(weights: Tensor | None, gramian: Tensor | None) -> bool:
    """Whether finite rows with these weights cannot leave the range of float32.

    On the host, from the norms of the rows: the direction itself need not be waited for.
    """
    if gramian is None or gramian.device.type != "cpu":
        return False
    squares: list[float] = gramian.diagonal().tolist()  # plain numbers: this is in every step
    sizes: list[float] = [1.0] * len(squares) if weights is None else weights.tolist()
    longest = sum(abs(w) * math.sqrt(max(s, 0.0)) for w, s in zip(sizes, squares, strict=True))
    return longest < 1e38


def _not_finite(vector: Tensor) -> Tensor:
    """NaN if a number of the vector is not finite, else zero; writes no copy of it."""
    if not vector.numel():
        return vector.new_zeros(())
    low, high = vector.aminmax()
    return low * 0 + high * 0


def _check_direction(direction: Tensor, gradients: Rows, balancer: Balancer) -> None:
    """Refuse a direction that is not finite, on every rank alike.

    Raises:
        NotFiniteError: a number in it is not.
    """
    if gradients.sum_shards(_not_finite(direction)).item():
        raise NotFiniteError(
            f"Expected a finite direction from {type(balancer).__name__} for "
            f"{list(balancer.tasks)} but found one that is not, though every loss and gradient is. "
            f"No parameter was changed. Look at the scale of the losses and at the state of the "
            f"balancer, or use another one."
        )


@overload
def _product(first: Tensor, second: Tensor | None) -> Tensor: ...
@overload
def _product(first: Tensor | None, second: Tensor) -> Tensor: ...
@overload
def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None: ...
def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second


def _among(
    weights: Tensor,
    part: list[int] | None,
    balancer: Balancer,
    losses: Tensor,
    *,
    look: bool = True,
) -> Tensor:
    """Weights of the tasks of the second stage among those of all present ones: 1 elsewhere."""
    if part is None:
        return checked(weights, balancer, losses, look=look)
    every = torch.ones_like(losses)
    every[part] = checked(weights, balancer, losses[part], look=look)
    return every


def of_all(
    weights: Tensor | None,
    rows: list[int] | None,
    size: int,
    like: Tensor,
    outside: Collection[int] = (),
) -> Tensor:
    """Weights of all tasks: zero for absent ones, one for those outside the gradient stage."""
    if weights is None:
        weights = like.new_ones(size if rows is None else len(rows))
    if rows is None or len(rows) == size:
        return weights
    every = weights.new_zeros(size)
    every[rows] = weights
    if outside:
        every[list(outside)] = 1.0
    return every
