"""Fits of SAMO for the tests of ranks, with perturbations large enough to show."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_mtl import LogLoss, MinNorm
from lightning_mtl.gradient_balancers.samo import SAMO
from tests.common.models import weights
from tests.ranks.rank_cases import fit

# How labels are missing, and how the own part of a task is found.
CASES = ("plain|estimate", "missing|estimate", "missing|gradient")


def run(case: str, rank: int, world: int, rho: float = 0.5) -> Tensor:
    """Parameters after a fit of twenty batches."""
    variant, _, local = case.partition("|")
    chosen: Any = local
    base = MinNorm() if variant == "plain" else None
    balancer = SAMO(base, rho=rho, local=chosen, seed=3)
    _, module = fit([balancer, LogLoss()], rank, world, variant)
    return weights(module)
