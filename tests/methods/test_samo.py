"""What is special to SAMO, by hand on quadratic losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.balancer import Columns
from lightning_mtl.gradient_balancers import DualBalance, MinNorm, TaskTensioner
from lightning_mtl.gradient_balancers.samo import SAMO, samo_perturbations
from lightning_mtl.loss_balancers import LogLoss

REFUSED = [
    ({"rho": 0.0}, r"`rho` of SAMO .* above 0, found 0\.0"),
    ({"beta": 1.1}, r"`beta` of SAMO to be in \[0, 1\], found 1\.1"),
    ({"local": "forward"}, r"`local` of SAMO .*\('estimate', 'gradient'\)"),
    ({"radius": -0.1}, r"`radius` of SAMO .* above 0, found -0\.1"),
    ({"seed": -1}, r"`seed` of SAMO .* at least 0 or None, found -1"),
    ({"base": LogLoss()}, r"no loss balancer too, found LogLoss\. Use"),
    ({"base": DualBalance()}, r"no loss balancer too, found DualBalance\. Use"),
    ({"base": MinNorm(weight_heads=True)}, r"found MinNorm with `weight_heads=True`"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SAMO(**arguments)


def doubles(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Quadratics:
    """Losses 0.5 (x - c)' A (x - c), whose gradients are known everywhere."""

    def __init__(self, tasks: int = 3, width: int = 5) -> None:
        roots = some(1, tasks, width, width)
        self.matrices = roots @ roots.mT + torch.eye(width, dtype=torch.float64)
        self.centres = some(2, tasks, width)
        self.point = some(3, width)

    def losses(self, points: Tensor) -> Tensor:
        """Loss of task t at row t."""
        offsets = points - self.centres
        return 0.5 * torch.einsum("tp,tpq,tq->t", offsets, self.matrices, offsets)

    def gradients(self, points: Tensor) -> Tensor:
        return torch.einsum("tpq,tq->tp", self.matrices, points - self.centres)


def parallel(first: Tensor, second: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)


class TestSAMO:
    sizes = (2, 3)

    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    def test_perturbations_tensor_by_tensor(self, beta: float) -> None:
        average, local = some(0, 5).numpy(), some(1, 3, 5).numpy()
        found = samo_perturbations(
            torch.from_numpy(average), torch.from_numpy(local), 0.2, beta, self.sizes
        )
        for t in range(3):
            mix = np.zeros(5)
            for a, b in ((0, 2), (2, 5)):
                g, h = average[a:b], local[t, a:b]
                length = np.sqrt((g * g).sum())
                mix[a:b] = (1 - beta) * g + beta * length * h / np.sqrt((h * h).sum())
            mix *= 0.2 / np.sqrt((mix * mix).sum())
            np.testing.assert_allclose(found[t].numpy(), mix, rtol=1e-12)

    def test_a_task_of_its_own_goes_where_its_loss_grows_most(self) -> None:
        problem = Quadratics()
        jacobian = problem.gradients(problem.point.expand(3, -1))
        balancer = SAMO(rho=0.1, beta=1.0, local="gradient")
        found = balancer.perturbations(jacobian.mean(0), jacobian)
        slopes = (found * jacobian).sum(1)
        others = torch.nn.functional.normalize(some(9, 20_000, 5), dim=1) * 0.1
        assert ((others @ jacobian.T).max(0).values <= slopes + 1e-12).all()
        moved = problem.losses(problem.point + found)
        assert (moved > problem.losses(problem.point.expand(3, -1))).all()

    def test_without_own_part_all_tasks_go_up_the_mean_loss(self) -> None:
        average = some(0, 5)
        found = SAMO(rho=0.1, beta=0.0).perturbations(average, some(1, 3, 5))
        torch.testing.assert_close(found, (0.1 * average / average.norm()).expand(3, -1))

    @pytest.mark.parametrize("s", [1e-12, 1e-3, 1e6])
    def test_only_directions_matter(self, s: float) -> None:
        average, local = some(0, 5), some(1, 3, 5)
        expected = samo_perturbations(average, local, sizes=self.sizes)
        lengths = doubles([[s], [1.0], [1 / s]])
        found = samo_perturbations(s * average, lengths * local, sizes=self.sizes)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.norm(dim=1), torch.full_like(found[:, 0], 1e-3))

    def test_zeros(self) -> None:
        average, local = doubles([3.0, 4.0, 0.0]), doubles([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
        found = samo_perturbations(average, local, 1.0, 0.5, (2, 1))
        torch.testing.assert_close(found[0], doubles([0.6, 0.8, 0.0]))
        torch.testing.assert_close(found[1], doubles([2.0, 1.0, 0.0]) / 5**0.5)
        assert not samo_perturbations(torch.zeros(3), local.float()).any()
        assert not samo_perturbations(average, -average[None], 1.0, 0.5).any()
        assert SAMO(rho=0.5).head_perturbation(torch.zeros(2)).tolist() == [0.0, 0.0]
        moved = SAMO(rho=0.5).head_perturbation(torch.tensor([3.0, -4.0]))
        torch.testing.assert_close(moved, torch.tensor([0.3, -0.4]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_dtype_of_the_input(self, dtype: torch.dtype) -> None:
        average, local = some(0, 5).to(dtype), some(1, 3, 5).to(dtype)
        found = samo_perturbations(average, local, sizes=self.sizes)
        assert found.dtype == dtype
        exact = samo_perturbations(average.double(), local.double(), sizes=self.sizes)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)

    def test_estimate_needs_no_more_than_a_sign(self) -> None:
        """Central differences of a quadratic are exact: the slope along the probe."""
        problem, balancer = Quadratics(), SAMO(beta=0.7, seed=0)
        probes = balancer.probes(problem.point, 3)
        differences = problem.losses(problem.point + probes) - problem.losses(
            problem.point - probes
        )
        jacobian = problem.gradients(problem.point.expand(3, -1))
        torch.testing.assert_close(differences, 2 * (probes * jacobian).sum(1))
        local = differences[:, None] * probes
        assert ((local * jacobian).sum(1) > 0).all()  # each task goes up its own loss
        average = jacobian.mean(0)
        torch.testing.assert_close(
            balancer.perturbations(average, local),
            balancer.perturbations(average, differences.sign()[:, None] * probes),
        )

    @pytest.mark.parametrize("base", [None, MinNorm()])
    @pytest.mark.parametrize("local", ["estimate", "gradient"])
    def test_a_whole_step(self, base, local) -> None:
        """As the paper orders it; the sharpness-aware gradient also by autograd."""
        problem, balancer = Quadratics(), SAMO(base, rho=0.05, local=local, seed=1)
        balancer.columns = Columns(("a", "b"), self.sizes)
        losses = problem.losses(problem.point.expand(3, -1))
        jacobian = problem.gradients(problem.point.expand(3, -1))
        rows = jacobian
        if local == "estimate":
            probes = balancer.probes(problem.point, 3)
            ends = [problem.losses(problem.point + sign * probes) for sign in (1, -1)]
            rows = (ends[0] - ends[1])[:, None] * probes
        moves = balancer.perturbations(jacobian.mean(0), rows)
        torch.testing.assert_close(
            moves, samo_perturbations(jacobian.mean(0), rows, 0.05, 0.5, self.sizes)
        )
        there = (problem.point + moves).requires_grad_()
        problem.losses(there).sum().backward()
        assert there.grad is not None
        found = problem.gradients(problem.point + moves)
        torch.testing.assert_close(found, there.grad)
        direction = balancer.direction(found, losses)
        weights = balancer.weights(found @ found.T, losses)
        plain = found.sum(0) if base is None else base.direction(found, losses)
        torch.testing.assert_close(direction, plain)
        torch.testing.assert_close(direction, weights @ found)
        here = jacobian.sum(0) if base is None else base.direction(jacobian, losses)
        assert (direction - here).norm() > 1e-3 * here.norm()

    def test_two_draws_differ_and_a_restored_balancer_goes_on(self) -> None:
        like = torch.zeros(4)
        first = SAMO(seed=3)
        drawn = first.probes(like, 2)
        assert drawn.shape == (2, 4)
        assert not torch.equal(drawn, first.probes(like, 2))
        second = SAMO(seed=3)
        assert torch.equal(drawn, second.probes(like, 2))
        state = second.state_dict()
        expected = second.probes(like, 2)
        third = SAMO(seed=3)
        third.load_state_dict(state)
        assert torch.equal(third.probes(like, 2), expected)

    def test_length_of_the_probes(self) -> None:
        probes = SAMO(radius=0.3, seed=0).probes(torch.zeros(100_000), 1)
        assert probes.std().item() == pytest.approx(0.3, rel=0.02)

    def test_state_of_the_base_travels_along(self) -> None:
        balancer = SAMO(TaskTensioner(window=1))
        assert balancer.state_key == "SAMO(TaskTensioner(CentralDirection))"
        assert balancer.gramian_weighted
        balancer.direction(torch.eye(2), torch.ones(2))
        state = balancer.state_dict()
        assert state["nested"]["base"]["state"]["norms"].shape == (2, 2)

    def test_a_base_of_no_weights_gives_its_direction(self) -> None:
        class Last(MinNorm):
            def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
                return jacobian[-1]

        balancer = SAMO(Last())
        assert not balancer.gramian_weighted
        assert balancer.direction(torch.eye(2), torch.ones(2)).tolist() == [0.0, 1.0]


def test_parallel_mix_of_a_task_that_agrees_with_the_mean() -> None:
    average = some(0, 5)
    found = samo_perturbations(average, 3 * average[None], 0.1, 0.4)
    torch.testing.assert_close(parallel(found[0], average), doubles(1.0))
