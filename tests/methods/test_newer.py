"""What is special to GO4Align and LDC-MTL."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.loss_balancers.go4_align import GO4Align, go4_align_weights
from lightning_mtl.loss_balancers.ldcmtl import LDCMTL, ldcmtl_weights

NAN = float("nan")
TASKS = ["a", "b", "c", "d"]
REFUSED = [
    (GO4Align, {"groups": 0}, r"`groups` of GO4Align .* at least 1, found 0"),
    (GO4Align, {"groups": 2.0}, r"`groups` of GO4Align .* integer .* found 2\.0"),
    (GO4Align, {"step_size": 0.0}, r"`step_size` of GO4Align .* above 0, found 0\.0"),
    (GO4Align, {"step_size": NAN}, r"`step_size` of GO4Align .* found nan"),
    (GO4Align, {"scale": "max"}, r"`scale` of GO4Align .*\('mean', 'sum'\), found 'max'"),
    (LDCMTL, {"penalty": -0.1}, r"`penalty` of LDCMTL .* at least 0, found -0\.1"),
    (LDCMTL, {"penalty": float("inf")}, r"`penalty` of LDCMTL .* finite .* found inf"),
    (LDCMTL, {"lr": -1e-3}, r"`lr` of LDCMTL .* at least 0, found -0\.001"),
    (LDCMTL, {"compared": "raw"}, r"`compared` .*\('weighted', 'plain'\), found 'raw'"),
    (LDCMTL, {"normalization": "l2"}, r"\('none', 'initial', 'log'\), found 'l2'"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def doubles(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestGO4Align:
    @pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
    def test_no_grouping_is_better(self, size: int, spread: float) -> None:
        rng = np.random.default_rng(size)
        for groups in sorted([*range(1, size + 2)] * 4):
            losses = np.exp(spread * rng.standard_normal(size))
            indicators = losses.mean() / losses
            found = go4_align_weights(doubles(losses), torch.zeros(size), groups).numpy()
            least = np.inf
            for labels in product(range(min(groups, size)), repeat=size):
                members = [indicators[np.equal(labels, k)] for k in set(labels)]
                if len(members) == min(groups, size):
                    least = min(least, sum(((m - m.mean()) ** 2).sum() for m in members))
            error = ((indicators - found) ** 2).sum() - least
            assert abs(error) <= 1e-12 * (indicators**2).sum()
            assert len(np.unique(found)) == min(groups, size)

    def test_a_group_pays_for_its_own_spread_only(self) -> None:
        indicators = doubles([9.0, 2.0, 10.0, 6.0])
        found = go4_align_weights(1 / indicators, torch.zeros(4), 2)
        found = found / (1 / indicators).mean()
        torch.testing.assert_close(found, doubles([9.5, 4.0, 9.5, 4.0]))

    def test_equal_losses_weigh_one(self) -> None:
        found = go4_align_weights(torch.full((5,), 0.3), torch.zeros(5), 2)
        torch.testing.assert_close(found, torch.ones(5))

    @pytest.mark.parametrize("step_size", [1e-4, 0.3])
    def test_alone_in_their_groups_the_sum_of_losses_stays(self, step_size: float) -> None:
        balancer = GO4Align(groups=9, step_size=step_size)
        for k in range(5):
            losses = some(k, 4).exp()
            weights = balancer.loss_weights(losses)
            torch.testing.assert_close(weights @ losses, losses.sum())
            balancer.update(losses)

    def test_small_steps_give_the_mean_loss_over_the_loss(self) -> None:
        losses = some(0, 4).exp()
        weights = GO4Align(groups=4, step_size=1e-12).loss_weights(losses)
        torch.testing.assert_close(weights, losses.mean() / losses)

    def test_mean_is_the_sum_over_the_number_of_tasks(self) -> None:
        losses = some(0, 4).exp()
        total, mean = GO4Align(scale="sum"), GO4Align(scale="mean")
        torch.testing.assert_close(total.loss_weights(losses), 4 * mean.loss_weights(losses))

    def test_only_an_update_moves_the_shares(self) -> None:
        balancer, losses = GO4Align(step_size=0.5), doubles([2.0, 0.5, 1.5])
        first = balancer.loss_weights(losses)
        assert torch.equal(balancer.loss_weights(losses), first)
        balancer.update(losses)
        assert not torch.equal(balancer.loss_weights(losses), first)

    def test_large_losses_are_left_behind(self) -> None:
        balancer, losses = GO4Align(groups=2, step_size=0.1), doubles([1.0, 3.0])
        for _ in range(50):
            balancer.update(losses)
        assert balancer.shares is not None
        shares = balancer.shares.exp() / 2
        torch.testing.assert_close(shares.sum(), doubles(1.0))
        torch.testing.assert_close(shares[1] / shares[0], doubles(-0.1 * 50 * 2.0).exp())

    def test_absent_tasks_keep_their_part_of_the_whole(self) -> None:
        balancer = GO4Align(step_size=0.5)
        with balancer.only(TASKS):
            balancer.update(doubles([1.0, 2.0, 3.0, 4.0]))
        assert balancer.shares is not None
        before = balancer.shares.clone()
        with balancer.only(TASKS, [1, 3]):
            balancer.update(doubles([5.0, 0.1]))
        torch.testing.assert_close(balancer.shares.exp().sum(), doubles(4.0))
        assert torch.equal(balancer.shares[[0, 2]], before[[0, 2]])
        assert balancer.shares[3] > before[3]
        assert balancer.shares[1] < before[1]

    def test_huge_losses_stay_finite(self) -> None:
        balancer, losses = GO4Align(step_size=1.0), torch.tensor([1e8, 1.0, 1e-8])
        for _ in range(5):
            assert balancer.loss_weights(losses).isfinite().all()
            balancer.update(losses)

    @pytest.mark.parametrize("bad", [0.0, -1.0, NAN, float("inf")])
    def test_no_weights_without_positive_losses(self, bad: float) -> None:
        assert GO4Align().requires_positive_losses
        assert GO4Align().loss_weights(torch.tensor([1.0, bad])).isnan().all()


def objective(losses: Tensor, logits: Tensor, penalty: float, compared: str) -> Tensor:
    """The objective of LDC-MTL, written out for autograd."""
    sigma = 1 / (1 + torch.exp(-logits))
    total = sum(s * x for s, x in zip(sigma, losses, strict=True)) / float(sigma.detach().sum())
    tau = sigma if compared == "weighted" else torch.ones_like(sigma)
    for t in range(len(losses) - 1):
        total = total + penalty * (tau[t] * losses[t] - tau[t + 1] * losses[t + 1]).abs()
    return total


class TestLDCMTL:
    @pytest.mark.parametrize("compared", ["weighted", "plain"])
    @pytest.mark.parametrize("size", [1, 2, 3, 12])
    def test_both_gradients_of_the_objective(self, size: int, compared) -> None:
        losses, logits = some(size, size).requires_grad_(), some(99, size).requires_grad_()
        expected = torch.autograd.grad(objective(losses, logits, 0.2, compared), (losses, logits))
        found = ldcmtl_weights(losses.detach(), logits.detach(), 0.2, compared)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("normalization", ["none", "initial", "log"])
    def test_training_is_descent_on_the_objective(self, normalization) -> None:
        """Against PyTorch's Adam and autograd through the normalisation."""
        balancer = LDCMTL(penalty=0.1, lr=0.05, normalization=normalization)
        logits = torch.ones(3, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([logits], lr=0.05)
        first: Tensor | None = None
        for k in range(6):
            losses = some(k, 3).exp().requires_grad_()
            first = losses.detach() if first is None else first
            values = losses
            if normalization == "initial":
                values = losses / first * first.min()
            elif normalization == "log":
                values = torch.log(losses / first)
            adam.zero_grad()
            objective(values, logits, 0.1, "weighted").backward()
            found = balancer.loss_weights(losses.detach())
            torch.testing.assert_close(found, losses.grad)
            adam.step()
            balancer.update(losses.detach())
            assert balancer.learned is not None
            torch.testing.assert_close(1 + balancer.learned[:, 0], logits.detach())

    def test_without_penalty_the_weights_sum_to_one(self) -> None:
        balancer = LDCMTL(penalty=0.0, lr=0.1)
        for k in range(4):
            losses = some(k, 5).exp()
            torch.testing.assert_close(balancer.loss_weights(losses).sum(), doubles(1.0))
            balancer.update(losses)

    def test_penalty_pulls_neighbours_together(self) -> None:
        weights = LDCMTL(penalty=0.01).loss_weights(doubles([3.0, 1.0, 2.0, 2.0]))
        tau = torch.sigmoid(doubles(1.0))
        expected = 0.25 + 0.01 * tau * doubles([1.0, -2.0, 1.0, 0.0])
        torch.testing.assert_close(weights, expected)

    def test_order_of_the_tasks_matters(self) -> None:
        losses = doubles([3.0, 1.0, 2.0])
        order = torch.tensor([1, 0, 2])
        moved = LDCMTL().loss_weights(losses[order])
        assert (moved - LDCMTL().loss_weights(losses)[order]).abs().max() > 0.01

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_weights_turn_negative_where_the_text_says(self, sign: int) -> None:
        tau = float(torch.sigmoid(doubles(1.0)))
        penalty = (1 - sign * 0.01) / (2 * 3 * tau)
        weights = LDCMTL(penalty=penalty).loss_weights(doubles([2.0, 1.0, 2.0]))
        assert (weights[1] > 0) == (sign > 0)

    def test_logits_fall_at_the_learning_rate(self) -> None:
        balancer = LDCMTL(lr=0.01)
        for _ in range(300):
            balancer.update(doubles([2.0, 0.5, 1.5]))
        assert balancer.learned is not None
        drop = -balancer.learned[:, 0]
        assert ((drop > 2.7) & (drop < 4.0)).all()
        assert drop.max() - drop.min() < 0.2

    def test_logits_that_have_fallen_far_still_share(self) -> None:
        logits = torch.tensor([-300.0, -301.0])
        weights, slopes = ldcmtl_weights(torch.tensor([1.0, 2.0]), logits)
        torch.testing.assert_close(weights, torch.tensor([1.0, 0.0]).softmax(0))
        torch.testing.assert_close(slopes, weights * torch.tensor([1.0, 2.0]))

    def test_only_an_update_moves_the_logits(self) -> None:
        balancer, losses = LDCMTL(lr=0.5, penalty=0.3), doubles([2.0, 0.5, 1.5])
        first = balancer.loss_weights(losses)
        assert torch.equal(balancer.loss_weights(losses), first)
        balancer.update(losses)
        assert not torch.equal(balancer.loss_weights(losses), first)

    def test_all_tasks_are_level_at_the_first_step(self) -> None:
        losses = doubles([0.1, 0.3, 0.7, 1 / 3, 1e-7])
        for s in (1.0, 1e-3, 1 / 7):
            found = LDCMTL(penalty=5.0, normalization="initial").loss_weights(s * losses)
            torch.testing.assert_close(found, losses.min() / losses / 5)

    def test_a_late_task_starts_from_its_own_first_loss(self) -> None:
        balancer = LDCMTL(normalization="log")
        with balancer.only(TASKS, [0, 2]):
            balancer.update(doubles([2.0, 3.0]))
        assert balancer.initial is not None
        assert balancer.initial.tolist() == [2.0, 0.0, 3.0, 0.0]
        with balancer.only(TASKS):
            assert balancer.loss_weights(doubles([2.0, 5.0, 3.0, 7.0])).isfinite().all()
            balancer.update(doubles([1.0, 5.0, 1.0, 7.0]))
        assert balancer.initial.tolist() == [2.0, 5.0, 3.0, 7.0]

    def test_which_losses_are_allowed(self) -> None:
        losses = torch.tensor([1.0, -1.0])
        assert LDCMTL().loss_weights(losses).isfinite().all()
        assert not LDCMTL().requires_positive_losses
        for balancer in (LDCMTL(normalization="initial"), LDCMTL(normalization="log")):
            assert balancer.requires_positive_losses
            assert balancer.loss_weights(losses).isnan().any()

    @pytest.mark.parametrize(
        ("normalization", "expected"), [("none", 1.0), ("initial", 1.0), ("log", 0.25)]
    )
    def test_one_task(self, normalization, expected: float) -> None:
        balancer = LDCMTL(normalization=normalization)
        for _ in range(3):
            assert balancer.loss_weights(torch.tensor([4.0])).tolist() == [expected]
            balancer.update(torch.tensor([4.0]))
