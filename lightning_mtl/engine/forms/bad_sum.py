"""The gradient of summed losses, looked at once it is there."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.gradients.fsdp2 import locals_of
from lightning_mtl.engine.gradients.host import non_finite, to_host
from lightning_mtl.engine.group import Group
from lightning_mtl.engine.guards import bad_losses, bad_sum
from lightning_mtl.engine.two_stages import checked


def refuse_bad_sum(
    setting: Setting, group: Group, late_losses: bool = False, weights: Tensor | None = None
) -> None:
    """Leave the step out when the gradient of the summed losses is not finite.

    A gradient scaler looks for itself, and skips the step.

    Args:
        setting: of the fit.
        group: the micro-batches of the step.
        late_losses: whether losses, and loss weights, have still to be looked at.
        weights: of the losses, of all tasks.
    """
    if setting.scaler is not None or setting.module.on_bad_loss == "ignore":
        return
    grads = [grad for p in setting.trained() if (grad := p.grad) is not None]
    flag = non_finite(locals_of(grads))
    if setting.layout.ranks.sharded_parameters:  # each process sees its part only
        flag = setting.layout.ranks.max_(flag.to(setting.layout.ranks.device))
    present = group.present()
    late = [group.mean_losses()] if late_losses else []
    if late and weights is not None:
        late.append(weights if len(present) == len(weights) else weights[present])
    flag, *late = to_host(flag, *late)
    names = [setting.module.training_tasks[t] for t in present]
    rule, step = setting.module.on_bad_loss, setting.trainer.global_step + 1
    bad: set[int] = set()
    if late:
        values = dict(enumerate(late[0].tolist()))
        bad = bad_losses(values, names, setting.limit, on_bad_loss=rule, step=step)
        if len(late) == 2 and not bad:
            checked(late[1], setting.loss_balancer, late[0])
    if flag.item() and not bad:
        bad_sum(names, on_bad_loss=rule, step=step)
        bad = set(range(len(present)))  # a sum does not tell
    if bad:
        group.skip = group.dropped = True
        group.bad.update(present[i] for i in bad)
        for p in setting.trained():
            p.grad = None
