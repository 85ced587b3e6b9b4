"""Which weights of a training count: the last ones, those of the last k, or the best ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mtl.compare import CompareError
from lightning_mtl.metrics.delta_p import delta_p

LAST, LAST_K, BEST = SELECT = ("last", "last_k_mean", "best_val")

Metrics = dict[str, dict[str, float]]


class Kept(Callback):
    """Keeps copies of the weights that count, in the memory of the CPU.

    Args:
        select: ``last_k_mean`` keeps those of the last ``k`` validations of the training,
            ``best_val`` the one of the validation with the highest Δp.
        k: how many.
        read: metrics from what the trainer logged.
        directions: ``{task: {metric: higher is better}}``.
        reference: what Δp is relative to; the first validation for tasks that it lacks.
    """

    def __init__(
        self,
        select: str,
        k: int,
        read: Callable[[Mapping[str, Any]], Metrics],
        directions: Mapping[str, Mapping[str, bool]],
        reference: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.select, self.read, self.directions = select, read, directions
        self.reference = {task: dict(metrics) for task, metrics in reference.items()}
        self.states: deque[dict[str, Any]] = deque(maxlen=k if select == LAST_K else 1)
        self.best: float | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights, if they count."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.select == BEST:
            found = self.read(trainer.callback_metrics)
            base = {
                task: {m: self.reference.setdefault(task, metrics)[m] or 1.0 for m in metrics}
                for task, metrics in found.items()
            }
            score = fmean(delta_p(found, base, self.directions).values())
            if self.best is not None and score <= self.best:
                return
            self.best = score
        state = pl_module.state_dict()
        self.states.append({name: _copied(value) for name, value in state.items()})

    def mean(self, module: LightningModule, evaluate: Callable[[], Metrics]) -> Metrics:
        """Metrics of what was kept, the mean over the copies."""
        if not self.states:
            raise CompareError(
                f"Expected a validation during the training for `--select {self.select}` but none "
                f"took place. Let `trainer.check_val_every_n_epoch` and the limits admit one."
            )
        found = []
        for state in self.states:
            module.load_state_dict(state)
            found.append(evaluate())
        return {
            task: {metric: fmean(run[task][metric] for run in found) for metric in metrics}
            for task, metrics in found[0].items()
        }


def _copied(value: Any) -> Any:
    # a copy on the CPU also where the value is there already: training goes on in place
    return value.detach().to("cpu", copy=True) if hasattr(value, "detach") else value
