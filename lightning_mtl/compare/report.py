"""``report.html``: the answer, the table, the pictures and how they were made, in one file."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.cells import Cell, Column, columns, fresh_columns, models_columns
from lightning_mtl.compare.table import Row, Summary
from lightning_mtl.compare.texts import name, visible

if TYPE_CHECKING:
    from lightning_mtl.compare.figures import Picture

_HERE = Path(__file__).parent
_TAGS = {"best": "highest mean", "tie": "may be best"}
_NOTE = """Mean ± sample standard deviation over seeds, as many decimals in every row of a column.
Δp is the mean over tasks of the relative improvement of each task's metrics over the mean
single-task run, in percent. Intervals of Δp hold with 95 % for all rows together; those of Δp count
the spread of the single-task runs. “May be best”: not shown to be worse than another row. “× equal”
is the time of a step by that of equal weighting, the median of turns taken with it in one process
with nothing beside, and the range of the turns, which holds the median with 97 %. “Step ms” is the
step of equal weighting, one median for all rows, by that ratio. “Device s”: optimiser steps of a
training by the time of a step; evaluation is not in it. “Peak MB”: what a training adds to its
process."""


def report_html(
    summary: Summary,
    pictures: Sequence[Picture],
    texts: Mapping[str, str],
    facts: Sequence[tuple[str, str]],
    faults: Sequence[str] = (),
) -> str:
    """The report, with nothing outside it: styles, a script that sorts, and pictures as SVG.

    Args:
        summary: the numbers.
        pictures: in the order of the page.
        texts: files to show in full, by name.
        facts: name and value of what the comparison was run with, such as versions.
        faults: what could not be drawn.
    """
    text = _writer(summary)
    errors = [
        (run, error) for row in (*summary.rows, *summary.fresh) for run, error in row.errors.items()
    ]
    failed = "".join(f"<p><b>{text(run)}</b>: {text(error)}</p>" for run, error in errors)
    shown = "".join(_figure(p, text) for p in pictures if not p.folded)
    folded = "".join(
        f"<details><summary>{text(p.title)}</summary>{_figure(p, text)}</details>"
        for p in pictures
        if p.folded
    )
    undrawn = "".join(f"<p>{text(fault)}</p>" for fault in faults)
    files = "".join(
        f"<details><summary>{text(name)}</summary><pre>{text(content)}</pre></details>"
        for name, content in texts.items()
    )
    rows = [_head(row, summary.mark(row), text) for row in summary.ordered()]
    classes = [f"{row.kind} {summary.mark(row)}".strip() for row in summary.ordered()]
    notes = [sentence for sentence in (summary.scope(), _noise(summary)) if sentence]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Balancers compared</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{(_HERE / "page.css").read_text("utf-8")}</style></head><body>
<h1>Does balancing help these tasks?</h1>
<div class="answer">{"".join(f"<p>{text(sentence)}</p>" for sentence in answer(summary))}</div>
{f'<h2>Failed runs</h2><div class="failed">{failed}</div>' if failed else ""}
<h2>Results</h2>
{_table("method", rows, columns(summary), text, classes)}
{"".join(f'<p class="note">{text(note)}</p>' for note in (*notes, _NOTE))}
{_fresh(summary, text)}
{_models(summary, text)}
<h2>Pictures</h2>{(shown + folded + undrawn) or "<p>No run finished that could be drawn.</p>"}
<h2>How it was run</h2>
<div class="scroll"><table class="facts">{
        "".join(f"<tr><td>{text(key)}</td><td>{text(value)}</td></tr>" for key, value in facts)
    }</table></div>
{files}
<script>{(_HERE / "page.js").read_text("utf-8")}</script>
</body></html>
"""


_Text = Callable[[str], str]


def _writer(summary: Summary) -> _Text:
    """Escapes texts, and sets names that are written from right to left apart from what follows."""
    names = [row.method for row in summary.rows] + [*summary.directions, *summary.unmeasured]
    names += [metric for metrics in summary.directions.values() for metric in metrics]
    turned = {
        escape(name(n))
        for n in names
        if any(unicodedata.bidirectional(c) in ("R", "AL") for c in n)
    }

    def text(content: str) -> str:
        found = escape(visible(content))
        for one in sorted(turned, key=len, reverse=True):
            found = found.replace(one, f"<bdi>{one}</bdi>")
        return found

    return text


def _head(row: Row, mark: str, text: _Text) -> str:
    tag = f'<span class="tag">{_TAGS[mark]}</span>' if mark else ""
    failed = f'<span class="tag">{len(row.errors)} FAILED</span>' if row.errors else ""
    dot = f'<span class="dot k-{row.kind}" title="{row.kind}"></span>'
    shown = f"{dot}{text(name(row.method))}{tag}{failed}"
    return f'<td data-v="{escape(visible(row.method))}">{shown}</td>'


def _table(
    first: str,
    heads: Sequence[str],
    found: Sequence[Column],
    text: _Text,
    classes: Sequence[str] = (),
) -> str:
    titles = f"<th><button>{text(first)}</button></th>"
    for column in found:
        small = f"<small>{text(column.title[0])}</small>" if len(column.title) > 1 else ""
        order = ' aria-sort="descending"' if column.title == ("Δp %",) else ""
        last = text(column.title[-1])
        for pair in (" ↑", " ↓", " %"):  # never alone on a line
            last = last.replace(pair, f"&nbsp;{pair[1:]}")
        titles += f'<th{order} title="{escape(column.meaning)}"><button>{small}{last}</button></th>'
    body = ""
    for i, head in enumerate(heads):
        cells = "".join(_cell(column.cells[i], text) for column in found)
        marked = f' class="{classes[i]}"' if classes else ""
        body += f"<tr{marked}>{head}{cells}</tr>\n"
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell, text: _Text) -> str:
    value = "" if cell.value is None else f' data-v="{cell.value!r}"'
    beside = f"<small>{text(cell.beside)}</small>" if cell.beside else ""
    return f'<td{value}><span class="n">{text(cell.text)}</span>{beside}</td>'


def _noise(summary: Summary) -> str | None:
    if summary.noise is None:
        return None
    return (
        f"Equal weighting beside itself, measured in the same way, takes {summary.noise.text()} "
        f"times as long: that is how far a ratio here can be from 1 by chance."
    )


def _fresh(summary: Summary, text: _Text) -> str:
    """The runs that confirm, a line a method."""
    if summary.plan is None:
        return ""
    rows = [_head(row, "", text) for row in summary.fresh]
    table = _table("method", rows, fresh_columns(summary), text)
    return f"<h2>Confirmed on {summary.plan.seeds} fresh seeds</h2>{table}"


def _models(summary: Summary, text: _Text) -> str:
    """One model beside a model per task."""
    models = summary.models
    if models is None and summary.no_models:
        return f"<h2>One model, or one per task</h2><p>Not measured: {text(summary.no_models)}</p>"
    if models is None:
        return ""
    heads, found, says = models_columns(models)
    rows = [f'<td data-v="{escape(visible(head))}">{text(name(head))}</td>' for head in heads]
    what = (
        "a forward pass in evaluation mode without gradients, on a training batch"
        if models.timed != "losses"
        else "task losses in evaluation mode without gradients, since they do not call the module"
    )
    note = (
        f"Parameters are those that the gradient of a task's loss reaches, frozen ones too. Time "
        f"is that of {what}; a model per task is this module with one active task, so a forward "
        f"pass that computes every head does so for each of them. Ratios are medians of turns, and "
        f"their range."
    )
    return (
        f'<h2>One model, or one per task</h2><p class="prose">{text(says)}</p>'
        f'{_table("model", rows, found, text)}<p class="note">{text(note)}</p>'
    )


def _figure(picture: Picture, text: _Text) -> str:
    caption = f"{text(picture.plots)} File: {picture.file}."
    label = f'role="img" aria-label="{escape(picture.title)}"'
    if picture.narrow is None:
        drawn = f'<div class="pan" {label}>{picture.wide}</div>'
    else:
        drawn = f'<div class="wide" {label}>{picture.wide}</div>'
        drawn += f'<div class="narrow" {label}>{picture.narrow}</div>'
    return (
        f"<figure><h3>{text(picture.title)}</h3><p>{text(picture.shows)}</p>"
        f"{drawn}"
        f"<figcaption>{caption}</figcaption></figure>"
    )
