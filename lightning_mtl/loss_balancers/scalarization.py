"""Fixed weights for the task losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_mtl.balancer import LossBalancer, as_weights


class Scalarization(LossBalancer):
    r"""Weigh the task losses by constants.

    .. math:: \omega_t = c_t

    Always one backward pass. A well chosen constant is a strong rival of every adaptive method.

    Args:
        weights: weights by task name, where tasks not named weigh 1; or one weight for every task,
            in the order of the module's tasks. Finite and at least zero.

    Raises:
        ValueError: a weight is negative or not finite, or there are none.

    References:
        Kurin et al., *In Defense of the Unitary Scalarization for Deep Multi-Task Learning*,
        NeurIPS 2022. Xin et al., *Do Current Multi-Task Optimization Methods in Deep Learning Even
        Help?*, NeurIPS 2022.

    Example:
        >>> import torch
        >>> Scalarization([1.0, 30.0]).loss_weights(torch.tensor([2.0, 0.5]))
        tensor([ 1., 30.])
    """

    needs_current_losses = False
    stateless = True

    def __init__(self, weights: dict[str, float] | list[float]) -> None:
        super().__init__()
        if not weights:
            raise ValueError(
                "Expected `weights` of Scalarization to hold at least one weight, found none. "
                "Use EqualWeighting for weights of 1."
            )
        items = weights.items() if isinstance(weights, dict) else enumerate(weights)
        for key, weight in items:
            number = isinstance(weight, Real) and math.isfinite(weight)
            if not (number and weight >= 0):
                raise ValueError(
                    f"Expected every entry of `weights` of Scalarization to be finite and at least "
                    f"0, found {weight!r} for task {key!r}."
                )
        self.weights = dict(weights) if isinstance(weights, dict) else list(weights)
        self._by_name = dict(weights) if isinstance(weights, dict) else None

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Compare the weights with all tasks of the run, and give a list of weights their names.

        Args:
            tasks: every task of the run, in order.

        Raises:
            ValueError: a weight is for an unknown task, or a list has another length.
        """
        if isinstance(self.weights, dict):
            unknown = sorted(set(self.weights) - set(tasks))
            if unknown:
                raise ValueError(
                    f"Scalarization has weights for the unknown tasks {unknown}; the tasks are "
                    f"{list(tasks)}. Correct the names in `weights`."
                )
        elif len(self.weights) != len(tasks):
            raise ValueError(
                f"Expected `weights` of Scalarization to hold one weight for each of the "
                f"{len(tasks)} tasks {list(tasks)}, found {len(self.weights)}. Give one weight a "
                f"task, or weights by task name."
            )
        else:
            self._by_name = dict(zip(tasks, self.weights, strict=True))

    def hyperparameters(self) -> dict[str, Any]:
        """The weights, so that a change of them is reported when a run is resumed."""
        return {"weights": self.weights}

    def loss_weights(self, losses: Tensor) -> Tensor:
        """The fixed weights of the tasks of this call.

        Args:
            losses: task losses, shape ``(T,)``, any float dtype.

        Returns:
            Weights of the shape, dtype and device of ``losses``.

        Raises:
            ValueError: a list of another length than ``losses``, or names without tasks.
        """
        if self._by_name is not None and self.tasks:
            return as_weights([self._by_name.get(task, 1.0) for task in self.tasks], losses)
        if isinstance(self.weights, dict):
            raise ValueError(
                "Scalarization holds weights by task name but knows no task names in this call. "
                "Call it through a MultiTaskModule, set `tasks`, or pass a list of weights."
            )
        if len(self.weights) != len(losses):
            raise ValueError(
                f"Expected `losses` of Scalarization to hold {len(self.weights)} losses, one for "
                f"each weight, found {len(losses)}. Call `check_tasks` with all task names first "
                f"if some tasks are absent."
            )
        return as_weights(self.weights, losses)
