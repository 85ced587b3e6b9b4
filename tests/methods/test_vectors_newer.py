"""Numbers of methods published since 2024, found without the library.

GO4Align: the authors' recursion in NumPy, with the best of all groupings by enumeration. LDC-MTL:
central differences of the written-out objective, by the losses and by the logits, and Adam in
NumPy. Losses are those of three or four steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mtl.loss_balancers.go4_align import GO4Align
from lightning_mtl.loss_balancers.ldcmtl import LDCMTL

USED: set[str] = set()  # there are none in vectors.json

STEPS = [[2.0, 0.5, 1.5], [1.8, 0.45, 1.6], [1.5, 0.4, 1.2], [1.1, 0.45, 1.3]]
DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4}

# groups, step size, weights of three steps
GROUPED: list[tuple[int, float, list[list[float]]]] = [
    (
        2,
        1e-4,
        [
            [0.7777481474, 2.666888893, 0.7777481474],
            [0.7574615782, 2.852327179, 0.7574615782],
            [0.7749151753, 2.583927532, 0.7749151753],
        ],
    ),
    (
        2,
        0.5,
        [
            [0.6162277247, 3.848194106, 0.6162277247],
            [0.4221972918, 5.408725453, 0.4221972918],
            [0.3209357916, 5.667110123, 0.3209357916],
        ],
    ),
    (
        1,
        0.5,
        [
            [1.693549852, 1.693549852, 1.693549852],
            [2.084373346, 2.084373346, 2.084373346],
            [2.102993902, 2.102993902, 2.102993902],
        ],
    ),
    (
        3,
        0.5,
        [
            [0.454439546, 3.848194106, 0.7780159033],
            [0.3252110616, 5.408725453, 0.519183522],
            [0.2097001699, 5.667110123, 0.4321714133],
        ],
    ),
]

# arguments, weights of four steps, W after each
LEARNED: list[tuple[dict[str, Any], list[list[float]], list[list[float]]]] = [
    (
        {},
        [
            [0.3698862622, 0.2602274756, 0.3698862623],
            [0.3688808077, 0.2622383839, 0.3688808079],
            [0.3678425347, 0.2643399586, 0.3678157451],
            [0.3667787565, 0.2664794313, 0.3667501236],
        ],
        [
            [0.900000005, 0.9000000286, 0.9000000067],
            [0.8001099262, 0.8000748209, 0.7998750057],
            [0.7008304395, 0.7003378097, 0.7005950464],
            [0.6035008116, 0.6001067151, 0.6009738922],
        ],
    ),
    (
        {"penalty": 0.3},
        [
            [0.5526509069, -0.1053018138, 0.552650907],
            [0.5405856936, -0.1047577407, 0.5405856938],
            [0.5281909247, -0.1033611023, 0.5281390444],
            [0.5155299916, -0.1011079898, 0.5154663505],
        ],
        [
            [0.9000000034, 1.099999929, 0.9000000045],
            [0.8001823498, 1.199101016, 0.799865507],
            [0.7011454416, 1.296546374, 0.7007731377],
            [0.6043572956, 1.393524696, 0.6014547021],
        ],
    ),
    (
        {"penalty": 0.1, "compared": "plain"},
        [
            [0.4333333333, 0.1333333335, 0.4333333334],
            [0.4333333327, 0.1333333343, 0.433333333],
            [0.4333410277, 0.1333410313, 0.4333179409],
            [0.4333542914, 0.1333153399, 0.4333303688],
        ],
        [
            [0.9000000056, 0.9000000223, 0.9000000074],
            [0.800100484, 0.8001005177, 0.79987708],
            [0.7007889336, 0.7004366208, 0.7005725505],
            [0.6033868427, 0.6002760805, 0.6009133002],
        ],
    ),
    (
        {"normalization": "initial"},
        [
            [0.08333333336, 0.3333333334, 0.1111111111],
            [0.08333333332, 0.2977858579, 0.1229602696],
            [0.07470387725, 0.402382625, 0.09960456335],
            [0.07497788077, 0.4000852563, 0.09999270649],
        ],
        [
            [0.9000000223, 0.9000000223, 0.9000000223],
            [0.8001005177, 0.8006435418, 0.8000808813],
            [0.7015457862, 0.7007481075, 0.7022157683],
            [0.6053626261, 0.600463255, 0.6041695805],
        ],
    ),
    (
        {"normalization": "log"},
        [
            [0.1666666575, 0.6666665205, 0.22222221],
            [0.185185175, 0.6595119195, 0.2311789139],
            [0.2003201227, 0.8443798758, 0.3002542077],
            [0.2731947759, 0.9213784706, 0.2204820357],
        ],
        [
            [1.0, 1.0, 1.0],
            [1.074413571, 1.074413557, 0.9255864815],
            [1.155799096, 1.156008396, 0.9715108678],
            [1.238993494, 1.241770012, 1.030435004],
        ],
    ),
]


def close(found: torch.Tensor, expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(
        found.double(), torch.tensor(expected).double(), rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "step_size", "weights"), GROUPED)
def test_go4_align(groups, step_size, weights, dtype) -> None:
    balancer = GO4Align(groups, step_size)
    for values, expected in zip(STEPS, weights, strict=False):
        losses = torch.tensor(values, dtype=dtype)
        close(balancer.loss_weights(losses), expected, DTYPES[dtype])
        balancer.update(losses)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("arguments", "weights", "logits"), LEARNED)
def test_ldcmtl(arguments, weights, logits, dtype) -> None:
    balancer = LDCMTL(lr=0.1, **arguments)
    for values, expected, after in zip(STEPS, weights, logits, strict=True):
        losses = torch.tensor(values, dtype=dtype)
        close(balancer.loss_weights(losses), expected, DTYPES[dtype])
        balancer.update(losses)
        assert balancer.learned is not None
        close(1 + balancer.learned[:, 0], after, DTYPES[dtype])
