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

from lightning_mtl.diagnose.summary import STARVED

EQUAL, FIXED = "EqualWeighting", "Scalarization"
# Under a family that could help, the worst-off task keeps this much more of its own decrease than
# under equal weighting: chosen on one half of the bank, tried on the other.
GAIN = 0.1
NOISY = 0.1  # a floor below which a gradient is nearly all noise; a convention, no rule
PAGE = "docs/diagnose.md"


@dataclass(frozen=True)
class Statement:
    """One paragraph of the reading.

    Attributes:
        text: what is said.
        verdict: ``could help``, ``no reason seen`` or empty.
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


def predicted(summary: dict[str, Any]) -> dict[str, bool]:
    """Whether each family, and the best fixed weight, could help, by class.

    It could where a task is held up by the others and the family would leave the worst-off task
    more. Where no task was trained alone, the second has to do.

    Args:
        summary: the numbers of a diagnosis.
    """
    alone = summary["alone"]
    held_up = not alone or any(row["starves"] for row in alone.values())
    return {
        name: held_up and gain is not None and gain >= GAIN for name, gain in gains(summary).items()
    }


def read(summary: dict[str, Any]) -> list[Statement]:
    """The reading: what could help and why, what could not, and what to do next.

    Args:
        summary: the numbers of a diagnosis.
    """
    found = [_families(summary, could=True), _fixed(summary), _families(summary, could=False)]
    seen = [_scales(summary), _conflicts(summary), _noise(summary), _starved(summary)]
    notes = [Statement(note) for note in summary.get("notes", ())]
    return [s for s in (*found, *seen, *notes, _next(summary)) if s is not None]


def _families(summary: dict[str, Any], *, could: bool) -> Statement | None:
    rows = [row for row in summary["families"] if row["example"] not in (EQUAL, FIXED)]
    said, gain = predicted(summary), gains(summary)
    chosen = [row for row in rows if said[row["example"]] is could]
    if not rows:
        if could:
            return None
        text = "No measured step had all tasks, so that nothing can be said of families of methods."
        return Statement(text)
    if not chosen:
        return None
    worst = next(row["worst"] for row in summary["families"] if row["example"] == EQUAL)
    chosen.sort(key=lambda row: -(gain[row["example"]] or 0.0))
    names = tuple(row["example"] for row in chosen)
    listed = ", ".join(f"{row['example']} ({_part(row['worst'])})" for row in chosen)
    undefined = [row["example"] for row in chosen if row["worst"] is None]
    text = (
        f"{listed}. In brackets is the part of its own decrease that the worst-off task of a step "
        f"keeps; with equal weighting it is {_part(worst)}."
    )
    if not could and not any(said.values()) and summary["alone"]:
        held = [task for task, row in summary["alone"].items() if row["starves"]]
        text += "" if held else " No task is held up by the others, so there is little to gain."
    if undefined:
        text += f" Not defined here: {', '.join(undefined)} (a loss was not above 0)."
    verdict = "could help" if could else "no reason seen"
    return Statement(text, verdict, _rule(summary, names, could=could), names)


def _rule(summary: dict[str, Any], names: tuple[str, ...], *, could: bool) -> str:
    """The rule for these families, and how often it was right for them."""
    alone = bool(summary["alone"])
    counts = evidence()["families" if alone else "without alone"]
    keys = ("said and true", "said") if could else ("not said but true", "not said")
    right, of = (sum(counts[name][key] for name in names) for key in keys)
    rule = f"the worst-off task keeps at least {GAIN:.2f} more"
    if alone:
        rule = f"a task is where it would be alone after {STARVED:.0%} of the steps, and {rule}"
    said = "said so, and was right," if could else "did not, and one helped all the same,"
    return (
        f"Rule: {rule}. For these families it {said} in {right} of {of} cases on problems that "
        f"it was not made from ({PAGE})."
    )


def _fixed(summary: dict[str, Any]) -> Statement | None:
    row = next((r for r in summary["families"] if r["example"] == FIXED), None)
    if row is None or not predicted(summary)[FIXED]:
        return None
    weights = ", ".join(
        f"{task}: {weight:.3g}"
        for task, weight in zip(summary["tasks"], summary["fixed_weights"], strict=True)
    )
    counts = evidence()["fixed"]
    text = (
        f"Scalarization with the weights {{{weights}}} ({_part(row['worst'])}), which cost "
        f"nothing. Every balancer has to be better than these: put them into the file of balancers."
    )
    rule = (
        f"Such weights were better than equal ones in {counts['said and true']} of "
        f"{counts['said']} problems of the bank, and a family was better than both in "
        f"{evidence()['beyond']['true']} of {evidence()['beyond']['all']} trainings ({PAGE})."
    )
    return Statement(text, "could help", rule, (FIXED,))


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
    names = [n for n, said in predicted(summary).items() if said] if summary["families"] else []
    if names:
        text = (
            "This is a prediction. `lightning-mtl compare` with these in the file of balancers, "
            "beside equal and fixed weights, is the proof."
        )
    else:
        text = (
            "This is a prediction. Before a comparison of many balancers, look at capacity, data "
            "and learning rate."
        )
    return Statement(text)


def _part(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
