"""The plain answer of a comparison: would balancing help, which method, and what does it cost?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_mtl.compare.cells import models_columns
from lightning_mtl.compare.grid import SINGLE
from lightning_mtl.compare.table import Row, Summary
from lightning_mtl.compare.texts import name

if TYPE_CHECKING:
    from lightning_mtl.compare.judge import Finding, Judgement

_FEWEST = 3  # seeds of an answer
_SHOWN = 8  # names in a sentence


def answer(summary: Summary) -> list[str]:
    """Sentences, the verdict first, each with what it rests on.

    A balancer helps when it is better than equal weighting **and** every other rival in the
    comparison: a fixed weight is the honest one, since it costs nothing. What "better" means is
    in :mod:`lightning_mtl.compare.judge`.
    """
    if summary.no_delta_p:
        return [f"No answer: Δp is not defined, because {summary.no_delta_p}.", *summary.remarks]
    judgement = summary.judgement
    assert judgement is not None
    equal = next((row for row in summary.methods if row.kind == "equal" and row.scores), None)
    if equal is None:
        none = "No answer: equal weighting has no finished run to compare with."
        return [none, *summary.remarks]
    balancers = [row for row in summary.methods if row.kind == "balancer" and row.scores]
    sentences = []
    if not balancers:
        sentences.append("No answer: no balancer has a finished run.")
    elif summary.plan is not None:
        sentences += _confirmed(summary)
    else:
        sentences += _screened(summary, judgement, balancers)
    sentences += _cost(summary, judgement, equal)
    sentences += _against_single(summary, judgement)
    sentences += _ranking(summary, judgement)
    return [*sentences, *_gaps(summary, judgement), *summary.remarks]


# ---------------------------------------------------------------------------------- balancing


def _screened(summary: Summary, judgement: Judgement, balancers: Sequence[Row]) -> list[str]:
    found, seeds = judgement.balancing, len(judgement.seeds)
    if seeds < 2:
        best = max(balancers, key=_mean)
        rival = max((r for r in summary.methods if r.kind != "balancer" and r.scores), key=_mean)
        where = "ahead of" if _mean(best) > _mean(rival) else "not ahead of"
        return [
            (
                f"Cannot tell: on the one seed that was run, {_text(best)} is {where} "
                f"{_text(rival)}, and of one run nothing is known about chance. Use --seeds "
                f"{_FEWEST} or more."
            )
        ]
    if found is None:
        return ["No answer: no balancer has a run on every seed of equal weighting."]
    if seeds < _FEWEST:
        return [
            (
                f"Cannot tell: two seeds are for screening only. {_ahead(summary.methods, found)}. "
                f"Use --seeds {_FEWEST} or more."
            )
        ]
    sentences = [_verdict(summary.methods, found, f"with {seeds} seeds")]
    if found.verdict.kind in ("open", "bounded") and judgement.next_confirm is not None:
        fresh, shows = judgement.next_confirm
        if math.isfinite(shows):
            runs = fresh * (1 + len(found.rivals))
            sentences.append(
                f"Cheapest way on: --confirm {fresh} trains {name(found.method)} and its "
                f"{_count(len(found.rivals), 'rival')} on fresh seeds, {runs} runs, in which a "
                f"difference above {_points(shows)} would show."
            )
    return [*sentences, f"This rests on {_basis(found)}."]


def _confirmed(summary: Summary) -> list[str]:
    plan, judgement = summary.plan, summary.confirmed
    assert plan is not None
    if judgement is None or judgement.balancing is None:
        return [
            (
                f"No answer yet: of the runs that are to confirm {name(plan.balancer)} on "
                f"{plan.seeds} fresh seeds some failed or are missing. The same command, with "
                f"--confirm {plan.seeds}, runs them."
            )
        ]
    found = judgement.balancing
    verdict = _verdict(summary.fresh, found, f"with {plan.seeds} fresh seeds")
    picked = f"{name(plan.balancer)} was picked on seeds 0 to {plan.screening - 1}"
    return [
        verdict,
        (
            f"{picked}; it, rivals, margin and rule were written down before the fresh seeds were "
            f"run. This rests on {_basis(found)}."
        ),
    ]


def _verdict(rows: Sequence[Row], found: Finding, with_seeds: str) -> str:
    v = found.verdict
    best, rival = _named(rows, found.method), _named(rows, found.rival)
    every = "every balancer here" if len(found.methods) > 1 else _named(rows, found.methods[0])
    if v.kind == "yes":
        return (
            f"Yes: balancing helps here. {best} is better than {_rivals(found)}: by "
            f"{v.effect:.2f} points of Δp than the best of them, {rival} ({_bounds(found)})."
        )
    if v.kind == "as good" and v.hidden < 0:
        return (
            f"No: {rival} is better than {every}. The next, {best}, is {-v.beside:.2f} points of "
            f"Δp behind it, and at least {_points(-v.hidden)}."
        )
    if v.kind == "as good":
        certain = " for certain" if v.low > 0 else ""
        return (
            f"No: {rival} does as well as {every}. {best} is{certain} {_signed(v.beside)} beside "
            f"it, none is more than {_points(v.hidden)} above it, and less than {v.margin:g} does "
            f"not matter (--margin)."
        )
    if v.kind == "bounded":
        return (
            f"No difference larger than {_points(v.hidden)} of Δp could be hidden here. "
            f"{_ahead(rows, found)}; an advantage of {v.margin:g} would have been found."
        )
    if not math.isfinite(v.shows):
        return (
            f"Cannot tell: the difference of {best} to a rival is the same in every seed, which is "
            f"not chance at work, so no error rate can be given. Does the seed change anything?"
        )
    more = _more(v.needed, len(found.seeds))
    return (
        f"Cannot tell: {with_seeds} only an advantage above {_points(v.shows)} of Δp would show (4 "
        f"times in 5), and up to {v.hidden:.2f} could be hidden. {_ahead(rows, found)}; {more} "
        f"would settle whether a balancer is better by {v.margin:g}."
    )


def _ahead(rows: Sequence[Row], found: Finding) -> str:
    v = found.verdict
    best, rival = _named(rows, found.method), _named(rows, found.rival)
    return f"{best} is {_signed(v.beside)} beside {rival} ({_bounds(found)})"


def _basis(found: Finding) -> str:
    fresh = "fresh seeds" if found.seeds[0] >= 10_000 else "seeds"
    last = f"{found.seeds[0]} to {found.seeds[-1]}"
    arms = found.runs // len(found.seeds)
    return (
        f"{len(found.seeds)} {fresh} ({last}) of {arms} methods, {found.runs} runs, and on "
        f"{found.rule}. Its error rate is {100 * found.verdict.alpha:.0f} %: where no balancer is "
        f"better, "
        f'at most {100 * found.verdict.alpha:.0f} comparisons in 100 say "yes"'
    )


def _more(needed: int | None, seeds: int) -> str:
    if needed is None:
        return "not even 200 seeds for all"
    more = max(needed - seeds, 1)
    return f"{_count(more, 'more seed')} for all"


def _rivals(found: Finding) -> str:
    others = len(found.rivals) - 1
    if not others:
        return f"{name(found.rivals[0])}, its only rival"
    return f"equal weighting and {'the' if others == 1 else 'each'} other rival"


# --------------------------------------------------------------------------------- the others


def _against_single(summary: Summary, judgement: Judgement) -> list[str]:
    found = summary.confirmed_single or judgement.single
    rows = summary.fresh if summary.confirmed_single else summary.methods
    single = "single-task training (Δp 0)"
    if found is None:
        best = max((row for row in summary.methods if row.scores), key=_mean, default=None)
        if best is None:
            return []
        where = "above" if _mean(best) > 0 else "below"
        return [
            (
                f"The best joint training, {_text(best)}, is {where} {single}; by how much is not "
                f"known with fewer than two seeds of each."
            )
        ]
    v = found.verdict
    best_text = f"The best joint training, {_named(rows, found.method)},"
    basis = f"{found.rule}, {len(found.seeds)} seeds, error rate {100 * v.alpha:.0f} %"
    if v.kind == "yes":
        text = f"{best_text} is above {single}, {_bounds(found)}"
    elif v.kind == "as good" and v.hidden < 0:
        text = f"{best_text} is below {single}: a model per task remains better"
    elif v.kind == "as good":
        text = (
            f"No joint training is more than {_points(v.hidden)} above {single}, less than the "
            f"{v.margin:g} that matters: a model per task does as well. The best one is "
            f"{_named(rows, found.method)}"
        )
    elif v.kind == "bounded":
        text = (
            f"{best_text} is neither above nor below {single} for certain; an advantage above "
            f"{_points(v.hidden)} is excluded"
        )
    elif not math.isfinite(v.shows):
        text = f"{best_text} does not vary over the seeds: whether it is above {single} is open"
    else:
        text = (
            f"Whether joint training is above {single} cannot be told: {best_text[0].lower()}"
            f"{best_text[1:-1]} ({_bounds(found)}), and only an advantage above "
            f"{_points(v.shows)} would show; {_more(v.needed, len(found.seeds))} and the "
            f"single-task runs would settle {v.margin:g}"
        )
    return [f"{text} ({basis})."]


def _cost(summary: Summary, judgement: Judgement, equal: Row) -> list[str]:
    confirmed = summary.confirmed and summary.confirmed.balancing
    found = confirmed or judgement.balancing
    if found is None:
        return []
    row = next(row for row in summary.methods if row.method == found.method)
    if row.step_ratio is None:
        return []
    memory = "" if row.peak_mb is None else f" (peak memory {_memory(row, equal)})"
    sentences = [
        (
            f"Cost: {name(row.method)} takes {row.step_ratio.text()} times as long a step as equal "
            f"weighting{memory}.{_training(summary, row, equal)}"
        )
    ]
    if summary.models is not None:
        sentences.append(models_columns(summary.models)[2])
    return sentences


def _training(summary: Summary, row: Row, equal: Row) -> str:
    """Device-seconds of a whole training, where the steps of the runs are known."""
    if row.device_seconds is None:
        return ""
    others = []
    if equal.device_seconds is not None:
        others.append(f"{equal.device_seconds.mean:.3g} with equal weighting")
    if summary.single.device_seconds is not None:
        models = _count(len(summary.directions), "single-task model")
        others.append(f"{summary.single.device_seconds.mean:.3g} for {models}")
    beside = f"; {', '.join(others)}" if others else ""
    return f" A training takes {row.device_seconds.mean:.3g} device-seconds{beside}."


def _ranking(summary: Summary, judgement: Judgement) -> list[str]:
    if judgement.luck is None or not judgement.ties or len(judgement.seeds) < _FEWEST:
        return []
    judged = [row for row in summary.methods if row.method in judgement.judged]
    best = max(judged, key=_mean)
    ties = [method for method in judgement.ties if method != best.method]
    luck = (
        f"{_text(best)} has the highest mean; the best of {len(judged)} methods that are all alike "
        f"would stand {judgement.luck:.2f} above its true mean by luck alone."
    )
    if not ties:
        return [f"{luck} No other can be the best one (Hsu's comparisons with the best, 5 %)."]
    if len(ties) == len(judged) - 1:
        return [f"{luck} Every other one may be the best as well (Hsu's comparisons, 5 %)."]
    return [f"{luck} {_list(ties)} may be the best as well (Hsu's comparisons, 5 %)."]


def _gaps(summary: Summary, judgement: Judgement) -> list[str]:
    sentences = []
    if judgement.left_out:
        lacking = "; ".join(
            f"{name(method)} lacks {_count(len(seeds), 'seed')}"
            for method, seeds in list(judgement.left_out.items())[:_SHOWN]
        )
        sentences.append(
            f"Left out of what is said here, since runs that are dropped make the others look "
            f"better: {lacking}."
        )
    if not any(row.kind == "fixed" for row in summary.methods):
        sentences.append(
            "No fixed weighting was compared, the rival that costs nothing: add some "
            "(Scalarization) to the file of balancers."
        )
    if SINGLE in (row.method for row in summary.rows if row.errors):
        sentences.append("Some single-task runs failed, so Δp rests on fewer of them.")
    failed = [row.method for row in (*summary.rows, *summary.fresh) if row.errors]
    if failed:
        listed = _list(list(dict.fromkeys(failed)))
        sentences.append(f"Runs of {listed} failed and are missing from these numbers.")
    return sentences


# -------------------------------------------------------------------------------------- words


def _mean(row: Row) -> float:
    assert row.delta_p is not None
    return row.delta_p.mean


def _text(row: Row) -> str:
    assert row.delta_p is not None
    return f"{name(row.method)} (Δp {row.delta_p.text('+.2f', '.2f')} %)"


def _named(rows: Sequence[Row], method: str) -> str:
    return next((_text(r) for r in rows if r.method == method and r.scores), name(method))


def _bounds(found: Finding) -> str:
    v = found.verdict
    return f"one-sided 95 % bounds {v.low:+.2f} and {v.high:+.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f} points of Δp"


def _points(value: float) -> str:
    return f"{value:.2f} points"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _list(names: Sequence[str]) -> str:
    shown = [name(n) for n in names[:_SHOWN]]
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    *head, last = [*shown, *more]
    return f"{', '.join(head)} and {last}" if head else last


def _memory(row: Row, equal: Row) -> str:
    other = "" if equal.peak_mb is None else f", equal weighting {equal.peak_mb:.1f} MB"
    return f"{row.peak_mb:.1f} MB{other}"
