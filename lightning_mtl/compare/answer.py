"""The plain answer of a comparison: would balancing help, which method, and what does it cost?"""

from __future__ import annotations

from lightning_mtl.compare.table import Row, Summary


def answer(summary: Summary) -> list[str]:
    """Sentences, the verdict first.

    A balancer helps when its mean Δp, less its standard deviation over seeds, is above the mean Δp
    of equal weighting **and** of every fixed weighting in the comparison: a fixed weight is the
    honest rival, since it costs nothing.
    """
    if summary.no_delta_p:
        return [f"No answer: Δp is not defined, because {summary.no_delta_p}."]
    equal = _best([row for row in summary.methods if row.kind == "equal"])
    plain = _best([row for row in summary.methods if row.kind in ("equal", "fixed")])
    balancer = _best([row for row in summary.methods if row.kind == "balancer"])
    if plain is None or equal is None:
        return ["No answer: equal weighting has no finished run to compare with."]
    if balancer is None:
        return ["No answer: no balancer has a finished run.", *_against_single(summary)]
    sentences = [_verdict(balancer, plain, equal)]
    if balancer.step_ratio is not None:
        memory = "" if balancer.peak_mb is None else f" (peak memory {_memory(balancer, equal)})"
        sentences.append(
            f"Cost: {balancer.method} takes {balancer.step_ratio:.2f} times as long a step as "
            f"equal weighting{memory}."
        )
    sentences += _against_single(summary)
    seeds = min(len(row.runs) for row in (balancer, plain))
    if seeds < 2:
        sentences.append(
            "This rests on one seed, so nothing is known about chance: use --seeds 3 or more."
        )
    failed = [row.method for row in summary.rows if row.errors]
    if failed:
        sentences.append(f"Runs of {', '.join(failed)} failed and are missing from these numbers.")
    return sentences


def _verdict(balancer: Row, plain: Row, equal: Row) -> str:
    low, best, rival, base = _low(balancer), _text(balancer), _mean(plain), _mean(equal)
    fixed = f" and than the best fixed weighting, {_text(plain)}" if plain is not equal else ""
    if low > rival and low > base and balancer.delta_p is not None and balancer.delta_p.n < 2:
        return f"Perhaps: on the one seed that was run, {best} is better than {_text(plain)}."
    if low > rival and low > base:
        return f"Yes: balancing helps here. {best}: clearly better than {_text(equal)}{fixed}."
    if low > base:
        return (
            f"No, not more than a fixed weight: {best} is clearly better than {_text(equal)}, "
            f"but not than {_text(plain)}, a fixed weighting that costs nothing."
        )
    return (
        f"No: no balancer is clearly better than {_text(plain)} here. The best of them is {best}; "
        f"its mean less one standard deviation does not exceed that."
    )


def _against_single(summary: Summary) -> list[str]:
    best = _best(summary.methods)
    if best is None:
        return []
    single = "single-task training (Δp 0)"
    if best.delta_p is not None and best.delta_p.n < 2:
        verdict = f"is {'above' if _mean(best) > 0 else 'below'} {single} on its one seed"
    elif _low(best) > 0:
        verdict = f"is above {single}"
    elif _mean(best) + (_mean(best) - _low(best)) < 0:
        verdict = f"is below {single}: a model per task remains better"
    else:
        verdict = f"is within one standard deviation of {single}"
    return [f"The best joint training, {_text(best)}, {verdict}."]


def _best(rows: list[Row]) -> Row | None:
    return max((row for row in rows if row.delta_p is not None), key=_mean, default=None)


def _mean(row: Row) -> float:
    assert row.delta_p is not None
    return row.delta_p.mean


def _low(row: Row) -> float:
    assert row.delta_p is not None
    return row.delta_p.mean - (row.delta_p.std or 0.0)


def _text(row: Row) -> str:
    assert row.delta_p is not None
    return f"{row.method} (Δp {row.delta_p.text('+.2f', '.2f')} %)"


def _memory(row: Row, equal: Row) -> str:
    other = "" if equal.peak_mb is None else f", equal weighting {equal.peak_mb:.1f} MB"
    return f"{row.peak_mb:.1f} MB{other}"
