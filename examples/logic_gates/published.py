"""Tables 1 to 4 as printed in Nakamura, Grassi and Wolf (2022), and how the tension may be read."""

from __future__ import annotations

from typing import NamedTuple

from examples.logic_gates.directions import AS_CODED, Reading
from examples.logic_gates.engine import Cell

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WINDOWS = (5, 10, 15)


class Printed(NamedTuple):
    """Epochs until both tasks are learned, mean and standard deviation of 50 runs; % that learn."""

    mean: float
    deviation: float
    rate: float = 100.0


# By alpha, in the order of WINDOWS. The paper prints its central direction for alpha = 0.
SWEEPS: dict[float, dict[float, tuple[Printed, ...]]] = {
    1.0: {
        0.1: (Printed(539.62, 30.39), Printed(527.46, 27.57), Printed(535.64, 27.89)),
        0.2: (Printed(496.52, 26.45), Printed(477.62, 23.09), Printed(489.36, 23.59)),
        0.3: (Printed(472.22, 27.73), Printed(443.02, 21.14), Printed(455.48, 22.58)),
        0.4: (Printed(456.06, 30.84), Printed(415.60, 19.14), Printed(428.38, 20.66)),
        0.5: (Printed(448.42, 41.63), Printed(396.08, 18.05), Printed(407.20, 18.53)),
        0.6: (Printed(444.48, 57.03), Printed(381.98, 17.90), Printed(391.82, 17.53)),
        0.7: (Printed(437.26, 54.05), Printed(370.00, 16.41), Printed(379.72, 15.42)),
        0.8: (Printed(430.52, 47.62), Printed(359.28, 15.90), Printed(369.58, 15.84)),
        0.9: (Printed(430.32, 66.24), Printed(358.68, 15.42), Printed(360.36, 14.83)),
        1.0: (Printed(431.48, 87.40), Printed(343.46, 15.22), Printed(362.64, 14.76)),
    },
    10.0: {
        0.1: (Printed(235.18, 37.23), Printed(253.22, 23.56), Printed(247.98, 32.79)),
        0.2: (Printed(207.06, 39.38), Printed(204.09, 23.64), Printed(222.64, 31.29)),
        0.3: (Printed(188.04, 36.16), Printed(188.20, 24.29), Printed(210.72, 38.15)),
        0.4: (Printed(177.92, 38.25), Printed(181.44, 24.26), Printed(207.52, 40.53)),
        0.5: (Printed(168.66, 38.07), Printed(180.64, 37.88), Printed(202.02, 44.57)),
        0.6: (Printed(171.90, 46.16), Printed(180.90, 75.41), Printed(194.80, 37.25)),
        0.7: (Printed(183.46, 85.43), Printed(193.42, 90.41), Printed(195.46, 45.51)),
        0.8: (
            Printed(231.50, 401.67, 96.0),
            Printed(178.30, 65.38, 98.0),
            Printed(252.32, 209.94, 98.0),
        ),
        0.9: (
            Printed(341.10, 609.80, 96.0),
            Printed(232.08, 198.64, 94.0),
            Printed(266.84, 166.23, 96.0),
        ),
        1.0: (
            Printed(340.16, 574.46, 94.0),
            Printed(231.94, 177.96, 98.0),
            Printed(361.94, 275.57, 98.0),
        ),
    },
}

# Tables 3 (XOR as it is) and 4 (XOR times 10), with alpha = 0.3 and T = 10.
METHODS: dict[float, dict[str, tuple[Cell, Printed]]] = {
    1.0: {
        "single AND": (Cell(gates=("and",)), Printed(351.70, 2.62)),
        "single XOR": (Cell(gates=("xor",)), Printed(871.20, 52.95)),
        "uniform weighting": (Cell("uniform"), Printed(484.86, 18.12)),
        "min-norm": (Cell("min-norm"), Printed(758.56, 137.15)),
        "central direction": (Cell("central"), Printed(574.44, 43.37)),
        "min-norm + tension": (Cell("min-norm", 0.3), Printed(493.16, 27.94)),
        "central + tension": (Cell("central", 0.3), Printed(443.02, 21.14)),
    },
    10.0: {
        "single AND": (Cell(gates=("and",)), Printed(351.70, 2.62)),
        "single XOR, rate 0.001": (
            Cell(gates=("xor",), scale=10.0, lr=1e-3),
            Printed(2979.00, 0.80),
        ),
        "uniform weighting": (Cell("uniform", scale=10.0), Printed(1831.60, 810.81, 46.0)),
        "uniform weighting, rate 0.005": (
            Cell("uniform", scale=10.0, lr=5e-3),
            Printed(1831.60, 810.81, 46.0),
        ),
        "min-norm": (Cell("min-norm", scale=10.0), Printed(1998.44, 316.38)),
        "central direction": (Cell("central", scale=10.0), Printed(328.50, 25.45)),
        "min-norm + tension": (Cell("min-norm", 0.3, scale=10.0), Printed(210.38, 14.96)),
        "central + tension": (Cell("central", 0.3, scale=10.0), Printed(188.20, 24.29)),
    },
}

READINGS: dict[str, Reading] = {
    "as coded": AS_CODED,
    "log10(L/2), no correction": Reading(2.0, "none"),
    "log10(L/2), orthogonal projection": Reading(2.0, "orthogonal"),
    "log10(L/4), as coded": Reading(4.0),
    "windows that do not overlap, L/2, projection": Reading(2.0, "orthogonal", apart=True),
    "unit vectors by tensor, L/2, as coded": Reading(2.0, by_tensor=True),
}


def sweep_cells(scale: float) -> dict[tuple[float, int], tuple[Cell, Printed]]:
    """By alpha and T what table 1 (``scale`` 1) or 2 (10) has, alpha = 0 left out."""
    return {
        (alpha, window): (Cell("central", alpha, window, scale), printed)
        for alpha, row in SWEEPS[scale].items()
        for window, printed in zip(WINDOWS, row, strict=True)
    }
