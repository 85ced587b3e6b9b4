"""Ways of running DDP, and what Lightning does around a step: two ranks against one process."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_mtl import Balancer, DualBalance, LogLoss, MinNorm
from tests.common.models import Batched, Plain, Sum, sgd, trainer
from tests.ranks.rank_cases import TASKS, Labelled, _tensors, batches

STEPS = 10
BALANCERS: dict[str, Callable[[], Balancer] | None] = {
    "none": None,
    "LogLoss": LogLoss,
    "MinNorm": MinNorm,
    "DualBalance": DualBalance,
}


def one_optimizer(module: Any) -> Any:
    """That of the other tests."""
    return sgd(module.net.parameters())


def two_optimizers(module: Any) -> Any:
    """The trunk by SGD, the heads by Adam."""
    trunk = torch.optim.SGD(module.net.trunk.parameters(), lr=0.01, momentum=0.9)
    return [trunk, torch.optim.Adam(module.net.heads.parameters(), lr=0.003)]


# {variant: (options of DDP, flags of the Trainer, arguments of the module)}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "find_unused": ({"find_unused_parameters": True}, {}, {}),
    "static_graph": ({"static_graph": True}, {}, {}),
    "bucket_view": ({"gradient_as_bucket_view": True}, {}, {}),
    "clip_norm": ({}, {"gradient_clip_val": 0.3}, {}),
    "clip_value": ({}, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}, {}),
    "optimizers": ({}, {}, {"configure": two_optimizers}),
    "uneven": ({}, {}, {"counted": True}),
    "launched": ({}, {}, {"configure": one_optimizer}),  # a lambda cannot be sent to a process
}


class Fed(Labelled):
    """Brings its batches, which depend on the rank that it finds itself on."""

    def __init__(self, variant: str, **kwargs: Any) -> None:
        super().__init__(**{"counted": False, **kwargs})
        self.variant = variant

    def train_dataloader(self) -> Batched:
        return data(self.trainer.global_rank, self.trainer.world_size, self.variant)


def data(rank: int, world: int, variant: str) -> Batched:
    """This rank's part of ten batches; with ``uneven`` the last has five and two samples."""
    every = batches(rank, world, missing=False)[:STEPS]
    if variant == "uneven":
        x, targets = batches(0, 1, missing=False)[STEPS]
        part = slice(0, 7) if world == 1 else slice(0, 5) if rank == 0 else slice(5, 7)
        every.append((x[part], {task: y[part] for task, y in targets.items()}))
    return Batched(every)


def fit(method: str, variant: str, world: int, strategy: Any = None) -> dict[str, Any]:
    """What a fit ends with in this process."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options, flags, arguments = VARIANTS[variant]
    make = BALANCERS[method]
    balancers = [] if make is None else [make()]
    run = trainer(
        devices=world,
        strategy=strategy or (DDPStrategy(**options) if world > 1 else "auto"),
        use_distributed_sampler=False,
        callbacks=list(balancers),
        **flags,
    )
    module = Fed(variant, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module)
    return {
        "weights": torch.cat([p.detach().flatten() for p in module.net.parameters()]),
        "state": [v for b in balancers for v in _tensors(b)],
        "steps": run.global_step,
    }


def batch_norm(plain: bool, rank: int, world: int, **flags: Any) -> dict[str, Any]:
    """A fit with BatchNorm in the trunk: balanced as equal weighting, or Lightning's own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module: Any = Plain(tasks=TASKS) if plain else Labelled(False)
    module.net.trunk.insert(1, nn.BatchNorm1d(8))
    run = trainer(
        devices=world,
        strategy=DDPStrategy(),
        use_distributed_sampler=False,
        callbacks=[] if plain else [Sum()],
        **flags,
    )
    error = None
    try:
        run.fit(module, data(rank, world, "plain"))
    except ValueError as found:
        error = str(found)
    norm = module.net.trunk[1]
    return {
        "weights": torch.cat([p.detach().flatten() for p in module.net.parameters()]),
        "buffers": torch.cat([norm.running_mean, norm.running_var]),
        "error": error,
    }


def run(case: str, rank: int, world: int) -> dict[str, Any]:
    """``variant|method``, or one about BatchNorm."""
    variant, _, method = case.partition("|")
    if variant == "batch norm":
        return batch_norm(method == "plain", rank, world)
    if variant == "sync_batchnorm":
        return batch_norm(False, rank, world, sync_batchnorm=True)
    return fit(method, variant, world)


if __name__ == "__main__":  # processes that the Trainer starts itself
    torch.set_num_threads(1)
    for wanted in sys.argv[2:]:
        launcher, _, method = wanted.partition("|")
        torch.save(fit(method, "launched", 2, launcher), Path(sys.argv[1]) / f"{wanted}.pt")
