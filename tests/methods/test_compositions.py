"""The logarithm of the losses before gradient balancers: weights and directions, eight digits."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.gradient_balancers import CentralDirection, MinNorm
from lightning_mtl.gradient_balancers.aligned_mtl import AlignedMTL
from lightning_mtl.gradient_balancers.cagrad import CAGrad
from lightning_mtl.gradient_balancers.con_fig import ConFIG
from lightning_mtl.gradient_balancers.imtlg import IMTLG
from lightning_mtl.gradient_balancers.nash_mtl import NashMTL
from lightning_mtl.gradient_balancers.pcgrad import PCGrad
from lightning_mtl.loss_balancers import LogLoss
from tests.common.methods import fixture

SECOND = {
    "IMTLG": IMTLG(),
    "CAGrad": CAGrad(c=0.4, rescale=1),
    "MinNorm": MinNorm(),
    "PCGrad": PCGrad(order="ascending"),
    "AlignedMTL": AlignedMTL(),
    "NashMTL": NashMTL(max_norm=None),
}
# Weights of the gradients of the logarithms, where they are known, and directions.
EXPECTED = {
    ("E2", "IMTLG"): ([0.78910328, 0.21089672], [-0.44903525, 1, 0.027241805]),
    ("E2", "CAGrad"): (None, [-1.205872, 1.4675663, 0.34380305]),
    ("E2", "MinNorm"): ([0.86792453, 0.13207547], [-0.094339623, 1, -0.16981132]),
    ("E2", "PCGrad"): ([2.3333333, 1.0952381], [-3.2142857, 3.4285714, 1.0238095]),
    ("E2", "AlignedMTL"): ([1.0679465, 0.33062445], [-0.78852454, 1.398571, 0.12727564]),
    ("E2", "NashMTL"): ([1.0177214, 0.27199749], [-0.57912926, 1.2897189, 0.035134271]),
    ("E3", "IMTLG"): (
        [0.6761683, 0.15762373, 0.16620798],
        [-0.23700811, 0.94459734, 0.30957926],
    ),
    ("E3", "CAGrad"): (None, [-0.65557364, 1.2750596, 0.75135908]),
    ("E3", "MinNorm"): (
        [0.74763334, 0.08889402, 0.16347264],
        [0.072731471, 0.94550912, 0.13091665],
    ),
    ("E3", "PCGrad"): ([2.4444444, 1.0952381, 1], [-2.8253968, 4.2063492, 2.968254]),
    ("E3", "AlignedMTL"): (
        [1.047943, 0.27751733, 0.47784622],
        [-0.42681572, 1.6440245, 0.98675559],
    ),
    ("E3", "NashMTL"): (
        [1.015099, 0.23493139, 0.4059602],
        [-0.29685601, 1.5206705, 0.77423369],
    ),
}


@pytest.mark.parametrize(("name", "second"), EXPECTED)
def test_logarithm_before(name: str, second: str) -> None:
    jacobian, losses = fixture(name)
    rows = LogLoss(eps=0.0).loss_weights(losses)[:, None] * jacobian
    weights, along = EXPECTED[name, second]
    found = SECOND[second].direction(rows, losses)
    torch.testing.assert_close(found, found.new_tensor(along), rtol=1e-6, atol=1e-7)
    if weights is not None:
        found = SECOND[second].weights(rows @ rows.T, losses)
        torch.testing.assert_close(found, found.new_tensor(weights), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["E2", "E3"])
@pytest.mark.parametrize("balancer", [IMTLG(), CentralDirection(), ConFIG()], ids=type)
def test_logarithm_leaves_the_ray_of_equal_projections(
    name: str, balancer: GradientBalancer
) -> None:
    jacobian, losses = fixture(name)
    rows = LogLoss(eps=0.0).loss_weights(losses)[:, None] * jacobian
    plain, logarithm = (balancer.direction(matrix, losses) for matrix in (jacobian, rows))
    torch.testing.assert_close(plain / plain.norm(), logarithm / logarithm.norm())


@pytest.mark.parametrize("name", ["E2", "E3"])
def test_logarithm_before_nash_changes_nothing(name: str) -> None:
    jacobian, losses = fixture(name)
    omega = LogLoss(eps=0.0).loss_weights(losses)
    rows = omega[:, None] * jacobian
    balancer = NashMTL()
    expected = balancer.direction(jacobian, losses), balancer.head_weights()
    found = balancer.direction(rows, losses), omega * balancer.head_weights()
    torch.testing.assert_close(found, expected)
