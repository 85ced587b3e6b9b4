"""The short trainings of a diagnosis: all tasks together, and each alone for as many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightning.pytorch import Callback

from lightning_mtl.compare.texts import error_text
from lightning_mtl.diagnose import DiagnoseError
from lightning_mtl.diagnose.record import GradientRecorder, LossCurve, Point

# Builds and runs one training: callbacks to add, and the only task to train or ``None`` for all.
Train = Callable[[Sequence[Callback], "str | None"], None]


@dataclass
class Study:
    """What the trainings of a diagnosis gave.

    Attributes:
        tasks: names of the tasks, in the order of every row.
        groups: names of the groups of shared layers.
        points: the measured steps.
        curve: losses of every step, all tasks together.
        alone: losses of every step of each task alone; empty where that was not asked for.
        unsplittable: why batches could not be divided; empty where they could.
        shared: number of shared parameters.
    """

    tasks: list[str]
    groups: list[str]
    points: list[Point]
    curve: list[dict[str, float]]
    alone: dict[str, list[float]] = field(default_factory=dict)
    unsplittable: str = ""
    shared: int = 0


def study(train: Train, steps: int, measured: int, *, alone: bool = True) -> Study:
    """Train for some steps and measure.

    Args:
        train: what runs one training.
        steps: optimiser steps of each.
        measured: of how many to measure the gradients.
        alone: also train every task alone.

    Raises:
        DiagnoseError: no step was made, there are fewer than two tasks, or nothing was measured.
    """
    recorder = GradientRecorder(steps, measured)
    train([recorder], None)
    if not recorder.losses:
        raise DiagnoseError(
            "Expected a batch to measure but the training made no optimiser step. Look for an "
            "empty training loader, and for limits of the trainer such as `max_steps: 0` or "
            "`limit_train_batches: 0`."
        )
    if len(recorder.tasks) == 1:
        raise DiagnoseError(
            f"Expected at least 2 tasks whose gradients meet but found {recorder.tasks}: there is "
            f"nothing to balance. Train with `lightning-mtl fit`, or look at `active_tasks` and "
            f"`balance=False`."
        )
    if recorder.trouble is not None and not recorder.points:
        raise DiagnoseError(
            f"Expected losses that can be computed again from the same batch, as a diagnosis does "
            f"before the step itself, but that failed. {error_text(recorder.trouble)} Let "
            f"`task_losses` depend on the batch and the parameters alone."
        ) from recorder.trouble
    if not recorder.points or recorder.shared is None:
        raise DiagnoseError(
            f"Expected two tasks in one batch but no step of {len(recorder.losses)} had them, or "
            f"none was taken, so task gradients never meet. Mix data sets within a batch, ask for "
            f"more --steps, or see docs/choosing.md for tasks that come in turn."
        )
    found = Study(
        recorder.tasks,
        recorder.shared.groups,
        recorder.points,
        recorder.losses,
        unsplittable=recorder.unsplittable,
        shared=recorder.shared.total,
    )
    for task in recorder.tasks if alone else ():
        curve = LossCurve(len(recorder.losses))
        train([curve], task)
        found.alone[task] = [losses[task] for losses in curve.losses if task in losses]
    return found
