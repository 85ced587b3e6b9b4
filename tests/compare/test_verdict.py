"""The statistics of the answer: against scipy and published tables, by property, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_mtl.compare.judge import Candidate, confirm, judge
from lightning_mtl.compare.verdict import (
    Differences,
    Moderated,
    Paired,
    advantage,
    against_baseline,
    as_good_within,
    as_scores,
    better_than_all,
    decide,
    expected_best,
    largest_hidden,
    luck_of_the_best,
    seeds_needed,
    settled,
    smallest_that_shows,
    ties_with_best,
)

RNG = np.random.default_rng(13)
SCORES = RNG.normal(size=(6, 5)) + np.arange(6)[:, None] + RNG.normal(size=5)


# -------------------------------------------------------------------------------- properties

arrays = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        np.random.default_rng(seed).normal(size=(6, 4))
        * np.random.default_rng(seed).uniform(0.1, 10, (6, 1))
    )
)
FEW = settings(max_examples=40, deadline=None)


@FEW
@given(arrays, st.floats(0.01, 100), st.floats(-50, 50))
def test_scale_and_place_change_nothing(scores, factor, shift):
    moved = factor * (scores + shift)
    for rule in (Moderated, Paired):
        a = rule(scores).between([0, 1, 2], [3, 4, 5])
        b = rule(moved).between([0, 1, 2], [3, 4, 5])
        assert b.estimate / b.error == pytest.approx(a.estimate / a.error, rel=1e-6, abs=1e-6)
        assert b.freedom == pytest.approx(a.freedom, rel=1e-6)


@FEW
@given(arrays, st.permutations(range(4)), st.permutations(range(6)))
def test_seeds_and_methods_have_no_order(scores, seeds, methods):
    a = Moderated(scores)
    b = Moderated(scores[methods][:, seeds])
    assert b.variance == pytest.approx(a.variance[list(methods)])
    assert b.freedom == pytest.approx(a.freedom)


@FEW
@given(arrays)
def test_what_all_methods_share_in_a_seed_drops_out(scores):
    shifted = scores + np.array([100.0, -3.0, 7.0, 0.0])
    for rule in (Moderated, Paired):
        a, b = rule(scores).between([0], [1]), rule(shifted).between([0], [1])
        assert b.error == pytest.approx(a.error, rel=1e-6)


@FEW
@given(arrays, st.floats(0.5, 20))
def test_statements_fit_each_other(scores, margin):
    found = Moderated(scores).between([0, 1, 2], [3, 4, 5])
    estimate, low, high = advantage(found)
    assert (low <= estimate).all()
    assert (estimate <= high).all()
    assert ((low > 0) == better_than_all(found)).all()
    assert as_good_within(found, margin).any() == (largest_hidden(found) < margin)
    assert (smallest_that_shows(found) > 0).all()
    verdict = decide(found, margin)
    assert (verdict.kind == "as good") == (verdict.hidden < margin)
    if verdict.kind == "yes":
        assert verdict.low > 0
        assert verdict.high >= verdict.effect
    if verdict.needed is not None and verdict.kind == "open":
        assert verdict.needed > 4


def test_a_winner_stays_in_the_group_of_ties_and_a_loser_leaves():
    scores = np.random.default_rng(0).normal(size=(5, 6))
    scores[2] += 20
    assert ties_with_best(Moderated(scores)).tolist() == [False, False, True, False, False]
    assert ties_with_best(Moderated(np.tile(scores[:1], (3, 1)))).all()


def test_repetitions_are_judged_as_alone():
    many = np.random.default_rng(5).normal(size=(7, 6, 4))
    together = Moderated(many).between([0, 1], [2, 3])
    base = against_baseline(many, many[:, 0])
    for i, scores in enumerate(many):
        alone = Moderated(scores).between([0, 1], [2, 3])
        assert together.lower(0.05)[i] == pytest.approx(alone.lower(0.05))
        one = against_baseline(scores, scores[0])
        assert base.lower(0.05)[i] == pytest.approx(one.lower(0.05))


def test_seeds_needed_shrinks_with_the_effect_and_gives_up():
    found = Paired(SCORES).between([0], [1, 2])
    needed = [seeds_needed(found, effect) for effect in (1.5, 2.0, 4.0)]
    assert needed == sorted(needed, reverse=True)
    assert seeds_needed(found, 1e-6) is None
    exact = Paired(SCORES).between([0], [1])._replace(freedom=np.array([[4.0]]))
    n = seeds_needed(exact, 2.0)
    sd = (exact.error * np.sqrt(5)).item()

    def reach(m: int) -> float:
        return (stats.t.isf(0.05, m - 1) + stats.t.ppf(0.8, m - 1)) * sd / m**0.5

    assert reach(n) <= 2.0 < reach(n - 1)


def test_luck_is_what_the_best_of_identical_methods_has():
    draws = np.random.default_rng(6).normal(size=(4000, 8, 5)) + 3
    shared = draws + np.random.default_rng(7).normal(size=(4000, 1, 5))
    best = (shared.mean(-1).max(-1) - shared.mean((-1, -2))).mean()
    assert luck_of_the_best(Moderated(shared)).mean() == pytest.approx(best, rel=0.05)


# -------------------------------------------------------------------------------- error rates


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_a_yes_without_a_difference_is_rare(spread: float):
    """16 balancers and 3 rivals; one rival is as good and the others are far below."""
    rng = np.random.default_rng(2026)
    sd = spread ** rng.uniform(-0.5, 0.5, (2000, 19, 1))
    scores = sd * rng.normal(size=(2000, 19, 3))
    one_rival = Moderated(scores).between(range(16), [16])
    assert better_than_all(one_rival).any(-1).mean() <= 0.05
    base = rng.normal(size=(2000, 3))
    assert better_than_all(against_baseline(scores, base)).any(-1).mean() <= 0.055
    fresh = sd * rng.normal(size=(2000, 19, 5))
    picked = scores[:, :16].mean(-1).argmax(-1)
    pair = np.stack([fresh[np.arange(2000), picked], fresh[:, 16]], 1)
    rate = better_than_all(Paired(pair).between([0], [1])).mean()
    assert 0.035 <= rate <= 0.065  # the level itself


def test_as_good_is_rarely_said_of_a_method_that_is_better():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(2000, 8, 4))
    scores[:, 0] += 2.0
    found = Moderated(scores).between(range(5), range(5, 8))
    assert as_good_within(found, 2.0).any(-1).mean() <= 0.05


# ------------------------------------------------------------------------------- the four answers


def candidates(**scores: list[float]) -> list[Candidate]:
    kinds = {"equal": "equal", "fixed": "fixed"}
    return [Candidate(m, kinds.get(m, "balancer"), dict(enumerate(s))) for m, s in scores.items()]


NOISE = {
    "equal": [0.1, -0.2, 0.05, 0.0, 0.1],
    "fixed": [0.0, 0.1, -0.1, 0.2, -0.1],
    "mine": [-0.1, 0.05, 0.1, -0.1, 0.0],
}


def plus(**by: float) -> dict[str, list[float]]:
    return {m: [x + by.get(m, 0.0) for x in s] for m, s in NOISE.items()}


@pytest.mark.parametrize(
    ("by", "margin", "kind"),
    [
        ({"mine": 3.0}, 1.0, "yes"),
        ({}, 1.0, "as good"),
        ({"fixed": 3.0}, 1.0, "as good"),
        ({"mine": 0.6}, 2.0, "as good"),  # certain, and too small to matter
        ({}, 0.01, "open"),
    ],
)
def test_each_answer(by: dict, margin: float, kind: str):
    finding = judge(candidates(**plus(**by)), margin).balancing
    assert finding.verdict.kind == kind, finding
    assert finding.method == "mine"
    assert finding.rivals == ["equal", "fixed"]


def test_what_would_have_shown_and_did_not():
    found = Differences(np.array([[0.4]]), np.array([[0.3]]), np.array([[100.0]]), 5)
    verdict = decide(found, 0.8)
    assert verdict.kind == "bounded"
    assert verdict.shows < 0.8 < verdict.hidden
    assert decide(found, 0.7).kind == "open"


def test_the_steady_balancer_is_found_behind_a_noisy_one():
    """The row with the highest mean is not the one that is better for certain."""
    rows = candidates(
        equal=[-5.0, -5.1, -4.9, -5.0, -4.95],
        steady=[2.5, 2.6, 2.4, 2.45, 2.5],
        noisy=[3.0, 18.0, -12.0, 9.0, -2.0],
    )
    finding = judge(rows).balancing
    assert finding.verdict.kind == "yes"
    assert finding.method == "steady"


def test_a_rival_that_spreads_is_no_proof():
    rows = candidates(equal=[30.0, -30.0, -1.0], mine=[0.6, 0.5, 0.7])
    assert judge(rows).balancing.verdict.kind == "open"


def test_differences_that_do_not_vary_prove_nothing():
    rows = candidates(equal=[1.0, 2.0, 4.0], mine=[3.0, 4.0, 6.0])
    verdict = judge(rows).balancing.verdict
    assert verdict.kind == "open"
    assert verdict.hidden == verdict.shows == np.inf
    same = candidates(equal=[1.0, 2.0, 4.0], mine=[1.0, 2.0, 4.0])
    assert judge(same).balancing.verdict.kind == "as good"
    found = settled(Paired(np.ones((2, 3))).between([0], [1]), np.ones((1, 3)), np.ones((1, 3)))
    assert found.error.item() == 0


def test_copies_of_equal_weighting_are_as_good():
    rows = candidates(equal=[1.0, 2.5, 4.0], **{f"copy{i}": [1.0, 2.5, 4.0] for i in range(12)})
    verdict = judge(rows).balancing.verdict
    assert verdict.kind == "as good"
    assert verdict.effect == 0.0


def test_a_method_that_lacks_a_seed_is_left_out():
    rows = candidates(**plus(), diverged=[9.0, 9.1])
    found = judge(rows)
    assert found.left_out == {"diverged": [2, 3, 4]}
    assert "diverged" not in found.judged
    assert judge(candidates(mine=[1.0, 2.0])).balancing is None


def test_one_seed_and_none():
    assert judge(candidates(equal=[1.0], mine=[2.0])).balancing is None
    assert judge([]).judged == []


def test_the_baseline_counts():
    row = Candidate("equal", "equal", {0: 1.0, 1: 1.1, 2: 0.9}, [0.0, 0.01, -0.01])
    unsure = Candidate("equal", "equal", row.scores, [3.0, -4.0, 1.0])
    assert judge([row]).single.verdict.kind == "yes"
    assert judge([unsure]).single.verdict.kind == "open"
    assert judge([Candidate("equal", "equal", row.scores, [0.0])]).single is None


def test_confirming_needs_all_of_its_runs():
    rows = candidates(**plus(mine=3.0))
    found = confirm(rows, "mine", ["equal", "fixed"], 1.0)
    assert found.balancing.verdict.kind == "yes"
    assert found.balancing.runs == 15
    assert confirm(rows[1:], "mine", ["equal", "fixed"], 1.0) is None
    rows[0] = Candidate("equal", "equal", {0: 1.0, 1: 2.0})
    assert confirm(rows, "mine", ["equal", "fixed"], 1.0) is None


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], r"shape \(methods, seeds\) but found \(2,\)"),
        (np.zeros((0, 3)), r"shape \(methods, seeds\) but found \(0, 3\)"),
        ([[1.0], [2.0]], "at least 2 seeds but found 1"),
        ([[1.0, 2.0], [1.0]], "as many seeds for every method"),
        ([[1.0, "x"]], "Expected scores to be numbers"),
        ([[1.0, 2.0], [float("nan"), 1.0]], "1 that are not, at method 1 seed 0"),
        ([[1.0, float("inf")]], "method 0 seed 1"),
    ],
)
def test_scores_that_are_none(scores, message: str):
    for function in (as_scores, Paired, Moderated):
        with pytest.raises(ValueError, match=message):
            function(scores)


def test_other_arguments_that_are_none():
    found = Paired(SCORES).between([0], [1])
    with pytest.raises(ValueError, match="at least 2 methods but found 1"):
        Moderated([[1.0, 2.0]])
    for alpha in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`alpha` between 0 and 1"):
            better_than_all(found, alpha)
    for margin in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`margin` to be a finite number above 0"):
            as_good_within(found, margin)
    with pytest.raises(ValueError, match=r"shape \(methods, rivals\)"):
        decide(Paired(SCORES[None]).between([0], [1]), 1.0)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        against_baseline(SCORES, [1.0])
    with pytest.raises(ValueError, match="at least 1 method"):
        expected_best(0)
