"""Rivals that a balancer has to exceed: what else the same effort could have gone into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.tuning.space import Space, grid

WEIGHTS, DECAY, TIME = "weights", "decay", "time"
NAMES = {
    WEIGHTS: "fixed weights (tuned)",
    DECAY: "equal (weight decay)",
    TIME: "equal (same time)",
}
SWEEP = 8  # fixed weightings, where no entry tries more settings
DECADES = 2.0  # a weight is at most 100 times as large as another one or as small
# From none to what is strong for AdamW; ten times apart, as such settings are usually tried.
STRENGTHS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
_HERE = __name__


@dataclass
class Rivals:
    """Rows that are added to those of the file.

    Attributes:
        methods: their callbacks, by name.
        spaces: what is tried for those that are tuned.
        missing: why others are not there, in words.
    """

    methods: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spaces: dict[str, Space] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def add_rivals(
    asked: Sequence[str],
    tasks: Sequence[str],
    trials: int,
    equal: Sequence[Mapping[str, Any]],
    faults: Mapping[str, str],
) -> Rivals:
    """The rivals of a comparison.

    Args:
        asked: which of :data:`NAMES`.
        tasks: names of the tasks that are weighted, empty where they are not known yet.
        trials: the most that an entry of the file has.
        equal: callbacks of equal weighting.
        faults: why a rival cannot be had, by its key.
    """
    found = Rivals()
    faults = dict(faults)
    if len(tasks) < 2:
        faults.setdefault(WEIGHTS, "the names of the tasks are known from the first batch on")
    if turned_off := [NAMES[key] for key in NAMES if key not in asked]:
        found.missing.append(f"{_list(turned_off)} left out by --rivals")
    for key in (key for key in NAMES if key in asked):
        name = NAMES[key]
        if key in faults:
            found.missing.append(f"{name} left out, because {faults[key]}")
        elif key == WEIGHTS:
            points = fixed_weights(tasks, max(SWEEP, trials))
            found.methods[name] = [{"class_path": "Scalarization"}]
            found.spaces[name] = grid([{"callbacks.0.weights": weights} for weights in points])
        elif key == DECAY:
            found.methods[name] = [{"class_path": f"{_HERE}.WeightDecay"}]
            found.spaces[name] = grid([{"callbacks.0.strength": s} for s in STRENGTHS])
        else:
            found.methods[name] = [*map(dict, equal), {"class_path": f"{_HERE}.Longer"}]
    return found


def fixed_weights(tasks: Sequence[str], count: int) -> list[dict[str, float]]:
    r"""Weightings spread evenly over the logarithms of the ratios between tasks.

    :math:`w_t \propto 10^{2 D (u_t - 1/2)}` for all tasks but the last one, whose :math:`u` is 1/2,
    with :math:`D` decades and :math:`u` of a Kronecker lattice: its first coordinate is
    :math:`(i + 1/2) / n`, the others are :math:`\{(i + 1/2)\, \varphi^{-k}\}` with the generalised
    golden ratio :math:`\varphi` of their number. The mean weight is 1, so that the learning rate
    keeps its meaning.

    Args:
        tasks: T names.
        count: how many weightings.

    Reference: Roberts, *The unreasonable effectiveness of quasirandom sequences*, 2018.
    """
    others = len(tasks) - 1
    ratio = 2.0
    for _ in range(60):  # the root of x^d = x + 1 with d - 1 coordinates beside the first
        ratio = (1 + ratio) ** (1 / others)
    found = []
    for i in range(count):
        u = [(i + 0.5) / count]
        u += [((i + 0.5) * ratio**-k) % 1 for k in range(1, others)]
        logs = [2 * DECADES * (x - 0.5) for x in u] + [0.0]
        raw = [10.0**x for x in logs]
        scale = len(tasks) / math.fsum(raw)
        # four digits: they are shown, and nobody needs more
        weights = [float(f"{scale * x:.4g}") for x in raw]
        found.append(dict(zip(tasks, weights, strict=True)))
    return found


class WeightDecay(Callback):
    """Sets the weight decay of every optimizer.

    Parameter groups that the module keeps without decay, usually biases and norms, stay so, unless
    no group has any.

    Args:
        strength: the decay; its meaning is that of the optimizer.
    """

    def __init__(self, strength: float = 0.0) -> None:
        self.strength = strength

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the groups, before the first step."""
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        groups = [group for group in groups if "weight_decay" in group]
        if not groups:
            raise CompareError(
                f"Expected an optimizer with weight decay but found "
                f"{', '.join(type(o).__name__ for o in trainer.optimizers)}. Leave this rival out: "
                f"--rivals {WEIGHTS},{TIME}."
            )
        decayed = [group for group in groups if group["weight_decay"]]
        for group in decayed or groups:
            group["weight_decay"] = self.strength


class Longer(Callback):
    """Trains for more steps, with the schedules of learning rates stretched to suit.

    Optimizers and schedules are configured for the length that the file asks for. Then the limits
    of the trainer are multiplied (epochs rounded up), and of the calls that step a schedule only as
    many do as makes it end where it would have ended; so it does for any schedule, whatever it was
    told its length is. ``ReduceLROnPlateau`` has no length and stays as it is. What a module
    changes by counting epochs itself is not stretched.

    Args:
        factor: how many times as many steps.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the limits and slow the schedules, before the first step."""
        loop = trainer.fit_loop
        stretched = []
        if loop.max_epochs is not None and loop.max_epochs > 0:
            epochs = math.ceil(loop.max_epochs * self.factor - 1e-9)
            stretched.append(epochs / loop.max_epochs)
            loop.max_epochs = epochs
        if loop.max_steps > 0:
            steps = math.ceil(loop.max_steps * self.factor - 1e-9)
            stretched.append(steps / loop.max_steps)
            loop.epoch_loop.max_steps = steps
        if not stretched:
            raise CompareError(
                f"Expected `trainer.max_epochs` or `trainer.max_steps`, of which more are needed, "
                f"but found neither. Set one, or leave this rival out: --rivals {WEIGHTS},{DECAY}."
            )
        for config in trainer.lr_scheduler_configs:
            if not config.reduce_on_plateau:
                _slow(config.scheduler, min(stretched))


def _slow(scheduler: Any, factor: float) -> None:
    """Let only one of ``factor`` calls step the schedule."""
    original, called, stepped = scheduler.step, 0, 0

    def step(*args: Any, **kwargs: Any) -> None:
        nonlocal called, stepped
        called += 1
        if called / factor + 1e-9 >= stepped + 1:
            stepped += 1
            original(*args, **kwargs)

    scheduler.step = step


def _list(names: Sequence[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last
