"""What is special to GradNorm and MetaBalance.

References here are torch's own optimisers, and plain loops over tasks and tensors.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_mtl.balancer import Columns
from lightning_mtl.gradient_balancers.grad_norm import (
    GradNorm,
    grad_norm_gradient,
    grad_norm_targets,
)
from lightning_mtl.gradient_balancers.meta_balance import MetaBalance, meta_balance_factors
from tests.common.methods import TASKS
from tests.common.models import Balanced, loader, trainer
from tests.methods.in_order import random_step, saved

COLUMNS = Columns(("net.0.weight", "net.0.bias", "net.2.weight", "scale"), (4, 2, 3, 1))
NAN = float("nan")


REFUSED = [
    (GradNorm, {"alpha": -1.0}, "`alpha` of GradNorm .* at least 0, found -1.0"),
    (GradNorm, {"lr": 0.0}, "`lr` of GradNorm .* above 0, found 0.0"),
    (GradNorm, {"optimizer": "rmsprop"}, r"\('adam', 'sgd'\), found 'rmsprop'"),
    (MetaBalance, {"target": -1}, "`target` of MetaBalance .* at least 0, found -1"),
    (MetaBalance, {"target": 1.0}, "`target` of MetaBalance .* found 1.0"),
    (MetaBalance, {"target": True}, "`target` of MetaBalance .* found True"),
    (MetaBalance, {"strategy": "A"}, r"\('both', 'shrink', 'enlarge'\), found 'A'"),
    (MetaBalance, {"relax": 1.1}, r"`relax` of MetaBalance to be in \[0, 1\], found 1.1"),
    (MetaBalance, {"beta": 1.0}, r"`beta` of MetaBalance to be in \[0, 1\), found 1.0"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_defaults() -> None:
    assert (GradNorm().alpha, GradNorm().lr, GradNorm().optimizer) == (1.5, 0.025, "adam")
    assert (GradNorm().weight_heads, GradNorm().gradients) == (True, "last_layer")
    assert not GradNorm(weight_heads=False).weight_heads
    assert (MetaBalance().target, MetaBalance().strategy) == (0, "both")
    assert (MetaBalance().relax, MetaBalance().beta) == (0.7, 0.9)
    assert not MetaBalance().weight_heads
    assert GradNorm().gramian_weighted
    assert not MetaBalance().gramian_weighted
    assert not any(b.requires_positive_losses for b in (GradNorm(), MetaBalance()))


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_grad_norm_is_torch_on_the_papers_loss(name: str, alpha: float) -> None:
    rng = np.random.default_rng(0)
    balancer = GradNorm(alpha=alpha, optimizer=name)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    optimizer, first = kind([w], lr=0.025), None
    for _ in range(30):
        jacobian, losses = random_step(rng, 3, spread=0.2)
        first = losses if first is None else first
        found = balancer.weights(jacobian @ jacobian.T, losses)
        torch.testing.assert_close(found, w.detach(), rtol=0, atol=1e-6)
        norms = (w[:, None] * jacobian).norm(dim=1)
        rates = (losses / first) / (losses / first).mean()
        optimizer.zero_grad()
        (norms - (norms.mean() * rates**alpha).detach()).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            w *= 3 / w.sum()
    assert (w.detach() - 1).abs().max() > 0.05


def test_first_loss_above_zero() -> None:
    balancer, gramian = GradNorm(), torch.diag(torch.tensor([1.0, 4.0]))
    for losses in ([0.0, 3.0], [0.0, 2.0], [5.0, 1.0], [7.0, 0.0], [0.0, 0.0]):
        assert balancer.weights(gramian, torch.tensor(losses)).isfinite().all()
    assert balancer.learned[:, 1].tolist() == [5.0, 3.0]
    ones, zero = torch.ones(2), torch.zeros(2)
    assert grad_norm_targets(ones, ones, torch.tensor([0.0, 3.0]), zero).tolist() == [1.0, 1.0]
    assert grad_norm_targets(ones, ones, zero, ones).tolist() == [1.0, 1.0]


def test_negative_loss_has_no_rate() -> None:
    gramian, losses = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1.0, -1.0])
    balancer = GradNorm()
    balancer.weights(gramian, torch.ones(2))
    before = balancer.learned.clone()
    assert balancer.weights(gramian, losses).isnan().all()
    assert balancer.weights(gramian, torch.tensor([1.0, math.inf])).isnan().all()
    assert balancer.weights(gramian * NAN, torch.ones(2)).isnan().all()
    assert torch.equal(balancer.learned, before)
    without = GradNorm(alpha=0.0)
    assert without.weights(gramian, losses).tolist() == [1.0, 1.0]
    assert without.learned[:, 1].tolist() == [1.0, 0.0]


def test_norms_that_are_equal_up_to_rounding_leave_the_weights_alone() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 7):
        row, losses = random_step(rng, 1)[0], torch.rand(size, dtype=torch.float64) + 0.1
        turns = [np.linalg.qr(rng.standard_normal((10, 10)))[0] for _ in range(size)]
        jacobian = torch.stack([row[0] @ torch.from_numpy(turn) for turn in turns])
        balancer = GradNorm()
        for k in range(1, 5):
            weights = balancer.weights(jacobian @ jacobian.T, losses / k)
        assert torch.equal(weights, torch.ones_like(losses))
    # One task: whatever its norm and loss.
    balancer = GradNorm()
    for k in range(1, 5):
        weights = balancer.weights(torch.full((1, 1), 3.0 * k), torch.full((1,), 1.0 / k))
        assert weights.tolist() == [1.0]


def test_weights_stay_positive() -> None:
    balancer = GradNorm(optimizer="sgd", alpha=0.0)
    gramian, losses = torch.diag(torch.tensor([1e8, 1.0, 1.0])), torch.ones(3)
    found = []
    for _ in range(5):
        found.append(balancer.weights(gramian, losses))
        assert (found[-1] > 0).all()
        torch.testing.assert_close(found[-1].sum(), torch.tensor(3.0))
    assert found[1][0] < 1e-3  # 1 - 0.025 * 1e4, were it not held
    assert found[1][1] > 1


def test_gradient_is_zero_at_the_target_and_for_no_gradient() -> None:
    weights, norms = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([3.0, 1.5, 0.0])
    gradient = grad_norm_gradient(weights, norms, torch.tensor([3.0, 2.0, 1.0]))
    assert gradient.tolist() == [0.0, 1.5, 0.0]


def test_weights_of_a_step_sum_to_its_tasks() -> None:
    rng = np.random.default_rng(4)
    balancer = GradNorm(lr=0.1)
    for _ in range(5):
        jacobian, losses = random_step(rng, 4)
        with balancer.only(TASKS[:4]):
            balancer.direction(jacobian, losses)
    before = balancer.learned[:, 0].clone()
    jacobian, losses = random_step(rng, 2)
    with balancer.only(TASKS[:4], [0, 3]):
        weights = balancer.weights(jacobian @ jacobian.T, losses)
    torch.testing.assert_close(weights, 2 * before[[0, 3]] / before[[0, 3]].sum())
    after = balancer.learned[:, 0]
    assert torch.equal(after[[1, 2]], before[[1, 2]])
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.sum(), torch.tensor(4.0, dtype=torch.float64))


def test_meta_balance_by_tensor() -> None:
    rng = np.random.default_rng(0)
    balancer = MetaBalance(target=1, relax=0.4, beta=0.8)
    balancer.columns = COLUMNS
    averages = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(5):
        jacobian, losses = random_step(rng, 3)
        expected, start = torch.zeros(10, dtype=torch.float64), 0
        for k, size in enumerate(COLUMNS.sizes):
            part = slice(start, start + size)
            start += size
            averages[:, k] = 0.8 * averages[:, k] + 0.2 * jacobian[:, part].norm(dim=1)
            for t in range(3):
                factor = 0.4 * averages[1, k] / averages[t, k] + 0.6
                expected[part] += factor * jacobian[t, part]
        torch.testing.assert_close(balancer.direction(jacobian, losses), expected)
        torch.testing.assert_close(balancer.averages, averages)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("both", [2.0, 0.25 * 6 + 0.75 * 2, 0.25 * 0.5 + 0.75 * 2]),
        ("shrink", [2.0, 0.25 * 6 + 0.75 * 2, 0.5]),
        ("enlarge", [2.0, 6.0, 0.25 * 0.5 + 0.75 * 2]),
    ],
)
def test_strategies(strategy: str, expected: list[float]) -> None:
    jacobian = torch.diag(torch.tensor([2.0, 6.0, 0.5]))
    found = MetaBalance(strategy=strategy, relax=0.75).direction(jacobian, torch.ones(3))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_zero_relax_is_the_plain_sum_and_one_equalises() -> None:
    jacobian, losses = random_step(np.random.default_rng(0), 4)
    torch.testing.assert_close(MetaBalance(relax=0.0).direction(jacobian, losses), jacobian.sum(0))
    rows = jacobian * (jacobian[2].norm() / jacobian.norm(dim=1))[:, None]
    found = MetaBalance(target=2, relax=1.0).direction(jacobian, losses)
    torch.testing.assert_close(found, rows.sum(0))


def test_gradients_that_are_zero_or_have_died_away() -> None:
    losses = torch.ones(2)
    balancer = MetaBalance()
    jacobian = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert torch.equal(balancer.direction(jacobian, losses), jacobian[0])
    assert balancer.averages[1] == 0
    jacobian[1] = 5.0
    assert (balancer.direction(jacobian, losses) > jacobian[0]).all()
    jacobian[1] = 0.0
    for _ in range(1200):  # its average passes through the smallest float32 numbers
        found = balancer.direction(jacobian, losses)
        assert torch.equal(found, jacobian[0])
    # A tensor that the target does not reach: the target's average is zero.
    factors = meta_balance_factors(torch.tensor([[0.0], [3.0]]), torch.zeros(1), relax=0.7)
    torch.testing.assert_close(factors.flatten(), torch.tensor([1.0, 0.3]))


def test_target_by_name_and_by_place() -> None:
    jacobian, losses = random_step(np.random.default_rng(0), 3)
    expected = MetaBalance(target=2).direction(jacobian, losses)
    for target in ("c", 2):
        balancer = MetaBalance(target=target)
        balancer.check_tasks(["a", "b", "c"])
        with balancer.only(["a", "b", "c"]):
            assert torch.equal(balancer.direction(jacobian, losses), expected)
        with balancer.only(["a", "b", "c"], [1, 2]):  # the third task, now in the second row
            found = balancer.direction(jacobian[1:], losses[1:])
        other = MetaBalance(target=1)
        other.direction(jacobian[1:], losses[1:])
        torch.testing.assert_close(found, other.direction(jacobian[1:], losses[1:]))


def test_target_that_is_not_there() -> None:
    message = r"one of the tasks \['a', 'b'\] or their place, found"
    for target in ("z", 2):
        with pytest.raises(ValueError, match=message):
            MetaBalance(target=target).check_tasks(["a", "b"])
        with pytest.raises(ValueError, match=r"among 2 rows but found .* by hand, give the number"):
            MetaBalance(target=target).direction(torch.ones(2, 3), torch.ones(2))


def test_step_without_the_target() -> None:
    balancer = MetaBalance(target="a")
    rows = torch.diag(torch.tensor([1.0, 4.0, 0.5]))
    with balancer.only("abc", [1, 2]):
        assert torch.equal(balancer.direction(rows[1:], torch.ones(2)), rows[1:].sum(0))
    with balancer.only("abc"):
        both = balancer.direction(rows, torch.ones(3))
    with balancer.only("abc", [1, 2]):
        without = balancer.direction(rows[1:], torch.ones(2))
    # Its average was 1 and holds, though the others have been there three times and it once.
    torch.testing.assert_close(both, torch.tensor([1.0, 0.7 + 1.2, 0.7 + 0.15]))
    torch.testing.assert_close(without, torch.tensor([0.0, 0.7 + 1.2, 0.7 + 0.15]))
    second = MetaBalance(target="a")
    second.load_state_dict(saved(balancer))
    with second.only("abc", [1, 2]):
        torch.testing.assert_close(second.direction(rows[1:], torch.ones(2)), without)


def test_meta_balance_in_a_run() -> None:
    balancer, model = MetaBalance(target="b"), Balanced()
    trainer(callbacks=[balancer], max_steps=3).fit(model, loader())
    assert balancer.averages.shape == (2, len(list(model.net.trunk.parameters())))
    torch.testing.assert_close(balancer.reference, balancer.averages[1] / (1 - 0.9**3))
    with pytest.raises(ValueError, match=r"one of the tasks \['a', 'b'\]"):
        trainer(callbacks=[MetaBalance(target="z")], max_steps=1).fit(Balanced(), loader())
