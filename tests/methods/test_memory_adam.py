"""What is special to MTAdam and MomentumConFIG, whose directions are Adam's with one task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.balancer import Columns
from lightning_mtl.gradient_balancers.momentum_con_fig import MomentumConFIG, implied_gradient
from lightning_mtl.gradient_balancers.mtadam import MTAdam, mtadam_factors
from tests.common.models import Balanced, loader, trainer

TASKS = ("a", "b", "c")
LR = 1e-2
REFUSED = [
    (MTAdam, {"beta1": 1.0}, r"`beta1` of MTAdam .* \[0, 1\), found 1.0"),
    (MTAdam, {"beta2": -0.1}, r"`beta2` of MTAdam .* \[0, 1\), found -0.1"),
    (MTAdam, {"beta3": 1.0}, r"`beta3` of MTAdam .* \[0, 1\), found 1.0"),
    (MTAdam, {"eps": -1.0}, "`eps` of MTAdam .* at least 0, found -1.0"),
    (MTAdam, {"ranks": {"a": 0.0}}, "`ranks` of MTAdam .* above 0, found 0.0 for task 'a'"),
    (MTAdam, {"ranks": []}, "`ranks` of MTAdam .* found none"),
    (MomentumConFIG, {"beta1": 1.0}, r"`beta1` of MomentumConFIG .* \[0, 1\), found 1.0"),
    (MomentumConFIG, {"beta2": 1.0}, r"`beta2` of MomentumConFIG .* \[0, 1\), found 1.0"),
    (MomentumConFIG, {"eps": float("nan")}, "`eps` of MomentumConFIG .* found nan"),
    (MomentumConFIG, {"rows_per_step": 0}, "`rows_per_step` of MomentumConFIG .* found 0"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("balancer", [MTAdam(), MomentumConFIG()], ids=["MTAdam", "MomentumConFIG"])
def test_one_task_is_adam(balancer) -> None:
    gradients = rows(8, 5)
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        found = balancer.direction(gradient[None], torch.ones(1))
        torch.testing.assert_close(found, before - parameter.detach())


def two_optimizers(module: Any) -> list[torch.optim.Optimizer]:
    """Plain SGD for the shared parameters, Adam for the others."""
    return [
        torch.optim.SGD(module.net.trunk.parameters(), lr=LR),
        torch.optim.Adam(module.net.heads.parameters(), lr=LR),
    ]


class PaperMTAdam:
    """The paper's optimizer over all parameters, tensor by tensor, in NumPy."""

    def __init__(self, shapes: list[tuple[int, ...]], tasks: int, ranks: list[float]) -> None:
        self.moments = [np.zeros((2, tasks, *shape)) for shape in shapes]
        self.norms = [np.zeros(tasks) for _ in shapes]
        self.ranks = ranks
        self.k = 0

    def steps(self, gradients: list[list[np.ndarray]]) -> list[np.ndarray]:
        """Update of every tensor over the learning rate; ``gradients[tensor][task]``."""
        self.k += 1
        found = []
        for (first, second), norms, of_tasks in zip(
            self.moments, self.norms, gradients, strict=True
        ):
            total, largest = np.zeros(first.shape[1:]), np.zeros(first.shape[1:])
            for t, gradient in enumerate(of_tasks):
                now = np.sqrt((gradient**2).sum())
                norms[t] = now if self.k == 1 else 0.9 * norms[t] + 0.1 * now
            for t, gradient in enumerate(of_tasks):
                if norms[t] > 1e-10:
                    anchor = next(s for s in range(len(norms)) if norms[s] > 1e-10)
                    gradient = self.ranks[t] * norms[anchor] / norms[t] * gradient
                first[t] = 0.9 * first[t] + 0.1 * gradient
                second[t] = 0.999 * second[t] + 0.001 * gradient**2
                total += first[t] / (1 - 0.9**self.k)
                largest = np.maximum(largest, np.sqrt(second[t] / (1 - 0.999**self.k)) + 1e-8)
            found.append(total / largest)
        return found


class TestMTAdam:
    def test_paper_on_several_tensors(self) -> None:
        ranks = [1.0, 0.5, 2.0]
        paper = PaperMTAdam([(2,), (4,), (1,)], 3, ranks)
        balancer = MTAdam(ranks=ranks)
        balancer.columns = Columns(("w", "v", "b"), (2, 4, 1))
        for k in range(6):
            jacobian = rows(3, 7, seed=k)
            jacobian[0, 2:6] = 0  # the first task never reaches the second tensor
            jacobian[1] *= 100
            pieces = jacobian.split((2, 4, 1), dim=1)
            expected = paper.steps([[row.numpy() for row in piece] for piece in pieces])
            found = balancer.direction(jacobian, torch.ones(3))
            np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-9)

    def test_factors(self) -> None:
        norms = torch.tensor([[2.0, 0.0, 0.0], [4.0, 3.0, 0.0], [1.0, 6.0, 0.0]])
        found = mtadam_factors(norms, torch.tensor([1.0, 2.0, 3.0]))
        torch.testing.assert_close(
            found, torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [6.0, 1.5, 1.0]])
        )

    def test_units_of_a_later_loss_do_not_matter(self) -> None:
        plain, changed = MTAdam(), MTAdam()
        for k in range(4):
            jacobian = rows(3, 6, seed=k)
            expected = plain.direction(jacobian, torch.ones(3))
            jacobian[1:] *= torch.tensor([[1e-5], [1e7]])
            torch.testing.assert_close(changed.direction(jacobian, torch.ones(3)), expected)

    def test_ranks_by_name(self) -> None:
        balancer = MTAdam(ranks={"c": 2.0})
        balancer.check_tasks(TASKS)
        in_order = MTAdam(ranks=[1.0, 2.0])
        jacobian = rows(2, 4)
        with balancer.only(TASKS, [0, 2]):
            found = balancer.direction(jacobian, torch.ones(2))
        assert torch.equal(found, in_order.direction(jacobian, torch.ones(2)))
        with pytest.raises(ValueError, match=r"unknown tasks \['z'\]"):
            MTAdam(ranks={"z": 2.0}).check_tasks(TASKS)
        with pytest.raises(ValueError, match=r"3 tasks .* found 2"):
            in_order.check_tasks(TASKS)

    def test_absent_tasks_stand_still(self) -> None:
        """With c away for two steps, a and b go on as alone, and c as if these were not."""
        balancer, pair = MTAdam(), MTAdam()
        for k in range(4):
            present = [0, 1] if k in (1, 2) else [0, 1, 2]
            jacobian = rows(3, 4, seed=k)
            with balancer.only(TASKS, present):
                balancer.direction(jacobian[present], torch.ones(len(present)))
            pair.direction(jacobian[:2], torch.ones(2))
        assert balancer.count.tolist() == [4, 4, 2]
        assert torch.equal(balancer.first[:2], pair.first)
        assert torch.equal(balancer.norms[:2], pair.norms)

    def test_pair_of_optimizers_is_the_papers_optimizer(self) -> None:
        """In a fit: shared parameters under SGD, heads under Adam, against MTAdam on all."""
        module = Balanced(two_optimizers)
        paper_net = Balanced(two_optimizers).net.double()
        parameters = list(paper_net.parameters())
        paper = PaperMTAdam([tuple(p.shape) for p in parameters], 2, [1.0, 1.0])
        batches = loader()
        trainer(callbacks=[MTAdam()]).fit(module, batches)
        for x, targets in batches:
            predictions = paper_net(x.double())
            losses = [nn.functional.mse_loss(predictions[t], targets[t].double()) for t in "ab"]
            rows_of = [
                torch.autograd.grad(
                    loss,
                    parameters,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for loss in losses
            ]
            steps = paper.steps(
                [[g.detach().numpy() for g in p] for p in zip(*rows_of, strict=True)]
            )
            with torch.no_grad():
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter -= LR * torch.from_numpy(step)
        start = dict(Balanced().net.named_parameters())
        trained = dict(module.net.named_parameters())
        for name, expected in paper_net.named_parameters():
            assert (trained[name] - start[name]).abs().max() > LR, name
            torch.testing.assert_close(trained[name].double(), expected, rtol=0, atol=2e-5)


class PaperMConFIG:
    """One momentum a step, ConFIG of all of them, one second moment for their result, in NumPy."""

    def __init__(self, size: int, width: int) -> None:
        self.momenta, self.had = np.zeros((size, width)), np.zeros(size)
        self.second, self.before, self.k = np.zeros(width), np.zeros(width), 0

    def step(self, turns: list[int], jacobian: np.ndarray) -> np.ndarray:
        for t in turns:
            self.momenta[t] = 0.9 * self.momenta[t] + 0.1 * jacobian[t]
            self.had[t] += 1
        if (self.had == 0).any():
            return np.zeros_like(self.second)
        self.k += 1
        momenta = self.momenta / (1 - 0.9**self.had)[:, None]
        units = momenta / np.linalg.norm(momenta, axis=1, keepdims=True)
        along = np.linalg.pinv(units) @ np.ones(len(units))
        along /= np.linalg.norm(along)
        combined = (momenta @ along).sum() * along
        smoothed = combined * (1 - 0.9**self.k)
        gradient = (smoothed - 0.9 * self.before) / 0.1
        self.before = smoothed
        self.second = 0.999 * self.second + 0.001 * gradient**2
        return combined / (np.sqrt(self.second / (1 - 0.999**self.k)) + 1e-8)


class TestMomentumConFIG:
    @pytest.mark.parametrize(("size", "each"), [(2, 1), (3, 1), (4, 2), (3, 3)])
    def test_paper(self, size: int, each: int) -> None:
        paper = PaperMConFIG(size, 6)
        balancer = MomentumConFIG(rows_per_step=each)
        queue = list(range(size))
        for k in range(20):
            turns, queue = queue[:each], queue[each:] + queue[:each]
            jacobian = rows(size, 6, seed=k)
            expected = paper.step(turns, jacobian.numpy())
            assert list(balancer.wanted(size)) == sorted(turns)
            others = [t for t in range(size) if t not in turns]
            jacobian[others] = torch.nan  # is not read
            found = balancer.direction(jacobian, torch.full((size,), torch.nan))
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)

    def test_rests_until_every_task_had_a_turn(self) -> None:
        balancer = MomentumConFIG()
        found = [bool(balancer.direction(rows(3, 4), torch.ones(3)).any()) for _ in range(4)]
        assert found == [False, False, True, True]
        assert int(balancer.step) == 2

    def test_asking_whose_turn_it_is_changes_nothing(self) -> None:
        balancer = MomentumConFIG()
        balancer.direction(rows(3, 4), torch.ones(3))
        assert [list(balancer.wanted(3)) for _ in range(3)] == [[1], [1], [1]]

    def test_turns_with_absent_tasks(self) -> None:
        balancer = MomentumConFIG()
        # In each step the tasks that are there; expected is whose turn it is.
        course = [
            ("ab", "a"),
            ("ab", "b"),
            ("abc", "c"),  # it has had none yet
            ("abc", "a"),
            ("bc", "b"),
            ("abc", "c"),
            ("abc", "a"),  # it has waited as long as b
            ("ac", "c"),
            ("abc", "b"),  # it was away for a step and kept its place
        ]
        for there, turn in course:
            present = [TASKS.index(t) for t in there]
            with balancer.only(TASKS, present):
                assert [balancer.tasks[t] for t in balancer.wanted(len(present))] == [turn]
                balancer.direction(rows(len(present), 4), torch.ones(len(present)))
        assert balancer.turns[:, 0].tolist() == [3, 3, 3]

    def test_equal_cosines_with_the_momenta(self) -> None:
        """Under a large eps the second moment is the same everywhere."""
        balancer = MomentumConFIG(beta1=0.0, beta2=0.0, eps=1e12, rows_per_step=3)
        jacobian = rows(3, 5)
        found = balancer.direction(jacobian, torch.ones(3))
        slopes = jacobian @ found / jacobian.norm(dim=1)
        torch.testing.assert_close(slopes / slopes[0], torch.ones(3, dtype=torch.float64))
        assert slopes[0] > 0

    def test_dependent_momenta(self) -> None:
        """No cosine suits the first two, so the third one gets what its gradient asks for."""
        jacobian = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
        balancer = MomentumConFIG(beta1=0.0, beta2=0.0, eps=1e12, rows_per_step=3)
        found = 1e12 * balancer.direction(jacobian, torch.ones(3))
        torch.testing.assert_close(found, torch.tensor([0.0, 3.0]))

    def test_opposite_momenta_rest(self) -> None:
        jacobian = torch.tensor([[1.0, 2.0], [-3.0, -6.0]])
        balancer = MomentumConFIG(eps=0.0, rows_per_step=2)
        assert balancer.direction(jacobian, torch.ones(2)).tolist() == [0.0, 0.0]

    def test_zero_momentum_takes_no_part(self) -> None:
        jacobian = rows(2, 5)
        with_zero = torch.cat([jacobian[:1], torch.zeros(1, 5), jacobian[1:]])
        found = MomentumConFIG(rows_per_step=3).direction(with_zero, torch.ones(3))
        expected = MomentumConFIG(rows_per_step=2).direction(jacobian, torch.ones(2))
        torch.testing.assert_close(found, expected)

    def test_not_finite(self) -> None:
        jacobian = torch.full((2, 3), torch.inf)
        found = MomentumConFIG(rows_per_step=2).direction(jacobian, torch.ones(2))
        assert found.isnan().all()

    def test_other_tasks_are_refused(self) -> None:
        balancer = MomentumConFIG()
        balancer.direction(rows(3, 4), torch.ones(3))
        with pytest.raises(ValueError, match=r"state `turns` in shape \(2, 2\) .* \(3, 2\)"):
            balancer.wanted(2)

    def test_implied_gradient(self) -> None:
        before, gradient = rows(2, 5)
        found = implied_gradient(0.9 * before + 0.1 * gradient, before, 0.9)
        torch.testing.assert_close(found, gradient)

    def test_resumed_with_the_shared_moments(self) -> None:
        whole, second = MomentumConFIG(), MomentumConFIG()
        for k in range(5):
            whole.direction(rows(2, 4, seed=k), torch.ones(2))
        second.load_state_dict(whole.state_dict())
        for k in range(5, 8):
            jacobian = rows(2, 4, seed=k)
            found = second.direction(jacobian, torch.ones(2))
            assert torch.equal(found, whole.direction(jacobian, torch.ones(2)))

    def test_trains(self) -> None:
        module, (x, targets) = Balanced(two_optimizers), next(iter(loader(batch_size=80)))

        def loss() -> float:
            with torch.no_grad():
                return float(sum((p - targets[t]).square().mean() for t, p in module(x).items()))

        first = loss()
        trainer(callbacks=[MomentumConFIG()], max_epochs=5).fit(module, loader())
        assert loss() < 0.6 * first
