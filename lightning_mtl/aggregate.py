"""Balance the task gradients of a step: loss weights, then a direction, then ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, LossBalancer
from lightning_mtl.jacobian import TaskGradients
from lightning_mtl.record import StepRecord


def aggregate(
    gradients: TaskGradients,
    jacobian: Tensor,
    losses: Tensor,
    counts: Sequence[float],
    tasks: Sequence[str],
    loss_balancer: LossBalancer,
    gradient_balancer: GradientBalancer | None,
    gramian: Tensor | None,
    *,
    share: float,
    observed: bool,
) -> StepRecord:
    r"""Write the balanced gradients of a step and say what was done.

    Row ``t`` of the Jacobian is a sum over micro-batches; divided by ``counts[t]`` it is the
    gradient of the mean loss. Every nonlinear stage sees these means; ``share`` scales the result
    back, as Lightning scales a last group that is not full. Weights multiply rows only where a
    method needs the rows themselves.

    Args:
        gradients: where the direction and the head gradients are written.
        jacobian: sums of task gradients, shape ``(T, P)``; rows of absent tasks are zero. May be
            overwritten.
        losses: mean losses of the present tasks, in their order.
        counts: what each row has to be divided by, 0 for an absent task; length T.
        tasks: names of all T tasks.
        loss_balancer: first stage.
        gradient_balancer: second stage, if there is one.
        gramian: ``jacobian @ jacobian.T`` where it is at hand.
        share: received micro-batches over those of a full group.
        observed: whether a callback wants to see gradients and direction.
    """
    present = [t for t, count in enumerate(counts) if count]
    rows = None if len(present) == len(tasks) else present
    device = jacobian.device
    index = torch.tensor(present, device=device)
    means = torch.tensor([1.0 / counts[t] for t in present], dtype=jacobian.dtype, device=device)
    if gramian is not None:
        gramian = gramian[index][:, index] * torch.outer(means, means)

    with loss_balancer.only(tasks, rows):
        omega = loss_balancer.loss_weights(losses).to(jacobian)
    scale = means * omega
    weights = None
    head_weights = scale
    with gradient_balancer.only(tasks, rows) if gradient_balancer else nullcontext():
        if gradient_balancer is not None and not gradient_balancer.gramian_weighted:
            scaled = jacobian if rows is None else jacobian[index]
            scaled.mul_(scale[:, None])
            direction = gradient_balancer.direction(scaled, losses)
            alignment = scaled @ direction / omega if observed else None
        else:
            combined = scale
            if gradient_balancer is not None:
                assert gramian is not None
                weights = gradient_balancer.weights(gramian * torch.outer(omega, omega), losses)
                combined = scale * weights.to(scale)
                head_weights = combined if gradient_balancer.weight_heads else scale
            whole = (
                combined
                if rows is None
                else combined.new_zeros(len(tasks)).index_copy(0, index, combined)
            )
            direction = gradients.combine(whole)
            alignment = (jacobian @ direction)[index] * means if observed else None
    if share != 1.0:
        direction = direction * share
        head_weights = head_weights * share
    gradients.write_shared(direction)
    gradients.write_heads(head_weights.new_zeros(len(tasks)).index_copy(0, index, head_weights))
    return StepRecord(
        tasks=tuple(tasks[t] for t in present),
        losses=losses,
        loss_weights=omega,
        gradient_weights=weights,
        gramian=gramian,
        alignment=alignment,
        direction_norm=torch.linalg.vector_norm(direction) / share if observed else None,
    )
