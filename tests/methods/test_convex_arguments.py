"""Arguments of the convex methods: what is refused, and what scale, preference and batches do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_mtl.gradient_balancers import CentralDirection, MinNorm, TaskTensioner
from lightning_mtl.gradient_balancers.cagrad import CAGrad, cagrad_weights
from lightning_mtl.gradient_balancers.dual_proj import DualProj, dual_proj_weights
from lightning_mtl.gradient_balancers.mo_do import MoDo, mo_do_weights
from lightning_mtl.gradient_balancers.sdmgrad import SDMGrad, sdmgrad_step, sdmgrad_weights
from lightning_mtl.gradient_balancers.upgrad import UPGrad, upgrad_weights
from tests.methods.test_convex import LOSSES, NAN, gramian

REFUSED = [
    (CAGrad, {"c": -0.1}, r"`c` of CAGrad to be finite and at least 0, found -0\.1"),
    (CAGrad, {"c": NAN}, r"`c` of CAGrad .* found nan"),
    (CAGrad, {"rescale": 3}, r"`rescale` of CAGrad to be one of \(0, 1, 2\), found 3"),
    (CAGrad, {"preference": [1.0, 0.0]}, r"`preference` of CAGrad .* found 0\.0 for task 1"),
    (CAGrad, {"scale": "max"}, r"`scale` of CAGrad .* \('mean', 'sum'\), found 'max'"),
    (CAGrad, {"gradients": "heads"}, "`gradients` of CAGrad .* found 'heads'"),
    (UPGrad, {"preference": {}}, "`preference` of UPGrad to hold a number for each task"),
    (UPGrad, {"preference": {"a": -1.0}}, r"found -1\.0 for task 'a'"),
    (UPGrad, {"scale": "max"}, r"`scale` of UPGrad .* found 'max'"),
    (DualProj, {"preference": [NAN]}, "`preference` of DualProj .* found nan for task 0"),
    (DualProj, {"scale": 2}, r"`scale` of DualProj .* found 2"),
    (SDMGrad, {"lam": -1.0}, r"`lam` of SDMGrad .* at least 0, found -1\.0"),
    (SDMGrad, {"batches": 2}, r"`batches` of SDMGrad to be one of \(1, 3\), found 2"),
    (SDMGrad, {"step_size": 0.0}, r"`step_size` of SDMGrad to be in \(0, 2\), found 0\.0"),
    (SDMGrad, {"step_size": 2.0}, r"`step_size` of SDMGrad to be in \(0, 2\), found 2\.0"),
    (SDMGrad, {"inner_steps": 0}, "`inner_steps` of SDMGrad .* at least 1, found 0"),
    (SDMGrad, {"preference": [0.0]}, "`preference` of SDMGrad"),
    (SDMGrad, {"scale": ""}, "`scale` of SDMGrad"),
    (SDMGrad, {"batches": 3, "gradients": "last_layer"}, r"found 'last_layer'.* `batches=1`"),
    (MoDo, {"gamma": 0.0}, r"`gamma` of MoDo to be finite and above 0, found 0\.0"),
    (MoDo, {"rho": -0.1}, r"`rho` of MoDo .* at least 0, found -0\.1"),
    (MoDo, {"batches": 1}, r"`batches` of MoDo to be one of \(2, 3\), found 1"),
    (MoDo, {"scale": "max"}, "`scale` of MoDo"),
    (MinNorm, {"scale": "max"}, "`scale` of MinNorm .* found 'max'"),
    (MinNorm, {"gradients": "all"}, "`gradients` of MinNorm .* found 'all'"),
    (CentralDirection, {"scale": "max"}, "`scale` of CentralDirection .* found 'max'"),
    (CentralDirection, {"gradients": "all"}, "`gradients` of CentralDirection .* found 'all'"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


FUNCTIONS = [
    cagrad_weights,
    upgrad_weights,
    dual_proj_weights,
    sdmgrad_weights,
    lambda m: sdmgrad_step(m, LOSSES / 2),
    lambda m: mo_do_weights(m, LOSSES / 2),
]


@pytest.mark.parametrize("weights", FUNCTIONS)
def test_bad_gramian(weights) -> None:
    with pytest.raises(ValueError, match=r"`gramian` of shape \(T, T\)"):
        weights(torch.ones(2, 3))
    for bad in (NAN, float("inf")):
        matrix = torch.eye(2)
        matrix[0, 1] = bad
        assert weights(matrix).isnan().all()


@pytest.mark.parametrize("cls", [CAGrad, UPGrad, DualProj, SDMGrad])
def test_preference_by_name(cls) -> None:
    matrix = gramian(np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, -1.0, 3.0]]))
    in_order = cls(preference=[1.0, 4.0, 2.0]).weights(matrix, LOSSES)
    named = cls(preference={"c": 2.0, "b": 4.0})
    named.check_tasks(["a", "b", "c"])
    with named.only(["a", "b", "c"]):
        torch.testing.assert_close(named.weights(matrix, LOSSES), in_order)
    with pytest.raises(ValueError, match=r"unknown tasks \['c'\]"):
        named.check_tasks(["a", "b"])
    part = matrix[1:, 1:]
    with named.only(["a", "b", "c"], [1, 2]):
        present = named.weights(part, LOSSES)
    torch.testing.assert_close(present, cls(preference=[4.0, 2.0]).weights(part, LOSSES))


@pytest.mark.parametrize("cls", [MinNorm, CentralDirection, CAGrad, UPGrad, DualProj, SDMGrad])
def test_scale_and_level(cls) -> None:
    matrix = gramian(np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, -1.0, 3.0]]))
    mean = cls().weights(matrix, LOSSES)
    torch.testing.assert_close(cls(scale="sum").weights(matrix, LOSSES), 3 * mean)
    assert cls().gradients == "parameters"
    assert cls(gradients="representation").gradients == "representation"
    assert not cls().weight_heads
    assert cls().gramian_weighted


def test_what_batches_change() -> None:
    assert SDMGrad().batches == 1
    assert SDMGrad(batches=3).batches == MoDo(batches=3).batches == 3
    assert MoDo().batches == 2
    assert not SDMGrad(batches=3).gramian_weighted
    assert not MoDo().gramian_weighted
    with pytest.raises(ValueError, match=r"Expected `batches=1` .* found 3.*Call `direction`"):
        SDMGrad(batches=3).weights(torch.eye(2), LOSSES)
    with pytest.raises(ValueError, match="found SDMGrad"):
        TaskTensioner(SDMGrad(batches=3))


def test_tensioner_sees_the_gradients_of_its_base() -> None:
    assert TaskTensioner().gradients == "parameters"
    assert TaskTensioner(MinNorm(gradients="last_layer")).gradients == "last_layer"
