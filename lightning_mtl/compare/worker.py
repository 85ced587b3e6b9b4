"""One run in a process of its own."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

from lightning_mtl import GradientBalancer
from lightning_mtl.compare import CompareError
from lightning_mtl.compare.build import RunCLI, callbacks_from
from lightning_mtl.compare.folder import file_hash, leave_locks
from lightning_mtl.compare.grid import Run
from lightning_mtl.compare.recorders import CurveRecorder
from lightning_mtl.compare.selection import LAST, Kept
from lightning_mtl.compare.stopping import left_to_parent
from lightning_mtl.compare.texts import error_text
from lightning_mtl.compare.timing import time_method
from lightning_mtl.compare.tuning.settings import arguments, with_settings
from lightning_mtl.parsing import use_current_directory

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_RECORDED = 3  # seeds whose task gradients are kept, for a band; a file grows with tasks squared


@dataclass(frozen=True)
class Job:
    """What all runs of a comparison share.

    Attributes:
        config: path of the config.
        config_hash: its content when the comparison started.
        methods: callbacks of every balancer, by name.
        metrics: ``{task: {metric: name it is logged under}}``, on ``split``.
        split: ``val`` or ``test``.
        logs: folder for what runs print.
        directions: ``{task: {metric: higher is better}}``.
        validation: as ``metrics``, on validation data, which trials are evaluated on.
        select: which weights of a training count, see :mod:`lightning_mtl.compare.selection`.
        last_k: how many of them, with ``last_k_mean``.
        reference: single-task metrics on validation data, for ``best_val``.
    """

    config: str
    config_hash: str
    methods: Mapping[str, list[dict[str, Any]]]
    metrics: Mapping[str, Mapping[str, str]]
    split: str
    logs: Path
    directions: Mapping[str, Mapping[str, bool]]
    validation: Mapping[str, Mapping[str, str]]
    select: str = LAST
    last_k: int = 1
    reference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def work(run: Run, job: Job, connection: Connection) -> None:
    """Do ``run`` in this process and send its record; never raises."""
    left_to_parent()
    end_with_parent()
    leave_locks()
    use_current_directory()
    torch.set_num_threads(1)  # the same sums in the same order, however many workers there are
    started = time.perf_counter()
    record = run.record()
    try:
        _print_to(job.logs / f"{run.name}.log")
        _check_config(job)
        if run.kind == "timing":
            specs, own = _specs(run, job), arguments(run.settings)
            found = time_method(job.config, run.seed, run.method, specs, list(job.metrics), own)
        else:
            found = _train(run, job)
        _check_config(job)  # it may have changed while the run read it
        record.update(status="finished", **found)
    except BaseException as error:  # a user's SystemExit too
        with suppress(OSError):  # on a full disk there is no log
            traceback.print_exc()
        record.update(status="failed", error=error_text(error))
    record["seconds"] = round(time.perf_counter() - started, 3)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    connection.send(record)


def _print_to(path: Path) -> None:
    """Let all that this process prints, and what it calls, go to a file."""
    log = path.open("w", encoding="utf-8", errors="backslashreplace", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log


def _check_config(job: Job) -> None:
    if file_hash(job.config) != job.config_hash:
        raise CompareError(
            f"Expected {job.config} as it was when the comparison started, but it has changed. Put "
            f"it back and start the same command again, or start another comparison with another "
            f"--out."
        )


def end_with_parent() -> None:
    """End when the command does, however it ends, and let what is forked here end with this.

    On Linux the system sees to it, whatever a process is doing: also to workers of a data loader,
    who look for their parent only between batches. Elsewhere a thread sees to this process, which
    has to wait while code in C holds the interpreter's lock.
    """
    parent = parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        _end_with(parent.pid)
        _let_children_end_with(os.getpid())
    threading.Thread(target=_wait_for, args=(parent.sentinel,), daemon=True).start()


def _end_with(parent: int | None) -> None:
    """Have the system kill this process when its parent ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3)
    if os.getppid() != parent:  # it had ended before it could be asked for
        os._exit(1)


def _let_children_end_with(process: int) -> None:
    """Do the same in what ``process`` forks from its main thread.

    Not in what other threads fork: the system counts the thread as the parent, and it may end
    before. Not in a child's children: a daemon outlives the child that forked it on purpose.
    """
    from_main = False

    def before() -> None:
        nonlocal from_main
        from_main = threading.current_thread() is threading.main_thread()

    def in_child() -> None:
        if from_main and os.getppid() == process:
            _end_with(process)

    os.register_at_fork(before=before, after_in_child=in_child)


def _wait_for(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)


def _train(run: Run, job: Job) -> dict[str, Any]:
    """Train and evaluate: metrics, and curves for the first seeds."""
    callbacks = callbacks_from(run.method, _specs(run, job))
    recorder = None
    # Asking for task gradients would change the rounding of methods that take one backward pass:
    # they are recorded where they exist anyway, and for equal weighting in a run of its own.
    if run.kind == "curves" or (run.seed < _RECORDED and _collects_gradients(callbacks)):
        recorder = CurveRecorder()
        callbacks.append(recorder)
    split = job.split if run.trial is None else "val"

    def read(split: str) -> dict[str, dict[str, float]]:
        names = job.metrics if split == job.split else job.validation
        return _metrics(run, names, cli.trainer.callback_metrics)

    kept = None
    if job.select != LAST and run.kind == "train":
        reference = job.reference if run.task is None else {}  # which is made of those
        kept = Kept(job.select, job.last_k, lambda _: read("val"), job.directions, reference)
        callbacks.append(kept)
    cli = RunCLI(job.config, run.seed, callbacks, overrides=arguments(run.settings))
    if run.task is not None:
        cli.model.active_tasks = [run.task]
    seed_everything(
        run.seed, workers=True, verbose=False
    )  # data order, whatever building a balancer has drawn
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if not cli.trainer.global_step:
        raise CompareError(
            f"Expected training to make optimiser steps but it made none. Look for an empty "
            f"training loader, and for limits of the trainer in {job.config}."
        )
    result: dict[str, Any] = {"steps": cli.trainer.global_step}
    if recorder is not None:
        result["curves"] = recorder.points

    def evaluate() -> dict[str, dict[str, float]]:
        stage = cli.trainer.test if split == "test" else cli.trainer.validate
        stage(cli.model, datamodule=cli.datamodule, verbose=False)
        return read(split)

    if run.kind == "train":
        result["metrics"] = evaluate() if kept is None else kept.mean(cli.model, evaluate)
    return result


def _specs(run: Run, job: Job) -> list[dict[str, Any]]:
    return with_settings(job.methods.get(run.method, []), run.settings)


def _collects_gradients(callbacks: Sequence[Callback]) -> bool:
    return any(isinstance(c, GradientBalancer) and c.needs_jacobian for c in callbacks)


def _metrics(
    run: Run, names: Mapping[str, Mapping[str, str]], logged: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for task in names if run.task is None else [run.task]:
        found[task] = {}
        for metric, name in names[task].items():
            if name not in logged:
                raise ValueError(
                    f"Expected metric `{name}` of task `{task}` after evaluation but found "
                    f"{sorted(logged)}. Log it, or correct `delta_p_metrics`."
                )
            value = float(logged[name])
            if not math.isfinite(value):
                raise ValueError(
                    f"Expected a finite metric `{name}` of task `{task}` but found {value}: the "
                    f"training diverged. Lower the learning rate, or clip gradients."
                )
            found[task][metric] = value
    return found
