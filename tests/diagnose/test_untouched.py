"""The training that is measured is, bit for bit, the training that nobody looks at."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from lightning_mtl import MultiTaskModule
from lightning_mtl.diagnose.record import GradientRecorder
from tests.diagnose.trainings import fit


class Restless(MultiTaskModule):
    """BatchNorm, dropout, a metric, and augmentation by NumPy's and Python's generators."""

    def __init__(self) -> None:
        super().__init__(["a", "b"])
        self.trunk = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 6)
        )
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
        self.error = MeanSquaredError()

    def task_losses(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        x = x + 0.1 * float(np.random.normal()) + 0.1 * random.random()
        z = self.trunk(x)
        self.error.update(self.heads[0](z).detach(), y[:, :1])
        self.log("error", self.error)
        losses = {}
        for t, (name, head) in enumerate(zip("ab", self.heads, strict=True)):
            losses[name] = (head(z) - y[:, t : t + 1]).square().mean()
        return losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(7, 4, generator=generator), torch.randn(7, 2, generator=generator))
        for _ in range(12)
    ]


@pytest.mark.parametrize("every", [1, 3])
def test_weights_buffers_metrics_and_generators(every: int):
    ends = []
    for steps in (None, 8):
        recorder = GradientRecorder(8, 5)
        watching = [] if steps is None else [recorder]
        flags = {"accumulate_grad_batches": every, "max_epochs": 3, "max_steps": 8}
        model = fit(Restless, batches, watching, gradient_clip_val=1.0, **flags)
        state = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
        ends.append((model, state))
    (plain, before), (seen, after) = ends
    assert len(recorder.points) == 5
    assert all(point.dropout is not None for point in recorder.points)
    assert plain.trainer.global_step == seen.trainer.global_step == 8
    assert plain.state_dict().keys() == seen.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, seen.state_dict()[name]), name
    assert torch.equal(plain.error.sum_squared_error, seen.error.sum_squared_error)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_it_stops_after_its_steps_where_the_config_would_go_on():
    recorder = GradientRecorder(5, 3)
    model = fit(Restless, batches, [recorder], max_epochs=4, max_steps=-1)
    assert model.trainer.global_step == 5
    assert [point.step for point in recorder.points] == [0, 2, 4]
