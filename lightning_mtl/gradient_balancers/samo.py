"""Task gradients where each task's loss is higher nearby: sharpness-aware balancing (SAMO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mtl.arguments import in_range, one_of
from lightning_mtl.balancer import GradientBalancer, LossBalancer, at_least_float32
from lightning_mtl.numerics import inner

Local = Literal["estimate", "gradient"]


def samo_perturbations(
    average: Tensor,
    local: Tensor,
    rho: float = 1e-3,
    beta: float = 0.5,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    r"""Where to take the gradient of each task, relative to the shared parameters.

    .. math:: m_t^{(j)} = (1 - \beta) \, g_0^{(j)} + \beta \, \lVert g_0^{(j)} \rVert
              \frac{h_t^{(j)}}{\lVert h_t^{(j)} \rVert}, \qquad
              \epsilon_t = \rho \, \frac{m_t}{\lVert m_t \rVert}

    for every shared tensor :math:`j`. The length of :math:`h_t^{(j)}` does not matter.

    Args:
        average: :math:`g_0`, the gradient of the mean loss, shape ``(P,)``.
        local: :math:`h`, the gradient of each task or an estimate of it, shape ``(T, P)``.
        rho: :math:`\rho`.
        beta: :math:`\beta`.
        sizes: how many columns each shared tensor has; ``None`` takes all for one tensor.

    Returns:
        :math:`\epsilon` of shape ``(T, P)`` in the dtype of ``local``. A tensor whose local part is
        zero keeps the average part alone; the perturbation is zero where :math:`m_t` is.

    Example:
        >>> samo_perturbations(torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 1.0]]), rho=1.0)
        tensor([[0.3162, 0.9487]])
    """
    centre, rows = at_least_float32(average), at_least_float32(local)
    blocks = [rows.shape[1]] if sizes is None else list(sizes)
    mixed = rows.detach().clone()  # the one copy: J may be large
    for g, h in zip(centre.split(blocks), mixed.split(blocks, dim=1), strict=True):
        _unit_(h).mul_(beta * inner.norms(g[None])).add_(g, alpha=1 - beta)
    return _unit_(mixed).mul_(rho).to(local.dtype)


class SAMO(GradientBalancer):
    r"""Balance the task gradients that are found a small step uphill (sharpness-aware).

    .. math:: d = A(\tilde J), \qquad
              \tilde g_t = \nabla_\theta \ell_t(\theta + \epsilon_t, \psi_t + \epsilon^\psi_t)

    with another balancer :math:`A` and the perturbations of :func:`samo_perturbations`, of length
    :math:`\rho`: a mix of the gradient of the mean loss, the same for all tasks, and of each
    task's own. Each task's own parameters are moved by
    :math:`\epsilon^\psi_t = \rho \nabla_\psi \bar \ell / \lVert \nabla_\psi \bar \ell \rVert` and
    get their plain gradients at the moved point.

    The paper estimates each task's gradient from two forward passes,
    :math:`h_t = (\ell_t(\theta + \mu z_t) - \ell_t(\theta - \mu z_t)) \, z_t / 2 \mu` with
    :math:`z_t \sim N(0, I)`. As only the direction of :math:`h_t` in each tensor is used, what
    remains of the difference is its sign.

    A step takes, in this order: the gradient of the mean loss of the tasks that are present; with
    ``local="estimate"`` :meth:`probes` and two losses of each task at them, in evaluation mode;
    :meth:`perturbations` and :meth:`head_perturbation`; a forward and backward pass a task at the
    perturbed parameters, with the dropout masks of the first one; and :meth:`direction` of the
    gradients found there, times loss weights if there are any. It needs the whole batch and whole
    parameters: no accumulation, no divided columns, no FSDP2.

    Deviations: the perturbation is free of the absolute 1e-12 in the authors' code. One of its four
    codes (NYUv2) leaves the normalisation in each tensor out, and one (QM9) moves the heads by
    their whole gradient; this follows the other ones. The adaptive variant is left out.

    Args:
        base: the balancer :math:`A`, with plain head gradients; ``None`` adds the gradients up (the
            authors' codes multiply that sum by the number of tasks).
        rho: length :math:`\rho` of the perturbations, finite and above 0. The authors' scripts
            have 0.001, and 0.00001 for QM9.
        beta: share :math:`\beta` of a task's own direction, in [0, 1] (one minus the paper's
            :math:`\alpha`). The authors' scripts have 0.5, and 0.9 for QM9. With 0 all tasks share
            one perturbation, that of the mean loss.
        local: :math:`h_t` from two forward passes (``"estimate"``, the paper's), or the gradient of
            the task itself (``"gradient"``), which the paper's estimate stands for.
        radius: :math:`\mu`, finite and above 0; the authors' 0.01.
        seed: where the random numbers start; ``None`` takes PyTorch's initial seed.

    Raises:
        ValueError: ``base`` is no gradient balancer, or balances losses too, weighs heads, takes
            micro-batches apart or looks at other gradients than those of all shared parameters;
            or an argument is out of range.

    References:
        Ban, Subramani & Ji, *SAMO: A Lightweight Sharpness-Aware Approach for Multi-Task
        Optimization with Joint Global-Local Perturbation*, ICCV 2025, arXiv 2507.07883.
    """

    def __init__(
        self,
        base: GradientBalancer | None = None,
        rho: float = 1e-3,
        beta: float = 0.5,
        local: Local = "estimate",
        radius: float = 0.01,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(base, LossBalancer) or not isinstance(base, (GradientBalancer, type(None))):
            raise ValueError(
                f"Expected `base` of SAMO to be a gradient balancer that is no loss balancer too, "
                f"found {type(base).__name__}. Use for example MinNorm()."
            )
        if base is not None and (
            base.weight_heads or base.batches != 1 or base.gradients != "parameters"
        ):
            raise ValueError(
                f"Expected `base` of SAMO to leave head gradients plain and to look at one "
                f"Jacobian of all shared parameters, found {type(base).__name__} with "
                f"`weight_heads={base.weight_heads}`, `batches={base.batches}` and "
                f"`gradients={base.gradients!r}`. Change these, or use another base."
            )
        self.base = base
        self.requires_positive_losses = base is not None and base.requires_positive_losses
        self.rho = in_range(self, "rho", rho, open_low=True)
        self.beta = in_range(self, "beta", beta, 0.0, 1.0, open_high=False)
        self.local: Local = one_of(self, "local", local, get_args(Local))
        self.radius = in_range(self, "radius", radius, open_low=True)
        self.seed = seed
        self.add_generator(seed)

    @property
    def gramian_weighted(self) -> bool:
        """Whether the base is; of the gradients at the perturbed parameters."""
        return self.base is None or self.base.gramian_weighted

    def probes(self, like: Tensor, count: int) -> Tensor:
        r"""Displacements :math:`\mu z_t` of the shared parameters, at whose ends to take losses.

        Args:
            like: the shared parameters, or a gradient of them, shape ``(P,)``.
            count: number of tasks :math:`T`.

        Returns:
            Shape ``(T, P)`` in the dtype and on the device of ``like``; the same on every rank.
        """
        drawn = torch.randn(count, len(like), dtype=torch.float32, generator=self.generator)
        return (self.radius * drawn).to(like)

    def perturbations(self, average: Tensor, local: Tensor) -> Tensor:
        r"""See :func:`samo_perturbations`, for the shared tensors of the run.

        Args:
            average: gradient of the mean loss, shape ``(P,)``.
            local: with ``local="estimate"`` the probes, each times
                :math:`\ell_t(\theta + \mu z_t) - \ell_t(\theta - \mu z_t)`; otherwise the Jacobian.
                Shape ``(T, P)``.

        Returns:
            Shape ``(T, P)`` in the dtype of ``local``.
        """
        sizes = None if self.columns is None else self.columns.sizes
        return samo_perturbations(average, local, self.rho, self.beta, sizes)

    def head_perturbation(self, gradient: Tensor) -> Tensor:
        """A step of length ``rho`` uphill for a task's own parameters; zero for a zero gradient.

        Args:
            gradient: of the mean loss by the task's own parameters, shape ``(P_t,)``.
        """
        step = at_least_float32(gradient).detach().clone()
        return _unit_(step).mul_(self.rho).to(gradient.dtype)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Weights of the base.

        Args:
            gramian: of the gradients at the perturbed parameters, shape ``(T, T)``.
            losses: shape ``(T,)``.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        if self.base is None:
            return gramian.new_ones(len(gramian))
        return self.base.weights(gramian, losses)

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Direction of the base.

        Args:
            jacobian: task gradients at the perturbed parameters, shape ``(T, P)``.
            losses: shape ``(T,)``.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.
        """
        if self.base is None:
            return jacobian.sum(0)
        return self.base.direction(jacobian, losses)


def _unit_(vectors: Tensor) -> Tensor:
    """Vectors of length one in the last dimension, in place; zero vectors stay zero."""
    norms = inner.norms(torch.atleast_2d(vectors)).view(*vectors.shape[:-1], 1)
    return vectors.div_(torch.where(norms == 0, 1.0, norms))
