"""Loss weights that bring the task gradients to norms of their own pace (GradNorm)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.arguments import in_range, one_of
from lightning_mtl.balancer import GradientBalancer, Level, as_weights, at_least_float32
from lightning_mtl.numerics.adam import adam_step
from lightning_mtl.numerics.quadratic import Array, to_numpy

Optimizer = Literal["adam", "sgd"]

_FLOOR = 1e-6  # a weight below it would turn a task around, or leave nothing to renormalise
_EPS = float(np.finfo(np.float64).eps)


def grad_norm_targets(
    weights: Tensor, norms: Tensor, losses: Tensor, first_losses: Tensor, alpha: float = 1.5
) -> Tensor:
    r"""The norms that the weighted task gradients should have.

    .. math:: \bar n \, r_t^\alpha, \qquad \bar n = \frac1T \sum_s w_s d_s, \qquad
              r_t = \frac{\ell_t / \ell_t(0)}{\frac1T \sum_s \ell_s / \ell_s(0)}

    Args:
        weights: :math:`w`, shape ``(T,)``, any float dtype and device.
        norms: :math:`d`, norms of the unweighted task gradients, shape ``(T,)``.
        losses: :math:`\ell`, shape ``(T,)``, at least zero.
        first_losses: :math:`\ell(0)`, shape ``(T,)``; zero where there is none yet, which counts as
            a ratio of 1.
        alpha: :math:`\alpha`, at least zero. With 0 all targets are equal and losses do not matter.

    Returns:
        Targets of shape ``(T,)`` in the dtype and on the device of ``weights``; NaN for input that
        is not finite or, unless ``alpha`` is 0, a loss below zero.

    Example:
        >>> ones = torch.ones(2)
        >>> grad_norm_targets(ones, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]), ones, 1.0)
        tensor([1., 3.])
    """
    w, d, now, first = map(to_numpy, (weights, norms, losses, first_losses))
    return as_weights(_targets(w, d, now, first, alpha), weights)


def grad_norm_gradient(weights: Tensor, norms: Tensor, targets: Tensor) -> Tensor:
    r"""Gradient by the weights of the distance between norms and targets.

    .. math:: L = \sum_t \big\lvert w_t d_t - a_t \big\rvert, \qquad
              \frac{\partial L}{\partial w_t} = \operatorname{sign}(w_t d_t - a_t) \, d_t

    with the targets :math:`a` held fixed.

    Args:
        weights: :math:`w`, shape ``(T,)``, any float dtype and device.
        norms: :math:`d`, norms of the unweighted task gradients, shape ``(T,)``.
        targets: :math:`a`, shape ``(T,)``, see :func:`grad_norm_targets`.

    Returns:
        The gradient, shape ``(T,)``, in the dtype and on the device of ``weights``; zero where norm
        and target are equal up to rounding.

    Example:
        >>> weights, norms = torch.ones(2), torch.tensor([1.0, 3.0])
        >>> grad_norm_gradient(weights, norms, torch.tensor([2.0, 2.0]))
        tensor([-1.,  3.])
    """
    w, d, aims = map(to_numpy, (weights, norms, targets))
    eps = max(_EPS, *(torch.finfo(x.dtype).eps for x in (weights, norms, targets)))
    return as_weights(_gradient(w, d, aims, eps), weights)


def _targets(w: Array, d: Array, losses: Array, first: Array, alpha: float) -> Array:
    mean = (w * d).mean()
    if alpha == 0:
        return np.full(len(w), mean)
    seen = first > 0
    ratios = np.where(seen, losses / np.where(seen, first, 1.0), 1.0)
    average = ratios.mean()
    if not np.isfinite(ratios).all() or losses.min() < 0:
        return np.full(len(w), np.nan)
    rates = ratios / average if average > 0 else np.ones(len(w))
    return np.asarray(mean * rates**alpha)


def _gradient(w: Array, d: Array, targets: Array, eps: float) -> Array:
    gaps = w * d - targets
    rounding = 4 * len(w) * eps * (w * d + targets)
    return np.asarray(np.where(np.abs(gaps) <= rounding, 0.0, np.sign(gaps)) * d)


class GradNorm(GradientBalancer):
    r"""Learn loss weights so that tasks train at similar rates.

    .. math:: \min_w \sum_t \big\lvert w_t d_t - \bar n \, r_t^\alpha \big\rvert, \qquad
              \bar n = \frac1T \sum_s w_s d_s, \qquad
              r_t = \frac{\ell_t / \ell_t(0)}{\frac1T \sum_s \ell_s / \ell_s(0)}

    with the norms :math:`d_t` of the task gradients and the targets held fixed. Each step trains
    with the current weights, 1 at first, then takes one step on them and scales them back to
    :math:`\sum_t w_t = T`. The weights apply to all gradients, those of each task's own parameters
    included. :math:`\ell_t(0)` is the first loss of the task above zero; until then its ratio is 1.

    Deviations: a weight is kept above 1e-6 before they are scaled, since a large step could make
    one negative. Adam works without its constant :math:`\varepsilon`, so that the scale of the
    losses does not matter. With tasks absent from a step, the weights of the others are scaled to
    their number for this step, and the sum of their stored weights does not change. LibMTL differs
    more: a softmax of parameters that the model's optimizer trains, first losses from a whole
    epoch, all shared parameters, plain head gradients.

    Args:
        alpha: :math:`\alpha`, at least 0: how strongly slow tasks are favoured. The paper's value
            for NYUv2; it takes 0.12 for tasks that are alike. With 0 all norms become equal.
        lr: learning rate of the weights, above 0; the paper's.
        optimizer: ``"adam"`` (the paper's) or ``"sgd"``, whose step grows with the gradients.
        weight_heads: weigh the gradients of each task's own parameters too, as in the paper.
        gradients: what the norms are taken by. The default is the paper's: the last shared layer.

    Raises:
        ValueError: an argument is out of range.

    References:
        Chen et al., *GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
        Networks*, ICML 2018.
    """

    learned: Tensor | None

    def __init__(
        self,
        alpha: float = 1.5,
        lr: float = 0.025,
        optimizer: Optimizer = "adam",
        weight_heads: bool = True,
        gradients: Level = "last_layer",
    ) -> None:
        super().__init__(gradients=gradients)
        self.alpha = in_range(self, "alpha", alpha)
        self.requires_nonnegative_losses = alpha > 0  # ratios of losses, to the power of alpha
        self.lr = in_range(self, "lr", lr, open_low=True)
        self.optimizer: Optimizer = one_of(self, "optimizer", optimizer, get_args(Optimizer))
        self.weight_heads = weight_heads
        # Of each task: its weight and its first loss, 0 before there are any; Adam's three numbers.
        self.add_state("learned", 0.0, per_task=True)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """The current weights; then takes a step on them.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: shape ``(T,)``, at least zero unless ``alpha`` is 0.

        Returns:
            Weights of shape ``(T,)`` and sum ``T``, in the dtype and on the device of ``gramian``.
            NaN, and no step, for input that is not finite or a loss below zero.

        Raises:
            ValueError: the restored state belongs to other tasks.
        """
        # On the CPU: the numbers of a few tasks, looked at many times.
        norms = at_least_float32(gramian.diagonal()).cpu().clamp(min=0).sqrt()
        learned = self.per_task_state("learned", norms, (5,))
        stored, first = torch.where(learned[:, 0] > 0, learned[:, 0], 1.0), learned[:, 1]
        size, total = len(norms), stored.sum()
        current = stored * (size / total)
        now = losses.to(norms)
        begun = torch.where((first == 0) & (now > 0), now, first)
        targets = grad_norm_targets(current, norms, now, begun, self.alpha)
        if not (targets.isfinite().all() and norms.isfinite().all()):
            return gramian.new_full((size,), torch.nan)
        gradient = grad_norm_gradient(current, norms, targets)
        moved = current.clone()
        if self.optimizer == "adam":
            adam_step(moved, gradient, learned[:, 2:], self.lr, eps=1e-30)
        else:
            moved -= self.lr * gradient
        moved.clamp_(min=_FLOOR)
        learned[:, 0] = moved * (total / moved.sum())
        learned[:, 1] = begun
        return current.to(gramian)
