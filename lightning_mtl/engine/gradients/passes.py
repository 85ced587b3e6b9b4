"""A backward pass from one place of a graph to the next, and what tells that it is linear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_mtl.engine.gradients.cuts import coarsest, entering, zeros_at
from lightning_mtl.engine.gradients.graph import leads_to
from lightning_mtl.numerics.flat import real

# A gradient that a function gave none for. Those below it are called nevertheless, as in any
# backward pass; one that gets no gradient at all is not.
UNDEFINED = torch.zeros(0)


def passed(
    top: GradientEdge | None,
    output: Tensor | None,
    leaves: Sequence[Tensor],
    bottom: GradientEdge | None,
    *,
    again: bool,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Gradients at the leaves of a block and at its bottom, from a loss or from the top.

    Args:
        top: where it begins; ``None`` for a loss.
        output: the loss, or the gradient at the top; ``None`` where there is none.
        leaves: that are wanted.
        bottom: where it ends; ``None`` for nowhere else.
        again: whether the gradient at the top enters once more, which functions and hooks may
            change in place.
        retain_graph: whether the graph is needed once more.
    """
    inputs: list[Any] = [*leaves, *([] if bottom is None else [bottom])]
    if output is None or not inputs:
        return [None] * len(inputs)
    gradient = None if output is UNDEFINED else output
    if top is not None and gradient is None:
        output = zeros_at(top)
    elif top is not None and again:
        output = gradient = output.clone()
    with nullcontext() if top is None else entering(top, gradient):
        found = torch.autograd.grad(
            [output] if top is None else [top],
            inputs,
            None if top is None else [output],
            retain_graph=retain_graph,
            allow_unused=True,
        )
    grads: list[Tensor | None] = [*found]
    if bottom is not None and grads[-1] is None:
        start = output.grad_fn if top is None else top.node
        grads[-1] = UNDEFINED if leads_to(start, {bottom.node}) else None
    return grads


def put(parts: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Copy gradients to their places, zeros where there are none."""
    for part, grad in zip(parts, grads, strict=True):
        part.zero_() if grad is None else part.copy_(real(grad))


def check_length(
    found: float, weights: Tensor, gramian: Tensor, dtype: torch.dtype, losses: Sequence[Tensor]
) -> None:
    """Compare the squared length of a direction with the one that the Gramian tells.

    Args:
        found: of the backward pass of the weighted losses.
        weights: of the losses, float64.
        gramian: inner products of their gradients, float64.
        dtype: of the parameters, float32 or wider.
        losses: with the graph.

    Raises:
        ValueError: they differ by more than rounding.
    """
    expected = (weights @ gramian @ weights).item()
    # Rounding is relative to what is added up, which may cancel.
    most = (weights.abs() @ gramian.diagonal().clamp(min=0).sqrt()).item()
    error, least = abs(found - expected), 1e3 * torch.finfo(dtype).tiny
    if not math.isfinite(error) or most < least:
        return  # what is not finite is looked for elsewhere; the smallest numbers have few digits
    if error <= math.sqrt(torch.finfo(dtype).eps) * most**2:
        return
    if error > math.sqrt(coarsest(losses)) * most**2:
        raise ValueError(
            f"Expected a direction with a squared length of {expected:.4g}, which the task "
            f"gradients tell, but the backward pass of the weighted losses has {found:.4g}: a "
            f"hook, or a function with a backward pass of its own, is not linear (it clips or "
            f"normalises gradients, say), or differs from one pass to the next. No parameter "
            f"was changed. Use `gradient_memory='full'`."
        )
