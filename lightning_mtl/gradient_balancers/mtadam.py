"""Adam moments for every task, with gradients of equal norm on every parameter (MTAdam)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.arguments import PerTask, in_range
from lightning_mtl.balancer import GradientBalancer, at_least_float32
from lightning_mtl.numerics.quadratic import unit_of


def mtadam_factors(norms: Tensor, ranks: Tensor) -> Tensor:
    r"""What brings the gradients of all tasks to the norm of the first task, tensor by tensor.

    .. math:: f_{ti} = \rho_t \, \frac{\nu_{ai}}{\nu_{ti}}, \qquad
              a = \min \{ s : \nu_{si} > 0 \}

    Args:
        norms: :math:`\nu`, smoothed norms of the task gradients on each parameter tensor, shape
            ``(T, N)``, float32 or float64.
        ranks: :math:`\rho`, how long the gradient of each task becomes relative to the first's,
            shape ``(T,)``.

    Returns:
        Factors of the shape, dtype and device of ``norms``; 1 where the norm is zero.

    Example:
        >>> mtadam_factors(torch.tensor([[2.0, 0.0], [4.0, 3.0]]), torch.ones(2))
        tensor([[1.0000, 1.0000],
                [0.5000, 1.0000]])
    """
    zero = norms == 0
    first = (~zero).to(norms.dtype).argmax(0)
    factors = ranks.to(norms)[:, None] * norms.gather(0, first[None]) / norms
    return torch.where(zero, 1.0, factors)


class MTAdam(GradientBalancer):
    r"""Adam with moments for every task, on gradients that are equally long on every parameter.

    .. math:: \nu_{ti} \leftarrow \beta_3 \nu_{ti} + (1 - \beta_3) \lVert g_{ti} \rVert, \qquad
              \tilde g_{ti} = \rho_t \frac{\nu_{ai}}{\nu_{ti}} \, g_{ti}, \qquad
              d = \frac{\sum_t \hat m_t}{\max_t \sqrt{\hat v_t} + \varepsilon}

    for the parameter tensors :math:`i`, with the bias-corrected Adam moments :math:`\hat m_t,
    \hat v_t` of :math:`\tilde g_t`, the maximum taken element by element, and the first task as
    anchor :math:`a` (on a tensor that it does not reach, the next one). In its first step
    :math:`\nu` is the norm itself. With one task this is Adam.

    The paper's MTAdam is an optimizer, and this direction is its step over the learning rate: let
    the shared parameters be trained by ``torch.optim.SGD`` without momentum, with a learning rate
    that suits Adam, and each task's own parameters by ``torch.optim.Adam``. On those MTAdam *is*
    Adam, so that pair takes the paper's steps (with ranks of 1; another rank is like another
    ``eps`` there). Under Adam or with gradient clipping the shared parameters would be normalised
    twice. It keeps two numbers for every element of the Jacobian.

    A step without some tasks leaves their moments, and their counts of steps, as they are, and
    their momentum out.

    Deviations: the authors' code skips norms below 1e-10, this one only zero ones. It adds weight
    decay to every task's gradient before the moments; here weight decay is the optimizer's. AMSGrad
    is not offered.

    Args:
        beta1: of the first moments, in [0, 1). All defaults are those of the authors' code.
        beta2: of the second moments, in [0, 1).
        beta3: of the norms, in [0, 1).
        eps: :math:`\varepsilon`, at least 0.
        ranks: :math:`\rho`, by task name, 1 where not named, or one number a task in order.

    Raises:
        ValueError: an argument is out of range.

    References:
        Malkiel & Wolf, *MTAdam: Automatic Balancing of Multiple Training Loss Terms*, EMNLP 2021.
    """

    first: Tensor | None
    second: Tensor | None
    norms: Tensor | None
    count: Tensor | None
    unit: float

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        beta3: float = 0.9,
        eps: float = 1e-8,
        ranks: dict[str, float] | list[float] | None = None,
    ) -> None:
        super().__init__()
        self.beta1 = in_range(self, "beta1", beta1, 0.0, 1.0)
        self.beta2 = in_range(self, "beta2", beta2, 0.0, 1.0)
        self.beta3 = in_range(self, "beta3", beta3, 0.0, 1.0)
        self.eps = in_range(self, "eps", eps)
        self.ranks = ranks
        self._ranks = PerTask(self, "ranks", ranks)
        self.add_state("first", 0.0, per_task=True, columns=True)
        self.add_state("second", 0.0, per_task=True, columns=True)
        self.add_state("norms", 0.0, per_task=True, tensors=True)
        self.add_state("count", 0.0, per_task=True)
        self.add_state("unit", 0.0)  # of the moments, once there are any

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Update norms and moments of every task and combine them.

        Args:
            jacobian: shape ``(T, P)``, any float dtype; :attr:`columns` tells its tensors, without
                it all columns are one tensor.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.

        Raises:
            ValueError: the restored state belongs to other tasks or other shared parameters.
        """
        like = at_least_float32(jacobian[:, :1])
        size = jacobian.shape[1]
        sizes = [size] if self.columns is None else list(self.columns.sizes)
        first = self.per_task_state("first", like, (size,))
        second = self.per_task_state("second", like, (size,))
        count = self.per_task_state("count", like)

        now = self.tensor_norms(jacobian)
        norms = self.per_task_state("norms", now, (len(sizes),))
        norms.copy_(torch.where(count[:, None] == 0, now, norms.lerp(now, 1 - self.beta3)))
        count += 1
        factors = mtadam_factors(norms, now.new_tensor(self._ranks.of(self.tasks, len(jacobian))))
        if self.unit == 0:
            self.unit = unit_of(float((factors * norms).max()))
        factors = factors / self.unit
        # In two numbers where one would leave the range of float32.
        near = factors.clamp(1e-30, 1e30)
        near, far = near.to(like), (factors / near).to(like)

        repeats = torch.tensor(sizes, device=like.device)
        total, largest = torch.zeros_like(first[0]), torch.zeros_like(first[0])
        numbers = torch.stack([count.to(like), (far != 1).any(1).to(like)]).tolist()
        for t, (k, beyond) in enumerate(zip(*numbers, strict=True)):
            row = jacobian[t].to(like.dtype) * near[t].repeat_interleave(repeats, output_size=size)
            if beyond:
                row *= far[t].repeat_interleave(repeats, output_size=size)
            first[t].mul_(self.beta1).add_(row, alpha=1 - self.beta1)
            second[t].mul_(self.beta2).addcmul_(row, row, value=1 - self.beta2)
            total.add_(first[t], alpha=1 / (1 - self.beta1**k))
            torch.maximum(largest, second[t] / (1 - self.beta2**k), out=largest)
        length = largest.sqrt_().add_(self.eps / self.unit)
        # A square beyond the range of its dtype would make the step zero without a word.
        length += length - length
        return torch.where(length == 0, 0.0, total / length).to(jacobian.dtype)
