"""The procedures behind the verdict against scipy and published examples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import polygamma

from lightning_mtl.compare.verdict import (
    Moderated,
    Paired,
    against_baseline,
    better_than_all,
    expected_best,
    simultaneous_intervals,
)
from lightning_mtl.compare.verdict.moderated import inverse_trigamma, shrunk
from tests.compare.test_verdict import RNG, SCORES

# ------------------------------------------------------------------------------ against scipy


def test_paired_is_scipys_paired_t():
    for k, j in ((0, 1), (3, 2), (5, 0)):
        found = Paired(SCORES).between([k], [j])
        expected = stats.ttest_rel(SCORES[k], SCORES[j], alternative="greater")
        assert (found.estimate / found.error).item() == pytest.approx(expected.statistic)
        assert found.freedom.item() == expected.df
        for level in (0.05, 0.01):
            interval = expected.confidence_interval(1 - level)
            assert found.lower(level).item() == pytest.approx(interval.low)
        p = stats.t.sf(found.estimate / found.error, found.freedom).item()
        assert p == pytest.approx(expected.pvalue)


def test_moderated_of_two_methods_is_the_paired_t():
    two = SCORES[[4, 1]]
    for a, b in zip(Moderated(two).between([0], [1]), Paired(two).between([0], [1]), strict=True):
        assert np.asarray(a).item() == pytest.approx(np.asarray(b).item())


def test_moderated_with_equal_variances_is_the_analysis_of_variance():
    """Without a prior to learn, the error is that of a two-way layout; Friedman-like blocks."""
    blocks = RNG.normal(size=(4, 7))
    v = Moderated(blocks).raw
    residual = blocks - blocks.mean(-1, keepdims=True) - blocks.mean(-2) + blocks.mean()
    assert v.mean() == pytest.approx((residual**2).sum() / (3 * 6))  # mean square, (A-1)(n-1)
    same, freedom = shrunk(np.full(4, 2.0), 6 * 3 / 4)
    assert same == pytest.approx(np.full(4, 2.0))
    assert freedom == pytest.approx(3 * 6)


def test_shrinkage_follows_smyth():
    """Section 6.2 of the paper, written out once more with scalars."""
    v, d = np.array([0.1, 0.7, 1.5, 40.0, 3.0, 0.02]), 3.0
    e = np.log(v) - polygamma(0, d / 2) + np.log(d / 2)
    d0 = 2 * inverse_trigamma(np.array(e.var(ddof=1) - polygamma(1, d / 2))).item()
    s0 = np.exp(e.mean() + polygamma(0, d0 / 2) - np.log(d0 / 2))
    found, freedom = shrunk(v, d)
    assert found == pytest.approx(np.maximum((d0 * s0 + d * v) / (d0 + d), v))
    assert freedom == pytest.approx(d0 + d)
    assert polygamma(1, d0 / 2) == pytest.approx(e.var(ddof=1) - polygamma(1, d / 2))


@pytest.mark.parametrize("x", [1e-8, 1e-3, 0.2, 1.0, 30.0, 1e6, 1e9])
def test_inverse_trigamma(x: float):
    assert polygamma(1, inverse_trigamma(np.array(x))) == pytest.approx(x, rel=1e-3)


def test_against_a_baseline_is_scipys_welch():
    base = RNG.normal(size=4) * 3
    found = against_baseline(SCORES, base, moderate=False)
    for k, row in enumerate(SCORES):
        expected = stats.ttest_ind(row, base, equal_var=False, alternative="greater")
        assert (found.estimate / found.error)[k, 0] == pytest.approx(expected.statistic)
        assert found.freedom[k, 0] == pytest.approx(expected.df)
    by_method = against_baseline(SCORES, np.tile(base, (6, 1)), moderate=False)
    assert by_method.error == pytest.approx(found.error)
    one = against_baseline(SCORES[:1], base)
    assert one.error == pytest.approx(found.error[:1])


def test_many_to_one_is_close_to_dunnett_and_never_finds_more():
    """With equal variances Bonferroni's quantile is a little above Dunnett's."""
    rng = np.random.default_rng(3)
    groups = rng.normal(size=(5, 40))
    groups[1] += 0.9
    expected = stats.dunnett(*groups[1:], control=groups[0], alternative="greater", rng=rng).pvalue
    found = Moderated(groups).between(range(1, 5), [0])
    p = np.minimum(4 * stats.t.sf(found.estimate / found.error, found.freedom), 1)[:, 0]
    assert p[0] == pytest.approx(expected[0], abs=0.01)
    assert (p >= expected - 0.005).all()
    assert better_than_all(found).tolist() == [True, False, False, False]


def test_simultaneous_intervals_contain_tukeys():
    rng = np.random.default_rng(4)
    groups = rng.normal(size=(4, 60))
    tukey = stats.tukey_hsd(*groups).confidence_interval(0.95)
    low, high = simultaneous_intervals(Moderated(groups).between([1, 2, 3], [0]))
    # three comparisons instead of six, blocks instead of one-way: within a fifth of the width
    width = tukey.high[1:, 0] - tukey.low[1:, 0]
    assert (high - low)[:, 0] == pytest.approx(width, rel=0.2)


@pytest.mark.parametrize(
    ("methods", "mean"),
    [(1, 0.0), (2, 0.56419), (3, 0.84628), (5, 1.16296), (10, 1.53875), (20, 1.86748)],
)
def test_luck_is_the_tabled_mean_of_the_largest(methods: int, mean: float):
    """Harter, Biometrika 48 (1961), table 1."""
    assert expected_best(methods) == pytest.approx(mean, abs=6e-6)


def test_student_s_sleep_data():
    """Student, Biometrika 6 (1908): ten patients, two drugs; mean 1.58, t = 4.06 on 9 degrees."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    for rule in (Paired, Moderated):
        found = rule([second, first]).between([0], [1])
        assert found.estimate.item() == pytest.approx(1.58)
        assert (found.estimate / found.error).item() == pytest.approx(4.0621, abs=1e-4)
        assert found.freedom.item() == pytest.approx(9)
        assert better_than_all(found, 0.0015).all()
        assert not better_than_all(found, 0.0013).any()  # p = .0014 one-sided
