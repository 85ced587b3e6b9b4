"""What the tests of methods that go through tasks in an order share."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer


def random_step(
    rng: np.random.Generator, size: int, width: int = 10, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gradients that often conflict, and positive losses."""
    rows = rng.standard_normal((size, width)) * 10 ** rng.uniform(-spread, spread, (size, 1))
    return torch.from_numpy(rows), torch.from_numpy(10 ** rng.uniform(-1, 1, size))


def permutations(rng: np.random.Generator, size: int) -> list[list[int]]:
    return [rng.permutation(size).tolist() for _ in range(size)]


def saved(balancer: Balancer) -> dict:
    """The state after a round trip through a checkpoint file."""
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
