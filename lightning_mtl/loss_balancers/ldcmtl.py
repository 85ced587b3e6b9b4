"""Learned loss weights, and a penalty on the differences between weighted losses (LDC-MTL)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mtl.arguments import in_range, one_of
from lightning_mtl.balancer import LossBalancer, at_least_float32
from lightning_mtl.numerics.adam import adam_step

Normalization = Literal["none", "initial", "log"]
Compared = Literal["weighted", "plain"]

_START = 1.0  # W before the first step


def ldcmtl_weights(
    losses: Tensor, logits: Tensor, penalty: float = 0.05, compared: Compared = "weighted"
) -> tuple[Tensor, Tensor]:
    r"""Gradients of the objective with respect to the losses and to the logits.

    .. math:: L = \frac{\sum_t \sigma_t \ell_t}{\operatorname{sg}(\sum_s \sigma_s)}
              + \lambda \sum_{t=1}^{T-1} \lvert \tau_t \ell_t - \tau_{t+1} \ell_{t+1} \rvert,
              \qquad \sigma_t = \frac{1}{1 + e^{-W_t}}

    with :math:`\tau = \sigma` (``"weighted"``) or 1 (``"plain"``), and no gradient through
    :math:`\operatorname{sg}`. An absolute value of zero has the slope zero.

    Args:
        losses: task losses, normalised if they have to be, shape ``(T,)``, float32 or float64.
        logits: :math:`W`, shape ``(T,)``.
        penalty: :math:`\lambda`.
        compared: what :math:`\tau` is.

    Returns:
        :math:`\partial L / \partial \ell`, which can be negative, and
        :math:`\partial L / \partial W`, both of shape ``(T,)`` in the dtype of ``losses``.

    Example:
        >>> weights, slopes = ldcmtl_weights(torch.tensor([2.0, 0.5, 1.5]), torch.ones(3))
        >>> weights
        tensor([0.3699, 0.2602, 0.3699])
        >>> slopes
        tensor([0.1990, 0.0350, 0.1492])
    """
    logits = logits.to(losses)
    sigma = logits.sigmoid()
    shares = torch.nn.functional.logsigmoid(logits).softmax(0)  # where every sigma is zero, too
    tau = sigma if compared == "weighted" else torch.ones_like(sigma)
    signs = (tau * losses).diff().sign()  # of the right neighbour minus the left one
    none = signs.new_zeros(1)
    slopes = penalty * (torch.cat([none, signs]) - torch.cat([signs, none]))
    through_tau = sigma * slopes if compared == "weighted" else 0.0
    return shares + tau * slopes, (1 - sigma) * losses * (shares + through_tau)


class LDCMTL(LossBalancer):
    r"""Learn a weight for each loss, and hold the weighted losses of neighbouring tasks together.

    .. math:: L = \frac{\sum_t \sigma_t \tilde \ell_t}{\operatorname{sg}(\sum_s \sigma_s)}
              + \lambda \sum_{t=1}^{T-1}
              \lvert \tau_t \tilde \ell_t - \tau_{t+1} \tilde \ell_{t+1} \rvert, \qquad
              \sigma_t = \frac{1}{1 + e^{-W_t}}, \qquad
              \omega_t = \frac{\partial L}{\partial \ell_t}

    The model descends :math:`L`, and so does :math:`W`, one Adam step of
    :math:`\partial L / \partial W` after every step of the model, from :math:`W = 1`. One backward
    pass.

    Worth knowing: the penalty runs over neighbours in the order of the module's tasks (of those
    that are there), so the order matters. A loss weight :math:`\omega_t` can be negative where the
    penalty outweighs the task's share, about where :math:`2 \lambda T \tau_t > 1`. With positive
    losses and a smaller :math:`\lambda` every :math:`\partial L / \partial W_t` is positive, so
    that Adam lowers all :math:`W` at nearly the same rate, about ``lr`` a step: the shares
    :math:`\sigma_t / \sum_s \sigma_s` stay close to :math:`1 / T`, and the penalty with
    ``compared="weighted"`` fades within some :math:`5 / \text{lr}` steps.

    Deviations: the paper writes :math:`W` as a bilevel problem, and the authors' codes for few
    tasks let a small network on the shared features output the weights. This is their code for
    many tasks (CelebA), where :math:`W` is one number a task, which needs nothing but the losses
    (that for QM9 adds a ReLU and a random start).
    There one optimiser trains model and :math:`W`; here :math:`W` has its own Adam with the
    learning rate ``lr``. With ``normalization="log"`` the authors' code takes :math:`\ell^0` anew
    at every epoch; here it stays that of the first step. A step without some tasks leaves their
    :math:`W` as it is.

    Args:
        penalty: :math:`\lambda`, finite and at least 0. The authors' codes have 0.01 (CelebA), 0.05
            (NYUv2, QM9) and 0.1 (Cityscapes).
        lr: learning rate of :math:`W`, finite and at least 0; the one the authors' codes for CelebA
            and QM9 use for model and :math:`W` alike.
        compared: :math:`\tau_t`: :math:`\sigma_t` (``"weighted"``) or 1 (``"plain"``, Cityscapes).
        normalization: :math:`\tilde \ell_t`: :math:`\ell_t` (``"none"``, CelebA and Cityscapes),
            :math:`\ell_t \min_s \ell^0_s / \ell^0_t` (``"initial"``, NYUv2) or
            :math:`\log(\ell_t / \ell^0_t)` (``"log"``, QM9), with the losses :math:`\ell^0` of the
            first step. The last two need positive losses.

    Raises:
        ValueError: an argument is out of range.

    References:
        Xiao, Dong, Zou & Ji, *LDC-MTL: Balancing Multi-Task Learning through Scalable Loss
        Discrepancy Control*, arXiv 2502.08585.

    Example:
        >>> LDCMTL(penalty=0.1).loss_weights(torch.tensor([2.0, 0.5, 1.5]))
        tensor([0.4064, 0.1871, 0.4064])
    """

    learned: Tensor | None
    initial: Tensor | None

    def __init__(
        self,
        penalty: float = 0.05,
        lr: float = 1e-3,
        compared: Compared = "weighted",
        normalization: Normalization = "none",
    ) -> None:
        super().__init__()
        self.penalty = in_range(self, "penalty", penalty)
        self.lr = in_range(self, "lr", lr)
        self.compared: Compared = one_of(self, "compared", compared, get_args(Compared))
        self.normalization: Normalization = one_of(
            self, "normalization", normalization, get_args(Normalization)
        )
        self.requires_positive_losses = normalization != "none"
        self.add_state("learned", 0.0, per_task=True)  # W - 1, then Adam's moments and count
        self.add_state("initial", 0.0, per_task=True)  # 0 until the task has been seen

    def loss_weights(self, losses: Tensor) -> Tensor:
        """The gradient of the objective with respect to the losses, see :func:`ldcmtl_weights`.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``; NaN for a loss at or below zero
            with a normalization.
        """
        wide = at_least_float32(losses)
        logits = self._learned(wide)[:, 0] + _START
        values, slopes = self._normalised(wide)
        weights, _ = ldcmtl_weights(values, logits, self.penalty, self.compared)
        return (weights * slopes).to(losses.dtype)

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        r"""One Adam step on :math:`W`.

        Args:
            losses: task losses of the step, shape ``(T,)``.
            after: not used.
        """
        super().update(losses, after)
        wide = at_least_float32(losses)
        learned = self._learned(wide)
        values, _ = self._normalised(wide)
        _, gradient = ldcmtl_weights(values, learned[:, 0] + _START, self.penalty, self.compared)
        adam_step(learned[:, 0], gradient, learned[:, 1:], self.lr)
        initial = self.per_task_state("initial", wide)
        initial.copy_(torch.where(initial == 0, wide, initial))

    def _learned(self, like: Tensor) -> Tensor:
        return self.per_task_state("learned", like, (4,))

    def _normalised(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised losses, and their derivatives with respect to the losses."""
        if self.normalization == "none":
            return losses, torch.ones_like(losses)
        positive = torch.where(losses > 0, losses, torch.nan)
        initial = self.per_task_state("initial", losses)
        initial = torch.where(initial == 0, positive, initial)
        ratios = positive / initial  # exactly 1 at the first step, where all tasks are level
        if self.normalization == "log":
            return ratios.log(), 1.0 / positive
        least = initial.min()
        return ratios * least, least / initial
