"""What the rules of ``lightning-mtl diagnose`` are worth: tables of the bank, and its evidence.

    python benchmarks/bank_table.py benchmarks/bank.jsonl [--evidence]

reads what ``benchmarks/bank.py`` wrote, prints the tables of docs/diagnose.md, and with
``--evidence`` writes the counts that the command quotes, lightning_mtl/diagnose/evidence.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_mtl.compare.verdict import Paired, decide, settled
from lightning_mtl.diagnose import reading

MARGIN = 1.0
NAMES = ("LogLoss", "DualBalance", "CentralDirection", "NashMTL", "UPGrad", "CAGrad", "MinNorm")
Line = dict[str, Any]


def helped(line: Line, method: str, *rivals: str) -> bool:
    """Whether a method is better than all rivals: paired t-tests over seeds, margin 1 point."""
    scores = [line["delta_p"][name] for name in (method, *rivals)]
    found = Paired(scores).between([0], range(1, len(scores)))
    return decide(settled(found), MARGIN).kind == "yes"


def counts(pairs: Iterable[tuple[bool, bool]]) -> dict[str, int]:
    """Said and true, of ``(said, true)``."""
    pairs = list(pairs)
    return {
        "said": sum(said for said, _ in pairs),
        "said and true": sum(said and true for said, true in pairs),
        "not said": sum(not said for said, _ in pairs),
        "not said but true": sum(true and not said for said, true in pairs),
    }


def halves(lines: list[Line]) -> tuple[list[Line], list[Line]]:
    """Every other problem of each kind: to choose numbers on, and to try them on."""
    return lines[::2], lines[1::2]


def table(header: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([str(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def confusion(lines: list[Line], said: Callable[[Line, str], bool], *more: str) -> dict[str, Any]:
    """Counts of a rule for every family, against equal weighting and ``more`` rivals."""
    return {
        name: counts((said(line, name), helped(line, name, "equal", *more)) for line in lines)
        for name in NAMES
    }


def rows_of(found: dict[str, dict[str, int]]) -> list[list[Any]]:
    total = {key: sum(c[key] for c in found.values()) for key in next(iter(found.values()))}
    return [
        [n, f"{c['said and true']} of {c['said']}", f"{c['not said but true']} of {c['not said']}"]
        for n, c in {**found, "all": total}.items()
    ]
