"""Smoothed task gradients and slowly moving convex weights (MoCo)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, as_weights, at_least_float32
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.quadratic import Array, gramian_array, to_numpy
from lightning_mtl.numerics.storage import combined

Projection = Literal["simplex", "softmax"]


def moco_weights(
    weights: Tensor,
    gramian: Tensor,
    gamma: float = 0.1,
    rho: float = 0.0,
    projection: Projection = "simplex",
) -> Tensor:
    r"""One step of the weights towards the shortest convex combination.

    .. math:: \lambda \leftarrow \Pi \big( \lambda - \gamma (Y Y^\top + \rho I) \lambda \big)

    Args:
        weights: :math:`\lambda` before the step, shape ``(T,)``, at least zero with sum one.
        gramian: :math:`Y Y^\top` of the smoothed task gradients, shape ``(T, T)``, any float dtype
            and device.
        gamma: step size :math:`\gamma`.
        rho: :math:`\rho`, a pull towards equal weights.
        projection: what :math:`\Pi` is: the nearest point of the simplex (``"simplex"``) or the
            ``"softmax"``.

    Returns:
        Weights of shape ``(T,)``, at least zero with sum one, in the dtype and on the device of
        ``gramian``; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> moco_weights(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.5500, 0.4500])
    """
    matrix, start = gramian_array(gramian), to_numpy(weights)
    if not (np.isfinite(matrix).all() and np.isfinite(start).all()):
        return as_weights(np.full(len(matrix), np.nan), gramian)
    moved = start - gamma * (matrix @ start + rho * start)
    moved -= moved.max()  # neither projection changes, and 1 is not lost in large numbers
    return as_weights(_nearest(moved) if projection == "simplex" else _softmax(moved), gramian)


class MoCo(GradientBalancer):
    r"""Follow a convex combination of smoothed task gradients, whose weights move a little a step.

    .. math:: Y \leftarrow Y + \beta_k (J - Y), \qquad
              \lambda \leftarrow \Pi_\Delta \big( \lambda - \gamma_k (Y Y^\top + \rho I) \lambda
              \big), \qquad d = Y^\top \lambda,
              \qquad \beta_k = \beta / k^{\sigma_\beta}, \quad \gamma_k = \gamma / k^{\sigma_\gamma}

    with :math:`Y = 0` and equal weights before step :math:`k = 1`. The weights descend on the
    length of the combination, so they go where :class:`MinNorm` puts them at once, without its bias
    from noisy gradients. They move by the *squares* of the gradients: with small gradients they
    stay equal, with large ones they jump between tasks, so ``gamma`` has to fit the losses. Each
    task's own parameters get their plain gradients. It keeps :math:`Y`, as large as the Jacobian.

    A step without some tasks moves the smoothed gradients and the weights of the others only,
    which share the weight that they had together and are scaled to sum one for that step.

    Deviations: the authors' two codes differ from each other. The one in their repository is this
    algorithm with the factor 2 of the derivative in the step, so ``MoCo(beta=0.1, gamma=0.2)`` is
    its default; the one they gave to LibMTL is ``MoCo(projection="softmax", normalize=True)``. The
    bounds that the paper puts on :math:`Y` for its proofs are left out, as in both. The direction
    uses the weights and :math:`Y` of the same step, as in both.

    Args:
        beta: :math:`\beta`, in (0, 1]; LibMTL's default, which all defaults are.
        beta_sigma: :math:`\sigma_\beta`, at least 0.
        gamma: :math:`\gamma`, above 0.
        gamma_sigma: :math:`\sigma_\gamma`, at least 0.
        rho: :math:`\rho`, at least 0.
        projection: the nearest point of the ``"simplex"``, as in the paper, or ``"softmax"``.
            Softmax maps numbers that are close to one another close to equal weights, so those stay
            near :math:`1/T` unless the gradients are long.
        normalize: smooth :math:`\ell_t g_t / \lVert g_t \rVert` in place of :math:`g_t`; losses
            must then be positive, and a zero gradient stays zero.
        scale: ``"mean"``, the formula; ``"sum"`` is :math:`T` times as long.

    Raises:
        ValueError: an argument is out of range.

    References:
        Fernando et al., *Mitigating Gradient Bias in Multi-objective Learning: A Provably
        Convergent Approach*, ICLR 2023.
    """

    average: Tensor | None
    weight: Tensor | None
    seen: Tensor | None
    step: Tensor

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        projection: Projection = "simplex",
        normalize: bool = False,
        scale: Scale = "mean",
    ) -> None:
        super().__init__()
        self.beta = in_range(self, "beta", beta, 0.0, 1.0, open_low=True, open_high=False)
        self.beta_sigma = in_range(self, "beta_sigma", beta_sigma)
        self.gamma = in_range(self, "gamma", gamma, open_low=True)
        self.gamma_sigma = in_range(self, "gamma_sigma", gamma_sigma)
        self.rho = in_range(self, "rho", rho)
        self.projection: Projection = one_of(self, "projection", projection, get_args(Projection))
        self.normalize = normalize
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.requires_positive_losses = normalize
        self.add_state("average", 0.0, per_task=True, columns=True)
        self.add_state("weight", 0.0, per_task=True)
        self.add_state("seen", 0.0, per_task=True)
        self.add_state("step", torch.zeros((), dtype=torch.int64))

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Move the smoothed gradients, then the weights, and combine.

        Args:
            jacobian: shape ``(T, P)``, any float dtype.
            losses: shape ``(T,)``; used with ``normalize=True`` only.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.

        Raises:
            ValueError: the restored state belongs to other tasks or other shared parameters.
        """
        like = at_least_float32(jacobian[:, :1])
        average = self.per_task_state("average", like, jacobian.shape[1:])
        self.step += 1
        k = int(self.step)
        factors = torch.ones_like(like)
        if self.normalize:
            norms = self.row_norms(jacobian)
            factors = torch.where(norms == 0, 0.0, losses.to(norms) / norms)[:, None].to(like)
        for row, gradient, factor in zip(average, jacobian, factors, strict=True):
            row.lerp_(gradient.to(row.dtype) * factor, self.beta / k**self.beta_sigma)

        weight = self.per_task_state("weight", like)
        seen = self.per_task_state("seen", like)
        start, mass = _start(to_numpy(weight), to_numpy(seen))
        found = moco_weights(
            as_weights(start, like),
            self.sum_shards(inner.gramian(average)),
            self.gamma / k**self.gamma_sigma,
            self.rho,
            self.projection,
        )
        weight.copy_(found * mass)
        seen.fill_(1.0)
        return combined(average, rescaled(found, self.scale, "mean")).to(jacobian.dtype)


def _start(weight: Array, seen: Array) -> tuple[Array, float]:
    """Weights of sum one, and their sum before; a new task begins with the mean of the others."""
    known = weight[seen > 0]
    weight = np.where(seen > 0, weight, known.mean() if len(known) else 1.0 / len(weight))
    mass = float(weight.sum())
    return weight / (mass or 1.0), mass  # without any weight, the projection makes them equal


def _nearest(values: Array) -> Array:
    """The nearest point of the simplex: the threshold that leaves the sum one."""
    order = np.sort(values)[::-1]
    thresholds = (np.cumsum(order) - 1.0) / np.arange(1, len(values) + 1)
    threshold = thresholds[np.flatnonzero(order > thresholds)[-1]]
    point = np.maximum(values - threshold, 0.0)
    return np.asarray(point / point.sum())


def _softmax(values: Array) -> Array:
    exponentials = np.exp(values)
    return np.asarray(exponentials / exponentials.sum())
