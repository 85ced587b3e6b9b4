"""What a look at the losses after the backward pass, instead of before it, must not change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_mtl import BadLossError, LogLoss, MinNorm
from tests.common.faulty import Faulty, batches, change
from tests.common.models import Balanced, loader, trainer, weights

by_balancer = pytest.mark.parametrize("balancer", [None, LogLoss, MinNorm])


def bad_at(step: int, rule: str) -> Any:
    return Faulty({step: change("a", lambda loss: loss * math.nan)}, on_bad_loss=rule)


@by_balancer
def test_anomaly_detection_leaves_bad_losses_to_us(balancer: Any) -> None:
    callbacks = [balancer()] if balancer else []
    with pytest.raises(BadLossError, match="Expected finite"):
        trainer(callbacks=callbacks, detect_anomaly=True).fit(bad_at(2, "raise"), batches())


@by_balancer
def test_a_step_that_is_left_out_leaves_no_gradients(balancer: Any) -> None:
    module = bad_at(2, "skip_step")
    run = trainer(callbacks=[balancer()] if balancer else [], max_epochs=1, limit_train_batches=3)
    with pytest.warns(UserWarning, match="A loss or a gradient of optimiser step 3"):
        run.fit(module, batches())
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert run.global_step == 2


@by_balancer
def test_half_precision_losses_times_their_labels(balancer: Any) -> None:
    """70 times 1,000 labels is more than float16 holds."""

    class Counted(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            return {t: ((loss - loss.detach() + 70).half(), 1000) for t, loss in losses.items()}

    module = Counted()
    before = weights(module)
    trainer(callbacks=[balancer()] if balancer else [], max_steps=3).fit(module, loader())
    assert weights(module).isfinite().all()
    assert not torch.equal(weights(module), before)
