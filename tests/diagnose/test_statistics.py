"""The functions of `diagnose` against scipy, published worked examples and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import distance

from lightning_mtl.diagnose import noise
from lightning_mtl.diagnose.summary import pace


def gramian(rows: np.ndarray) -> np.ndarray:
    return rows @ rows.T


def test_cosines_are_those_of_scipy():
    rows = np.random.default_rng(0).normal(size=(5, 7))
    expected = 1 - distance.squareform(distance.pdist(rows, "cosine"))
    np.testing.assert_allclose(noise.cosines(gramian(rows)), expected, atol=1e-12)


def test_cosines_of_a_zero_row_are_not_numbers():
    found = noise.cosines(gramian(np.asarray([[1.0, 0.0], [0.0, 0.0]])))
    assert found[0, 0] == 1
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()


def test_half_cosines_never_compare_what_shares_a_half():
    first, second = np.random.default_rng(1).normal(size=(2, 3, 6))
    found = noise.half_cosines(gramian(np.concatenate([first, second])))
    for i in range(3):
        for j in range(3):
            both = distance.cosine(first[i], second[j]), distance.cosine(second[i], first[j])
            assert found[i, j] == pytest.approx(1 - np.mean(both))


def test_correction_for_attenuation():
    # Spearman's formula by hand: .28 / sqrt(.49 * .64) = .5
    halves = np.asarray([[[0.49, 0.28], [0.28, 0.64]]])
    assert noise.corrected_cosines(halves)[0, 1] == pytest.approx(0.5)
    halves[0, 0, 0] = -0.01
    assert np.isnan(noise.corrected_cosines(halves)[0, 1])


@pytest.mark.parametrize(
    ("below", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_shares_have_the_intervals_of_newcombe(below: int, count: int, low: float, high: float):
    # Newcombe, Statistics in Medicine 17, 1998, table I, method 3
    values = np.where(np.arange(count) < below, -1.0, 1.0)
    found = noise.share_below_zero(np.append(values, np.nan))
    assert found == pytest.approx((below / count, low, high), abs=5e-5)


def test_means_have_the_interval_of_students_sleep_data():
    # Student, Biometrika 6, 1908; the interval as R's t.test prints it
    gained = np.asarray([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4, np.nan])
    assert noise.mean_interval(gained) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)


def test_noise_scale_is_that_of_mccandlish():
    # Equations A.2 and A.3 of arXiv 1812.06162, with the whole batch as the mean of its halves.
    halves = np.random.default_rng(2).normal(size=(50, 2, 8)) + 0.7
    small, size = np.square(halves).sum(-1).mean(), 16
    big = np.square(halves.mean(1)).sum(-1).mean()
    signal = (2 * size * big - size * small) / size
    scatter = (small - big) / (1 / size - 1 / (2 * size))
    pairs = np.stack([gramian(h) for h in halves])
    assert noise.noise_scale(pairs, size) == pytest.approx([scatter / signal])


def test_noise_scale_without_signal_is_infinite():
    pairs = gramian(np.asarray([[1.0, 0.0], [-1.0, 0.0]]))[None]
    assert noise.noise_scale(pairs, 8) == [np.inf]


def test_verdicts_need_an_interval_on_one_side_and_trusted_floors():
    rng = np.random.default_rng(3)
    far = rng.normal(-0.5, 0.1, 30)
    assert noise.verdict_of(far, True) == "conflict"
    assert noise.verdict_of(-far, True) == "agree"
    assert noise.verdict_of(far, False) == "unsure"
    assert noise.verdict_of(far - far.mean(), True) == "unsure"
    assert noise.verdict_of(far[:1], True) == "unsure"


def test_pace_of_exponential_decay():
    steps = np.arange(400)
    fast, slow = np.exp(-steps / 40), np.exp(-steps / 80)
    assert pace(slow, fast) == pytest.approx(0.5, abs=0.01)  # alone it was there in half the steps
    assert pace(fast, slow) == 1
    assert pace(fast, fast) == pytest.approx(1)
