"""Which form a step takes: the cheapest that gives its balancers what they need."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.engine.forms.balanced import Balanced
from lightning_mtl.engine.forms.form import Form
from lightning_mtl.engine.forms.perturbed import Perturbed
from lightning_mtl.engine.forms.probe import Probed
from lightning_mtl.engine.forms.reuse import Reuse
from lightning_mtl.engine.forms.rows import Rows
from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.forms.sum import Sum
from lightning_mtl.engine.forms.weighted import Weighted
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.engine.two_stages import of_all


def kinds(balancer: GradientBalancer | None) -> tuple[type[Form], ...]:
    """The forms that steps of a fit may have to take where nobody looks.

    Args:
        balancer: of the gradients.
    """
    if balancer is None:
        return (Sum,)
    if balancer.perturbs:
        return (Perturbed,)
    return (Rows, Probed) if balancer.needs_all_rows else (Rows, Probed, Reuse, Sum)


def choose(
    setting: Setting,
    group: Group,
    losses: TaskLosses,
    *,
    single: bool,
    uneven: bool,
    marked: list[Tensor],
) -> Form:
    """The form of a step: the table in docs/design.md.

    Args:
        setting: of the fit.
        group: the step, without micro-batches so far.
        losses: of the first micro-batch.
        single: whether it is the only one.
        uneven: whether label counts or absent tasks were met under accumulation.
        marked: what the module marked as shared representation.
    """
    balancer, late = setting.gradient_balancer, losses.late
    rows = group.observed
    if not single:
        rows |= uneven or setting.loss_balancer.needs_current_losses
    if balancer is None and not rows:
        return Sum(setting, group, late=late, uneven=uneven)
    kind: type[Balanced] = Rows
    if balancer is not None:
        blocks = setting.module.gradient_memory == "blocks" and not setting.perturbs
        narrow = blocks or balancer.gradients != "parameters"
        setting.layout.probing = narrow and len(group.counts) > 1
        kind = Probed if setting.layout.probing else Rows
        kind = Perturbed if setting.perturbs else kind
    kind = _lay_out(setting, group, losses, single, kind, marked)
    wanted = None
    if balancer is not None and not (rows or setting.perturbs):
        known, wanted = _spare(setting, group, balancer, losses, single, late, uneven)
        if known is not None:
            return known
    form = kind(setting, group, late=late)
    form.uneven = uneven
    form.wanted = wanted
    form.marked = marked
    return form


def _lay_out(
    setting: Setting,
    group: Group,
    losses: TaskLosses,
    single: bool,
    kind: type[Balanced],
    marked: list[Tensor],
) -> type[Balanced]:
    """Find the shared parameters, anew with every task that no step before had.

    Returns:
        The form that can do with what is shared.
    """
    layout, balancer = setting.layout, setting.gradient_balancer
    optimizers = setting.trainer.optimizers
    layout.check_frozen(optimizers, first=True, balanced=balancer is not None)
    there = [*losses.present, *losses.bad]
    at_once = single or (balancer is not None and balancer.batches > 1)
    at_once &= not layout.ranks.sharded_parameters  # whose graphs do not tell
    if not (at_once or layout.given or layout.complete):
        layout.forget()  # found with the last micro-batch
    gradients = setting.gradients()
    gradients.begin()
    new = not gradients.known or gradients.reach.unmet(there)
    if there and new and (at_once or gradients.known):
        gradients.discover(losses)
        if layout.extend(balancer, optimizers):
            gradients = setting.gradients()
            gradients.begin()
        if not gradients.shared and not layout.complete and balancer is not None:
            kind = Rows  # nothing is shared by the tasks so far: they train as they are
        kind.check(setting, losses, marked)
    group.outside = setting.outside()
    return kind


def _spare(
    setting: Setting,
    group: Group,
    balancer: GradientBalancer,
    losses: TaskLosses,
    single: bool,
    late: bool,
    uneven: bool,
) -> tuple[Weighted | None, set[int] | None]:
    """Ask the balancer which task gradients it can do without in this step.

    Returns:
        A form with weights that are known, and the tasks whose rows are needed; ``None`` where
        there are no such weights, or all rows are needed.
    """
    size = len(group.counts)
    there = losses.present if single else range(size)
    rows = [t for t in there if t not in group.outside]
    if not rows:
        return None, None
    with balancer.only(*setting.rows_of(rows)):
        reused = balancer.reused_weights()
        asked = balancer.wanted(len(rows)) if single else None
        own = balancer.weight_heads and balancer.own_head_weights
        heads = balancer.head_weights() if reused is not None and own else None
    wanted = None if asked is None else {rows[i] for i in asked} | group.outside
    if reused is None or not setting.gradients().known:
        return None, wanted
    known = of_all(reused, rows, size, reused, group.outside)
    if balancer.weight_heads and not own:
        return Sum(setting, group, late=late, uneven=uneven, reused=known), wanted
    form = Reuse(setting, group, late=late, uneven=uneven, reused=known)
    if heads is not None:
        form.heads = of_all(heads, rows, size, heads, group.outside)
    return form, wanted
