"""Groups of tasks that share a loss weight, from the losses of this step and of all before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled, whole
from lightning_mtl.balancer import LossBalancer, as_weights, at_least_float32
from lightning_mtl.numerics.quadratic import Array, to_numpy


def go4_align_weights(losses: Tensor, potentials: Tensor, groups: int = 2) -> Tensor:
    r"""Loss weights that are equal within each group of tasks.

    .. math:: \gamma_t = \frac{\sum_s \ell_s}{\ell_t} \, p_t, \qquad
              p = \operatorname{softmax}(\phi), \qquad
              \omega_t = \frac{1}{|G(t)|} \sum_{s \in G(t)} \gamma_s

    The groups :math:`G` cut the sorted indicators :math:`\gamma` where the sum of squared
    distances to the group means is least (exact K-means of numbers).

    Args:
        losses: positive task losses, shape ``(T,)``, any float dtype and device.
        potentials: :math:`\phi_t = -\eta \sum_k \ell_t^k` over all steps up to this one, up to a
            constant that all tasks share, shape ``(T,)``.
        groups: number of groups; every task is a group of its own if there are no more tasks.

    Returns:
        Weights of the shape, dtype and device of ``losses``. NaN for input that is not finite or a
        loss at or below zero.

    Example:
        >>> import torch
        >>> go4_align_weights(torch.tensor([2.0, 0.5, 1.5]), torch.zeros(3))
        tensor([0.7778, 2.6667, 0.7778])
    """
    values, phi = to_numpy(losses), to_numpy(potentials)
    if not (np.isfinite(values).all() and np.isfinite(phi).all() and (values > 0).all()):
        return torch.full_like(losses, torch.nan)
    shares = np.exp(phi - phi.max())
    indicators = values.sum() / values * (shares / shares.sum())
    return as_weights(_group_means(indicators, groups), losses)


class GO4Align(LossBalancer):
    r"""Give tasks with alike risk one weight, the mean of what each of them would get alone.

    .. math:: p_t \propto p_t \, e^{-\eta \ell_t}, \qquad
              \gamma_t = \frac{\sum_s \ell_s}{\ell_t} \, p_t, \qquad
              \omega_t = \operatorname{mean}_{s \in G(t)} \gamma_s

    with :math:`p = 1/T` before the first step and groups :math:`G` by K-means of the
    :math:`\gamma_t` at every step. Losses must be positive.

    Worth knowing: with a group for every task :math:`\sum_t \omega_t \ell_t = \sum_t \ell_t`, and
    for :math:`\eta \to 0` the weights are :math:`\bar \ell / \ell_t`, the logarithm of the losses
    up to their mean. :math:`\eta` is not free of units: :math:`p` leans towards the tasks whose
    losses have summed to less, by :math:`e^{-\eta \sum_k \ell_t^k}`, so large losses or a long run
    leave tasks with large losses behind. With one group all weights are equal.

    Deviations: K-means is solved exactly, where the authors' code starts from random centres and
    may stop at another grouping. A step without some tasks leaves their :math:`p` as it is and
    shares the rest among those that are there.

    Args:
        groups: number of groups, at least 1. The authors' script has 1 as its default, which
            groups nothing, and gives no other value; 2 is the smallest that does.
        step_size: :math:`\eta`, finite and above 0; the default of the authors' code.
        scale: ``"sum"`` (the method's) or ``"mean"``, :math:`1/T` of that.

    Raises:
        ValueError: an argument is out of range.

    References:
        Shen et al., *GO4Align: Group Optimization for Multi-Task Alignment*, NeurIPS 2024, arXiv
        2404.06486.

    Example:
        >>> import torch
        >>> GO4Align(groups=2).loss_weights(torch.tensor([2.0, 0.5, 1.5]))
        tensor([0.7777, 2.6669, 0.7777])
    """

    requires_positive_losses = True
    shares: Tensor | None

    def __init__(self, groups: int = 2, step_size: float = 1e-4, scale: Scale = "sum") -> None:
        super().__init__()
        self.groups = whole(self, "groups", groups)
        self.step_size = in_range(self, "step_size", step_size, open_low=True)
        self.scale: Scale = one_of(self, "scale", scale, ("mean", "sum"))
        self.add_state("shares", 0.0, per_task=True)  # log(T p)

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`go4_align_weights`.

        Args:
            losses: positive task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.
        """
        weights = go4_align_weights(losses, self._potentials(losses), self.groups)
        return rescaled(weights, self.scale, "sum")

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        """Lower the shares of tasks with large losses.

        Args:
            losses: task losses of the step, shape ``(T,)``.
            after: not used.
        """
        super().update(losses, after)
        before = self.per_task_state("shares", at_least_float32(losses))
        now = self._potentials(losses)
        now += before.logsumexp(0) - now.logsumexp(0)  # what absent tasks hold stays theirs
        before.copy_(now)

    def _potentials(self, losses: Tensor) -> Tensor:
        wide = at_least_float32(losses)
        return self.per_task_state("shares", wide) - self.step_size * wide


def _group_means(values: Array, groups: int) -> Array:
    """Each value's group mean in the best partition into ``groups`` intervals."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    size, groups = len(values), min(groups, len(values))
    cost = np.full((size, size + 1), np.inf)  # of the interval [i, j)
    for i in range(size):
        distances = ordered[i:] - ordered[i]
        count = np.arange(1, size - i + 1)
        squares = np.cumsum(distances**2) - np.cumsum(distances) ** 2 / count
        cost[i, i + 1 :] = np.maximum(squares, 0.0)
    best = np.concatenate([[0.0], np.full(size, np.inf)])  # of the first j values
    starts = np.zeros((groups, size + 1), dtype=np.int64)
    for k in range(groups):
        through = best[:size, None] + cost
        starts[k] = through.argmin(0)
        best = through.min(0)
    means = np.empty(size)
    stop = size
    for k in reversed(range(groups)):
        start = starts[k, stop]
        means[order[start:stop]] = ordered[start:stop].mean()
        stop = start
    return means
