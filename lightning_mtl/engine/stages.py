"""Which balancers a Trainer has: at most one for the losses, at most one for the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mtl.balancer import Balancer, GradientBalancer, LossBalancer
from lightning_mtl.ranks import OneProcess


def attached_balancers(
    callbacks: Iterable[Callback],
) -> tuple[LossBalancer | None, GradientBalancer | None]:
    """The loss balancer and the gradient balancer among ``callbacks``; a hybrid is both.

    Raises:
        MisconfigurationException: two balancers of one stage.
    """
    balancers = [c for c in callbacks if isinstance(c, Balancer)]
    loss = [b for b in balancers if isinstance(b, LossBalancer)]
    gradient = [b for b in balancers if isinstance(b, GradientBalancer)]
    for stage, found in (("loss", loss), ("gradient", gradient)):
        if len(found) > 1:
            names = ", ".join(type(b).__name__ for b in found)
            hybrid = [
                type(b).__name__
                for b in found
                if isinstance(b, LossBalancer) == isinstance(b, GradientBalancer)
            ]
            reason = f" {hybrid[0]} balances losses and gradients by itself." if hybrid else ""
            raise MisconfigurationException(
                f"Expected at most one {stage} balancer among the Trainer's callbacks but found "
                f"{names}.{reason} Keep one of them."
            )
    return (loss[0] if loss else None), (gradient[0] if gradient else None)


def check_tasks(balancers: Iterable[Balancer | None], tasks: Sequence[str]) -> None:
    """Let balancers that are configured by task name check the names."""
    for balancer in balancers:
        if balancer is None:
            continue
        balancer._known_tasks = tuple(tasks)
        balancer.check_tasks(tasks)
        check_tasks(balancer.nested().values(), tasks)


def warn_of_one_task(balancer: Balancer | None, tasks: Sequence[str]) -> None:
    """Say that a gradient balancer has nothing to balance."""
    if balancer is not None and len(tasks) == 1:
        rank_zero_warn(
            f"{type(balancer).__name__} has the gradient of '{tasks[0]}' only, and with one task "
            f"there is nothing to balance. Train without it, or with more `active_tasks`."
        )


def same_tasks(tasks: Sequence[str], ranks: OneProcess) -> None:
    """Refuse ranks that train different tasks, before any of them waits for another.

    Raises:
        ValueError: they do.
    """
    found = ranks.gather(list(tasks))
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"Expected the same tasks in the same order on every rank but rank 0 trains "
                f"{found[0]} and rank {rank} {other}. Declare the tasks in the module, or return a "
                f"dict with every task on every rank, `None` for one without labels."
            )
