"""Columns divided over two processes, here threads: the direction of a process that has all."""

from __future__ import annotations

from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancer import Columns
from lightning_mtl.gradient_balancers.excess_mtl import ExcessMTL
from lightning_mtl.gradient_balancers.grad_drop import GradDrop
from lightning_mtl.gradient_balancers.mo_co import MoCo
from lightning_mtl.gradient_balancers.momentum_con_fig import MomentumConFIG
from lightning_mtl.gradient_balancers.mtadam import MTAdam

WHOLE = Columns(("weight", "bias"), (5, 3))
PARTS = [(slice(0, 4), (4, 0)), (slice(4, 8), (1, 3))]
SIZE, WIDTH, STEPS, SAVED = 3, 8, 8, 4
MAKE: dict[str, Callable[[], Any]] = {
    "GradDrop": lambda: GradDrop(seed=2),
    "MoCo": lambda: MoCo(gamma=1.0),
    "MoCo(normalize)": lambda: MoCo(projection="softmax", normalize=True),
    "ExcessMTL": lambda: ExcessMTL(step_size=1.0),
    "MTAdam": MTAdam,
    "MomentumConFIG": MomentumConFIG,
}


class Part:
    """One of the two processes, and what it has to exchange with the other one."""

    total = WIDTH

    def __init__(self, rank: int, barrier: Barrier, sent: list[Any]) -> None:
        self.columns = PARTS[rank][0]
        self.rank, self.barrier, self.sent = rank, barrier, sent

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self.sent[self.rank] = tensor.clone()
        self.barrier.wait()
        both = list(self.sent)
        self.barrier.wait()
        return both

    def sum(self, partial: Tensor) -> Tensor:
        return torch.stack(self._exchange(partial)).sum(0)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor[..., self.columns].clone() if tensor.shape[-1] == WIDTH else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange(tensor), dim=-1)


def steps() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(SIZE, WIDTH, generator=generator, dtype=torch.float64),
            torch.rand(SIZE, generator=generator, dtype=torch.float64) + 0.1,
        )
        for _ in range(STEPS)
    ]


@pytest.mark.parametrize("name", MAKE)
def test_divided_columns(name: str) -> None:
    whole, data = MAKE[name](), steps()
    whole.columns = WHOLE
    expected = []
    for k, step in enumerate(data):
        if k == SAVED:
            state = whole.state_dict()
        expected.append(whole.direction(*step))

    barrier, sent, found, ends = Barrier(2, timeout=30), [None, None], [[], []], [{}, {}]

    def work(rank: int, resumed: bool) -> None:
        part = Part(rank, barrier, sent)
        balancer = MAKE[name]()
        if resumed:
            balancer.load_state_dict(state)  # it holds all columns
        balancer.columns = Columns(WHOLE.names, PARTS[rank][1])
        balancer.shards, balancer.sum_shards = part, part.sum
        for jacobian, losses in data[SAVED if resumed else 0 :]:
            found[rank].append(balancer.direction(jacobian[:, part.columns], losses))
        ends[rank] = balancer.state_dict()

    for resumed in (False, True):
        found[0].clear()
        found[1].clear()
        threads = [Thread(target=work, args=(rank, resumed)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        directions = [torch.cat(pair) for pair in zip(*found, strict=True)]
        assert len(directions) == STEPS - (SAVED if resumed else 0)
        torch.testing.assert_close(directions, expected[-len(directions) :])
        for end in ends:
            torch.testing.assert_close(end["state"], whole.state_dict()["state"])
