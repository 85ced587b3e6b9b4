"""What is special to GradDrop, MoCo and ExcessMTL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.gradient_balancers import min_norm_weights
from lightning_mtl.gradient_balancers.excess_mtl import ExcessMTL, excess_mtl_weights
from lightning_mtl.gradient_balancers.grad_drop import GradDrop, grad_drop
from lightning_mtl.gradient_balancers.mo_co import MoCo, moco_weights
from lightning_mtl.gradient_balancers.momentum_con_fig import MomentumConFIG
from lightning_mtl.gradient_balancers.mtadam import MTAdam
from tests.common.models import Balanced, loader, sgd, trainer

NAN = float("nan")
TASKS = ("a", "b", "c")
REFUSED = [
    (GradDrop, {"leak": 1.5}, r"`leak` of GradDrop .* \[0, 1\], found 1.5"),
    (GradDrop, {"leak": NAN}, "`leak` of GradDrop .* found nan"),
    (GradDrop, {"scale": "max"}, r"`scale` of GradDrop .* \('mean', 'sum'\), found 'max'"),
    (GradDrop, {"seed": -1}, "`seed` of GradDrop .* at least 0 or None, found -1"),
    (
        GradDrop,
        {"gradients": "last_layer"},
        r"`gradients` of GradDrop .* \('parameters', 'representation'\), found 'last_layer'",
    ),
    (MoCo, {"beta": 0.0}, r"`beta` of MoCo .* \(0, 1\], found 0.0"),
    (MoCo, {"beta_sigma": -1.0}, "`beta_sigma` of MoCo .* at least 0, found -1.0"),
    (MoCo, {"gamma": 0.0}, "`gamma` of MoCo .* above 0, found 0.0"),
    (MoCo, {"gamma_sigma": NAN}, "`gamma_sigma` of MoCo .* found nan"),
    (MoCo, {"rho": -0.1}, "`rho` of MoCo .* at least 0, found -0.1"),
    (MoCo, {"projection": "box"}, r"\('simplex', 'softmax'\), found 'box'"),
    (MoCo, {"scale": "max"}, r"`scale` of MoCo .* \('mean', 'sum'\), found 'max'"),
    (ExcessMTL, {"step_size": 0.0}, "`step_size` of ExcessMTL .* above 0, found 0.0"),
    (ExcessMTL, {"warm_up": 0}, "`warm_up` of ExcessMTL .* at least 1, found 0"),
    (ExcessMTL, {"scale": "max"}, r"`scale` of ExcessMTL .* \('mean', 'sum'\), found 'max'"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradDrop(leak=0.3, seed=0),
        lambda: MoCo(gamma=1.0),
        lambda: ExcessMTL(step_size=1.0),
        MTAdam,
        MomentumConFIG,
    ],
)
def test_bfloat16_is_accumulated_in_float32(make) -> None:
    narrow, wide = make(), make()
    for k in range(40):
        jacobian = rows(3, 8, seed=k).bfloat16()
        found = narrow.direction(jacobian, torch.ones(3, dtype=torch.bfloat16))
        expected = wide.direction(jacobian.float(), torch.ones(3)).bfloat16()
        assert torch.equal(found, expected)


class TestGradDrop:
    def test_on_average_it_is_the_sum(self) -> None:
        task_rows = rows(4, 6)
        draws = (torch.arange(1000) + 0.5) / 1000
        found = torch.stack([grad_drop(task_rows, u.expand(6)) for u in draws]).mean(0)
        torch.testing.assert_close(found, task_rows.sum(0), rtol=0, atol=1e-2)

    def test_one_sign_is_left(self) -> None:
        task_rows = rows(5, 200)
        found = GradDrop(seed=0).direction(task_rows, torch.ones(5))
        sides = torch.stack([task_rows.clamp(min=0).sum(0), task_rows.clamp(max=0).sum(0)])
        taken = (found - sides).abs() < 1e-12
        assert taken.any(0).all()
        assert 60 < int(taken[0].sum()) < 140

    @pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
    def test_columns_of_one_sign_stay(self, u: float) -> None:
        task_rows = torch.tensor([[0.1, -0.1, 0.0], [0.2, -0.2, 0.0], [0.3, -0.7, 0.0]])
        found = grad_drop(task_rows, torch.full((3,), u))
        torch.testing.assert_close(found, task_rows.sum(0))

    def test_full_leak_is_the_sum(self) -> None:
        task_rows = rows(3, 6)
        torch.testing.assert_close(grad_drop(task_rows, torch.rand(6), leak=1.0), task_rows.sum(0))
        found = GradDrop(leak=1.0, scale="mean").direction(task_rows, torch.ones(3))
        torch.testing.assert_close(found, task_rows.mean(0))

    def test_mask_of_a_seed_does_not_depend_on_the_dtype(self) -> None:
        task_rows = rows(3, 50)
        wide = GradDrop(seed=1).direction(task_rows, torch.ones(3))
        narrow = GradDrop(seed=1).direction(task_rows.float(), torch.ones(3))
        torch.testing.assert_close(narrow, wide.float())

    def test_one_task_is_left_alone(self) -> None:
        row = rows(1, 12)
        for level in ("parameters", "representation"):
            found = GradDrop(gradients=level).direction(row, torch.ones(1))
            assert torch.equal(found, row[0])
            assert found.data_ptr() != row.data_ptr()
        silent = torch.zeros(3, 4)  # casts no vote
        assert torch.equal(grad_drop(row, torch.rand(4), activation=silent), row[0])

    def test_representation_element_by_element(self) -> None:
        activation = rows(3, 2, 4, seed=1)
        activation[:, 0, 0] = torch.tensor([0.0, 1.0, -2.0])  # a zero casts no vote
        gradients = rows(2, 3, 2, 4, seed=2)
        uniform = torch.rand(8, generator=torch.Generator().manual_seed(4)).view(2, 4)
        expected = torch.zeros(3, 2, 4, dtype=torch.float64)
        for i, j in np.ndindex(2, 4):
            votes = [
                sum(
                    float(gradients[t, b, i, j]) * np.sign(float(activation[b, i, j]))
                    for b in range(3)
                )
                for t in range(2)
            ]
            purity = 0.5 * (1 + sum(votes) / sum(abs(v) for v in votes))
            for t in range(2):
                if (votes[t] > 0) == (purity > uniform[i, j]):
                    expected[:, i, j] += gradients[t, :, i, j]
        balancer = GradDrop(seed=4, gradients="representation")
        balancer.representation = activation
        found = balancer.direction(gradients.flatten(1), torch.ones(2))
        torch.testing.assert_close(found.view(3, 2, 4), expected)

    def test_representation_is_needed(self) -> None:
        balancer = GradDrop(gradients="representation")
        with pytest.raises(
            ValueError, match=r"with 6 elements.*found none.*gradients='parameters'"
        ):
            balancer.direction(rows(2, 6), torch.ones(2))
        balancer.representation = torch.ones(2, 4)
        with pytest.raises(ValueError, match=r"with 6 elements.*found shape \(2, 4\)"):
            balancer.direction(rows(2, 6), torch.ones(2))

    def test_in_a_fit_on_the_representation(self) -> None:
        class Marked(Balanced):
            def forward(self, x: Tensor) -> dict[str, Tensor]:
                z = self.shared_representation(self.net.trunk(x).tanh())
                return {name[5:]: head(z).squeeze(-1) for name, head in self.net.heads.items()}

        module, plain = Marked(), Balanced().net
        trainer(callbacks=[GradDrop(seed=5, gradients="representation")]).fit(module, loader())
        optimizer, generator = sgd(plain.parameters()), torch.Generator().manual_seed(5)
        for x, targets in loader():
            z = plain.trunk(x).tanh()
            leaf = z.detach().requires_grad_()
            optimizer.zero_grad()
            task_rows = []
            for name, head in plain.heads.items():
                loss = (head(leaf).squeeze(-1) - targets[name[5:]]).square().mean()
                leaf.grad = None
                loss.backward()
                task_rows.append(leaf.grad.flatten())
            uniform = torch.rand(z.shape[1], generator=generator)
            found = grad_drop(torch.stack(task_rows), uniform, activation=z.detach())
            z.backward(found.view_as(z))
            optimizer.step()
        for found, expected in zip(module.net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected)


class TestMoCo:
    @pytest.mark.parametrize("seed", range(20))
    def test_projection_is_the_nearest_point(self, seed: int) -> None:
        start = np.random.default_rng(seed).dirichlet(np.ones(5))
        jacobian = rows(5, 9, seed=seed)
        moved = start - 0.3 * (jacobian @ jacobian.T).numpy() @ start
        found = moco_weights(torch.tensor(start), jacobian @ jacobian.T, 0.3).numpy()
        assert found.sum() == pytest.approx(1.0)
        assert (found >= 0).all()
        slack = moved - found  # one number where the weight is positive, no more elsewhere
        threshold = slack[found > 0].mean()
        np.testing.assert_allclose(slack[found > 0], threshold, atol=1e-12)
        assert (slack <= threshold + 1e-12).all()

    @pytest.mark.parametrize("projection", ["simplex", "softmax"])
    def test_large_gradients(self, projection) -> None:
        gramian = torch.diag(torch.tensor([1e25, 1e30, 4e30]))
        found = moco_weights(torch.full((3,), 1 / 3), gramian, projection=projection)
        torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0]))

    def test_not_finite(self) -> None:
        assert moco_weights(torch.ones(2) / 2, torch.full((2, 2), NAN)).isnan().all()
        with pytest.raises(ValueError, match=r"`gramian` of shape \(T, T\)"):
            moco_weights(torch.ones(2), torch.ones(2, 3))

    def test_weights_go_where_min_norm_puts_them(self) -> None:
        jacobian = rows(4, 6, seed=3) + 0.5
        expected = min_norm_weights(jacobian @ jacobian.T)
        balancer = MoCo(beta=1.0, gamma_sigma=0.0, gamma=0.05)
        for _ in range(2000):
            found = balancer.direction(jacobian, torch.ones(4))
        torch.testing.assert_close(balancer.weight, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(found, expected @ jacobian, rtol=0, atol=1e-5)

    def test_rho_pulls_to_equal_weights(self) -> None:
        spread = []
        for rho in (0.0, 5.0, 100.0):
            balancer = MoCo(beta=1.0, gamma=0.005, gamma_sigma=0.0, rho=rho)
            for _ in range(500):
                balancer.direction(torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2))
            spread.append(float(balancer.weight[0] - balancer.weight[1]))
        assert spread[0] > 0.7
        assert spread[0] > spread[1] > spread[2] > 0
        assert spread[2] < 0.05

    def test_sum_is_tasks_times_mean(self) -> None:
        jacobian = rows(3, 4)
        mean, total = MoCo(), MoCo(scale="sum")
        for _ in range(3):
            found = total.direction(jacobian, torch.ones(3))
            torch.testing.assert_close(found, 3 * mean.direction(jacobian, torch.ones(3)))

    def test_normalize(self) -> None:
        jacobian = rows(3, 4)
        jacobian[1] = 0
        losses = torch.tensor([2.0, 5.0, 0.5])
        balancer = MoCo(beta=1.0, normalize=True)
        assert balancer.requires_positive_losses
        assert not MoCo().requires_positive_losses
        balancer.direction(jacobian, losses)
        norms = balancer.average.norm(dim=1)
        torch.testing.assert_close(norms, torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64))

    def test_absent_tasks(self) -> None:
        jacobian, losses = rows(3, 4), torch.ones(3)
        balancer = MoCo(gamma=1.0)
        for _ in range(3):
            with balancer.only(TASKS):
                balancer.direction(jacobian, losses)
        before = balancer.weight.clone()
        assert before.max() - before.min() > 0.02
        same = jacobian[:1].expand(2, -1)
        with balancer.only(TASKS, [0, 2]):
            balancer.average.copy_(same)  # then any weights of sum one give the same direction
            found = balancer.direction(same, losses[:2])
        torch.testing.assert_close(found, jacobian[0])
        assert balancer.weight[1] == before[1]
        assert float(balancer.weight.sum()) == pytest.approx(1.0)
        balancer.gamma = 1e-12  # then the weights stay in proportion
        before = balancer.weight.clone()
        with balancer.only(TASKS, [1, 2]):
            found = balancer.direction(jacobian[1:], losses[1:])
            share = before[1:] / before[1:].sum()
            torch.testing.assert_close(found, share @ balancer.average)
        torch.testing.assert_close(balancer.weight, before)

    def test_present_tasks_that_had_no_weight(self) -> None:
        balancer = MoCo(gamma=1e-12)
        balancer.direction(rows(3, 4), torch.ones(3))
        balancer.weight.copy_(torch.tensor([0.0, 1.0, 0.0]))
        with balancer.only(TASKS, [0, 2]):
            found = balancer.direction(rows(2, 4), torch.ones(2))
            torch.testing.assert_close(found, balancer.average.mean(0))
        assert balancer.weight.tolist() == [0.0, 1.0, 0.0]

    def test_a_late_task_starts_with_the_mean_of_the_others(self) -> None:
        balancer = MoCo(gamma=1e-9)
        with balancer.only(TASKS, [0, 1]):
            balancer.direction(rows(2, 4), torch.ones(2))
        with balancer.only(TASKS):
            found = balancer.direction(rows(3, 4), torch.ones(3))
        torch.testing.assert_close(found, balancer.average.mean(0), rtol=1e-6, atol=0)


class TestExcessMTL:
    def test_the_sum_stays(self) -> None:
        balancer = ExcessMTL(step_size=1.0)
        for k in range(60):
            balancer.direction(rows(4, 6, seed=k), torch.ones(4))
            assert float(balancer.head_weights().sum()) == pytest.approx(4.0)
        weights = excess_mtl_weights(torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0]), 0.5)
        assert float(weights.sum()) == pytest.approx(2.5)
        assert float(weights[0] / weights[1]) == pytest.approx(0.25 * math.e)

    def test_direction_has_the_weights_that_heads_get(self) -> None:
        for scale, total in (("sum", 3.0), ("mean", 1.0)):
            balancer = ExcessMTL(step_size=0.5, scale=scale)
            for k in range(4):
                jacobian = rows(3, 6, seed=k)
                found = balancer.direction(jacobian, torch.ones(3))
                torch.testing.assert_close(found, balancer.head_weights() @ jacobian)
            assert float(balancer.head_weights().sum()) == pytest.approx(total)
        assert balancer.weight_heads
        assert not ExcessMTL(weight_heads=False).weight_heads

    def test_head_weights_need_a_direction(self) -> None:
        with pytest.raises(ValueError, match="before the head weights of ExcessMTL"):
            ExcessMTL().head_weights()

    def test_units_of_a_loss_do_not_matter(self) -> None:
        plain, changed = ExcessMTL(step_size=1.0), ExcessMTL(step_size=1.0)
        units = torch.tensor([[1e-6], [1.0], [1e6]], dtype=torch.float64)
        for k in range(5):
            jacobian = rows(3, 6, seed=k)
            plain.direction(jacobian, torch.ones(3))
            changed.direction(units * jacobian, torch.ones(3))
        torch.testing.assert_close(changed.head_weights(), plain.head_weights())

    def test_a_converged_task_loses_weight(self) -> None:
        balancer = ExcessMTL(step_size=0.1)
        jacobian = rows(2, 6)
        for k in range(20):
            jacobian[1] *= 0.5
            balancer.direction(jacobian * (1 + 0.1 * k), torch.ones(2))
        weights = balancer.head_weights()
        assert weights[1] < 0.8 < 1.2 < weights[0]

    def test_warm_up_averages_the_first_risks(self) -> None:
        balancer = ExcessMTL(step_size=1.0, warm_up=2)
        jacobian = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        steps = (torch.tensor([[3.0], [1.0]]), torch.tensor([[4.0], [1.0]]))
        for scale in steps:
            balancer.direction(scale * jacobian, torch.ones(2))
            assert balancer.head_weights().tolist() == [1.0, 1.0]
        # Risks 3 and 16 / 5, then 144 / 13; of the second task 1, 1 / sqrt 2, 1 / sqrt 3.
        balancer.direction(torch.tensor([[12.0], [1.0]]) * jacobian, torch.ones(2))
        ratios = torch.tensor([144 / 13 / 3.1, 3**-0.5 / (0.5 + 0.5 * 2**-0.5)])
        torch.testing.assert_close(balancer.head_weights(), 2 * ratios.softmax(0))

    def test_zero_gradient_in_the_first_step(self) -> None:
        balancer = ExcessMTL(step_size=1.0)
        jacobian = rows(3, 6)
        jacobian[1] = 0
        for _ in range(3):
            assert balancer.direction(jacobian, torch.ones(3)).isfinite().all()
            assert balancer.head_weights()[1] == 1
        balancer.direction(rows(3, 6, seed=1), torch.ones(3))
        assert balancer.head_weights()[1] == 1
        balancer.direction(rows(3, 6, seed=2), torch.ones(3))
        assert balancer.head_weights()[1] != 1

    def test_absent_tasks_keep_their_share(self) -> None:
        balancer = ExcessMTL(step_size=1.0)
        for k in range(4):
            with balancer.only(TASKS):
                balancer.direction(rows(3, 6, seed=k), torch.ones(3))
        before = balancer.head_weights()
        with balancer.only(TASKS, [0, 2]):
            balancer.direction(rows(2, 6, seed=9), torch.ones(2))
        after = balancer.head_weights()
        assert not torch.equal(after, before[[0, 2]])
        assert float(after.sum()) == pytest.approx(float(before[[0, 2]].sum()))

    def test_no_weight_is_lost_for_good(self) -> None:
        balancer = ExcessMTL(step_size=1e6)
        for k in range(3):
            balancer.direction(rows(2, 6, seed=k).float(), torch.ones(2))
        assert sorted(balancer.head_weights().tolist()) == [0.0, 2.0]
        assert balancer.risk.isfinite().all()

    def test_in_a_fit_the_heads_get_the_weights(self) -> None:
        module, plain = Balanced(), Balanced().net
        trainer(callbacks=[ExcessMTL(step_size=1.0)]).fit(module, loader())
        balancer, optimizer = ExcessMTL(step_size=1.0), sgd(plain.parameters())
        trunk = list(plain.trunk.parameters())
        for x, targets in loader():
            losses = torch.stack([(p - targets[t]).square().mean() for t, p in plain(x).items()])
            grads = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]
            jacobian = torch.stack([torch.cat([g.flatten() for g in of_t]) for of_t in grads])
            balancer.direction(jacobian, losses.detach())
            optimizer.zero_grad()
            (balancer.head_weights() @ losses).backward()
            optimizer.step()
        assert abs(float(balancer.head_weights()[0]) - 1) > 0.02
        for found, expected in zip(module.net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected)
