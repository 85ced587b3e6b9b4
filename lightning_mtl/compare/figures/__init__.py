"""The pictures of a comparison, each with what it plots and what it shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import matplotlib

from lightning_mtl.compare.figures import says
from lightning_mtl.compare.figures.curves import draw_methods, draw_overall
from lightning_mtl.compare.figures.drawing import NARROW, STYLE, WIDE, Drawing
from lightning_mtl.compare.figures.gain import draw_by_task, draw_delta_p
from lightning_mtl.compare.figures.scatter import draw_pareto, draw_runs
from lightning_mtl.compare.table import Summary
from lightning_mtl.compare.texts import error_text


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        file: its name as a file.
        title: what it is about.
        plots: what is drawn.
        shows: what this one shows.
        png: the file.
        wide: SVG for a page.
        narrow: SVG for a phone; one that is folded is scrolled there instead.
        folded: whether a page shows it on request only.
    """

    file: str
    title: str
    plots: str
    shows: str
    png: bytes
    wide: str
    narrow: str | None
    folded: bool = False


_POINTER = "A pointer on a point tells its name and numbers."
_FRONT = f"The line joins the rows that no other one beats in both, by means. {_POINTER}"
_SMOOTH = (
    "Moving means over an eighth of the training; the band is the range of the first seeds. "
    "Methods of one backward pass have no curve; equal weighting was run once more for its own."
)
_DRAWN = (
    "Mean over tasks and seeds with the 95 % interval of the table, or the standard deviation if "
    "there is none; filled: the best row and those that may be the best. The axis shows the region "
    "of the best rows: an arrow is a row beyond it, its number stands at the right."
)
_TIME = (
    "Δp against device-seconds: optimiser steps of a training by the time of a step, without "
    f"evaluation; for single-task training, of all its models together. {_FRONT}"
)
_RUNS = (
    "The first metric of the first two tasks; dashed: means of the single-task runs. Filled: equal "
    f"weighting, the best fixed weighting, the best balancer. {_POINTER}"
)


@dataclass(frozen=True)
class _Kind:
    """How a picture is made; attributes as those of :class:`Picture`."""

    file: str
    title: str
    plots: str
    draw: Callable[..., Drawing | None]
    shows: Callable[[Summary], str]
    folded: bool = False

    def picture(self, summary: Summary) -> Picture | None:
        wide = self.draw(summary, WIDE)
        narrow = None if self.folded else self.draw(summary, NARROW)
        if wide is None:
            return None
        stem = self.file.removesuffix(".png").replace("_", "-")
        svgs = wide.svg(f"{stem}-w"), narrow.svg(f"{stem}-n") if narrow else None
        shows = self.shows(summary)
        return Picture(self.file, self.title, self.plots, shows, wide.png(), *svgs, self.folded)


_KINDS = [
    _Kind("delta_p.png", "Δp against single-task training", _DRAWN, draw_delta_p, says.delta_p),
    _Kind(
        "pareto_time.png",
        "Gain against time",
        _TIME,
        partial(draw_pareto, cost="device_seconds"),
        partial(says.cost, what="device_seconds"),
    ),
    _Kind(
        "pareto_memory.png",
        "Gain against memory",
        f"Δp against the peak memory that a training adds to its process. {_FRONT}",
        partial(draw_pareto, cost="peak_mb"),
        partial(says.cost, what="peak_mb"),
    ),
    _Kind("runs.png", "Every run", _RUNS, draw_runs, says.runs),
    _Kind(
        "gradient_cosines.png",
        "Do task gradients conflict?",
        f"Cosine of two task gradients, mean over all pairs; below 0 they conflict. {_SMOOTH}",
        partial(draw_overall, what="cosines"),
        says.cosines,
    ),
    _Kind(
        "gradient_norms.png",
        "How different are their lengths?",
        f"The largest norm of a task's gradient by the smallest. {_SMOOTH}",
        partial(draw_overall, what="norms"),
        says.norms,
    ),
    _Kind(
        "delta_p_tasks.png",
        "Δp by task",
        "Mean over seeds and standard deviation, rows in the order of the mean over tasks.",
        draw_by_task,
        says.by_task,
        folded=True,
    ),
    _Kind(
        "gradient_cosines_methods.png",
        "Cosines, a panel a method",
        f"By pair of tasks; above six pairs their mean and range. {_SMOOTH}",
        partial(draw_methods, what="cosines"),
        says.cosines,
        folded=True,
    ),
    _Kind(
        "gradient_norms_methods.png",
        "Norms, a panel a method",
        f"By task; above six tasks their mean and range. {_SMOOTH}",
        partial(draw_methods, what="norms"),
        says.norms,
        folded=True,
    ),
]


def figures(summary: Summary) -> tuple[list[Picture], list[str]]:
    """Every picture that the results allow; what could not be drawn."""
    made: list[Picture] = []
    faults: list[str] = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font does not have
        for kind in _KINDS:
            try:
                if picture := kind.picture(summary):
                    made.append(picture)
            except Exception as error:  # a picture must not cost the report of a week's runs
                faults.append(f"{kind.file} could not be drawn. {error_text(error)}")
    return made, faults
