"""Gradients of the parameters outside the rows: a task's own, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.engine.gradients.host import non_finite
from lightning_mtl.numerics.flat import real, with_places
from lightning_mtl.ranks.one_process import OneProcess


class HeadGradients:
    """Head gradients of every task in one optimiser step, added up over micro-batches.

    Args:
        num_tasks: number of active tasks T.
    """

    def __init__(self, num_tasks: int) -> None:
        self.by_task: list[dict[str, Tensor]] = [{} for _ in range(num_tasks)]
        self._owned = False

    def begin(self) -> None:
        """Start a new optimiser step."""
        self.by_task = [{} for _ in self.by_task]
        self._owned = False

    def add(self, task: int, names: Sequence[str], grads: Sequence[Tensor | None]) -> None:
        """Add gradients of the named parameters; ``None`` where a task does not reach one."""
        heads = self.by_task[task]
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                heads[name] = heads[name] + grad if name in heads else grad

    def own(self) -> list[Tensor]:
        """The gradients, copied once, since weights, checks and clipping work in place.

        Two parameters may have got one tensor from autograd, or one with stride 0.
        """
        grads = self._all()
        if not self._owned:
            # Where single calls cost less.
            on_cpu = all(grad.device.type == "cpu" for grad in grads)
            grads = [g.clone() for g in grads] if on_cpu else list(torch._foreach_mul(grads, 1.0))
            copies = iter(grads)
            self.by_task = [dict(zip(heads, copies, strict=False)) for heads in self.by_task]
            self._owned = True
        return grads

    def flag(self) -> Tensor:
        """A number on the device, above zero if a gradient is not finite."""
        return non_finite(self.own())

    def sizes(self) -> list[float]:
        """Zero for each task, or infinity where a gradient of it is not finite."""
        self.own()
        flags = [non_finite(list(heads.values())) for heads in self.by_task]
        device = next((f.device for f in flags if f.device.type != "cpu"), flags[0].device)
        found = torch.stack([f.to(device) for f in flags]).tolist()
        return [math.inf if flag else 0.0 for flag in found]

    def weighted(self, weights: Tensor | None) -> dict[str, Tensor]:
        """The gradients by name, each task's times its weight; ``None`` for ones."""
        grads = self.own()
        if weights is not None and grads:
            weights = weights.to(grads[0].device)
            for weight, heads in zip(weights, self.by_task, strict=True):
                for grad in heads.values():  # a scalar for `_foreach_mul_` would be read
                    grad.mul_(weight)
        found: dict[str, Tensor] = {}
        for heads in self.by_task:
            for name, grad in heads.items():
                # A parameter outside the rows may still belong to several tasks: their sum.
                found[name] = found[name] + grad if name in found else grad
        return found

    def _all(self) -> list[Tensor]:
        return [grad for heads in self.by_task for grad in heads.values()]


def summed_heads(
    found: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    ranks: OneProcess,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Head gradients of all ``parameters`` summed over ranks, as real numbers in one vector."""
    own = [real(p.detach()) for p in parameters.values()]
    flat = torch.zeros(sum(p.numel() for p in own), dtype=dtype, device=ranks.device)
    parts = dict(zip(parameters, with_places(flat, own), strict=True))
    refuse_sparse(list(found), list(found.values()))
    for name, grad in found.items():
        parts[name].copy_(real(grad))
    ranks.sum_(flat)
    return parts


def refuse_sparse(names: Sequence[str], grads: Sequence[Tensor]) -> None:
    """Refuse sparse gradients where they would be put beside others.

    Raises:
        ValueError: there are some.
    """
    sparse = [n for n, g in zip(names, grads, strict=True) if g.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"Expected dense gradients of shared parameters, and of all that several processes sum "
            f"up, but found sparse ones of {sparse[:4]}. Use nn.Embedding(sparse=False), or train "
            f"in one process without a gradient balancer."
        )
