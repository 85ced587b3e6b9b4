"""Loss weights learned so that all losses fall at one rate (FAMO)."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import LossBalancer, as_weights, at_least_float32
from lightning_mtl.numerics.adam import adam_step


def famo_weights(
    losses: Tensor, logits: Tensor, minimum: Tensor | float = 0.0, eps: float = 1e-8
) -> Tensor:
    r"""Weights under which the logarithms of the losses are weighted by a softmax.

    .. math:: \omega_t = \frac{z_t / D_t}{\sum_s z_s / D_s}, \qquad
              z = \operatorname{softmax}(\xi), \qquad
              D_t = \ell_t - \ell^{\min}_t + \varepsilon

    This is :math:`\operatorname{softmax}(\xi - \log D)`, and is computed so.

    Args:
        losses: task losses, shape ``(T,)``, any float dtype and device.
        logits: :math:`\xi`, shape ``(T,)``.
        minimum: :math:`\ell^{\min}`, what the losses cannot fall below.
        eps: :math:`\varepsilon`.

    Returns:
        Weights of sum one, in the shape, dtype and device of ``losses``; all NaN if one of
        :math:`D` is not above zero.

    Example:
        >>> famo_weights(torch.tensor([2.0, 0.5]), torch.zeros(2))
        tensor([0.2000, 0.8000])
    """
    return torch.softmax(logits - _log_gaps(losses, minimum, eps), 0).to(losses.dtype)


class FAMO(LossBalancer):
    r"""Learn loss weights under which all losses fall by the same factor.

    .. math:: \omega_t = \frac{z_t / D_t}{\sum_s z_s / D_s}, \qquad
              z = \operatorname{softmax}(\xi), \qquad
              D_t = \ell_t - \ell^{\min}_t + \varepsilon

    After each optimiser step the losses :math:`\ell'` of the same batch are computed again, without
    gradients, which costs **one more forward pass**. What each logarithm has fallen,
    :math:`\delta_t = \log D_t - \log D'_t`, is the gradient for :math:`z`, and one step of Adam
    follows

    .. math:: \nabla_\xi = z \odot \big( \delta - z^\top \delta \big) + \gamma \, \xi ,

    so that a task which fell less than the others weighs more in the next step. One backward pass
    where a step is one batch. Weights of sum one. A step without a task leaves its :math:`\xi_t` as
    it is. A step after which a loss is not finite, or not above its minimum, teaches nothing.

    Deviations: like the authors' code, and their Algorithm 2, :math:`\xi` follows Adam, where
    Algorithm 1 follows the gradient. Their standalone code clips the gradient of the shared
    parameters to norm 1; here nothing is clipped, and the Trainer's ``gradient_clip_val`` clips
    that of all parameters.

    Args:
        gamma: :math:`\gamma`, how strongly :math:`\xi` is drawn to zero, as weight decay in the
            gradient. The default of Algorithm 2, of LibMTL and of the authors' runs on NYUv2, QM9
            and CelebA; their runs on Cityscapes have 1e-2.
        lr: learning rate of :math:`\xi`; the default of the authors' code.
        minimum: what losses cannot fall below, by task name, where tasks not named have 0; or one
            number a task, in the order of the module's tasks. Losses must be above it. ``None``
            is 0, as in the authors' runs.
        eps: :math:`\varepsilon`, at least 0; the authors'.
        scale: ``"mean"``, weights of sum one as in the paper, or ``"sum"``, of sum :math:`T`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Liu et al., *FAMO: Fast Adaptive Multitask Optimization*, NeurIPS 2023.
    """

    needs_losses_after = True
    logits: Tensor | None
    moments: Tensor | None

    def __init__(
        self,
        gamma: float = 1e-3,
        lr: float = 0.025,
        minimum: dict[str, float] | list[float] | None = None,
        eps: float = 1e-8,
        scale: Scale = "mean",
    ) -> None:
        super().__init__()
        self.gamma = in_range(self, "gamma", gamma)
        self.lr = in_range(self, "lr", lr, open_low=True)
        self.eps = in_range(self, "eps", eps)
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.minimum = minimum
        self._minima = PerTask(self, "minimum", minimum, unnamed=0.0, positive=False)
        self.requires_positive_losses = minimum is None
        self.add_state("logits", 0.0, per_task=True)
        self.add_state("moments", 0.0, per_task=True)

    def loss_weights(self, losses: Tensor) -> Tensor:
        """See :func:`famo_weights`.

        Args:
            losses: task losses above their minimum, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.

        Raises:
            ValueError: used by hand with a ``minimum`` for other tasks than these.
        """
        wide = at_least_float32(losses)
        weights = famo_weights(
            wide, self.per_task_state("logits", wide), self._minimum(wide), self.eps
        )
        return rescaled(weights, self.scale, "mean").to(losses.dtype)

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        """One step of Adam on the logits, from how far each loss has fallen.

        Args:
            losses: task losses of the step, shape ``(T,)``.
            after: losses of the same batch after the step.

        Raises:
            ValueError: ``after`` is missing.
        """
        super().update(losses, after)
        if after is None:
            raise ValueError(
                "FAMO learns from the losses of the same batch after the optimiser step but got "
                "none. Pass `after`."
            )
        wide = at_least_float32(losses)
        minimum = self._minimum(wide)
        fall = _log_gaps(wide, minimum, self.eps) - _log_gaps(after.to(wide), minimum, self.eps)
        logits = self.per_task_state("logits", wide)
        moments = self.per_task_state("moments", wide, (3,))
        if fall.isfinite().all():
            z = torch.softmax(logits, 0)
            adam_step(logits, z * (fall - z @ fall) + self.gamma * logits, moments, self.lr)

    def _minimum(self, losses: Tensor) -> Tensor | float:
        if self.minimum is None:
            return 0.0
        return as_weights(self._minima.of(self.tasks, len(losses)), losses)


def _log_gaps(losses: Tensor, minimum: Tensor | float, eps: float) -> Tensor:
    return (at_least_float32(losses) - minimum + eps).log()  # NaN or infinite where it is not above
