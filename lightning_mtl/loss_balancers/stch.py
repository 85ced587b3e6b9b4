"""Smooth maximum of the normalised losses (STCH)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mtl.arguments import PerTask, in_range, whole
from lightning_mtl.balancer import as_weights, at_least_float32
from lightning_mtl.loss_balancers._epochs import EpochBalancer, add_to_means, keep_first_means


def stch_weights(
    losses: Tensor, nadir: Tensor, mu: float = 1.0, preference: Tensor | None = None
) -> Tensor:
    r"""Derivative of the smooth maximum of the logarithms of the normalised losses.

    .. math:: \omega_t = \frac{\partial}{\partial \ell_t} \;
              T \mu \log \sum_s e^{x_s / \mu}
              = \frac{T}{\ell_t} \operatorname{softmax}(x / \mu)_t, \qquad
              x_t = \log \frac{\lambda_t \, \ell_t}{n_t}

    Args:
        losses: task losses, shape ``(T,)``, any float dtype and device.
        nadir: :math:`n`, positive losses that count as alike, shape ``(T,)``.
        mu: :math:`\mu`, how smooth the maximum is: towards 0 the task with the largest
            :math:`x_t` has all the weight; with 1 weights are :math:`T \lambda_t / n_t` over
            :math:`\sum_s \lambda_s \ell_s / n_s`.
        preference: :math:`\lambda`, positive, shape ``(T,)``; ones if left out. Only its
            proportions matter.

    Returns:
        Weights of the shape, dtype and device of ``losses``; all NaN if a loss is not above zero.

    Example:
        >>> stch_weights(torch.tensor([2.0, 0.5, 1.5]), torch.tensor([4.0, 1.0, 2.0]))
        tensor([0.4286, 1.7143, 0.8571])
    """
    wide = at_least_float32(losses)
    logs = torch.where(wide > 0, wide.log(), torch.nan)
    x = logs - at_least_float32(nadir).log()
    if preference is not None:
        x = x + at_least_float32(preference).log()
    weights = torch.log_softmax(x / mu, 0) + math.log(len(losses)) - logs
    return weights.exp().to(losses.dtype)


class STCH(EpochBalancer):
    r"""Minimise a smooth maximum of the normalised losses: the task that lags most counts most.

    .. math:: L = T \mu \log \sum_t \Big( \frac{\lambda_t \, \ell_t}{n_t} \Big)^{1/\mu}, \qquad
              \omega_t = \frac{T}{\ell_t} \operatorname{softmax}(x / \mu)_t, \qquad
              x_t = \log \frac{\lambda_t \, \ell_t}{n_t}

    This is smooth Tchebycheff scalarization of the logarithms. The nadir :math:`n_t` is the mean
    training loss of one early epoch; up to its end :math:`L = \sum_t \log \ell_t`, so a run of no
    more than ``warm_up + 1`` epochs is :class:`~lightning_mtl.LogLoss` throughout. Multiplying one
    loss by a constant changes nothing. Losses must be positive.

    State is kept by task: one that its epoch never saw gets its nadir from the first later epoch
    that sees it, and steps with such a task take the logarithms.

    Deviations: as in the authors' code for multi-task learning, the scalarization is of
    :math:`\log (\ell_t / n_t)` without the paper's ideal point. That code has no preference; the
    paper multiplies :math:`f_t - z^*_t` by :math:`\lambda_t`. Here :math:`\lambda_t` multiplies
    :math:`\ell_t / n_t`, inside the logarithm, so that a larger one always means more weight for
    the task (outside it would mean less as soon as the loss is below its nadir), and :math:`\mu \to
    0` is the weighted Tchebycheff scalarization :math:`\max_t \lambda_t \ell_t / n_t`. The code's
    1e-20 under the logarithm is left out.

    Args:
        mu: :math:`\mu`; 1 in the authors' code, which weighs the sum of the normalised losses.
        warm_up: number of epochs before the one in which the nadir is estimated; 4 in the authors'
            code.
        preference: :math:`\lambda` by task name, where tasks not named have 1; or one number a
            task, in the order of the module's tasks. Only the proportions matter; ``None`` treats
            all tasks alike.

    Raises:
        ValueError: an argument is out of range.

    References:
        Lin et al., *Smooth Tchebycheff Scalarization for Multi-Objective Optimization*, ICML 2024.
    """

    requires_positive_losses = True
    nadir: Tensor | None  # (T, 3): mean and count of this epoch, nadir or zero
    epoch: int

    def __init__(
        self,
        mu: float = 1.0,
        warm_up: int = 4,
        preference: dict[str, float] | list[float] | None = None,
    ) -> None:
        super().__init__()
        self.mu = in_range(self, "mu", mu, open_low=True)
        self.warm_up = whole(self, "warm_up", warm_up, at_least=0)
        self.preference = preference
        self._preference = PerTask(self, "preference", preference)
        self.add_state("nadir", 0.0, per_task=True)
        self.add_state("epoch", 0)

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`stch_weights`; the derivative of the logarithms while a nadir is missing.

        Args:
            losses: positive task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.

        Raises:
            ValueError: used by hand with a ``preference`` for other tasks than these.
        """
        wide = at_least_float32(losses)
        nadir = self.per_task_state("nadir", wide, (3,))[:, 2]
        preference = None
        if self.preference is not None:
            preference = as_weights(self._preference.of(self.tasks, len(losses)), wide)
        weights = stch_weights(wide, nadir.where(nadir > 0, 1.0), self.mu, preference)
        logarithm = torch.where(wide > 0, 1 / wide, torch.nan)
        return torch.where((nadir > 0).all(), weights, logarithm).to(losses.dtype)

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        """Add the losses of a step to the means of this epoch.

        Args:
            losses: task losses of the step, shape ``(T,)``.
            after: not used.
        """
        super().update(losses, after)
        wide = at_least_float32(losses)
        add_to_means(self.per_task_state("nadir", wide, (3,)), wide)

    def end_epoch(self) -> None:
        """Take the means of the epoch that ended as nadir, where it is time."""
        if self.nadir is not None:
            keep_first_means(self.nadir, due=self.epoch >= self.warm_up)
        self.epoch += 1
