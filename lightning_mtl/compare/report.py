"""``report.html``: the answer, the table, the pictures and how they were made, in one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.table import Summary, cells
from lightning_mtl.compare.texts import visible

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 75rem; margin: 2rem auto;  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.answer { border-left: 4px solid #1f77b4; background: #f2f6fa; padding: .7rem 1rem; }
.answer p { margin: .3rem 0; } .answer p:first-child { font-weight: 600; }
.failed { border-left: 4px solid #c0392b; background: #fbeeec; padding: .7rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap;
  font-size: .9rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #999; } th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; white-space: normal; }
tr.single td { background: #f7f7f7; }
img { max-width: 100%; height: auto; display: block; }
figure { margin: 1.2rem 0; } figcaption, .note { color: #555; font-size: .9rem; }
pre { background: #f7f7f7; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""

_CAPTIONS = {
    "delta_p.png": "Relative improvement over single-task training; bars are means over seeds, "
    "whiskers ± one standard deviation.",
    "runs.png": "Every run by the first metric of the first two tasks. The dashed lines are the "
    "single-task averages.",
    "gradient_cosines.png": "Cosine between task gradients over the training, seed 0. Below 0 "
    "the tasks conflict. Methods that need one backward pass only have no curve; equal weighting "
    "was run once more for its own.",
    "gradient_norms.png": "Norms of the task gradients on the shared parameters over the "
    "training, seed 0.",
}


def report_html(
    summary: Summary,
    pictures: Mapping[str, bytes],
    texts: Mapping[str, str],
    facts: Sequence[tuple[str, str]],
    faults: Sequence[str] = (),
) -> str:
    """The report, with nothing outside it.

    Args:
        summary: the numbers.
        pictures: PNG files by name.
        texts: files to show in full, by name.
        facts: name and value of what the comparison was run with, such as versions.
        faults: what could not be drawn.
    """
    header, body = cells(summary)
    lines = [_row("th", header)]
    for row, line in zip(summary.rows, body, strict=True):
        lines.append(_row("td", line, f' class="{row.kind}"'))
    errors = [
        (run, error) for row in (*summary.rows, *summary.fresh) for run, error in row.errors.items()
    ]
    failed = "".join(f"<p><b>{_text(run)}</b>: {_text(error)}</p>" for run, error in errors)
    figures = "".join(
        f'<figure><img alt="{escape(_CAPTIONS[name])}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(_CAPTIONS[name])}</figcaption></figure>"
        for name, png in pictures.items()
    )
    files = "".join(
        f"<details><summary>{_text(name)}</summary><pre>{_text(text)}</pre></details>"
        for name, text in texts.items()
    )
    scope = summary.scope()
    note = "" if scope is None else f'<p class="note">{_text(scope)}</p>'
    undrawn = "".join(f"<p>{_text(fault)}</p>" for fault in faults)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Balancers compared</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>Does balancing help these tasks?</h1>
<div class="answer">{"".join(f"<p>{_text(sentence)}</p>" for sentence in answer(summary))}</div>
{f'<h2>Failed runs</h2><div class="failed">{failed}</div>' if failed else ""}
<h2>Results</h2>
<div class="scroll"><table>{"".join(lines)}</table></div>
{note}<p class="note">Mean ± sample standard deviation over seeds. Δp is the mean over tasks of the
relative improvement of each task's metrics over the mean single-task run, in percent. Step time is
the median of one training step, and peak memory what a training adds to its process, both measured
in a short run with nothing beside it. Intervals hold with 95 % for all rows together; those of Δp
count the spread of the single-task runs. "May be best": not shown to be worse than another.</p>
{_fresh(summary)}
<h2>Pictures</h2>{(figures + undrawn) or "<p>No run finished that could be drawn.</p>"}
<h2>How it was run</h2>
<table class="facts">{"".join(_row("td", fact) for fact in facts)}</table>
{files}
</body></html>
"""


def _fresh(summary: Summary) -> str:
    """The runs that confirm, a line a method."""
    if summary.plan is None:
        return ""
    lines = [_row("th", ["method", "Δp %", "runs"])]
    for row in summary.fresh:
        delta_p = "–" if row.delta_p is None else row.delta_p.text("+.2f", ".2f")
        lines.append(_row("td", [row.method, delta_p, str(len(row.scores))]))
    return (
        f"<h2>Confirmed on {summary.plan.seeds} fresh seeds</h2>"
        f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    )


def _row(cell: str, texts: Sequence[str], attributes: str = "") -> str:
    return (
        f"<tr{attributes}>" + "".join(f"<{cell}>{_text(text)}</{cell}>" for text in texts) + "</tr>"
    )


def _text(text: str) -> str:
    return escape(visible(text))
