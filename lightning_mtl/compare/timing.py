"""What a step costs beside equal weighting, and one model beside a model per task."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback

from lightning_mtl.compare.build import RunCLI, callbacks_from, kind_of
from lightning_mtl.compare.recorders import ModelRecorder, PeakMemory, StepTimer
from lightning_mtl.compare.texts import error_text

Specs = Sequence[Mapping[str, Any]]

# Six: the range of six independent values holds their median with 1 - 2^-5 = 97 %, whatever their
# distribution is; with five it would be 94 %.
TURNS = 6
_BUDGET = 60.0  # seconds after which no further turn of the single-task models begins


def time_method(
    config: str,
    seed: int,
    method: str,
    specs: Specs,
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Short trainings for the time of a step and the peak of memory.

    The method and equal weighting take turns in this process, and in who begins, so that a machine
    that is slower for a while slows both: their ratio means more than either time.

    Args:
        config: path of the config.
        seed: of every training.
        method: its name, for errors.
        specs: its callbacks.
        tasks: those that have single-task models, which are measured with equal weighting.
        overrides: arguments of the method that replace those of the config.

    Returns:
        The fields of a record of the kind ``timing``.
    """
    memory = PeakMemory()
    own: list[float] = []
    equal: list[float] = []
    for turn in range(TURNS):
        order: list[tuple[list[float], Specs, Sequence[str]]]
        order = [(own, specs, overrides), (equal, (), ())]
        for times, chosen, replaced in order[:: 1 if turn % 2 == 0 else -1]:
            timer = StepTimer()
            # memory of the very first training: later ones find what it left to the process
            more = [memory] if turn == 0 and times is own else []
            _fit(config, seed, [*callbacks_from(method, chosen), *more, timer], None, replaced)
            times.append(1000 * statistics.median(timer.durations()))
    found: dict[str, Any] = {
        "step_ms": round(statistics.median(own), 4),
        "step_ratio": round(statistics.median(a / b for a, b in zip(own, equal, strict=True)), 4),
        "peak_mb": memory.peak_mb,
        "step_turns_ms": [round(value, 5) for value in own],
        "equal_turns_ms": [round(value, 5) for value in equal],
    }
    if kind_of(callbacks_from(method, specs)) == "equal":
        try:
            found["models"] = _models(config, seed, tasks)
        except Exception as error:  # it is shown beside the table, and must not cost the timing
            traceback.print_exc()
            found["models_error"] = error_text(error)
    return found


def _models(config: str, seed: int, tasks: Sequence[str]) -> dict[str, Any]:
    """The multi-task model and a model per task in turns: parameters, steps, evaluation."""
    names: list[str | None] = [None, *tasks]
    step: dict[str | None, list[float]] = {name: [] for name in names}
    answer: dict[str | None, list[float]] = {name: [] for name in names}
    parameters: dict[str | None, int] = {}
    timed = set()
    started = time.perf_counter()
    for turn in range(TURNS):
        if turn and time.perf_counter() - started > _BUDGET:
            break
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            timer = StepTimer(warm_up=5, least=15, seconds=0.05)
            model = ModelRecorder(count=turn == 0)
            _fit(config, seed, [timer, model], name)
            step[name].append(round(1000 * statistics.median(timer.durations()), 5))
            if model.forward_ms is not None:
                answer[name].append(round(model.forward_ms, 5))
                timed.add(model.timed)
            if model.parameters is not None:
                parameters[name] = model.parameters

    def of(name: str | None) -> dict[str, Any]:
        whole = len(timed) == 1 and all(len(v) == len(step[None]) for v in answer.values())
        return {
            "parameters": parameters.get(name),
            "step_turns_ms": step[name],
            "forward_turns_ms": answer[name] if whole else [],
        }

    return {
        "joint": of(None),
        "single": {task: of(task) for task in tasks},
        "timed": timed.pop() if len(timed) == 1 else None,
    }


def _fit(
    config: str,
    seed: int,
    callbacks: Sequence[Callback],
    task: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """A training that its :class:`StepTimer` ends."""
    short = {
        "max_steps": StepTimer.most,
        "max_epochs": -1,
        "min_epochs": None,
        "min_steps": None,
        "limit_val_batches": 1,
    }
    cli = RunCLI(config, seed, callbacks, short, may_stop_early=False, overrides=overrides)
    if task is not None:
        cli.model.active_tasks = [task]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
