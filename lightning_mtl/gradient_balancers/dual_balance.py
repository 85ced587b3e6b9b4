"""Logarithm of the losses and smoothed task gradients of equal norm (DB-MTL)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mtl.arguments import in_range, one_of
from lightning_mtl.balancer import GradientBalancer, LossBalancer

Scale = Literal["max", "min", "mean", "median", "constant"]


def dual_balance_weights(norms: Tensor, scale: Scale = "max", eps: float = 1e-8) -> Tensor:
    r"""Weights that give every task gradient the same norm.

    .. math:: w_t = \frac{\alpha}{\lVert \hat g_t \rVert + \varepsilon}, \qquad
              \alpha = \max_s \lVert \hat g_s \rVert

    Args:
        norms: :math:`\lVert \hat g_t \rVert`, shape ``(T,)``, float32 or float64.
        scale: what :math:`\alpha` is: the ``"max"``, ``"min"``, ``"mean"`` or ``"median"`` of the
            norms, or 1 (``"constant"``). The median of an even number of norms is the mean of the
            middle two.
        eps: :math:`\varepsilon`.

    Returns:
        Weights of the shape, dtype and device of ``norms``; zero where the norm is zero.

    Example:
        >>> dual_balance_weights(torch.tensor([1.0, 4.0]), scale="mean")
        tensor([2.5000, 0.6250])
    """
    if scale == "max":
        alpha = norms.amax()
    elif scale == "min":
        alpha = norms.amin()
    elif scale == "mean":
        alpha = norms.mean()
    elif scale == "median":
        alpha = norms.quantile(0.5)
    else:
        alpha = norms.new_ones(())
    return torch.where(norms == 0, 0.0, alpha / (norms + eps))


class DualBalance(LossBalancer, GradientBalancer):
    r"""Balance losses by their logarithm and smoothed task gradients by their norm.

    .. math:: \hat g_t \leftarrow \beta_k \hat g_t + (1 - \beta_k)
              \nabla_\theta \log(\ell_t + \varepsilon), \qquad
              d = \alpha_k \sum_t \frac{\hat g_t}{\lVert \hat g_t \rVert + \varepsilon}, \qquad
              \alpha_k = \max_t \lVert \hat g_t \rVert, \qquad \beta_k = \beta / k^\sigma

    with :math:`\hat g = 0` before step :math:`k = 1` and no bias correction. It owns both stages,
    so no other balancer can stand beside it. Each task's own parameters get the gradient of
    :math:`\log(\ell_t + \varepsilon)`. With ``beta > 0`` it keeps the smoothed gradients, as large
    as the Jacobian; with ``beta=0`` nothing.

    Deviations: ``beta_sigma`` is 0.5 where the authors' code has 0, because the paper's study of
    insensitivity covers :math:`\beta / \sqrt k` only. With ``beta_sigma=0`` and ``beta=0.9`` the
    first steps are up to ten times too short. Algorithm 1 counts from :math:`k = 0`, where
    :math:`\beta / \sqrt k` does not exist; like the authors' code this counts from 1. A step
    without a task leaves that task's smoothed gradient as it is.

    Args:
        beta: forgetting rate :math:`\beta`, in [0, 1); the default of the authors' code.
        beta_sigma: :math:`\sigma`, at least 0.
        scale: what :math:`\alpha_k` is: the ``"max"`` (the paper's choice), ``"min"``, ``"mean"``
            or ``"median"`` of the norms, or 1 (``"constant"``; the paper does not tell its value).
        loss_part: take the logarithm of the losses; they must then be positive.
        gradient_part: smooth and normalise the task gradients; otherwise they are summed, in one
            backward pass where the losses allow it.
        eps: :math:`\varepsilon`, at least 0, used for losses and norms alike; the paper's. With 0
            the direction is exactly equation 2, which has none, at every scale.

    Raises:
        ValueError: an argument is out of range.

    References:
        Lin et al., *Dual-Balancing for Multi-Task Learning*, arXiv 2308.12029.
    """

    average: Tensor | None
    step: Tensor

    def __init__(
        self,
        beta: float = 0.9,
        beta_sigma: float = 0.5,
        scale: Scale = "max",
        loss_part: bool = True,
        gradient_part: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.beta = in_range(self, "beta", beta, 0, 1)
        self.beta_sigma = in_range(self, "beta_sigma", beta_sigma)
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.loss_part = loss_part
        self.gradient_part = gradient_part
        self.eps = in_range(self, "eps", eps)
        self.requires_positive_losses = loss_part
        self.needs_current_losses = loss_part
        self.needs_jacobian = gradient_part
        self.add_state("average", 0.0, per_task=True, columns=True)
        self.add_state("step", torch.zeros((), dtype=torch.int64))

    @property
    def gramian_weighted(self) -> bool:
        """Whether there is no average to keep, so that norms of this step's gradients suffice."""
        return self.beta == 0 or not self.gradient_part

    def loss_weights(self, losses: Tensor) -> Tensor:
        r"""Derivative of the logarithms, :math:`1 / (\ell_t + \varepsilon)`; ones without it.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``; NaN for a negative loss.
        """
        if not self.loss_part:
            return torch.ones_like(losses)
        return torch.where(losses < 0, torch.nan, 1 / (losses + self.eps))

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Weights from the norms of this step's gradients, with ``beta=0``.

        Args:
            gramian: shape ``(T, T)``, of rows that carry the loss weights already.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.

        Raises:
            ValueError: ``beta`` is not zero, so that the direction is no combination of this step's
                gradients.
        """
        if not self.gradient_part:
            return gramian.new_ones(len(gramian))
        if self.beta > 0:
            raise ValueError(
                f"Expected `beta=0` for weights of DualBalance, found {self.beta}: its direction "
                f"combines gradients of earlier steps. Call `direction` instead."
            )
        squares = gramian.diagonal().to(_at_least_float32(gramian)).clamp(min=0)
        return dual_balance_weights(squares.sqrt(), self.scale, self.eps).to(gramian.dtype)

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Update the smoothed gradients and add them up at equal norm.

        Args:
            jacobian: shape ``(T, P)``, rows that carry the loss weights already.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.

        Raises:
            ValueError: the restored average belongs to other tasks or other shared parameters.
        """
        if not self.gradient_part:
            return jacobian.sum(0)
        rows = jacobian
        if self.beta > 0:
            rows = self.per_task_state("average", jacobian, jacobian.shape[1:])
            self.step += 1
            beta = self.beta / int(self.step) ** self.beta_sigma
            rows.mul_(beta).add_(jacobian, alpha=1 - beta)
        norms = self.row_norms(rows)
        return dual_balance_weights(norms, self.scale, self.eps).to(rows.dtype) @ rows


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
