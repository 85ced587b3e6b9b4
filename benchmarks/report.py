"""What every benchmark takes and gives: arguments, the machine in words, tables, files, plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

Cell = str | float | int | None


def arguments(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="of the interleaved run")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw them to this file")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the arguments, set the threads, and say on what is measured."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}; {_number(args.rounds, 'round')}.\n", flush=True)
    return args


def machine() -> str:
    """The machine and the versions in words."""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    return (
        f"{platform.machine()}, {_number(cores, 'core')}, {_number(threads, 'thread')}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}"
    )


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a markdown table."""
    print(markdown(head, rows) + "\n", flush=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A markdown table; ``None`` is a dash, and so is what could not be measured."""
    cells = [list(head), *[[_text(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    rule = ["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        left, *others = zip(row, widths, strict=True)
        line = [left[0].ljust(left[1]), *[text.rjust(width) for text, width in others]]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return str(cell)


def notes(reasons: Mapping[str, str]) -> None:
    """Say why a row has dashes."""
    for name, reason in reasons.items():
        print(f"– {name}: {reason}")
    if reasons:
        print(flush=True)


def end(args: argparse.Namespace, figures: Any, draw: Callable[[Path], None]) -> None:
    """Write the files that were asked for."""
    if args.json:
        text = {"machine": machine(), "rounds": args.rounds, "figures": figures}
        args.json.write_text(json.dumps(text, indent=1) + "\n")
    if args.plot:
        draw(args.plot)


# ------------------------------------------------------------------------------------ plots


def bars(
    path: Path,
    panels: Mapping[str, Mapping[str, float | None]],
    label: str,
    marks: Mapping[str, tuple[str, float]] | None = None,
    ours: tuple[str, ...] = ("MultiTaskModule", "our engine"),
) -> None:
    """Horizontal bars, a panel a model, with a line at what each is to be compared with.

    Args:
        path: of the picture.
        panels: ``{title: {way: value}}``; what has no value has no bar.
        label: of the axis.
        marks: ``{title: (name, value)}`` of the line.
        ours: what the names of our own ways hold, which are drawn in another colour.
    """
    plt = _pyplot()
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    longest = max(len(values) for values in panels.values())
    size = (6.4 * columns, height * (0.9 + 0.27 * longest))
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=False):
        names = list(values)[::-1]
        lengths = [values[name] or 0.0 for name in names]
        marked = [any(part in name for part in ours) for name in names]
        colours = ["#2a6f97" if found else "#adb5bd" for found in marked]
        drawn = axis.barh(names, lengths, color=colours, height=0.7)
        texts = ["does not work" if values[n] is None else _text(values[n]) for n in names]
        labels = axis.bar_label(drawn, texts, padding=4, fontsize=8, zorder=3)
        for text in labels:  # readable where the line crosses it
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        if marks and title in marks:
            name, value = marks[title]
            axis.axvline(value, color="#d00000", linestyle="--", linewidth=1.2)
            axis.annotate(
                f"{name} {_text(value)}",
                (value, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#d00000",
            )
            lengths.append(value)
        axis.set_xlim(0, 1.17 * max(lengths))
        axis.set_title(title, loc="left", fontsize=10, pad=14)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel(label, fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def lines(path: Path, panels: Sequence[tuple[str, str, list[float], list[float], Any]]) -> None:
    """Points and their least-squares line, a panel each: title, axis, x, y, line.

    A line has ``slope``, ``intercept``, ``r2`` and ``log``, whether it is one in the logarithm.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (title, label, x, y, line) in zip(axes.flat, panels, strict=True):
        axis.plot(x, y, "o", color="#2a6f97")
        ends = torch.linspace(min(x), max(x), 2) if not line.log else torch.tensor([min(x), max(x)])
        fitted = [line.at(float(end)) for end in ends]
        axis.plot(ends, fitted, "--", color="#d00000", linewidth=1.2, label=str(line))
        if line.log:
            axis.set_xscale("log")
        axis.set_ylim(0, 1.25 * max(y))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylabel("ratio to plain Lightning", fontsize=9)
        axis.legend(fontsize=8, loc="upper left", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
