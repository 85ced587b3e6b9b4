"""What the numbers of a diagnosis say, each sentence with its rule and how often that is right.

Rules come from the bank of small problems (``benchmarks/bank.py``), where trainings over seeds have
given the truth; ``evidence.json`` has how often each was right there, and docs/diagnose.md the
tables. What did not predict is said as a number and not as a rule.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

EQUAL, FIXED = "EqualWeighting", "Scalarization"
# From this factor between the longest and the shortest gradient on, families of balancers helped in
# the bank: the number is from 8 of its problems, and was tried on 19 others.
SPREAD = 3.6
COULD, OPEN, NONE = "could help", "cannot tell", "no reason seen"
NOISY = 0.1  # a floor below which a gradient is nearly all noise; a convention, no rule
PAGE = "docs/diagnose.md"


@dataclass(frozen=True)
class Statement:
    """One paragraph of the reading.

    Attributes:
        text: what is said.
        verdict: ``could help``, ``cannot tell``, ``no reason seen`` or empty.
        rule: what it rests on, and how often that was right.
        methods: the balancers that it is about, by class.
    """

    text: str
    verdict: str = ""
    rule: str = ""
    methods: tuple[str, ...] = ()


@cache
def evidence() -> dict[str, Any]:
    """How often the rules were right in the bank: ``evidence.json``, by ``bank_table.py``."""
    path = Path(__file__).with_name("evidence.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def gains(summary: dict[str, Any]) -> dict[str, float | None]:
    """How much better off the worst-off task is under each family than under equal weighting.

    Args:
        summary: the numbers of a diagnosis.

    Returns:
        Differences of cosines by class; ``None`` where a family is not defined, such as
        ``LogLoss`` on losses that are not above 0.
    """
    worst = {row["example"]: row["worst"] for row in summary["families"]}
    equal = worst.pop(EQUAL, None)
    return {
        name: None if value is None or equal is None else value - equal
        for name, value in worst.items()
    }


def level(summary: dict[str, Any]) -> str:
    """Whether balancing could help: :data:`COULD`, :data:`OPEN` or :data:`NONE`.

    It could where task gradients differ in length. Where they do not and a task is held up by the
    others all the same, some families helped in the bank and others did not.

    Args:
        summary: the numbers of a diagnosis.
    """
    if (summary["norm"]["spread"] or 1.0) >= SPREAD:
        return COULD
    return OPEN if any(row["starves"] for row in summary["alone"].values()) else NONE


def read(summary: dict[str, Any]) -> list[Statement]:
    """The reading: what could help and why, what could not, and what to do next.

    Args:
        summary: the numbers of a diagnosis.
    """
    found = [_families(summary), _fixed(summary), _scales(summary), _starved(summary)]
    found += [_conflicts(summary), _noise(summary)]
    notes = [Statement(note) for note in summary.get("notes", ())]
    return [s for s in (*found, *notes, _next(summary)) if s is not None]


def _families(summary: dict[str, Any]) -> Statement:
    rows = [row for row in summary["families"] if row["example"] not in (EQUAL, FIXED)]
    if not rows:
        text = "No measured step had all tasks, so that nothing can be said of families of methods."
        return Statement(text)
    verdict, gain = level(summary), gains(summary)
    rows.sort(key=lambda row: -(gain[row["example"]] or 0.0))
    names = tuple(row["example"] for row in rows)
    worst = next(row["worst"] for row in summary["families"] if row["example"] == EQUAL)
    listed = ", ".join(f"{row['example']} ({_part(row['worst'])})" for row in rows)
    undefined = [row["example"] for row in rows if row["worst"] is None]
    why = {
        COULD: "The longest task gradient sets the step. ",
        OPEN: "Task gradients are about as long as one another, yet a task is held up. ",
        NONE: "Task gradients are about as long as one another, and no task is held up. ",
    }[verdict]
    if verdict == NONE and not summary["alone"]:
        why = "Task gradients are about as long as one another; whether one is held up is unknown. "
    text = (
        f"{why}Families by what the worst-off task of a step keeps of its own decrease (with equal "
        f"weighting {_part(worst)}): {listed}."
    )
    if undefined:
        text += f" Not defined here: {', '.join(undefined)} (a loss was not above 0)."
    return Statement(text, verdict, _rule(summary, verdict), names)


def _rule(summary: dict[str, Any], verdict: str) -> str:
    """The rule, and how often families helped where it said the same."""
    counts = evidence()["families" if summary["alone"] else "without alone"][verdict]
    each = ", ".join(f"{name} {helped} of {of}" for name, (helped, of) in counts.items())
    total = [sum(pair[i] for pair in counts.values()) for i in (0, 1)]
    rule = f"the longest gradient is {SPREAD} times the shortest"
    if verdict != COULD:
        rule = f"it is not {SPREAD} times the shortest"
        if summary["alone"]:
            rule += f", and {'a' if verdict == OPEN else 'no'} task is held up"
    return (
        f"Rule: {rule}. On small problems that its number was not chosen on, families were better "
        f"than equal weighting in {total[0]} of {total[1]} such cases ({each}; {PAGE})."
    )


def _fixed(summary: dict[str, Any]) -> Statement | None:
    row = next((r for r in summary["families"] if r["example"] == FIXED), None)
    if row is None or level(summary) != COULD:
        return None
    weights = ", ".join(
        f"{task}: {weight:.3g}"
        for task, weight in zip(summary["tasks"], summary["fixed_weights"], strict=True)
    )
    helped, of = evidence()["fixed"][COULD]
    beyond, cases = evidence()["beyond"][COULD]
    text = (
        f"Scalarization with the weights {{{weights}}} ({_part(row['worst'])}), which cost "
        f"nothing. Every balancer has to be better than these: put them into the file of balancers."
    )
    rule = (
        f"Such weights were better than equal ones in {helped} of {of} problems of the bank with "
        f"this verdict, and a family was better than both in {beyond} of {cases} cases ({PAGE})."
    )
    return Statement(text, COULD, rule, (FIXED,))


def _scales(summary: dict[str, Any]) -> Statement | None:
    tasks, norm = summary["tasks"], summary["norm"]
    there = [(n, task) for n, task in zip(norm["median"], tasks, strict=True) if n is not None]
    none = [task for n, task in zip(norm["median"], tasks, strict=True) if n is None]
    text = ""
    if len(there) > 1:
        text = (
            f"The gradient of {max(there)[1]} is {norm['spread']:.3g} times as long as that of "
            f"{min(there)[1]}"
        )
        spread = summary["loss"]["spread"]
        text += "." if spread is None else f"; losses differ by a factor of {spread:.3g}."
    if none:
        text += f" Without any gradient on shared parameters: {', '.join(none)}."
    return Statement(text.strip()) if text else None


def _conflicts(summary: dict[str, Any]) -> Statement:
    pairs = summary["pairs"]
    number = {v: sum(p["verdict"] == v for p in pairs) for v in ("conflict", "agree", "unsure")}
    on = summary["halves"]
    if on["size"] is None:
        return Statement(
            "There is no noise floor, so that conflict cannot be told from noise: batches could "
            f"not be divided ({on['unsplittable']}), and no batch was before a measured one."
        )
    text = (
        f"Of {len(pairs)} pairs of tasks, {number['conflict']} conflict beyond the noise, "
        f"{number['agree']} agree, and of {number['unsure']} it cannot be told."
    )
    if number["conflict"]:
        worst = min((p for p in pairs if p["verdict"] == "conflict"), key=lambda p: p["halves"][0])
        text += (
            f" {worst['tasks'][0]} and {worst['tasks'][1]} part most: "
            f"{_part(worst['halves'][0])} on different halves, {_part(worst['corrected'])} with "
            f"the noise taken out."
        )
    if on["unsplittable"]:
        text += (
            f" Batches could not be divided ({on['unsplittable']}); floors are those of successive "
            f"batches."
        )
    return Statement(text)


def _noise(summary: dict[str, Any]) -> Statement | None:
    floors = zip(summary["tasks"], summary["noise"]["floor"], strict=True)
    noisy = [task for task, floor in floors if floor is not None and floor < NOISY]
    if not noisy:
        return None
    return Statement(
        f"On half a batch the gradient of {', '.join(noisy)} is nearly all noise (floor below "
        f"{NOISY}). What a method computes from such gradients is noise too: larger batches, or a "
        f"method that averages over steps, come before one that looks for conflict. That is a "
        f"guess: the bank was not asked."
    )


def _starved(summary: dict[str, Any]) -> Statement | None:
    alone = summary["alone"]
    if not alone:
        return None
    starved = [task for task, row in alone.items() if row["starves"]]
    unknown = [task for task, row in alone.items() if row["pace"] is None]
    text = "No task is held up by the others: alone, none is much faster."
    if starved:
        text = "; ".join(
            f"{task} is where it would be alone after {alone[task]['pace']:.0%} of the steps"
            for task in starved
        )
        text += ": held up by the others."
    if unknown:
        text += f" Not known, since they did not learn alone in these steps: {', '.join(unknown)}."
    return Statement(text)


def _next(summary: dict[str, Any]) -> Statement:
    if level(summary) == NONE:
        return Statement(
            "This is a prediction. Before a comparison of many balancers, look at capacity, data "
            "and learning rate."
        )
    return Statement(
        "This is a prediction. `lightning-mtl compare` with one method of a family each, beside "
        "equal and fixed weights, is the proof."
    )


def _part(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
