"""What the rules of ``lightning-mtl diagnose`` are worth: tables of the bank, and its evidence.

    python benchmarks/bank_table.py benchmarks/bank.jsonl [--evidence]

reads what ``benchmarks/bank.py`` wrote and prints the tables of docs/diagnose.md. With
``--evidence`` it writes the counts that the command quotes, lightning_mtl/diagnose/evidence.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lightning_mtl.diagnose
from lightning_mtl.compare.verdict import Paired, as_good_within, better_than_all, settled
from lightning_mtl.diagnose.reading import COULD, NONE, OPEN, gains, level
from lightning_mtl.diagnose.summary import STARVED

MARGIN, ALPHA = 1.0, 0.05
SEEN = 27  # lines of the bank: with these in view the rule of the reading was chosen
NAMES = ("LogLoss", "DualBalance", "CentralDirection", "NashMTL", "UPGrad", "CAGrad", "MinNorm")
LEVELS = (COULD, OPEN, NONE)
EVIDENCE = Path(lightning_mtl.diagnose.__file__).with_name("evidence.json")
Line = dict[str, Any]
Score = Callable[[Line, str], float]


def _gain(line: Line, name: str) -> float:
    found = gains(line["diagnosis"])[name]
    return -1.0 if found is None else found


def _conflicts(line: Line) -> float:
    verdicts = [pair["verdict"] for pair in line["diagnosis"]["pairs"]]
    return verdicts.count("conflict") / len(verdicts)


def better(line: Line, method: str, *rivals: str) -> bool:
    """Whether a method is better than all rivals: paired t-tests over seeds, margin 1 point."""
    scores = np.asarray([line["delta_p"][name] for name in (method, *rivals)])
    found = Paired(scores).between([0], range(1, len(scores)))
    found = settled(found, scores[:1], scores[1:])
    # what `decide` calls "yes", without its search for the number of seeds
    certain = better_than_all(found, ALPHA).any()
    return bool(certain and not as_good_within(found, MARGIN, ALPHA).any())


def counts(pairs: Iterable[tuple[bool, bool]]) -> dict[str, int]:
    """Of ``(said, true)``: how often each went with the other."""
    pairs = list(pairs)
    return {
        "said": sum(said for said, _ in pairs),
        "said and true": sum(said and true for said, true in pairs),
        "not said": sum(not said for said, _ in pairs),
        "not said but true": sum(true and not said for said, true in pairs),
    }


def halves(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """Problems that there were when the rules were chosen, and those that were made after.

    Both have every kind and every size.
    """
    return list(lines[:SEEN]), list(lines[SEEN:])


def slowest(line: Line) -> float:
    """The pace of the task that is held up most; 1 where none is known."""
    alone = line["diagnosis"]["alone"].values()
    return min((row["pace"] for row in alone if row["pace"] is not None), default=1.0)


# What could predict, larger for a "yes": of a problem, or of a family on it.
SCORES: dict[str, Score] = {
    "a task starves": lambda line, _: -slowest(line),
    "gradient norms apart": lambda line, _: line["diagnosis"]["norm"]["spread"] or 1.0,
    "pairs in conflict": lambda line, _: _conflicts(line),
    "the worst-off task keeps more": _gain,
    "a task starves, and the worst-off one keeps more": lambda line, name: (
        _gain(line, name) if slowest(line) < STARVED else -1.0
    ),
}


def cut(lines: Sequence[Line], score: Score) -> float:
    """The number from which on to say "could help", by the largest difference of the two rates."""
    pairs = [(score(line, n), better(line, n, "equal")) for line in lines for n in NAMES]
    helped = max(1, sum(true for _, true in pairs))
    others = max(1, len(pairs) - helped)

    def difference(least: float) -> float:
        right = sum(true for value, true in pairs if value >= least)
        wrong = sum(not true for value, true in pairs if value >= least)
        return right / helped - wrong / others

    return max(sorted({value for value, _ in pairs}), key=difference)


def evidence(lines: Sequence[Line]) -> dict[str, Any]:
    """What the reading quotes, from problems made after it was chosen: ``[true, cases]``."""
    new = halves(lines)[1]
    found: dict[str, Any] = {"problems": len(new)}
    blind = [{**line["diagnosis"], "alone": {}} for line in new]
    seen = [line["diagnosis"] for line in new]
    for key, diagnoses in (("families", seen), ("without alone", blind)):
        of = {v: [d for d, x in zip(new, diagnoses, strict=True) if level(x) == v] for v in LEVELS}
        found[key] = {
            v: {n: [sum(better(d, n, "equal") for d in part), len(part)] for n in NAMES}
            for v, part in of.items()
        }
    of = {v: [d for d in new if level(d["diagnosis"]) == v] for v in LEVELS}
    found["fixed"] = {
        v: [sum(better(d, "fixed", "equal") for d in p), len(p)] for v, p in of.items()
    }
    found["beyond"] = {
        v: [sum(better(d, n, "equal", "fixed") for d in p for n in NAMES), len(p) * len(NAMES)]
        for v, p in of.items()
    }
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([str(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(c: dict[str, int]) -> list[str]:
    return [f"{c['said and true']} of {c['said']}", f"{c['not said but true']} of {c['not said']}"]


def truths(lines: Sequence[Line]) -> str:
    """How often each family is better than equal weighting, by kind."""
    rows = []
    for kind in dict.fromkeys(line["kind"] for line in lines):
        of = [line for line in lines if line["kind"] == kind]
        found = [sum(better(line, name, "equal") for line in of) for name in ("fixed", *NAMES)]
        rows.append([kind, len(of), *found])
    return table(["kind", "problems", "fixed weights", *NAMES], rows)


def rules(lines: Sequence[Line]) -> str:
    """Every rule: its number from the problems in view, its counts on these and on new ones."""
    first, second = halves(lines)
    rows = []
    for rule, score in SCORES.items():
        least = cut(first, score)
        cells = []
        for part in (first, second):
            pairs = [(score(d, n) >= least, better(d, n, "equal")) for d in part for n in NAMES]
            cells += _cells(counts(pairs))
        rows.append([rule, f"{least:.2f}", *cells])
    header = ["rule", "from", "chosen on: right", "missed", "tried on: right", "missed"]
    return table(header, rows)


def verdicts(lines: Sequence[Line]) -> str:
    """The rule of the reading on the problems that were made after it was chosen, by family."""
    found = evidence(lines)
    of = found["families"]
    rows: list[list[Any]] = [
        [name, *(f"{of[v][name][0]} of {of[v][name][1]}" for v in LEVELS)] for name in NAMES
    ]
    total = [[sum(pair[i] for pair in of[v].values()) for i in (0, 1)] for v in LEVELS]
    rows.append(["all", *(f"{helped} of {cases}" for helped, cases in total)])
    for what, key in (("fixed weights", "fixed"), ("better than fixed weights too", "beyond")):
        rows.append([what, *(f"{found[key][v][0]} of {found[key][v][1]}" for v in LEVELS)])
    return table(["family", *(f'"{v}"' for v in LEVELS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--evidence", action="store_true")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.bank.read_text().splitlines()]
    first, second = halves(lines)
    print(f"{len(first)} problems in view when the rules were chosen, {len(second)} made after\n")
    print(truths(lines), rules(lines), verdicts(lines), sep="\n\n")
    if options.evidence:
        EVIDENCE.write_text(json.dumps(evidence(lines), indent=1) + "\n")


if __name__ == "__main__":
    main()
