"""Min-norm weights that follow double samples (MoDo)."""

from __future__ import annotations

from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, as_weights, at_least_float32
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.quadratic import gramian_array, project_on_simplex, to_numpy
from lightning_mtl.numerics.storage import combined


def mo_do_weights(cross: Tensor, weights: Tensor, gamma: float = 0.1, rho: float = 0.1) -> Tensor:
    r"""Weights after one step of projected gradient descent on a sample of the min-norm problem.

    .. math:: w \leftarrow \Pi \big( w - \gamma (J_1 J_2^\top w + \rho w) \big)

    with the projection :math:`\Pi` onto weights of at least zero with sum one.

    Args:
        cross: :math:`J_1 J_2^\top` of two independent batches, shape ``(T, T)``.
        weights: :math:`w` so far, shape ``(T,)``.
        gamma: step size :math:`\gamma`.
        rho: regularisation :math:`\rho` towards equal weights.

    Returns:
        :math:`w`, shape ``(T,)``, in the dtype and on the device of ``cross``; NaN for input that
        is not finite.

    Raises:
        ValueError: ``cross`` is not square.

    Example:
        >>> import torch
        >>> mo_do_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.5750, 0.4250])
    """
    matrix, w = gramian_array(cross), to_numpy(weights)
    if not (np.isfinite(matrix).all() and np.isfinite(w).all()):
        return as_weights(np.full(len(w), np.nan), cross)
    return as_weights(project_on_simplex(w - gamma * (matrix @ w + rho * w)), cross)


class MoDo(GradientBalancer):
    r"""Follow min-norm weights that move a little every step, driven by two independent batches.

    .. math:: w \leftarrow \Pi \big( w - \gamma (J_1 J_2^\top w + \rho w) \big), \qquad
              d = \tfrac12 (J_1 + J_2)^\top w

    Starts from equal weights. The product of two batches is an unbiased sample of the Gramian of
    the mean gradients, which that of one batch is not. With ``batches=3`` a third batch gives the
    direction, :math:`d = J_3^\top w`, which is then unbiased given the weights. Use it with
    ``accumulate_grad_batches`` equal to ``batches``; a group with fewer micro-batches uses the mean
    of those that are there, and one with a single one uses it throughout. Each task's own
    parameters get their plain gradients.

    The step size is absolute: gradients that are ten times longer move the weights a hundred times
    further. Where :math:`\gamma` exceeds 2 over the largest eigenvalue of the Gramian they jump
    between single tasks, so choose ``gamma`` for the length of your gradients.

    Deviations: the authors' code adds the two batches up and leaves the factor one half to the
    learning rate. A weight that is kept is its difference from equal weights; tasks that are absent
    keep theirs.

    Args:
        gamma: step size :math:`\gamma`, above 0. The default is that of the authors' code; LibMTL
            has 0.001.
        rho: regularisation :math:`\rho` towards equal weights, at least 0. The default is that of
            the authors' code for LibMTL; their code for MNIST has 0.
        batches: 2 or 3 independent batches a step, both found in the authors' code.
        scale: ``"mean"`` for weights with sum one, as in the paper; ``"sum"`` for ``T`` times that.

    Raises:
        ValueError: an argument is out of range.

    References:
        Chen, Fernando, Ying & Chen, *Three-Way Trade-Off in Multi-Objective Learning:
        Optimization, Generalization and Conflict-Avoidance*, NeurIPS 2023.
    """

    offsets: Tensor | None

    def __init__(
        self,
        gamma: float = 0.1,
        rho: float = 0.1,
        batches: int = 2,
        scale: Scale = "mean",
    ) -> None:
        super().__init__()
        self.gamma = in_range(self, "gamma", gamma, open_low=True)
        self.rho = in_range(self, "rho", rho)
        self.batches = one_of(self, "batches", batches, (2, 3))
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.add_state("offsets", 0.0, per_task=True)

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Move the weights and apply them.

        Args:
            jacobian: those of the micro-batches, stacked to ``(batches, T, P)`` or fewer, or
                ``(T, P)`` for a single one.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.
        """
        wide = at_least_float32(jacobian)
        samples = wide if wide.ndim == 3 else wide[None]
        size = samples.shape[1]
        cross = self.sum_shards(inner.products(samples[0], samples[min(1, len(samples) - 1)]))
        offsets = self.per_task_state("offsets", cross.diagonal())
        kept = as_weights(project_on_simplex(1 / size + to_numpy(offsets)), cross)
        kept = mo_do_weights(cross, kept, self.gamma, self.rho)
        if kept.isfinite().all():
            offsets.copy_(kept - 1 / size)
        last = samples[2] if len(samples) > 2 else samples.mean(0)
        return combined(last, rescaled(kept, self.scale, "mean")).to(jacobian.dtype)
