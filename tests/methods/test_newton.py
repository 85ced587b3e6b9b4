"""Nash-MTL and FairGrad: their equation, what its solution is best at, and reused weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mtl.gradient_balancers.fair_grad import FairGrad, fair_grad_weights
from lightning_mtl.gradient_balancers.nash_mtl import NashMTL, nash_mtl_weights
from lightning_mtl.numerics import newton
from lightning_mtl.numerics.newton import alpha_fair
from tests.common.methods import TASKS, fixture
from tests.common.models import Balanced, loader, trainer

NAN = float("nan")


def rows_of(rng: np.random.Generator, size: int, width: int, spread: float = 4.0) -> np.ndarray:
    """Random rows with norms over ``exp(+-spread)``."""
    scales = np.exp(rng.uniform(-spread, spread, size))
    return rng.standard_normal((size, width)) * scales[:, None]


def near_opposite(rng: np.random.Generator, size: int, gap: float) -> np.ndarray:
    rows = rows_of(rng, size, 30, 2.0)
    noise = rng.standard_normal(30) / 30**0.5
    rows[-1] = -3 * (rows[0] + gap * np.linalg.norm(rows[0]) * noise)
    return rows


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps of Newton's method, one entry a call of the linear solver."""
    calls: list[int] = []
    solve = np.linalg.solve
    counted = lambda *arguments: calls.append(1) or solve(*arguments)  # noqa: E731
    monkeypatch.setattr(newton.np.linalg, "solve", counted)
    return calls


# ------------------------------------------------------------------------------------ the equation


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_thousand_problems_are_solved_in_few_steps(alpha: float, solves: list[int]) -> None:
    rng = np.random.default_rng(0)
    most, total, worst = 0, 0, 0.0
    for _ in range(1000):
        size = int(rng.integers(2, 12))
        rows = rows_of(rng, size, size + int(rng.integers(2, 20)))
        gramian = rows @ rows.T
        solves.clear()
        w = alpha_fair(gramian, alpha)
        most, total = max(most, len(solves)), total + len(solves)
        worst = max(worst, np.abs((gramian @ w) * w ** (1 / alpha) - 1).max())
    assert worst < 1e-10
    assert most <= 12
    assert total < 7000


@pytest.mark.parametrize("alpha", [0.05, 0.2, 5.0, 10.0])
def test_other_alphas(alpha: float, solves: list[int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        rows = rows_of(rng, int(rng.integers(2, 12)), 30, 2.0)
        gramian = rows @ rows.T
        solves.clear()
        w = alpha_fair(gramian, alpha)
        assert len(solves) <= 30
        assert (w > 0).all()
        wanted = w ** (-1 / alpha)
        error = np.abs(gramian @ w - wanted)
        assert (error < 1e-12 * (np.abs(gramian) @ w) + 1e-9 * wanted).all()


def test_nearly_identical_rows() -> None:
    """Far from orthogonal and with a steep power, where relative steps overshoot."""
    rows = np.full((11, 11), 1.0) + 1e-3 * np.eye(11)
    gramian = rows @ rows.T
    for alpha in (0.01, 0.1, 1.0, 10.0):
        w = alpha_fair(gramian, alpha)
        np.testing.assert_allclose((gramian @ w) * w ** (1 / alpha), 1.0, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_near_opposite_rows(gap: float, alpha: float, solves: list[int]) -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        rows = near_opposite(rng, int(rng.integers(2, 12)), gap)
        solves.clear()
        w = alpha_fair(rows @ rows.T, alpha)
        assert len(solves) <= 35
        expected = np.sqrt((w ** (1 - 1 / alpha)).sum())
        assert abs(np.linalg.norm(w @ rows) / expected - 1) < 1e-3
        assert (rows @ (w @ rows) > 0).all()


def test_gramian_with_more_noise_than_its_dtype_has() -> None:
    """As from matrix products in TF32: no longer positive semidefinite, still usable weights."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = int(rng.integers(2, 13))
        rank = max(1, size // 2)
        rows = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, 16))
        gramian = torch.from_numpy(rows @ rows.T).bfloat16().double().numpy()
        for alpha in (0.1, 1.0, 10.0):
            w = alpha_fair(gramian, alpha, resolution=1.2e-7)
            assert np.isfinite(w).all()
            assert (w * np.sqrt(gramian.diagonal())).max() < 1e4


def test_alpha_beyond_all_measure() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.8]])
    w = alpha_fair(rows @ rows.T, 1e5)
    np.testing.assert_allclose(w, [1.0, 1.0, 0.0], atol=1e-3)


def test_equation_with_preference_in_every_dtype() -> None:
    jacobian, _ = fixture("E3")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        gramian = (jacobian @ jacobian.T).to(dtype)
        w = nash_mtl_weights(gramian, [1.0, 2.0, 6.0])
        assert w.dtype == dtype
        expected = torch.tensor([1.0, 2.0, 6.0], dtype=dtype) / 3
        torch.testing.assert_close(w * (gramian @ w), expected, rtol=tolerance, atol=0)


# ---------------------------------------------------------------------------------------- Nash-MTL


def test_nash_direction_has_norm_root_of_the_number_of_tasks() -> None:
    rng = np.random.default_rng(3)
    for size in (1, 2, 5, 11):
        for preference in (None, list(range(1, size + 1))):
            jacobian = torch.from_numpy(rows_of(rng, size, 20))
            w = nash_mtl_weights(jacobian @ jacobian.T, preference)
            torch.testing.assert_close(float((w @ jacobian).norm()), size**0.5)
            assert (w >= 1e-9).all()
            clipped = NashMTL(preference=preference).direction(jacobian, torch.ones(size))
            torch.testing.assert_close(float(clipped.norm()), 1.0)


def test_nash_does_not_see_the_length_of_a_row() -> None:
    rng = np.random.default_rng(4)
    jacobian = torch.from_numpy(rows_of(rng, 5, 20))
    factors = torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1e6], dtype=torch.float64)
    plain, scaled = (
        nash_mtl_weights(rows @ rows.T) for rows in (jacobian, factors[:, None] * jacobian)
    )
    torch.testing.assert_close(scaled * factors, plain, rtol=1e-9, atol=0)


def test_nash_is_best_among_directions_of_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    powers = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    found = nash_mtl_weights(jacobian @ jacobian.T, powers.tolist()) @ jacobian

    def product(along: Tensor) -> Tensor:
        return ((jacobian @ along).log() @ powers).nan_to_num(-torch.inf)

    for size in (1e-3, 1e-1, 1.0):
        for _ in range(100):
            other = found + size * torch.randn(4, generator=generator, dtype=torch.float64)
            other *= found.norm() / other.norm()
            assert product(other) <= product(found) + 1e-12


def test_nash_clips_the_shared_direction_only() -> None:
    jacobian, losses = fixture("E3")
    plain = nash_mtl_weights(jacobian @ jacobian.T)
    for max_norm, expected in ((0.25, 0.25), (1.0, 1.0), (5.0, 3**0.5), (None, 3**0.5)):
        balancer = NashMTL(max_norm=max_norm)
        assert balancer.weight_heads
        torch.testing.assert_close(float(balancer.direction(jacobian, losses).norm()), expected)
        torch.testing.assert_close(balancer.head_weights(), plain)
    alone = torch.tensor([[3.0, 0.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(float(NashMTL().direction(alone, losses[:2]).norm()), 1.0)
    tripled = NashMTL(scale="sum")
    torch.testing.assert_close(float(tripled.direction(jacobian, losses).norm()), 3.0)
    torch.testing.assert_close(tripled.head_weights(), 3 * plain)


def test_nash_has_no_head_weights_before_the_first_call() -> None:
    for every in (1, 2):
        with pytest.raises(RuntimeError, match=r"no weights yet: call `weights` or `direction`"):
            NashMTL(update_weights_every=every).head_weights()


class TestReuse:
    """Weights that serve for more than one step."""

    def step(self, balancer: NashMTL, scale: float = 1.0) -> Tensor:
        jacobian, losses = fixture("E3")
        jacobian = jacobian * torch.tensor([1.0, scale, 1.0], dtype=torch.float64)[:, None]
        return balancer.weights(jacobian @ jacobian.T, losses)

    def test_schedule(self) -> None:
        balancer, fresh = NashMTL(update_weights_every=3), NashMTL()
        reused = []
        for k in range(1, 8):
            kept = balancer.reused_weights()
            found = self.step(balancer, k)
            reused.append(kept is not None)
            if kept is not None:
                assert torch.equal(kept, found)
                assert torch.equal(found, before)  # noqa: F821
            else:
                assert torch.equal(found, self.step(fresh, k))
                assert torch.equal(balancer.head_weights(), fresh.head_weights())
                before = found  # noqa: F841
            balancer.update(torch.ones(3))
        assert reused == [False, True, True, False, True, True, False]

    def test_head_weights_of_a_step_that_reuses(self) -> None:
        balancer = NashMTL(update_weights_every=2)
        self.step(balancer)
        heads = balancer.head_weights()
        balancer.update(torch.ones(3))
        assert balancer.reused_weights() is not None
        assert torch.equal(balancer.head_weights(), heads)
        torch.testing.assert_close(heads, balancer.reused_weights() * 3**0.5)

    def test_reading_changes_nothing(self) -> None:
        balancer = NashMTL(update_weights_every=2)
        self.step(balancer)
        balancer.update(torch.ones(3))
        before = balancer.kept.clone()
        balancer.reused_weights().zero_()
        balancer.head_weights().zero_()
        assert torch.equal(balancer.kept, before)

    def test_step_that_is_skipped_does_not_count(self) -> None:
        balancer = NashMTL(update_weights_every=2)
        self.step(balancer)
        assert balancer.reused_weights() is None  # no update: the step was not taken
        self.step(balancer, 2.0)
        balancer.update(torch.ones(3))
        assert torch.equal(balancer.reused_weights(), self.step(NashMTL(), 2.0))

    def test_every_step_by_default(self) -> None:
        balancer = NashMTL()
        self.step(balancer)
        balancer.update(torch.ones(3))
        assert balancer.reused_weights() is None
        assert balancer.kept is None

    def test_task_that_was_never_there(self) -> None:
        balancer = NashMTL(update_weights_every=3)
        names = TASKS[:3]
        with balancer.only(names, [0, 1]):
            balancer.weights(torch.eye(2).double(), torch.ones(2))
            balancer.update(torch.ones(2))
        with balancer.only(names, [0, 1]):
            torch.testing.assert_close(
                balancer.reused_weights(), torch.full((2,), 0.5**0.5).double()
            )
        with balancer.only(names):
            assert balancer.reused_weights() is None
            assert torch.equal(self.step(balancer), self.step(NashMTL()))
            balancer.update(torch.ones(3))
        with balancer.only(names, [2]):  # kept weights serve for fewer tasks too
            assert balancer.reused_weights().shape == (1,)

    def test_weights_of_another_run_are_refused(self) -> None:
        balancer = NashMTL(update_weights_every=3)
        self.step(balancer)
        balancer.update(torch.ones(3))
        with balancer.only(["a", "b"]):
            assert balancer.reused_weights() is None
            with pytest.raises(ValueError, match=r"its state `kept` in shape \(2, 3\)"):
                balancer.weights(torch.eye(2), torch.ones(2))

    def test_weights_that_are_not_finite_are_not_kept(self) -> None:
        balancer = NashMTL(update_weights_every=3)
        balancer.weights(torch.full((2, 2), NAN), torch.ones(2))
        balancer.update(torch.ones(2))
        assert balancer.reused_weights() is None
        assert balancer.weights(torch.eye(2), torch.ones(2)).isfinite().all()

    def test_in_a_fit(self) -> None:
        seen: list[tuple[float, Tensor, Tensor]] = []

        class Look(Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
                shared = torch.cat([p.grad.flatten() for p in module.net.trunk.parameters()])
                heads = torch.cat([head.bias.grad for head in module.net.heads.values()])
                seen.append((float(shared.norm()), heads.clone(), balancer.head_weights()))

        for weight_heads in (True, False):
            balancer = NashMTL(update_weights_every=3, weight_heads=weight_heads)
            trainer(callbacks=[balancer, Look()], max_steps=7).fit(Balanced(), loader())
        norms = [norm for norm, _, _ in seen[:7]]
        assert [k for k, norm in enumerate(norms, 1) if abs(norm - 1) < 1e-5] == [1, 4, 7]
        (_, weighted, w), (_, plain, _) = seen[0], seen[7]
        torch.testing.assert_close(weighted, w.float() * plain)


# ---------------------------------------------------------------------------------------- FairGrad


def test_fair_grad_with_alpha_one_is_nash() -> None:
    rng = np.random.default_rng(5)
    jacobian = torch.from_numpy(rows_of(rng, 6, 20))
    gramian = jacobian @ jacobian.T
    assert torch.equal(fair_grad_weights(gramian), nash_mtl_weights(gramian))
    assert FairGrad().alpha == 1.0
    assert not FairGrad().weight_heads
    assert FairGrad(weight_heads=True).weight_heads


def test_fair_grad_between_the_sum_and_equal_improvements() -> None:
    jacobian, _ = fixture("E3")
    gramian = jacobian @ jacobian.T
    torch.testing.assert_close(
        fair_grad_weights(gramian, 1e-3), torch.ones(3).double(), rtol=3e-3, atol=0
    )
    slopes = gramian @ fair_grad_weights(gramian, 1e3)
    torch.testing.assert_close(slopes, torch.ones(3).double(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_fair_grad_is_best_among_directions_of_its_length(alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    jacobian = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    found = fair_grad_weights(jacobian @ jacobian.T, alpha) @ jacobian

    def utility(along: Tensor) -> Tensor:
        slopes = jacobian @ along
        value = slopes.clamp(min=0) ** (1 - alpha) / (1 - alpha)
        return torch.where(slopes > 0, value, -torch.inf).sum()

    for size in (1e-3, 1e-1, 1.0):
        for _ in range(100):
            other = found + size * torch.randn(4, generator=generator, dtype=torch.float64)
            other *= found.norm() / other.norm()
            assert utility(other) <= utility(found) + 1e-12
