"""The tables of a diagnosis, cell by cell, and its text on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mtl.compare.texts import name
from lightning_mtl.diagnose.reading import Statement, read

MOST_PAIRS = 12
Table = list[list[str]]


def number(value: float | None, form: str = ".2f") -> str:
    """A number in a cell; a dash for none."""
    return "–" if value is None else format(value, form)


def task_table(summary: dict[str, Any]) -> Table:
    """A line a task: losses, gradients, noise, what the optimizer did, and the task alone."""
    unit = summary["halves"]["unit"]
    header = [
        "task",
        "loss",
        "gradient norm",
        "80 %",
        "noise floor",
        "halves against",
        "dropout floor",
    ]
    header += [f"noise scale, {unit}", "cosine to update", "pace"]
    lines = [header]
    noise, norm = summary["noise"], summary["norm"]
    for t, task in enumerate(summary["tasks"]):
        against = noise["floor_below_zero"][t]
        alone = summary["alone"].get(task) or {}
        masks = noise["dropout"]
        lines.append(
            [
                task,
                number(summary["loss"]["median"][t], ".3g"),
                number(norm["median"][t], ".3g"),
                f"{number(norm['low'][t], '.2g')}–{number(norm['high'][t], '.2g')}",
                number(noise["floor"][t]),
                number(None if against is None else against[0], ".0%"),
                number(None if masks is None else masks[t]),
                number(noise["scale"][t], ".3g"),
                number(summary["update"]["cosine"][t]),
                number(alone.get("pace"), ".0%"),
            ]
        )
    return lines


def pair_table(summary: dict[str, Any]) -> Table:
    """A line for every two tasks, those that part most first."""
    lines = [
        ["tasks", "cosine", "steps below 0", "95 %", "on halves", "95 %", "noise out", "verdict"]
    ]
    pairs = sorted(summary["pairs"], key=_towards)
    for pair in pairs[:MOST_PAIRS]:
        share, low, high = pair["below_zero"]
        mean, bottom, top = pair["halves"]
        lines.append(
            [
                " / ".join(name(task, 24) for task in pair["tasks"]),
                number(pair["cosine"][0]),
                number(share, ".0%"),
                f"{number(low, '.0%')} to {number(high, '.0%')}",
                number(mean),
                f"{number(bottom)} to {number(top)}",
                number(pair["corrected"]),
                pair["verdict"],
            ]
        )
    return lines


def _towards(pair: dict[str, Any]) -> float:
    values = (pair["halves"][0], pair["cosine"][0])
    return next((float(v) for v in values if v is not None), 2.0)


def family_table(summary: dict[str, Any]) -> Table:
    """A line a family: what its direction would do to every task."""
    short = [name(task, 16) for task in summary["tasks"]]
    header = ["family", "as in", "worst-off task", "steps with a task uphill"]
    lines = [header + [f"{task}: share" for task in short] + [f"{t}: decrease" for t in short]]
    lines += [
        [
            row["name"],
            row["example"],
            number(row["worst"]),
            number(row["against"], ".0%"),
            *(number(share) for share in row["share"]),
            *(number(part, ".2%") for part in row["decrease"]),
        ]
        for row in summary["families"]
    ]
    return lines


def console(summary: dict[str, Any]) -> str:
    """Everything that is worth a look before the page is opened."""
    tasks = len(summary["tasks"])
    families = [line if tasks <= 4 else line[:4] for line in family_table(summary)]
    families = [line[: 4 + tasks] for line in families]
    parts = [aligned(task_table(summary)), aligned(pair_table(summary))]
    if len(summary["pairs"]) > MOST_PAIRS:
        parts[-1] += f"\n(those of {len(summary['pairs'])} pairs that part most)"
    parts += [aligned(families), "\n".join(sentence(s) for s in read(summary))]
    return "\n\n".join(parts)


def sentence(statement: Statement) -> str:
    """A statement as one paragraph."""
    return f"{statement.verdict}: {statement.text}" if statement.verdict else statement.text


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left."""
    lines = [[name(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
