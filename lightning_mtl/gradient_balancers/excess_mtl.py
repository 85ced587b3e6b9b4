"""Task weights that grow with the estimated distance from convergence (ExcessMTL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled, whole
from lightning_mtl.balancer import GradientBalancer, as_weights, at_least_float32
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.quadratic import Array, to_numpy, unit_of


def excess_risks(jacobian: Tensor, squares: Tensor, units: Sequence[float] | None = None) -> Tensor:
    r"""How far each task is from convergence, estimated from its gradients so far.

    .. math:: e_t = \sum_p \frac{g_{tp}^2}{\sqrt{A_{tp}}}

    Args:
        jacobian: task gradients :math:`g`, shape ``(T, P)``, any float dtype and device.
        squares: :math:`A`, the sum of :math:`g^2` over all steps, this one included, shape
            ``(T, P)``.
        units: what the gradients were divided by in ``squares``, one number a task; ones if left
            out.

    Returns:
        Shape ``(T,)``, float64, in these units. A column whose gradient has always been
        zero adds nothing.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> excess_risks(rows, rows**2)
        tensor([7., 2.], dtype=torch.float64)
    """
    risks = []
    for t, (row, square) in enumerate(zip(jacobian, squares, strict=True)):
        wide = at_least_float32(row)
        wide = wide if units is None else wide / units[t]
        relative = torch.where(square == 0, 0.0, wide / square.sqrt())
        risks.append(inner.along(relative[None], wide)[0])
    return torch.stack(risks)


def excess_mtl_weights(weights: Tensor, ratios: Tensor, step_size: float = 0.01) -> Tensor:
    r"""One step of exponentiated gradient on the task weights; their sum stays.

    .. math:: w_t \leftarrow \frac{w_t e^{\eta r_t}}{\sum_s w_s e^{\eta r_s}} \sum_s w_s

    Args:
        weights: above zero, shape ``(T,)``, any float dtype and device.
        ratios: :math:`r`, excess risks over their first values, shape ``(T,)``.
        step_size: :math:`\eta`.

    Returns:
        Weights of the shape, dtype and device of ``weights``.

    Example:
        >>> excess_mtl_weights(torch.ones(2), torch.tensor([1.0, 0.5]), step_size=1.0)
        tensor([1.2449, 0.7551])
    """
    moved = _exponentiated(np.log(to_numpy(weights)), step_size * to_numpy(ratios))
    return as_weights(np.exp(moved), weights)


class ExcessMTL(GradientBalancer):
    r"""Weigh tasks by their excess risk, an estimate of how far they are from convergence.

    .. math:: d = \sum_t w_t g_t, \qquad w_t \leftarrow w_t \exp(\eta \, e_t / e_t^0), \qquad
              e_t = \sum_p \frac{g_{tp}^2}{\sqrt{A_{tp}}}, \qquad A_t \leftarrow A_t + g_t^2

    after which the weights are scaled to keep their sum, :math:`T`. :math:`e_t^0` is the excess
    risk of the first step (``warm_up`` steps), in which the weights stay 1. Weights follow
    gradients and not losses, so a task whose loss stays high because its labels are noisy is not
    preferred. Only the ratio to the task's own first value counts, so the scale of a loss does not
    change its weight. It keeps :math:`A`, as large as the Jacobian.

    A step without some tasks leaves theirs as they are; the others share the weight that they had
    together. A task that comes late starts with 1, and so does one whose gradient was zero until
    then.

    Deviations: the authors' code adds 1e-7 under the root; here a column whose gradient has always
    been zero adds nothing, which is its limit and keeps small gradients exact. Their code divides
    by zero when a gradient is zero in the first step; here the first step that has one counts.

    Args:
        step_size: :math:`\eta`, above 0; the default of the authors' code. Its README runs 1.
        warm_up: number of steps of a task whose mean excess risk is :math:`e_t^0`, at least 1, as
            in the authors' code. For three epochs, give three times the number of batches.
        scale: ``"sum"`` (weights of sum :math:`T`, as in the authors' code and LibMTL) or
            ``"mean"`` (of sum 1, as in TorchJD).
        weight_heads: weigh the gradients of each task's own parameters too: the method weighs
            losses.

    Raises:
        ValueError: an argument is out of range.

    References:
        He et al., *Robust Multi-Task Learning with Excess Risks*, ICML 2024.
    """

    squares: Tensor | None
    units: Tensor | None
    risk: Tensor | None

    def __init__(
        self,
        step_size: float = 0.01,
        warm_up: int = 1,
        scale: Scale = "sum",
        weight_heads: bool = True,
    ) -> None:
        super().__init__()
        self.step_size = in_range(self, "step_size", step_size, open_low=True)
        self.warm_up = whole(self, "warm_up", warm_up)
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.weight_heads = weight_heads
        self.add_state("squares", 0.0, per_task=True, columns=True)
        self.add_state("units", 0.0, per_task=True)  # of the gradients in the squares
        self.add_state("risk", 0.0, per_task=True)  # log of the weight, first risk, steps in it
        self._latest: Tensor | None = None

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Estimate the excess risks, move the weights and combine.

        Args:
            jacobian: shape ``(T, P)``, any float dtype.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.

        Raises:
            ValueError: the restored state belongs to other tasks or other shared parameters.
        """
        like = at_least_float32(jacobian[:, :1])
        squares = self.per_task_state("squares", like, jacobian.shape[1:])
        units = self._measured(jacobian)
        for square, row, unit in zip(squares, jacobian, units, strict=True):
            wide = row.to(square.dtype) / unit
            square.addcmul_(wide, wide)
        risk = self.per_task_state("risk", like, (3,))
        logs, first, count = to_numpy(risk).T.copy()
        now = to_numpy(self.sum_shards(excess_risks(jacobian, squares, units)))

        ready = count >= self.warm_up
        logs[ready] = _exponentiated(logs[ready], self.step_size * now[ready] / first[ready])
        begins = ~ready & (now > 0)
        count[begins] += 1
        first[begins] += (now[begins] - first[begins]) / count[begins]
        risk.copy_(as_weights(np.stack((logs, first, count), axis=1), risk))

        weights = rescaled(as_weights(np.exp(logs), like), self.scale, "sum")
        self._latest = weights
        direction = torch.zeros_like(squares[0])
        for weight, row in zip(weights.tolist(), jacobian, strict=True):
            direction.add_(row, alpha=weight)
        return direction.to(jacobian.dtype)

    def _measured(self, jacobian: Tensor) -> list[float]:
        """A unit for each task: that of its first gradient that is not zero."""
        units = self.per_task_state("units", at_least_float32(jacobian[:, :1]).double())
        found: list[float] = units.tolist()
        if not all(found):
            norms = self.row_norms(jacobian).tolist()
            found = [u or (unit_of(n) if n else 0.0) for u, n in zip(found, norms, strict=True)]
            units.copy_(units.new_tensor(found))
        return [u or 1.0 for u in found]

    def head_weights(self) -> Tensor:
        """The weights that the last direction was made with, shape ``(T,)``.

        Raises:
            ValueError: there is no direction yet.
        """
        if self._latest is None:
            raise ValueError(
                "Expected a direction before the head weights of ExcessMTL but found none. Call "
                "`direction(jacobian, losses)` first."
            )
        return self._latest


def _exponentiated(logs: Array, steps: Array) -> Array:
    """Logarithms of the weights after a step; in logarithms no weight is ever lost to zero."""
    if not len(logs):
        return logs
    moved = logs + steps
    return np.asarray(moved - np.logaddexp.reduce(moved) + np.logaddexp.reduce(logs))
