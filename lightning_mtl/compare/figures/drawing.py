"""What all pictures share: colours by kind, labels, and SVG that a page may take in.

The page holds matplotlib's SVG: no script, no other file, and the same drawing is the PNG for a
paper. Its texts stay texts, so the browser sets them in any script, and its colours become CSS
variables, so a reader's preference for dark pages holds in pictures, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from lightning_mtl.compare.table import Row
from lightning_mtl.compare.texts import name, visible

INK, MUTED, LINES = "#1b1f23", "#6a737d", "#d5dae0"
KINDS = {"balancer": "#1f6fb5", "fixed": "#c96a00", "equal": "#138a4b", "single": "#8445b8"}
WORDS = {
    "balancer": "balancer",
    "fixed": "fixed weights",
    "equal": "equal",
    "single": "a model per task",
}
MARKERS = {"balancer": "o", "fixed": "D", "equal": "s", "single": "*"}
# Of lines within one panel: distinct also for those who confuse red and green (Okabe and Ito).
CYCLE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
# Names of the page's CSS variables; the values here are those of a light page.
VARIABLES = (
    {INK: "ink", MUTED: "muted", LINES: "line"}
    | {colour: kind for kind, colour in KINDS.items()}
    | {colour: f"cycle{i}" for i, colour in enumerate(CYCLE)}
)
_SPAN = 8.0  # largest by smallest, from which an axis is logarithmic
WIDE, NARROW = 7.6, 3.9  # inches; a page picks one of both by its own width

STYLE: Any = {
    "text.usetex": False,  # whatever the user's own settings are: names are no formulas
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_mtl",  # else ids are drawn, and no page is made twice alike
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINES,
    "grid.linewidth": 0.6,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.prop_cycle": cycler(color=CYCLE),
}


@dataclass
class Drawing:
    """A figure, and what a pointer on its parts tells.

    Attributes:
        figure: of matplotlib.
        tips: texts by the ``gid`` of the artist.
        settled: whether it is laid out.
    """

    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)
    settled: bool = False

    def tip(self, artist: Any, text: str) -> None:
        """Let a pointer on ``artist`` show ``text``."""
        gid = f"tip{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = text

    def settle(self) -> None:
        """Lay it out, once: every drawing after that takes the same places."""
        if not self.settled:
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
            self.settled = True

    # Not by `savefig`, which draws everything once more to know the layout.
    def png(self) -> bytes:
        """For a paper: on white."""
        self.settle()
        self.figure.set_facecolor("white")
        buffer = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(buffer)
        return buffer.getvalue()

    def svg(self, prefix: str) -> str:
        """For the page.

        Args:
            prefix: of all its ids, which are then unique in the page.
        """
        self.settle()
        parts: list[Any] = [self.figure, *self.figure.axes]
        for part in parts:
            part.set_facecolor("none")
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        dpi = self.figure.dpi
        FigureCanvasSVG(self.figure).print_svg(buffer, metadata=nothing)
        self.figure.dpi = dpi  # which it has changed
        return embedded(buffer.getvalue(), prefix, self.tips)


def embedded(svg: str, prefix: str, tips: Mapping[str, str]) -> str:
    """An SVG file as a part of a page: own ids, colours of the page, no size of its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)

    def tag(match: re.Match[str]) -> str:  # names, which stand between tags, stay as they are
        found = match[0]
        if found.startswith("<svg"):
            found = re.sub(r' (width|height)="[^"]*"', "", found)
        found = re.sub(r'\bid="', f'id="{prefix}-', found)
        found = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", found)
        found = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", found)
        for colour, variable in VARIABLES.items():
            found = found.replace(colour, f"var(--{variable})")
        return found

    svg = re.sub(r"<[^>]*>", tag, svg)
    for gid, text in tips.items():
        start = f'id="{prefix}-{gid}">'
        svg = svg.replace(start, f"{start}<title>{escape(visible(text))}</title>")
    return svg


def panels(
    width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any
) -> tuple[Drawing, list[Any]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return Drawing(figure), [axis for line in axes for axis in line]


def logarithmic(axis: Any, way: str, values: Sequence[float]) -> None:
    """Let an axis be logarithmic where its values span more than about a decade.

    Args:
        axis: of a panel.
        way: ``x`` or ``y``.
        values: what it shows.
    """
    seen = [value for value in values if value > 0]
    if len(seen) < len(values) or not seen or max(seen) / min(seen) < _SPAN:
        return
    getattr(axis, f"set_{way}scale")("log")
    ticks = getattr(axis, f"{way}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if max(seen) / min(seen) < 300 else (1,)))
    ticks.set_major_formatter(FormatStrFormatter("%g"))
    ticks.set_minor_locator(NullLocator())


def label(text: str, width: float = WIDE) -> str:
    """A name as matplotlib shows it: no formula between `$`, no hidden entry of a legend."""
    shown = name(text, 40 if width >= WIDE else 20).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def point(axis: Any, row: Row, x: float, y: float, strong: bool, size: float = 34) -> Any:
    """A row as a point: colour and shape by its kind, filled where it matters."""
    colour = KINDS[row.kind]
    larger = 2.2 if row.kind == "single" else 1.0
    return axis.scatter(
        [x],
        [y],
        marker=MARKERS[row.kind],
        s=size * larger * (1.0 if strong else 0.6),
        facecolors=colour if strong else "none",
        edgecolors=colour,
        linewidths=1.1,
        alpha=1.0 if strong else 0.7,
        zorder=4 if strong else 3,
    )


def legend(figure: Figure, kinds: Sequence[str]) -> None:
    """What colours and shapes mean, below the axes."""
    handles = [
        Line2D([], [], color=KINDS[kind], marker=MARKERS[kind], linestyle="", label=WORDS[kind])
        for kind in WORDS
        if kind in kinds
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, handletextpad=0.1, columnspacing=1
    )


def name_points(drawing: Drawing, axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points so that none covers another or leaves the axes.

    Each takes the first of some places around its point that is free; one that finds none stays
    without, since a pointer on its point tells it.
    """
    drawing.settle()
    renderer = drawing.figure.canvas.get_renderer()  # type: ignore[attr-defined] # Agg's has it
    inside = axis.get_window_extent(renderer)
    seats = axis.transData.transform([(x, y) for x, y, _ in points]) if points else []
    taken: list[Any] = []
    for x, y, text in points:
        for dx, dy, ha, va in _PLACES:
            note = axis.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8
            )
            note.set_in_layout(False)
            box = note.get_window_extent(renderer)
            within = (
                inside.x0 <= box.x0
                and box.x1 <= inside.x1
                and inside.y0 <= box.y0
                and box.y1 <= inside.y1
            )
            free = not any(box.overlaps(other) for other in taken)
            if within and free and not any(box.contains(*seat) for seat in seats):
                taken.append(box)
                break
            note.remove()


_PLACES = [
    (dx * far, dy * far, ha, va)
    for far in (1, 2.2, 4)
    for dx, dy, ha, va in (
        (7, 0, "left", "center"),
        (-7, 0, "right", "center"),
        (4, 5, "left", "bottom"),
        (4, -5, "left", "top"),
        (-4, 5, "right", "bottom"),
        (-4, -5, "right", "top"),
        (0, 8, "center", "bottom"),
        (0, -8, "center", "top"),
    )
]


Ends = tuple[float, float] | None


def visible_range(found: Sequence[tuple[float, Ends]]) -> tuple[float, float]:
    """A range of values, higher better, on which the best can be told apart.

    Values more than three times as far below the best as the median is lie beyond it: a row that
    diverged would leave no room for the others.

    Args:
        found: values with the ends of their whiskers, which widen the range by half at each side.
    """
    ordered = sorted((value for value, _ in found), reverse=True)
    best, middle = ordered[0], ordered[len(ordered) // 2]
    cut = ordered[-1] if len(ordered) < 4 else best - 3 * (best - middle)
    shown = [(value, ends or (value, value)) for value, ends in found if value >= cut]
    worst = min(value for value, _ in shown)
    length = best - worst or max(abs(best), 1.0) / 10
    low = max(min(worst, *(ends[0] for _, ends in shown)), worst - length / 2)
    high = min(max(best, *(ends[1] for _, ends in shown)), best + length / 2)
    pad = 0.05 * (high - low or length)
    return low - pad, high + pad
