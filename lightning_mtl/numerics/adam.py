"""Adam for the few numbers that a balancer learns: absent tasks, and their counts, stand still."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_step(
    values: Tensor,
    gradient: Tensor,
    moments: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    r"""One step of Adam on ``values``, in place; no weight decay.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
              v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
              x \leftarrow x - \eta \, \frac{m / (1 - \beta_1^k)}
              {\sqrt{v / (1 - \beta_2^k)} + \varepsilon}

    ``torch.optim.Adam`` counts steps for a whole tensor; here every task has its own count.

    Args:
        values: what is learned, shape ``(T,)``, float32 or float64.
        gradient: shape ``(T,)``.
        moments: :math:`m`, :math:`v` and the count of steps, shape ``(T, 3)``, zeros at first.
        lr: learning rate :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\varepsilon`.

    References:
        Kingma & Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015.
    """
    first, second, count = moments.unbind(1)
    first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    count += 1
    mean = first / (1 - torch.pow(betas[0], count))
    size = (second / (1 - torch.pow(betas[1], count))).sqrt()
    values -= lr * mean / (size + eps)
