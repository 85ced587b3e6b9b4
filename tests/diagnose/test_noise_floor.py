"""The noise floor and the noise scale against the closed forms of a linear-Gaussian problem.

Inputs are standard normal in d dimensions, targets x · w_t plus noise of variance σ², and all tasks
predict with one vector w, held at 0. With δ = w - w_t the gradient of a sample has mean δ and
covariance (|δ|² + σ²) I + δ δᵀ, so for a batch of b: E g¹ · g² = |δ|², E |g|² = |δ|² + tr Σ / b.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.diagnose import noise
from tests.diagnose.trainings import studied

SIZE, NOISE, HALF = 40, 1.5, 64
COSINE = -0.6
FIRST = torch.eye(SIZE)[0]
TARGETS = torch.stack([FIRST, COSINE * FIRST + (1 - COSINE**2) ** 0.5 * torch.eye(SIZE)[1]])
TRACE = SIZE * (1 + NOISE**2) + 1


class OneVector(MultiTaskModule):
    def __init__(self, rate: float = 0.0, optimizer: type = torch.optim.SGD) -> None:
        super().__init__(["a", "b"])
        self.vector = nn.Parameter(torch.zeros(SIZE))
        self.rate, self.kind = rate, optimizer

    def task_losses(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        error = 0.5 * ((x @ self.vector)[:, None] - y).square().mean(0)
        return {"a": error[0], "b": error[1]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind(self.parameters(), self.rate)


def draws(count: int):
    def batches():
        generator = torch.Generator().manual_seed(5)
        found = []
        for _ in range(count):
            x = torch.randn(2 * HALF, SIZE, generator=generator)
            y = x @ TARGETS.T + NOISE * torch.randn(2 * HALF, 2, generator=generator)
            found.append((x, y))
        return found

    return batches


def test_floor_scale_and_corrected_cosine_are_the_analytic_ones():
    found = studied(OneVector, draws(300), 300, 300)
    pairs = np.stack([point.pairs for point in found.points]).sum(axis=1)
    halves = noise.half_cosines(pairs)
    floor = 1 / (1 + TRACE / HALF)
    mean = halves.mean(0)
    assert np.diagonal(mean) == pytest.approx([floor, floor], abs=0.015)
    assert mean[0, 1] == pytest.approx(COSINE * floor, abs=0.015)
    assert noise.corrected_cosines(halves)[0, 1] == pytest.approx(COSINE, abs=0.04)
    assert noise.noise_scale(pairs, HALF) == pytest.approx([TRACE, TRACE], rel=0.1)
    # on one batch the inputs are the same for both tasks, which a floor of halves does not see:
    # E g_a · g_b = δ_a · δ_b + (2 δ_a · δ_b + ... ) / B
    together = noise.cosines(np.stack([point.gramian for point in found.points])).mean(0)
    cross = COSINE + (SIZE + 1) * COSINE / (2 * HALF)
    assert together[0, 1] == pytest.approx(cross / (1 + TRACE / (2 * HALF)), abs=0.015)


def test_the_floor_of_dropout_is_the_analytic_one():
    """On one batch of b, other masks add q / p times E y² |x|² / b to E |g|² = |δ|² + tr Σ / b."""
    rate, batch = 0.3, 2 * HALF

    class Dropped(OneVector):
        def __init__(self) -> None:
            super().__init__()
            nn.init.constant_(self.vector, 1e-4)  # at 0 no mask would change a loss

        def task_losses(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
            x, y = batch
            return super().task_losses((nn.functional.dropout(x, rate), y), batch_idx)

    found = studied(Dropped, draws(200), 200, 200)
    same = 1 + TRACE / batch
    masks = rate / (1 - rate) * (SIZE + 2 + NOISE**2 * SIZE) / batch
    floor = np.stack([point.dropout for point in found.points]).mean(0)
    assert floor == pytest.approx([same / (same + masks)] * 2, abs=0.015)
    assert studied(OneVector, draws(3), 3, 3).points[0].dropout is None  # nothing is random


def test_the_update_of_sgd_is_the_sum_of_the_gradients_turned_round():
    found = studied(lambda: OneVector(0.1), draws(6), 6, 6)
    for point in found.points:
        assert point.sum_along_update == pytest.approx(1, abs=1e-6)
        total = point.gramian.sum()
        assert point.update == pytest.approx(0.1 * total**0.5, rel=1e-5)
        cosines = point.gramian.sum(0) / np.sqrt(np.diagonal(point.gramian) * total)
        np.testing.assert_allclose(point.along_update, cosines, atol=1e-5)


def test_the_first_update_of_adam_is_that_of_the_signs():
    found = studied(lambda: OneVector(0.01, torch.optim.Adam), draws(1), 1, 1)
    x, y = draws(1)()[0]
    gradient = -(x.T @ y / (2 * HALF)).sum(1)
    expected = gradient.abs().sum() / gradient.norm() / SIZE**0.5
    assert found.points[0].sum_along_update == pytest.approx(float(expected), abs=1e-4)


def test_batches_that_cannot_be_divided_take_the_batch_before():
    def ragged():
        return [(x, [y, y[:3]]) for x, y in draws(60)()]

    class Ragged(OneVector):
        def task_losses(self, batch, batch_idx):
            return super().task_losses((batch[0], batch[1][0]), batch_idx)

    found = studied(Ragged, ragged, 60, 60)
    assert "first dimensions of [3, 128]" in found.unsplittable
    pairs = [point.pairs for point in found.points if point.pairs is not None]
    assert len(pairs) == 59  # none is before the first
    halves = noise.half_cosines(np.stack(pairs).sum(axis=1)).mean(0)
    floor = 1 / (1 + TRACE / (2 * HALF))  # of whole batches
    assert np.diagonal(halves) == pytest.approx([floor, floor], abs=0.04)
