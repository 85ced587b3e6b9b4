"""The paper's stopping rule."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mtl import MultiTaskModule


class StopWithoutImprovement(Callback):
    """Stop when no validation metric of any training task has improved for some epochs.

    Lightning's EarlyStopping watches a single number, and two of them would stop as soon as the
    first task has converged.

    Args:
        patience: epochs without improvement after which to stop.
    """

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"Expected `patience` to be at least 1 but found {patience}.")
        self.patience = patience
        self.waited = 0
        self.best: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: MultiTaskModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        improved = False
        for directions in pl_module.metric_directions().values():
            for name, higher_is_better in directions.items():
                value = trainer.callback_metrics[name].item()
                value = value if higher_is_better else -value
                if value > self.best.get(name, float("-inf")):
                    self.best[name] = value
                    improved = True
        self.waited = 0 if improved else self.waited + 1
        if self.waited >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"waited": self.waited, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.waited, self.best = state_dict["waited"], dict(state_dict["best"])
