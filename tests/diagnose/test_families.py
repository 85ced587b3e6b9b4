"""What families would do to gradients, from Gramians, against the directions themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lightning_mtl
from lightning_mtl.diagnose.families import (
    FAMILIES,
    best_fixed_weights,
    decreases,
    family_weights,
    shares,
)

ARGUMENTS = {"DualBalance": {"loss_part": False, "beta": 0.0}}


def jacobian(seed: int = 0, tasks: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tasks, 20)) * np.logspace(0, 1, tasks)[:, None]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.example)
def test_a_family_points_where_its_class_does(family):
    J, losses = jacobian(), np.asarray([0.5, 2.0, 4.0])
    M = J @ J.T
    weights = family_weights(family, M[None], losses[None])[0]
    cls = getattr(lightning_mtl, family.example)
    rows, values = torch.from_numpy(J), torch.from_numpy(losses)
    balancer = cls(**ARGUMENTS.get(family.example, {}))
    if isinstance(balancer, lightning_mtl.GradientBalancer):
        expected = balancer.direction(rows.clone(), values).numpy()
    else:
        expected = balancer.loss_weights(values).numpy() @ J
    found = weights @ J
    assert found @ expected == pytest.approx(np.linalg.norm(found) * np.linalg.norm(expected))
    for name in family.members:
        assert hasattr(lightning_mtl, name), name


def test_shares_are_cosines_of_the_direction():
    J, w = jacobian(1), np.asarray([1.0, -0.5, 2.0])
    d = w @ J
    expected = J @ d / np.linalg.norm(J, axis=1) / np.linalg.norm(d)
    np.testing.assert_allclose(shares(J @ J.T, w), expected)


def test_shares_without_a_gradient_or_a_direction():
    M = np.diag([1.0, 0.0])
    np.testing.assert_allclose(shares(M, np.ones(2)), [1.0, np.nan])
    opposite = np.asarray([[1.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(shares(opposite, np.ones(2)), [0.0, 0.0])


def test_a_small_step_decreases_losses_as_predicted():
    # a quadratic bowl for each task, at a point where nothing is small
    rng = np.random.default_rng(4)
    point, centres = rng.normal(size=6), rng.normal(size=(3, 6))

    def losses(at: np.ndarray) -> np.ndarray:
        return np.square(at - centres).sum(1)

    J = 2 * (point - centres)
    w, length = np.asarray([1.0, 2.0, 0.5]), 1e-6
    d = w @ J
    after = losses(point - length * d / np.linalg.norm(d))
    fell = (losses(point) - after) / losses(point)
    predicted = decreases(J @ J.T, w, losses(point), np.asarray(length))
    np.testing.assert_allclose(predicted, fell, rtol=1e-4)


def test_best_fixed_weights_of_orthogonal_gradients_undo_their_lengths():
    norms = np.asarray([1.0, 30.0, 1000.0])
    weights = best_fixed_weights(np.stack([np.diag(norms**2)] * 5))
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(weights * norms / (weights * norms).max(), 1, atol=0.02)


def test_best_fixed_weights_are_no_worse_than_equal_ones():
    for seed in range(5):
        M = np.stack([j @ j.T for j in (jacobian(seed + 10 * s, 4) for s in range(6))])
        weights = best_fixed_weights(M)
        worst = [shares(M, np.broadcast_to(w, (6, 4))).min(1).mean() for w in (weights, np.ones(4))]
        assert worst[0] >= worst[1] - 1e-12
