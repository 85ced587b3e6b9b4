"""What is special to PCGrad and GradVac.

References here work on the gradients themselves, in plain loops.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.balancer import Columns, GradientBalancer
from lightning_mtl.gradient_balancers.grad_vac import GradVac, grad_vac_weights
from lightning_mtl.gradient_balancers.pcgrad import PCGrad, pcgrad_weights
from tests.common.methods import TASKS
from tests.common.models import Balanced, loader, trainer
from tests.methods.in_order import permutations, random_step, saved

COLUMNS = Columns(("net.0.weight", "net.0.bias", "net.2.weight", "scale"), (3, 2, 3, 2))
NAN = float("nan")


REFUSED = [
    (PCGrad, {"order": "descending"}, r"`order` of PCGrad .* \('random', 'ascending'\), found"),
    (PCGrad, {"scale": "max"}, r"`scale` of PCGrad .* \('mean', 'sum'\), found 'max'"),
    (PCGrad, {"seed": -1}, "`seed` of PCGrad .* at least 0 or None, found -1"),
    (PCGrad, {"gradients": "head"}, "`gradients` of PCGrad .* found 'head'"),
    (GradVac, {"beta": 1.5}, r"`beta` of GradVac to be in \[0, 1\], found 1.5"),
    (GradVac, {"beta": NAN}, "`beta` of GradVac .* found nan"),
    (GradVac, {"groups": "all"}, r"`groups` of GradVac .*'layer', 'tensor'\), found 'all'"),
    (GradVac, {"order": None}, "`order` of GradVac .* found None"),
    (
        GradVac,
        {"groups": "layer", "gradients": "last_layer"},
        "`gradients='parameters'` of GradVac with `groups='layer'`, found 'last_layer'. Use",
    ),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_defaults() -> None:
    assert (PCGrad().order, PCGrad().include_self, PCGrad().scale) == ("random", False, "sum")
    assert (GradVac().beta, GradVac().groups, GradVac().scale) == (0.5, "model", "sum")
    assert not any(b.weight_heads or b.requires_positive_losses for b in (PCGrad(), GradVac()))
    assert PCGrad().gramian_weighted
    assert GradVac().gramian_weighted
    assert not GradVac(groups="tensor").gramian_weighted


def projected(jacobian: Tensor, orders: list[list[int]], include_self: bool) -> Tensor:
    """Algorithm 1 of the paper on the gradients."""
    total = torch.zeros_like(jacobian[0])
    for i, order in enumerate(orders):
        p = jacobian[i].clone()
        for j in order:
            if (include_self or j != i) and p @ jacobian[j] < 0:
                p -= (p @ jacobian[j]) / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total += p
    return total


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_pcgrad_is_the_papers_algorithm(size: int, include_self: bool) -> None:
    rng = np.random.default_rng(size)
    for width in (2, 10):  # in two dimensions gradients are dependent and conflicts abound
        for _ in range(20):
            jacobian, _ = random_step(rng, size, width)
            orders = permutations(rng, size)
            weights = pcgrad_weights(jacobian @ jacobian.T, orders, include_self)
            torch.testing.assert_close(
                weights @ jacobian,
                projected(jacobian, orders, include_self),
                rtol=0,
                atol=1e-10 * float(jacobian.norm()),
            )


def test_without_conflict_the_plain_sum() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    losses = torch.ones(3)
    for balancer in (PCGrad(), GradVac(), PCGrad(include_self=True)):
        assert balancer.weights(jacobian @ jacobian.T, losses).tolist() == [1.0, 1.0, 1.0]
    for balancer in (PCGrad(scale="mean"), GradVac(scale="mean")):
        weights = balancer.weights(jacobian @ jacobian.T, losses)
        torch.testing.assert_close(weights, torch.full((3,), 1 / 3))
    grouped = GradVac(scale="mean", groups="tensor")
    torch.testing.assert_close(grouped.direction(jacobian, losses), jacobian.mean(0))


def test_two_tasks_never_increase() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        jacobian, losses = random_step(rng, 2, 3)
        found = PCGrad().direction(jacobian, losses)
        assert (jacobian @ found >= -1e-12 * jacobian.norm() ** 2).all()


def test_zero_gradients_and_bad_input() -> None:
    jacobian = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-3.0, 0.0]])
    gramian = jacobian @ jacobian.T
    weights = pcgrad_weights(gramian)
    assert weights[0] == 1
    assert torch.equal(weights[1:], pcgrad_weights(gramian[1:, 1:]))
    assert pcgrad_weights(torch.full((2, 2), NAN)).isnan().all()
    weights, targets = grad_vac_weights(torch.full((2, 2), math.inf), torch.ones(2, 2))
    assert weights.isnan().all()
    assert (targets == 1).all()


@pytest.mark.parametrize("orders", [[[0, 1]], [[1], [0]], [[0, 0], [1, 0]], [[0, 1], [0, 1, 2]]])
def test_orders_must_be_permutations(orders: list[list[int]]) -> None:
    message = r"`orders` to hold a permutation of 0 to 1 .* 2 tasks, found \[\["
    with pytest.raises(ValueError, match=message):
        pcgrad_weights(torch.eye(2), orders)
    with pytest.raises(ValueError, match=message):
        grad_vac_weights(torch.eye(2), torch.zeros(2, 2), orders=orders)


@pytest.mark.parametrize("make", [PCGrad, GradVac])
def test_random_orders(make) -> None:
    jacobian = torch.tensor([[1.0, 0.1, 0.3], [-1.0, 0.7, 0.0], [-0.9, -1.0, 0.2]])
    losses, gramian = torch.ones(3), jacobian @ jacobian.T

    def draw(balancer: GradientBalancer) -> list[list[float]]:
        found = []
        for _ in range(60):
            if isinstance(balancer, GradVac):
                balancer.targets = None  # each time the first step
            found.append([round(w, 5) for w in balancer.weights(gramian, losses).tolist()])
        return found

    assert draw(make(seed=1)) == draw(make(seed=1))
    assert draw(make(seed=1)) != draw(make(seed=2))
    # Each task has its own order: all 2 x 2 x 2 results that differ are met.
    possible = set()
    for code in range(8):
        others = [[1, 2], [0, 2], [0, 1]]
        orders = [[i, *(o[::-1] if code >> i & 1 else o)] for i, o in enumerate(others)]
        weights = pcgrad_weights(gramian, orders)
        possible.add(tuple(round(w, 5) for w in weights.tolist()))
    assert len(possible) > 4
    assert {tuple(w) for w in draw(make(seed=1))} == possible
    ascending = draw(make(order="ascending"))
    assert ascending[0] == [round(w, 5) for w in pcgrad_weights(gramian).tolist()]
    assert len({tuple(w) for w in ascending}) == 1


def test_random_numbers_are_saved() -> None:
    jacobian, losses = random_step(np.random.default_rng(3), 5, 3)
    first = PCGrad(seed=7)
    for _ in range(3):
        first.direction(jacobian, losses)
    state = saved(first)
    expected = [first.direction(jacobian, losses) for _ in range(5)]
    second = PCGrad(seed=7)
    second.load_state_dict(state)
    found = [second.direction(jacobian, losses) for _ in range(5)]
    assert all(map(torch.equal, found, expected))
    assert len({tuple(d.tolist()) for d in found}) > 1


def vaccinated(
    jacobian: Tensor, rho: Tensor, beta: float, orders: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """One step on the gradients of one group, by the law of sines of the paper."""
    total, rho = torch.zeros_like(jacobian[0]), rho.clone()
    for i, order in enumerate(orders):
        p = jacobian[i].clone()
        for j in order:
            g = jacobian[j]
            if j == i:
                continue
            phi, target = p @ g / (p.norm() * g.norm()), rho[i, j].clone()
            rho[i, j] = (1 - beta) * target + beta * phi
            if phi < target:
                sines = torch.sqrt(1 - phi**2), torch.sqrt(1 - target**2)
                p += p.norm() * (target * sines[0] - phi * sines[1]) / (g.norm() * sines[1]) * g
                torch.testing.assert_close(p @ g / (p.norm() * g.norm()), target)
        total += p
    return total, rho


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_grad_vac_is_the_papers_step(size: int) -> None:
    rng = np.random.default_rng(size)
    rho = targets = torch.zeros(size, size, dtype=torch.float64)
    for _ in range(30):
        jacobian, _ = random_step(rng, size, 6)
        orders = permutations(rng, size)
        weights, targets = grad_vac_weights(jacobian @ jacobian.T, targets, 0.3, orders)
        expected, rho = vaccinated(jacobian, rho, 0.3, orders)
        atol = 1e-8 * float(jacobian.norm())
        torch.testing.assert_close(weights @ jacobian, expected, rtol=0, atol=atol)
        torch.testing.assert_close(targets, rho, rtol=0, atol=1e-8)
    assert rho.abs().max() > 0.05 or size == 1


@pytest.mark.parametrize(
    ("groups", "parts"),
    [("layer", [[0, 1], [2], [3]]), ("tensor", [[0], [1], [2], [3]])],
)
def test_grad_vac_corrects_every_group_apart(groups: str, parts: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    balancer = GradVac(beta=0.3, groups=groups, order="ascending")
    # A layer's tensors need not be neighbours.
    order = [0, 2, 1, 3]
    balancer.columns = Columns(
        tuple(COLUMNS.names[k] for k in order), tuple(COLUMNS.sizes[k] for k in order)
    )
    starts = np.cumsum([0, *balancer.columns.sizes])
    place = {k: torch.arange(starts[n], starts[n + 1]) for n, k in enumerate(order)}
    index = [torch.cat([place[k] for k in part]) for part in parts]
    rho = [torch.zeros(3, 3, dtype=torch.float64) for _ in parts]
    orders = [[0, 1, 2]] * 3
    for _ in range(6):
        jacobian, losses = random_step(rng, 3, 10)
        found = balancer.direction(jacobian, losses)
        for k, columns in enumerate(index):
            expected, rho[k] = vaccinated(jacobian[:, columns], rho[k], 0.3, orders)
            torch.testing.assert_close(found[columns], expected)
    assert balancer.targets.shape == (3, 3, len(parts))
    names = [balancer.columns.names[n].rpartition(".")[0] for n in range(4)]
    kept = list(dict.fromkeys(names)) if groups == "layer" else list(balancer.columns.names)
    for k, part in enumerate(parts):
        name = COLUMNS.names[part[0]]
        name = name.rpartition(".")[0] if groups == "layer" else name
        torch.testing.assert_close(balancer.targets[:, :, kept.index(name)], rho[k])


def test_grad_vac_without_history_is_pcgrad() -> None:
    rng = np.random.default_rng(5)
    for size in (2, 4):
        jacobian, losses = random_step(rng, size, 3)
        gramian = jacobian @ jacobian.T
        vaccine, surgery = GradVac(seed=3), PCGrad(seed=3)
        torch.testing.assert_close(
            vaccine.weights(gramian, losses), surgery.weights(gramian, losses)
        )
        never = GradVac(beta=0.0, order="ascending")
        for _ in range(3):
            weights = never.weights(gramian, losses)
            torch.testing.assert_close(weights, pcgrad_weights(gramian))


def test_targets_near_one_stay_finite() -> None:
    same, losses = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.ones(2)
    balancer = GradVac(order="ascending")
    for _ in range(40):
        balancer.direction(same, losses)
    assert balancer.targets[0, 1, 0] > 1 - 1e-6
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = balancer.weights(apart @ apart.T, losses)
    # cos = 0 and a target of 0.9999: 1 + 0.9999 / sqrt(1 - 0.9999**2)
    torch.testing.assert_close(found, torch.full((2,), 1 + 0.9999 / math.sqrt(1 - 0.9999**2)))


def test_a_pair_without_cosine_keeps_its_target() -> None:
    balancer, losses = GradVac(order="ascending"), torch.ones(3)
    first = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    balancer.direction(first, losses)
    before = balancer.targets.clone()
    second = first.clone()
    second[1] = 0
    found = balancer.weights(second @ second.T, losses)
    assert found[1] == 1
    after = balancer.targets
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[:, 1], before[:, 1])
    assert not torch.equal(after[0, 2], before[0, 2])
    # Nothing is left of the first gradient after it met its opposite.
    opposite = torch.tensor([[1.0, 1.0], [-2.0, -2.0], [1.0, 0.0]], dtype=torch.float64)
    weights, targets = grad_vac_weights(opposite @ opposite.T, torch.zeros(3, 3))
    assert targets[0, 2] == 0
    torch.testing.assert_close(weights @ opposite, projected(opposite, [[0, 1, 2]] * 3, False))


def test_both_dimensions_of_the_targets_follow_the_tasks() -> None:
    rng = np.random.default_rng(1)
    balancer, part = (GradVac(order="ascending") for _ in range(2))
    for _ in range(3):
        jacobian, losses = random_step(rng, 4)
        with balancer.only(TASKS[:4]):
            balancer.direction(jacobian, losses)
    before = balancer.targets.clone()
    present = [1, 3]
    part.targets = before[present][:, present].clone()
    for _ in range(2):
        jacobian, losses = random_step(rng, 2)
        with balancer.only(TASKS[:4], present):
            found = balancer.direction(jacobian, losses)
        assert torch.equal(found, part.direction(jacobian, losses))
    after = balancer.targets.clone()
    assert torch.equal(after[present][:, present], part.targets)
    after[[1, 1, 3, 3], [1, 3, 1, 3]] = before[[1, 1, 3, 3], [1, 3, 1, 3]]
    assert torch.equal(after, before)


def test_targets_of_tasks_not_met_yet_are_zero() -> None:
    rng = np.random.default_rng(2)
    balancer = GradVac(groups="tensor")
    balancer.columns = COLUMNS
    jacobian, losses = random_step(rng, 2)
    with balancer.only(TASKS[:3], [0, 2]):
        balancer.direction(jacobian, losses)
    assert balancer.targets.shape == (3, 3, 4)
    assert balancer.targets[[0, 2], [2, 0]].all()
    assert not balancer.targets[1].any()
    assert not balancer.targets[:, 1].any()

    def broken_off() -> None:
        with balancer.only(TASKS[:3], [0, 1]):
            balancer.direction(jacobian, losses)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert balancer.targets.shape == (3, 3, 4)
    assert balancer.targets[0, 1].all()
    with (
        pytest.raises(ValueError, match=r"`targets` in shape \(2, .* found \(3, 3, 4\)"),
        balancer.only(TASKS[:2], [0]),
    ):
        pass
    balancer.columns = None
    with pytest.raises(ValueError, match=r"`targets` in shape \(3, 3, 1\)"):
        balancer.direction(torch.ones(3, 10), torch.ones(3))


def test_groups_have_no_common_weights() -> None:
    with pytest.raises(ValueError, match=r"`groups='model'` .* found 'layer'.*Call `direction`"):
        GradVac(groups="layer").weights(torch.eye(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"shape of `gramian`, \(2, 2\), found \(3, 3\)\. Start"):
        grad_vac_weights(torch.eye(2), torch.zeros(3, 3))


@pytest.mark.parametrize("groups", ["model", "layer", "tensor"])
def test_grad_vac_in_a_run(groups: str) -> None:
    balancer, model = GradVac(groups=groups), Balanced()
    trainer(callbacks=[balancer], max_steps=3).fit(model, loader())
    tensors = len(list(model.net.trunk.parameters()))
    expected = {"model": 1, "layer": tensors // 2, "tensor": tensors}[groups]
    assert balancer.targets.shape == (2, 2, expected)
    assert balancer.targets.any()
