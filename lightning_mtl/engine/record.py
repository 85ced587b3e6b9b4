"""What one optimiser step did, for monitors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """Numbers of one optimiser step.

    Detached tensors, on the host where the step brought them there anyway; with task gradients
    apart, weights and inner products are float64.

    Attributes:
        tasks: names of the tasks present in the step, in the order of all that follows.
        losses: task losses before weighting, means over the step's micro-batches, shape ``(T,)``.
        loss_weights: weights of the loss balancer, shape ``(T,)``.
        gradient_weights: weights of the gradient balancer on rows already scaled by
            ``loss_weights``, shape ``(T,)``; ``None`` without one, or when its direction is no
            such combination.
        gramian: inner products of the task gradients before any weighting, shape ``(T, T)``;
            ``None`` when one backward pass was enough.
        alignment: inner products of each task gradient (unweighted) with the direction, shape
            ``(T,)``; only when a callback asked for the Jacobian of this step.
        direction_norm: Euclidean norm of the direction, a scalar; given together with
            ``alignment``.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    loss_weights: Tensor
    gradient_weights: Tensor | None = None
    gramian: Tensor | None = None
    alignment: Tensor | None = None
    direction_norm: Tensor | None = None
