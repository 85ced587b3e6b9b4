"""Nash-MTL and its family where there is no solution or no angle; what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.gradient_balancers.aligned_mtl import AlignedMTL, aligned_mtl_weights
from lightning_mtl.gradient_balancers.con_fig import ConFIG, config_weights
from lightning_mtl.gradient_balancers.fair_grad import FairGrad, fair_grad_weights
from lightning_mtl.gradient_balancers.imtl import IMTL, imtl_weights
from lightning_mtl.gradient_balancers.imtlg import IMTLG, imtlg_weights
from lightning_mtl.gradient_balancers.nash_mtl import NashMTL, nash_mtl_weights
from tests.common.methods import fixture
from tests.methods.test_newton import near_opposite, rows_of

NAN = float("nan")
WEIGHTS = [
    nash_mtl_weights,
    fair_grad_weights,
    aligned_mtl_weights,
    config_weights,
    imtlg_weights,
    lambda gramian: imtl_weights(gramian, torch.zeros(len(gramian))),
]
each_function = pytest.mark.parametrize(
    "weights", WEIGHTS, ids=["nash", "fair", "aligned", "config", "imtlg", "imtl"]
)


def gram(rows: list[list[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    jacobian = torch.tensor(rows, dtype=dtype)
    return jacobian @ jacobian.T


# ---------------------------------------------------------------------------- no solution, no angle


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pareto_stationary_points_give_zero(alpha: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    for size in (2, 3, 5, 11):
        for factor in (-1.0, -3.0, -1e-3):
            jacobian = torch.from_numpy(rows_of(rng, size, 40, 1.0)).to(dtype)
            jacobian[-1] = factor * jacobian[0]
            w = fair_grad_weights(jacobian @ jacobian.T, alpha)
            assert (w >= 0).all()
            assert w.sum() > 0
            terms = (w * jacobian.norm(dim=1)).max()
            assert (w @ jacobian).norm() < terms * (1e-6 if dtype == torch.float32 else 1e-14)


def test_stationary_weights_have_the_size_of_solutions() -> None:
    rows = [[3.0, 0.0], [-3.0, 0.0]]
    torch.testing.assert_close(nash_mtl_weights(gram(rows)), torch.full((2,), 2**-0.5 / 3).double())
    for alpha in (0.5, 2.0):  # the solution for identical rows of the same norm
        identical = fair_grad_weights(gram([[3.0, 0.0], [3.0, 0.0]]), alpha)
        torch.testing.assert_close(fair_grad_weights(gram(rows), alpha), identical)
    with_another = nash_mtl_weights(gram([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(with_another, torch.tensor([3**0.5 / 6, 3**0.5 / 6, 0]).double())


def test_float32_near_a_stationary_point() -> None:
    """Gaps that the rounding of the Gramian hides count as none; wider ones are solved."""
    rng = np.random.default_rng(7)
    for gap, solved in ((1e-5, False), (1e-4, False), (1e-2, True), (1e-1, True)):
        jacobian = torch.from_numpy(near_opposite(rng, 4, gap)).float()
        w = nash_mtl_weights(jacobian @ jacobian.T)
        norm = float((w.double() @ jacobian.double()).norm())
        assert abs(norm - 2.0) < 1e-2 if solved else norm < 1e-3


def test_identical_rows_and_a_single_row() -> None:
    for size in (1, 2, 5):
        gramian = gram([[0.0, 3.0, 4.0]] * size)
        expected = torch.full((size,), 1 / (5 * size**0.5)).double()
        torch.testing.assert_close(nash_mtl_weights(gramian), expected)
        for alpha in (0.5, 2.0):
            w = fair_grad_weights(gramian, alpha)
            torch.testing.assert_close(gramian @ w, w ** (-1 / alpha))
        equal = torch.full((size,), 1 / size).double()
        torch.testing.assert_close(imtlg_weights(gramian), equal)
        torch.testing.assert_close(aligned_mtl_weights(gramian), torch.ones(size).double())
        torch.testing.assert_close(config_weights(gramian), torch.ones(size).double())


@each_function
def test_zero_rows_are_left_out(weights) -> None:
    jacobian, _ = fixture("E3")
    padded = torch.zeros(5, 3).double()
    padded[[0, 2, 3]] = jacobian
    found = weights(padded @ padded.T)
    torch.testing.assert_close(found[[0, 2, 3]], weights(jacobian @ jacobian.T))
    assert found[[1, 4]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weights", [nash_mtl_weights, config_weights])
def test_zero_rows_take_their_preference_with_them(weights) -> None:
    jacobian, _ = fixture("E3")
    padded = torch.zeros(5, 3).double()
    padded[[0, 2, 3]] = jacobian
    found = weights(padded @ padded.T, [1.0, 9.0, 2.0, 0.5, 9.0])
    torch.testing.assert_close(found[[0, 2, 3]], weights(jacobian @ jacobian.T, [1.0, 2.0, 0.5]))
    assert found[[1, 4]].tolist() == [0.0, 0.0]


@each_function
def test_all_zero(weights) -> None:
    found = weights(torch.zeros(4, 4))
    expected = 0.25 if weights is imtlg_weights or weights is WEIGHTS[-1] else 0.0
    assert found.tolist() == [expected] * 4


@each_function
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_nan_for_input_that_is_not_finite(weights, bad: float) -> None:
    gramian = torch.eye(3)
    gramian[1, 1] = bad
    assert weights(gramian).isnan().all()


@each_function
@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0)])
def test_gramian_must_be_square(weights, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`gramian` of shape \(T, T\) .* found \(.*@ jacobian.T"):
        weights(torch.ones(shape))


# --------------------------------------------------------------------------------------- arguments

REFUSED = [
    (NashMTL, {"update_weights_every": 0}, "`update_weights_every` of NashMTL .* at least 1"),
    (NashMTL, {"update_weights_every": 2.0}, "`update_weights_every` of NashMTL .* found 2.0"),
    (NashMTL, {"max_norm": 0.0}, "`max_norm` of NashMTL to be finite and above 0, found 0.0"),
    (NashMTL, {"max_norm": NAN}, "`max_norm` of NashMTL .* found nan"),
    (NashMTL, {"preference": {"a": 0.0}}, "`preference` of NashMTL .* found 0.0 for task 'a'"),
    (FairGrad, {"alpha": 0.0}, "`alpha` of FairGrad to be finite and above 0, found 0.0"),
    (FairGrad, {"alpha": float("inf")}, "`alpha` of FairGrad .* found inf"),
    (AlignedMTL, {"mode": "mean"}, r"`mode` of AlignedMTL .* \('min', 'median', 'rmse'\)"),
    (AlignedMTL, {"preference": []}, "`preference` of AlignedMTL .* found none"),
    (ConFIG, {"length": "mean"}, "`length` of ConFIG .* 'harmonic', .* found 'mean'"),
    (ConFIG, {"preference": [1.0, -1.0]}, "`preference` of ConFIG .* found -1.0 for task 1"),
    (IMTL, {"lr": 0.0}, "`lr` of IMTL to be finite and above 0, found 0.0"),
    *(
        (cls, {name: "none"}, f"`{name}` of {cls.__name__} to be one of .* found 'none'")
        for cls in (NashMTL, FairGrad, AlignedMTL, ConFIG, IMTLG, IMTL)
        for name in ("scale", "gradients")
    ),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("cls", [NashMTL, AlignedMTL, ConFIG])
def test_preference_by_name(cls) -> None:
    jacobian, losses = fixture("E3")
    numbers = cls([1.0, 2.0, 0.5]).direction(jacobian, losses) if cls is ConFIG else None
    by_name = cls(preference={"b": 2.0, "c": 0.5})
    by_name.check_tasks(["a", "b", "c"])
    with by_name.only(["a", "b", "c"]):
        found = by_name.direction(jacobian, losses)
    in_order = cls(preference=[1.0, 2.0, 0.5])
    torch.testing.assert_close(in_order.direction(jacobian, losses), found)
    assert numbers is None or torch.equal(numbers, found)
    equal = cls(preference=[3.0, 3.0, 3.0]).direction(jacobian, losses)
    torch.testing.assert_close(equal, cls().direction(jacobian, losses))
    assert (found - equal).norm() > 0.01
    with by_name.only(["a", "b", "c"], [0, 2]):
        part = by_name.direction(jacobian[[0, 2]], losses[[0, 2]])
    pair = cls(preference=[1.0, 0.5]).direction(jacobian[[0, 2]], losses[[0, 2]])
    torch.testing.assert_close(part, pair)
    with pytest.raises(ValueError, match=r"names the unknown tasks \['b'\]"):
        by_name.check_tasks(["a", "c"])


@pytest.mark.parametrize("cls", [NashMTL, FairGrad, AlignedMTL, ConFIG, IMTLG, IMTL])
def test_gradients_of_another_level(cls) -> None:
    balancer: GradientBalancer = cls(gradients="last_layer")
    assert balancer.gradients == "last_layer"
    assert balancer.hyperparameters()["gradients"] == "last_layer"
    assert balancer.gramian_weighted
