"""Tables 1 to 4 of the tensioner paper beside the printed ones, and figures 6 and 7.

python -m examples.logic_gates.tables --out logic_gates_results

Started again, it goes on after the last reading that was finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.footprint import footprint_table
from examples.logic_gates.data import INPUTS
from examples.logic_gates.engine import LIMIT, Cell, train
from examples.logic_gates.figures import EPOCHS, draw
from examples.logic_gates.model import Network
from examples.logic_gates.published import (
    ALPHAS,
    METHODS,
    READINGS,
    WINDOWS,
    Printed,
    sweep_cells,
)

Results = dict[Cell, Tensor]
TITLES = {
    1.0: ("Table 1 (c = 1)", "Table 3 (c = 1)"),
    10.0: ("Table 2 (c = 10)", "Table 4 (c = 10)"),
}


def figures_of(epochs: Tensor) -> tuple[float, float, float]:
    """Mean and standard deviation of the runs that learned, and how many in a hundred did."""
    learned = epochs[~epochs.isnan()]
    deviation = learned.std().item() if len(learned) > 1 else float("nan")
    return learned.mean().item(), deviation, 100 * len(learned) / len(epochs)


def fits(epochs: Tensor, printed: Printed) -> bool:
    """Whether our mean is within one printed standard deviation of the printed mean."""
    return abs(figures_of(epochs)[0] - printed.mean) <= printed.deviation


def text(mean: float, deviation: float, rate: float) -> str:
    share = "" if rate == 100 else f" ({rate:.0f} %)"
    return f"{mean:.1f} ± {deviation:.1f}{share}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def method_table(results: Results, scale: float) -> str:
    """Table 3 or 4."""
    rows = [
        [name, text(*figures_of(results[cell])), text(*printed), yes(fits(results[cell], printed))]
        for name, (cell, printed) in METHODS[scale].items()
    ]
    return table(["", "here", "paper", "within one printed deviation"], rows)


def sweep_table(results: Results, scale: float) -> str:
    """Table 1 or 2, ours and the printed one by T."""
    cells = sweep_cells(scale)
    head = ["α"] + [f"T = {w}, {who}" for w in WINDOWS for who in ("here", "paper")]
    rows = []
    for alpha in ALPHAS:
        row = [f"{alpha:g}"]
        for window in WINDOWS:
            cell, printed = cells[alpha, window]
            row += [text(*figures_of(results[cell])), text(*printed)]
        rows.append(row)
    return table(head, rows)


def readings_table(results: dict[str, Results]) -> str:
    """The rows with tension, and how much of tables 1 and 2 fits, under every reading."""
    names = ("central + tension", "min-norm + tension")
    cells = {(name, scale): METHODS[scale][name] for name in names for scale in METHODS}
    head = ["reading"]
    head += [
        f"{name.split()[0]} c = {scale:g} ({text(*p)})" for (name, scale), (_, p) in cells.items()
    ]
    head += ["table 1, T = 5/10/15", "table 2"]
    rows = []
    for name, found in results.items():
        row = [name] + [text(*figures_of(found[cell])) for cell, _ in cells.values()]
        for scale in METHODS:
            fit = {key: fits(found[cell], p) for key, (cell, p) in sweep_cells(scale).items()}
            row.append("/".join(str(sum(fit[a, w] for a in ALPHAS)) for w in WINDOWS))
        rows.append(row)
    return table(head, rows)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def cells_of(reading: str) -> list[Cell]:
    """Every cell of the tables; those without tension under the first reading only."""
    cells = [cell for scale in METHODS for cell, _ in sweep_cells(scale).values()]
    cells += [cell for rows in METHODS.values() for cell, _ in rows.values()]
    return [c for c in dict.fromkeys(cells) if c.alpha is not None or reading == "as coded"]


def run(names: Sequence[str], seeds: int, limit: int, path: Path) -> dict[str, Results]:
    """Train every cell under the readings ``names``, those aside that ``path`` has already."""
    results: dict[str, Results] = {}
    for name in names:
        cells, start = cells_of(name), time.monotonic()
        stamp = {"reading": name, "seeds": seeds, "limit": limit}
        found = load(path, stamp)
        if set(found) != set(cells):
            found = train(cells, range(seeds), READINGS[name], limit)
            save(found, path, stamp)
            took = time.monotonic() - start
            print(f"{name}: {seeds * len(cells)} runs in {took:.0f} s", flush=True)
        results[name] = found
    return results


def save(results: Results, path: Path, stamp: dict[str, Any]) -> None:
    """Append every cell with the epoch in which each run learned, or null."""
    lines = [
        json.dumps(
            {
                **stamp,
                "cell": dataclasses.asdict(cell),
                "epochs": [None if e != e else int(e) for e in epochs.tolist()],
            }
        )
        for cell, epochs in results.items()
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def load(path: Path, stamp: dict[str, Any]) -> Results:
    """What :func:`save` has written under this ``stamp``.

    Raises:
        ValueError: a line of ``path`` is not one of ours.
    """
    found: Results = {}
    if not path.exists():
        return found
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            cell = record.pop("cell")
            cell = Cell(**{**cell, "gates": tuple(cell["gates"])})
            epochs = torch.tensor(
                [float("nan") if e is None else e for e in record.pop("epochs")],
                dtype=torch.float64,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected line {number} of {path} to be a cell and its epochs but found "
                f"{line[:80]!r}. Remove that line, or choose another `--out`."
            ) from error
        if record == stamp:
            found[cell] = epochs
    return found


def report(results: dict[str, Results], seeds: int, limit: int) -> str:
    """All tables, in Markdown."""
    parts = []
    parts.append(
        f"Epochs until every task is learned, counted from zero: mean ± standard deviation of the "
        f"runs that learn within {limit:,}, of {seeds}, and how many those are where not all do."
    )
    coded = results["as coded"]
    for scale, (first, second) in TITLES.items():
        parts += [f"## {first}", sweep_table(coded, scale), f"## {second}"]
        parts.append(method_table(coded, scale))
    parts += ["## Readings of the tension", readings_table(results)]
    parts.append("The last columns count the values of α, of 10, within one printed deviation.")
    parts += ["## One model or two", footprint_table(Network(), INPUTS)]
    return "\n\n".join(parts) + "\n"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and figures")
    parser.add_argument("--seeds", type=int, default=50, help="runs a cell (the paper's 50)")
    parser.add_argument("--limit", type=int, default=LIMIT, help="epochs (the paper's 3,000)")
    parser.add_argument(
        "--coded-only", action="store_true", help="leave out the other readings of the tension"
    )
    options = parser.parse_args(args)
    if options.seeds < 1 or options.limit < 1:
        parser.error("Expected `--seeds` and `--limit` of at least 1.")
    return options


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small matrices
    names = ["as coded"] if options.coded_only else list(READINGS)
    results = run(names, options.seeds, options.limit, options.out / "runs.jsonl")
    draw(options.out, min(EPOCHS, options.limit))
    tables = report(results, options.seeds, options.limit)
    (options.out / "tables.md").write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main()
