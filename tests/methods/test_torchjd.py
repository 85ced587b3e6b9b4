"""Side by side with TorchJD: the same direction where both mean the same, or why they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, LossBalancer
from lightning_mtl.gradient_balancers.aligned_mtl import AlignedMTL
from lightning_mtl.gradient_balancers.cagrad import CAGrad
from lightning_mtl.gradient_balancers.con_fig import ConFIG
from lightning_mtl.gradient_balancers.dual_proj import DualProj
from lightning_mtl.gradient_balancers.excess_mtl import ExcessMTL
from lightning_mtl.gradient_balancers.fair_grad import FairGrad
from lightning_mtl.gradient_balancers.grad_drop import grad_drop
from lightning_mtl.gradient_balancers.grad_vac import grad_vac_weights
from lightning_mtl.gradient_balancers.imtlg import IMTLG
from lightning_mtl.gradient_balancers.min_norm import MinNorm
from lightning_mtl.gradient_balancers.mo_do import MoDo
from lightning_mtl.gradient_balancers.nash_mtl import NashMTL
from lightning_mtl.gradient_balancers.pcgrad import pcgrad_weights
from lightning_mtl.gradient_balancers.sdmgrad import SDMGrad
from lightning_mtl.gradient_balancers.smooth import Smooth
from lightning_mtl.gradient_balancers.upgrad import UPGrad
from lightning_mtl.loss_balancers.dynamic_weight_average import DynamicWeightAverage
from lightning_mtl.loss_balancers.famo import FAMO
from lightning_mtl.loss_balancers.geometric_mean import GeometricMean
from lightning_mtl.loss_balancers.imtll import IMTLL
from lightning_mtl.loss_balancers.random_weighting import RandomWeighting
from lightning_mtl.loss_balancers.stch import stch_weights
from lightning_mtl.loss_balancers.uncertainty_weighting import UncertaintyWeighting
from tests.common.methods import fixture

pytest.importorskip("torchjd", reason="compared where it is installed")
pytest.importorskip("qpsolvers", reason="torchjd's extras are missing")
from torchjd import aggregation as jd
from torchjd import scalarization as scalarizers
from torchjd.linalg import QuadprogProjector

SIZES = [2, 3, 5]
WIDTH = 8


def jacobians(size: int, count: int = 10) -> Iterator[Tensor]:
    """Random gradients of full rank, whose norms differ a few times."""
    rng = np.random.default_rng(size)
    for _ in range(count):
        scales = np.exp(rng.uniform(-1, 1, size))
        yield torch.from_numpy(rng.standard_normal((size, WIDTH)) * scales[:, None])


def direction(balancer: GradientBalancer, jacobian: Tensor) -> Tensor:
    return balancer.direction(jacobian, torch.ones(jacobian.shape[-2], dtype=jacobian.dtype))


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the longer of the two."""
    size = max(float(found.norm()), float(expected.norm()), 1e-300)
    return float((found - expected).norm()) / size


def exact() -> Any:
    """Without the 1e-4 that TorchJD adds to the diagonal, and its threshold for small gradients."""
    return QuadprogProjector(norm_eps=0.0, reg_eps=0.0)


def shares(size: int) -> Tensor:
    values = torch.arange(1, size + 1, dtype=torch.float64)
    return values / values.sum()


class Pair(NamedTuple):
    """Two balancers for T tasks that mean the same, and how many times longer ours is."""

    name: str
    ours: Callable[[int], GradientBalancer]
    theirs: Callable[[int], Any]
    tolerance: float
    longer: Callable[[int], float] = lambda size: 1.0


SAME = [
    Pair("UPGrad", lambda t: UPGrad(), lambda t: jd.UPGrad(projector=exact()), 1e-9),
    Pair(
        "UPGrad(preference)",
        lambda t: UPGrad(preference=[*range(1, t + 1)]),
        lambda t: jd.UPGrad(shares(t), projector=exact()),
        1e-9,
    ),
    Pair("DualProj", lambda t: DualProj(), lambda t: jd.DualProj(projector=exact()), 1e-9),
    Pair(
        "DualProj(preference)",
        lambda t: DualProj(preference=[*range(1, t + 1)]),
        lambda t: jd.DualProj(shares(t), projector=exact()),
        1e-9,
    ),
    *(
        Pair(
            f"CAGrad({c})", lambda t, c=c: CAGrad(c=c, rescale=0), lambda t, c=c: jd.CAGrad(c), 5e-4
        )
        for c in (0.0, 0.4, 0.9)
    ),
    Pair("NashMTL", lambda t: NashMTL(), jd.NashMTL, 1e-5),
    Pair("NashMTL, unclipped", lambda t: NashMTL(max_norm=None), lambda t: jd.NashMTL(t, 0), 1e-5),
    *(
        Pair(
            f"FairGrad({a})", lambda t, a=a: FairGrad(alpha=a), lambda t, a=a: jd.FairGrad(a), 1e-7
        )
        for a in (0.5, 1.0, 2.0)
    ),
    # Ours is the sum of the aligned gradients, as in the authors' code; theirs is their mean.
    *(
        Pair(
            f"AlignedMTL({m})",
            lambda t, m=m: AlignedMTL(mode=m),
            lambda t, m=m: jd.AlignedMTL(scale_mode=m),
            1e-9,
            float,
        )
        for m in ("min", "median", "rmse")
    ),
    Pair(
        "AlignedMTL(preference)",
        lambda t: AlignedMTL(preference=[*range(1, t + 1)], scale="mean"),
        lambda t: jd.AlignedMTL(shares(t)),
        1e-9,
    ),
    Pair("ConFIG", lambda t: ConFIG(), lambda t: jd.ConFIG(), 1e-9),
    Pair(
        "ConFIG(preference)",
        lambda t: ConFIG(preference=[*range(1, t + 1)]),
        lambda t: jd.ConFIG(shares(t)),
        1e-9,
    ),
]


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pair", SAME, ids=lambda pair: pair.name)
def test_same_direction(pair: Pair, size: int) -> None:
    if pair.name.startswith("NashMTL"):
        pytest.importorskip("ecos", reason="it has no wheel for every Python")
    for jacobian in jacobians(size):
        ours = direction(pair.ours(size), jacobian)
        expected = pair.longer(size) * pair.theirs(size)(jacobian)
        assert difference(ours, expected) < pair.tolerance


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("ours", "other"), [(UPGrad, jd.UPGradWeighting), (DualProj, jd.DualProjWeighting)]
)
def test_regularisation_is_what_moves_their_weights(ours: Any, other: Any, size: int) -> None:
    """By default theirs adds 1e-4 to the diagonal of the normalised Gramian."""
    moved = []
    for jacobian in jacobians(size):
        gramian = jacobian @ jacobian.T
        expected = other()(gramian)
        regular = gramian / gramian.trace() + 1e-4 * torch.eye(size)
        weights = [ours().weights(m, torch.ones(size)) for m in (regular, gramian)]
        assert difference(weights[0], expected) < 1e-9
        moved.append(difference(weights[1], expected))
    assert max(moved) > 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_imtlg(size: int) -> None:
    """The same unless the sum of the weights, by which both divide, is negative: see below."""
    for jacobian in jacobians(size):
        cosines = jacobian @ jacobian.T
        if float(torch.linalg.solve(cosines, cosines.diagonal().sqrt()).sum()) > 0:
            assert difference(direction(IMTLG(), jacobian), jd.IMTLG()(jacobian)) < 1e-9


def test_imtlg_does_not_ascend() -> None:
    """Equal progress can mean a negative sum of weights; dividing by it turns the direction."""
    jacobian, _ = fixture("C3")
    jacobian[2] *= 0.1
    assert (jacobian @ jd.IMTLG()(jacobian) < 0).all()
    assert (jacobian @ direction(IMTLG(), jacobian) >= -1e-12).all()


@pytest.mark.parametrize("size", SIZES)
def test_min_norm_is_never_longer(size: int) -> None:
    """Theirs iterates. For any other point q of the hull, |q - p|^2 <= |q|^2 - |p|^2."""
    closer = []
    for jacobian in jacobians(size):
        ours = direction(MinNorm(), jacobian)
        square = float(ours.square().sum())
        gaps = []
        for iterations in (100, 500):
            other = jd.MGDA(epsilon=1e-12, max_iters=iterations)(jacobian)
            gaps.append(float(other.square().sum()) - square)
            assert gaps[-1] >= -1e-12 * square
            assert float((other - ours).square().sum()) <= gaps[-1] + 1e-12 * square
        closer.append(gaps[0] - gaps[1])
    assert np.median(closer) >= 0  # more iterations come closer to ours


def test_small_gradients_keep_their_conflicts_with_theirs() -> None:
    """An absolute threshold makes TorchJD average gradients that are short; ours have none."""
    jacobian, _ = fixture("E2")
    jacobian[1] *= 4
    small = 0.001 * jacobian
    for ours, other in ((UPGrad(), jd.UPGrad()), (DualProj(), jd.DualProj())):
        assert difference(other(small), small.mean(0)) < 1e-12
        assert (small @ other(small)).min() < 0
        expected = 0.001 * direction(ours, jacobian)
        assert difference(direction(ours, small), expected) < 1e-12
        assert (small @ direction(ours, small)).min() >= -1e-18
    assert not jd.CAGrad(0.4)(small).any()
    expected = 0.001 * direction(CAGrad(), jacobian)
    assert difference(direction(CAGrad(), small), expected) < 1e-9


@pytest.mark.parametrize("size", SIZES)
def test_sdmgrad(size: int) -> None:
    """Small steps of theirs lead to ours; its default steps are too long to get there."""
    jumps = []
    for jacobian in jacobians(size, count=5):
        gramian = jacobian @ jacobian.T
        ours = SDMGrad().weights(gramian, torch.ones(size))
        assert difference(jd.SDMGradWeighting(lr=0.1, n_iter=1000)(gramian), ours) < 1e-6
        other = jd.SDMGradWeighting()(gramian)
        length = float((ours @ jacobian).norm())
        assert length <= (1 + 1e-12) * float((other @ jacobian).norm())
        jumps.append(difference(other, ours))
    assert max(jumps) > 0.1


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The permutations that TorchJD draws."""
    drawn, draw = [], torch.randperm

    def recorded(size: int, **kwargs: Any) -> Tensor:
        drawn.append(draw(size, **kwargs).tolist())
        return torch.tensor(drawn[-1])

    monkeypatch.setattr(torch, "randperm", recorded)
    return drawn


@pytest.mark.parametrize("size", SIZES)
def test_pcgrad(size: int, orders: list[list[int]]) -> None:
    for jacobian in jacobians(size):
        orders.clear()
        expected = jd.PCGrad()(jacobian)
        ours = pcgrad_weights(jacobian @ jacobian.T, orders) @ jacobian
        assert difference(ours, expected) < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_grad_vac(size: int, orders: list[list[int]]) -> None:
    other = jd.GradVac(beta=0.3, eps=0.0)
    targets = torch.zeros(size, size, dtype=torch.float64)
    for jacobian in jacobians(size):
        orders.clear()
        expected = other(jacobian)
        met = []
        for i, order in enumerate(orders):  # they permute the other tasks only
            rest = [j for j in range(size) if j != i]
            met.append([*(rest[k] for k in order), i])
        weights, targets = grad_vac_weights(jacobian @ jacobian.T, targets, 0.3, met)
        assert difference(weights @ jacobian, expected) < 1e-9
    assert float(targets.abs().max()) > 0.05


@pytest.mark.parametrize("leak", [0.0, 0.25])
@pytest.mark.parametrize("size", SIZES)
def test_grad_drop(size: int, leak: float) -> None:
    for seed, jacobian in enumerate(jacobians(size)):
        jacobian[:, 0] = 0  # 0 / 0 in theirs drops it; it adds nothing in ours either
        torch.manual_seed(seed)
        leaks = torch.full((size,), leak, dtype=torch.float64)
        expected = jd.GradDrop(leak=leaks)(jacobian)
        torch.manual_seed(seed)
        uniform = torch.rand(WIDTH, dtype=torch.float64)
        assert difference(grad_drop(jacobian, uniform, leak), expected) < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_excess_mtl(size: int) -> None:
    """Their weights sum to one, ours to T; they add 1e-7 to sums of squares and to first risks."""
    ours, other = ExcessMTL(step_size=0.5, warm_up=3), jd.ExcessMTL(0.5, n_warmup_steps=3)
    for jacobian in jacobians(size):
        assert difference(direction(ours, jacobian), size * other(jacobian)) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_smooth(size: int) -> None:
    """CR-MOGM over weights that both compute exactly."""
    ours = Smooth(AlignedMTL(scale="mean"), alpha=0.8)
    other = jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.AlignedMTLWeighting(), alpha=0.8))
    for jacobian in jacobians(size):
        assert difference(direction(ours, jacobian), other(jacobian)) < 1e-9


@pytest.mark.parametrize("size", SIZES)
def test_mo_do(size: int) -> None:
    """Two independent batches for the weights, a third for the direction."""
    ours, other = MoDo(gamma=0.02, rho=0.1, batches=3), jd.MoDoWeighting(gamma=0.02, rho=0.1)
    batches = list(jacobians(size, count=12))
    for k in range(0, 12, 3):
        first, second, third = batches[k : k + 3]
        expected = other(first @ second.T) @ third
        assert difference(direction(ours, torch.stack([first, second, third])), expected) < 1e-9


def losses(size: int, count: int = 12) -> Iterator[Tensor]:
    rng = np.random.default_rng(10 + size)
    for _ in range(count):
        yield torch.from_numpy(10 ** rng.uniform(-1, 1, size))


def slopes(scalarizer: Any, values: Tensor) -> Tensor:
    """What each loss is multiplied by: the derivative of their scalar."""
    leaf = values.clone().requires_grad_()
    scalarizer(leaf).backward()
    return leaf.grad


@pytest.mark.parametrize("size", SIZES)
def test_geometric_mean(size: int) -> None:
    for values in losses(size):
        expected = slopes(scalarizers.GeometricMean(), values)
        torch.testing.assert_close(GeometricMean().loss_weights(values), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("ours", "other"),
    [(UncertaintyWeighting, scalarizers.UW), (IMTLL, scalarizers.IMTLL)],
    ids=["UW", "IMTL-L"],
)
def test_learned_with_adam(ours: type[LossBalancer], other: Any, size: int) -> None:
    balancer, scalarizer = ours(lr=0.05), other(size).double()
    optimizer = torch.optim.Adam(scalarizer.parameters(), lr=0.05)
    for values in losses(size):
        optimizer.zero_grad()
        expected = slopes(scalarizer, values)
        torch.testing.assert_close(balancer.loss_weights(values), expected)
        optimizer.step()
        balancer.update(values)
    assert (expected - expected.mean()).norm() > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_dynamic_weight_average(size: int) -> None:
    balancer, scalarizer = DynamicWeightAverage(temperature=1.5), scalarizers.DWA(temperature=1.5)
    for step, values in enumerate(losses(size), start=1):
        expected = slopes(scalarizer, values)
        torch.testing.assert_close(balancer.loss_weights(values), expected)
        balancer.update(values)
        if step % 3 == 0:
            scalarizer.step()
            balancer.end_epoch()
    assert (expected - 1).norm() > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_famo(size: int) -> None:
    floor = [0.01 * k for k in range(size)]
    balancer = FAMO(gamma=1e-2, minimum=floor)
    lowest = torch.tensor(floor, dtype=torch.float64)
    scalarizer = scalarizers.FAMO(size, min_losses=lowest, weight_decay=1e-2).double()
    for values, after in zip(losses(size), losses(size + 1), strict=True):
        expected = slopes(scalarizer, values)
        torch.testing.assert_close(balancer.loss_weights(values), expected)
        scalarizer.update(after[:size])
        balancer.update(values, after[:size])
    assert (balancer.logits - balancer.logits.mean()).norm() > 1e-3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mu", [1.0, 0.1])
def test_stch(mu: float, size: int) -> None:
    """Theirs takes the values as they are; ours log(loss / nadir), times T, as the authors do."""
    nadir = next(losses(size))
    scalarizer = scalarizers.STCH(mu, weights=torch.ones(size, dtype=torch.float64))
    for values in losses(size):
        expected = size * slopes(lambda x: scalarizer((x / nadir).log()), values)
        torch.testing.assert_close(stch_weights(values, nadir, mu), expected)


@pytest.mark.parametrize("size", SIZES)
def test_random(size: int) -> None:
    balancer = RandomWeighting(seed=4)
    torch.manual_seed(4)
    for values in losses(size):
        expected = slopes(scalarizers.Random(), values.float())
        torch.testing.assert_close(balancer.loss_weights(values.float()), expected)
