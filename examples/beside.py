"""The table of a comparison beside a published one, and whether both order the methods alike.

``python -m examples.beside --results office_results --tables "table 4, Office-31"`` prints the rows
that `lightning-mtl compare` wrote and that the paper has too, as Markdown, with Spearman's rank
correlation of both columns of Δp and its interval. The printed tables are in `published.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import spearmanr

PUBLISHED = Path(__file__).with_name("published.json")
ALIKE = {"equal weighting": "EW"}  # what the paper calls a row of ours


def printed(table: str) -> dict[str, float]:
    """Δp of a printed table by method, in percent; single-task models left out.

    Raises:
        ValueError: there is no such table; names those that there are.
    """
    tables = json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]
    if table not in tables:
        raise ValueError(f"Expected a table of {list(tables)} but found {table!r}.")
    rows = tables[table]["rows"].items()
    return {method: float(row[-1]) for method, row in rows if method != "STL"}


def measured(folder: Path) -> list[dict[str, str]]:
    """The rows of a comparison's ``summary.csv``.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / "summary.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected {path} of `lightning-mtl compare --out {folder}` but found none."
        )
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def correlation(found: dict[str, float], other: dict[str, float]) -> tuple[float, float, int]:
    """Spearman's correlation over the methods of both, its p-value, and their number."""
    both = [method for method in found if method in other]
    if len(both) < 3:
        raise ValueError(f"Expected three methods or more in both tables but found {both}.")
    result = spearmanr([found[m] for m in both], [other[m] for m in both])
    return float(result.statistic), float(result.pvalue), len(both)


def interval(rho: float, count: int) -> tuple[float, float]:
    """Where Spearman's correlation may be, 95 %: Fisher's z with a variance of Bonett and Wright.

    *Sample size requirements for estimating Pearson, Kendall and Spearman correlations*,
    Psychometrika 65, 2000.
    """
    if count < 4 or abs(rho) == 1:
        return -1.0, 1.0
    reach = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)


def beside(folder: Path, tables: Sequence[str]) -> str:
    """Both in Markdown, and a line a table on how they agree."""
    theirs = {table: printed(table) for table in tables}
    rows = measured(folder)
    metrics = [
        column
        for column in rows[0]
        if column.endswith(" mean") and "/" in column and not column.startswith("delta_p")
    ]
    names = [c.removesuffix(" mean").partition("/")[::2] for c in metrics]
    of_task = Counter(task for task, _ in names)
    titles = [task if of_task[task] == 1 else f"{task} {metric}" for task, metric in names]
    timed = any(row.get("step_ratio") for row in rows)
    header = ["method", *titles, "Δp", *(["× equal a step"] if timed else []), *tables]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    ours: dict[str, float] = {}
    for row in rows:
        name = ALIKE.get(row["method"], row["method"])
        if row["delta_p mean"] and row["kind"] != "single":
            ours[name] = float(row["delta_p mean"])
        cells = [f"{float(row[c]):.4g}" if row[c] else "" for c in metrics]
        gain = ""
        if row["delta_p mean"]:
            spread = f" ± {float(row['delta_p std']):.1f}" if row["delta_p std"] else ""
            gain = f"{float(row['delta_p mean']):+.1f}{spread}"
        ratio = row.get("step_ratio")
        times = [f"{float(ratio):.2f}" if ratio else ""] if timed else []
        known = [f"{theirs[t][name]:+.2f}" if name in theirs[t] else "" for t in tables]
        lines.append(f"| {' | '.join([row['method'], *cells, gain, *times, *known])} |")
    for table in tables:
        rho, p, count = correlation(ours, theirs[table])
        low, high = interval(rho, count)
        lines.append(
            f"\n{table}: Spearman's ρ {rho:+.2f} over {count} methods "
            f"(95 % interval {low:+.2f} to {high:+.2f}, p = {p:.2f})"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.beside", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="what `compare` wrote")
    parser.add_argument("--tables", nargs="+", required=True, help="names in published.json")
    given = parser.parse_args(arguments)
    try:
        print(beside(given.results, given.tables))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
