"""A fit that makes no optimiser step ends with an error that says what was seen."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_mtl.balancer import Balancer
from lightning_mtl.contract import OnBadLoss
from lightning_mtl.engine.forms.form import Form
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.engine.guards import NotFiniteError


class Idle:
    """Counts the optimiser steps that were due and left out.

    Every rank counts the same: what a step is left out for has been agreed on.

    Args:
        limit: how many in a row end the fit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.made = False  # whether the fit has made a step, or tried and overflowed
        self.missed = 0  # steps in a row
        self._batches = 0
        self._empty = 0
        self._overflows = 0
        self._bad: Counter[str] = Counter()

    def stepped(self) -> None:
        """A step was made."""
        self.made = True
        if self.missed:
            self.missed = self._batches = self._empty = self._overflows = 0
            self._bad.clear()

    def overflowed(self, scale: float) -> None:
        """A gradient scaler skipped a step.

        While it looks for its scale that is as it should be; below one, the gradients themselves
        are no numbers of half precision.
        """
        self.made = True
        if scale < 1:
            self.missed += 1
            self._batches += 1
            self._overflows += 1

    def left_out(self, group: Group, tasks: Sequence[str]) -> None:
        """A step was left out for what its micro-batches brought."""
        self.missed += 1
        self._batches += group.received
        self._empty += group.empty
        self._bad.update({tasks[t]: n for t, n in group.bad.items()})

    def check(self, rule: OnBadLoss, step: int) -> None:
        """End a fit that goes on without steps.

        Raises:
            RuntimeError: the limit is reached.
        """
        if self.missed >= self.limit:
            raise RuntimeError(
                f"Expected an optimiser step in every {self.limit} but none was made after step "
                f"{step}: {self._seen(rule)} `MultiTaskModule(max_skipped_steps=...)` says how "
                f"many may be left out in a row."
            )

    def finish(self, rule: OnBadLoss) -> None:
        """End a fit that made no step at all.

        Raises:
            RuntimeError: steps were due, and none was made.
        """
        if self.missed and not self.made:
            raise RuntimeError(
                f"Expected the fit to train but it made no optimiser step: {self._seen(rule)}"
            )

    def _seen(self, rule: OnBadLoss) -> str:
        found, cures = [], []
        if self._empty:
            found.append(f"{self._empty} returned no loss ({{}}, or None for every task)")
            cures.append("Return the loss of each task that a batch has labels of.")
        if self._bad:
            found.append(
                f"bad losses or gradients were left out, as `on_bad_loss='{rule}'` asks, of "
                f"{dict(self._bad)} (batches by task)"
            )
            cures.append("`on_bad_loss='raise'` says what is wrong with the first.")
        if self._overflows:
            found.append(f"{self._overflows} overflowed in half precision at a loss scale below 1")
            cures.append("Train with 'bf16-mixed' or '32-true', or look at the scale of the loss.")
        seen = "; ".join(found) or "each was left out"
        return f"of the last {self._batches} batches {seen}. {' '.join(cures)}"


def random_states(balancers: Iterable[Balancer]) -> list[tuple[Balancer, Tensor | None]]:
    """Where the random numbers of balancers, and of those they wrap, stand; ``None``: not begun."""
    found: list[tuple[Balancer, Tensor | None]] = []
    for balancer in balancers:
        drawn = balancer._generator
        found.append((balancer, None if drawn is None else drawn.get_state()))
        nested = balancer.nested()
        if nested:
            found += random_states(nested.values())
    return found


def draw_again(before: Iterable[tuple[Balancer, Tensor | None]]) -> None:
    """Undo what was drawn for a step that is left out after all."""
    for balancer, state in before:
        if state is None:
            balancer._generator = None
        else:
            balancer.generator.set_state(state)


def run_or_leave_out(form: Form, losses: TaskLosses, *, stepping: bool) -> Tensor | None:
    """The backward pass of a micro-batch; the step is left out if a balancer cannot do with it.

    With ``on_bad_loss`` ``"skip_task"`` or ``"skip_step"``: no task is at fault that could be left
    out alone. A balancer whose own state is not finite would fail in every step from here on, so
    that is an error in any case.

    Raises:
        NotFiniteError: weights or a direction are not finite.
    """
    try:
        return form.run(losses, stepping=stepping)
    except RuntimeError as error:
        if sys.version_info >= (3, 11) and "backward through the graph a second" in str(error):
            error.add_note(
                "The graph of a loss had been used before. Look for `.backward()` in "
                "`task_losses`, which returns losses only, and for tensors that are kept from an "
                "earlier batch: `.detach()` those."
            )
        raise
    except NotFiniteError:
        setting = form.setting
        balancers = [b for b in (setting.loss_balancer, setting.gradient_balancer) if b]
        spoilt = any(b.not_finite() for b in balancers)
        ranks = setting.layout.ranks
        if not ranks.alone:
            spoilt = any(ranks.gather(spoilt))
        if spoilt or setting.module.on_bad_loss not in ("skip_task", "skip_step"):
            raise
        form.group.skip = form.group.dropped = True
        for p in setting.trained():
            p.grad = None
        return None
