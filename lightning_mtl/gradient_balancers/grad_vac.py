"""Task gradients pulled to the cosines they usually have (GradVac)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights, at_least_float32
from lightning_mtl.gradient_balancers._orders import Order, draw_orders, orders_array
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.quadratic import gramian_array, to_numpy, unit_gramian
from lightning_mtl.numerics.storage import combined

Groups = Literal["model", "layer", "tensor"]

# Targets nearer to 1 or -1 count as these: the correction would divide by zero at 1.
_LIMIT = 1.0 - 1e-4
_EPS = float(np.finfo(np.float64).eps)


def grad_vac_weights(
    gramian: Tensor,
    targets: Tensor,
    beta: float = 0.5,
    orders: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Weights of the sum of the corrected task gradients, and the targets after this step.

    Each task starts from :math:`p_i = g_i` and meets the others in its order. With :math:`\phi =
    \cos(p_i, g_j)` below the target :math:`\rho_{ij}`,

    .. math:: p_i \leftarrow p_i + \frac{\lVert p_i \rVert}{\lVert g_j \rVert} \left( \rho_{ij}
              \sqrt{\frac{1 - \phi^2}{1 - \rho_{ij}^2}} - \phi \right) g_j

    gives :math:`\cos(p_i, g_j) = \rho_{ij}`. In any case :math:`\rho_{ij} \leftarrow (1 - \beta)
    \rho_{ij} + \beta \phi`.

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device; or one for each of
            ``K`` groups of parameters, shape ``(K, T, T)``.
        targets: :math:`\rho`, in [-1, 1], in the shape of ``gramian``; zeros at first.
        beta: how fast the targets follow the cosines, in [0, 1].
        orders: for each task a permutation of all tasks, counted from 0, in which its own place is
            passed over; the same for all groups. ``None`` for ascending order.

    Returns:
        Weights of shape ``(T,)`` or ``(K, T)``, in the dtype and on the device of ``gramian``, and
        the new targets in those of ``targets``. Where a gradient is zero, or nothing is left of it,
        there is no cosine: it stays as it is, and so does the target. With input that is not finite
        the weights are NaN and the targets stay.

    Raises:
        ValueError: ``gramian`` is not square, ``targets`` has another shape, or ``orders`` are no
            permutations.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> grad_vac_weights(gramian, torch.zeros(2, 2))
        (tensor([1.5000, 1.5000]), tensor([[ 0.0000, -0.2500],
                [-0.2500,  0.0000]]))
    """
    if targets.shape != gramian.shape:
        raise ValueError(
            f"Expected `targets` in the shape of `gramian`, {tuple(gramian.shape)}, found "
            f"{tuple(targets.shape)}. Start with `torch.zeros_like(gramian)`."
        )
    grouped = gramian.ndim == 3
    matrices = [gramian_array(m) for m in (gramian.detach().cpu() if grouped else [gramian])]
    size = len(matrices[0])
    visits = orders_array(orders, size)
    if not np.isfinite(matrices).all():
        return gramian.new_full(gramian.shape[:-1], torch.nan), targets
    units = [unit_gramian(matrix) for matrix in matrices]
    cosines, norms = np.stack([u[0] for u in units]), np.stack([u[1] for u in units])
    rho = to_numpy(targets).copy().reshape(-1, size, size)

    rows = np.arange(size)
    shares = np.tile(np.eye(size), (len(units), 1, 1))  # of unit gradients in p_i / |g_i|
    for met in visits.T:  # task i meets task met[i], in every group at once
        squares = np.einsum("kij,kij->ki", shares, shares @ cosines)
        rounding = size * _EPS * np.abs(shares).sum(2) ** 2
        defined = (squares > rounding) & (norms[:, met] > 0) & (met != rows)
        lengths = np.sqrt(np.where(defined, squares, 1.0))
        phi = np.einsum("kij,kij->ki", shares, cosines[:, met]) / lengths
        phi = np.clip(phi, -1.0, 1.0)
        target = rho[:, rows, met]
        aim = np.clip(target, -_LIMIT, _LIMIT)
        step = lengths * (aim * np.sqrt((1.0 - phi**2) / (1.0 - aim**2)) - phi)
        shares[:, rows, met] += np.where(defined & (phi < aim), step, 0.0)
        rho[:, rows, met] = np.where(defined, (1.0 - beta) * target + beta * phi, target)
    lengths = np.where(norms == 0, 1.0, norms)
    weights = (shares * lengths[:, :, None]).sum(1) / lengths
    return (
        as_weights(weights if grouped else weights[0], gramian),
        as_weights(rho.reshape(targets.shape), targets),
    )


class GradVac(GradientBalancer):
    r"""Pull task gradients to the cosines that they have had with each other, then add them up.

    .. math:: d = \sum_i p_i, \qquad
              p_i \leftarrow p_i + \frac{\lVert p_i \rVert}{\lVert g_j \rVert} \left( \rho_{ij}
              \sqrt{\frac{1 - \phi^2}{1 - \rho_{ij}^2}} - \phi \right) g_j
              \quad \text{if } \phi = \cos(p_i, g_j) < \rho_{ij}

    for all :math:`j \ne i` in random order, starting from :math:`p_i = g_i`. The targets, zero at
    first, are running means of the cosines: :math:`\rho_{ij} \leftarrow (1 - \beta) \rho_{ij} +
    \beta \phi`, with :math:`\phi` from before the correction. The first step is that of PCGrad;
    later ones also act on gradients without conflict, and let pass a conflict that is usual. Each
    task's own parameters get their plain gradients.

    Deviations: a target beyond :math:`\pm 0.9999` counts as that, since the correction grows
    without bound as it nears 1. A pair with a zero gradient, which has no cosine, is passed over,
    where codes without that case count its cosine as 0. Some codes move a target only when the
    correction acts.

    Args:
        beta: :math:`\beta`, in [0, 1]. The default is that of public codes (LibMTL, TorchJD); the
            paper's own value could not be checked.
        groups: what cosines are taken over: the whole ``"model"``, each ``"layer"`` (the parameters
            of one module) or each ``"tensor"``. The last two correct every group apart and need the
            task gradients themselves; the paper's parameter groups are this idea.
        order: ``"random"``, a permutation for each task at each step, the same for all groups; or
            ``"ascending"``, which draws nothing.
        scale: ``"sum"`` (that of PCGrad) or ``"mean"``, which is ``T`` times shorter.
        seed: where the random numbers start; ``None`` takes PyTorch's initial seed.
        gradients: what the task gradients are taken by; for ``groups="model"`` only.

    Raises:
        ValueError: an argument is out of range, or ``gradients`` does not go with ``groups``.

    References:
        Wang, Tsvetkov, Firat & Cao, *Gradient Vaccine: Investigating and Improving Multi-task
        Optimization in Massively Multilingual Models*, ICLR 2021.
    """

    targets: Tensor | None
    fixed_with_state = ("groups",)

    def __init__(
        self,
        beta: float = 0.5,
        groups: Groups = "model",
        order: Order = "random",
        scale: Scale = "sum",
        seed: int | None = None,
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.beta = in_range(self, "beta", beta, 0.0, 1.0, open_high=False)
        self.groups: Groups = one_of(self, "groups", groups, get_args(Groups))
        if groups != "model" and gradients != "parameters":
            raise ValueError(
                f"Expected `gradients='parameters'` of GradVac with `groups={groups!r}`, found "
                f"{gradients!r}. Use `groups='model'` for other gradients."
            )
        self.order: Order = one_of(self, "order", order, get_args(Order))
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.seed = seed
        self.add_generator(seed)
        self.add_state("targets", 0.0, per_task=True)

    @property
    def gramian_weighted(self) -> bool:
        """Whether the whole model is one group."""
        return self.groups == "model"

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Correct the whole gradients and move the targets.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.

        Raises:
            ValueError: there are several groups, whose weights differ.
        """
        if self.groups != "model":
            raise ValueError(
                f"Expected `groups='model'` for weights of GradVac, found {self.groups!r}: every "
                f"group of parameters has weights of its own. Call `direction` instead."
            )
        return rescaled(self._weights(gramian[None])[0], self.scale, "sum")

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Correct the gradients, group by group, and move the targets.

        Args:
            jacobian: shape ``(T, P)``; its groups are those of :attr:`columns`, or one by hand.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.
        """
        if self.groups == "model":
            return super().direction(jacobian, losses)
        wide = at_least_float32(jacobian)
        columns = self.columns
        names = self._groups(("",) if columns is None else columns.names)
        sizes = [jacobian.shape[1]] if columns is None else list(columns.sizes)
        number = {name: k for k, name in enumerate(dict.fromkeys(names))}
        group = torch.tensor([number[name] for name in names], device=wide.device)
        parts = wide.split(sizes, dim=1)
        gramians = self.sum_shards(torch.stack([inner.gramian(part) for part in parts]))
        summed = gramians.new_zeros(len(number), *gramians.shape[1:]).index_add_(0, group, gramians)
        weights = rescaled(self._weights(summed).T, self.scale, "sum")[:, group]
        found = [combined(part, weights[:, k]) for k, part in enumerate(parts)]
        return torch.cat(found).to(jacobian.dtype)

    def _groups(self, names: Sequence[str]) -> list[str]:
        """The group of each parameter: itself, or the module it belongs to."""
        return [n.rpartition(".")[0] if self.groups == "layer" else n for n in names]

    def widen(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Begin with targets of zero for groups that are new."""
        super().widen(names, sizes)
        if self.targets is not None and self.groups != "model" and self.columns is not None:
            more = set(self._groups(names)) - set(self._groups(self.columns.names))
            self.targets = torch.nn.functional.pad(self.targets, (0, len(more)))

    def _weights(self, gramians: Tensor) -> Tensor:
        """Weights of shape ``(K, T)`` for Gramians of shape ``(K, T, T)``."""
        groups, size = gramians.shape[:2]
        like = at_least_float32(gramians[0])
        targets = self.per_task_state("targets", like, (size, groups))
        orders = draw_orders(size, self.order, self.generator)
        weights, moved = grad_vac_weights(gramians, targets.permute(2, 0, 1), self.beta, orders)
        targets.copy_(moved.permute(1, 2, 0))
        return weights

    @contextmanager
    def _narrowed(self, tasks: Sequence[str], present: Sequence[int]) -> Iterator[None]:
        """Narrow the second dimension of the targets too, which stands for tasks as well."""
        with super()._narrowed(tasks, present):
            rows, index = self.targets, list(present)
            self.targets = None if rows is None else rows[:, index]
            try:
                yield
            finally:
                pairs = self.targets
                if pairs is not None:
                    if rows is None:
                        rows = pairs.new_zeros(len(index), len(tasks), pairs.shape[2])
                    rows = rows.to(pairs)
                    rows[:, index] = pairs
                self.targets = rows
