"""``diagnose.json`` and ``diagnose.html``, one page with nothing outside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning_mtl.compare.folder import write
from lightning_mtl.compare.texts import name, visible
from lightning_mtl.diagnose.heat_map import heat_map
from lightning_mtl.diagnose.reading import read
from lightning_mtl.diagnose.text import MOST_PAIRS, Table, family_table, pair_table, task_table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.answer { border-left: 4px solid #1f77b4; background: #f2f6fa; padding: .7rem 1rem; }
.answer p { margin: .4rem 0; } .rule { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap;
  font-size: .9rem; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #999; } th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; white-space: normal; }
.note { color: #555; font-size: .9rem; }
pre { background: #f7f7f7; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""
_TASKS = """Medians over the measured steps, norms with the range of 80 % of them. Noise floor:
mean cosine between the same task's gradients on two halves of the batch; 1 is no noise, 0 nothing
but noise. Halves against: in what share of the steps these two point away from each other. Dropout
floor: the same on the whole batch with two draws of masks. Noise scale: the batch with as much
noise as signal. Cosine to update: between the task's downhill direction and what the optimizer did.
Pace: the share of the steps after which the task alone was where it ends with the others."""
_PAIRS = """Cosine: on the same batch, as balancers see it. On halves: one task's gradient on one
half, the other's on the other, so that both have noise of their own. Noise out: the latter divided
by the root of both floors. Verdict: whether its 95 % interval, with steps as if independent, is
below or above zero."""
_FAMILIES = """Share: cosine of the direction to the task's gradient, which to first order is the
part of its own decrease that the task keeps in a step of the same length. Worst-off task: the
smallest share of a step, averaged over steps. Decrease: predicted for a step as long as the
optimizer's, in percent of the loss. Computed from the recorded gradients; nothing was trained."""
_GROUPS = """Left: two tasks on different halves of the batch. Right: each task with itself, the
noise floor of that group. A pair parts where its cell is red and both floors are well above zero;
what is pale beside pale floors is noise."""


def write_files(
    summary: Mapping[str, Any],
    out: Path,
    texts: Mapping[str, str],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write both files.

    Args:
        summary: the numbers.
        out: the folder.
        texts: files to show in full, by name.
        facts: name and value of what it was run with.

    Raises:
        OSError: one could not be written; the old one is as it was.
    """
    content = {**summary, "reading": [vars(s) for s in read(dict(summary))], "facts": dict(facts)}
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    write(out / "diagnose.json", text + "\n")
    write(out / "diagnose.html", page(dict(summary), texts, facts))


def page(
    summary: dict[str, Any], texts: Mapping[str, str], facts: Sequence[tuple[str, str]]
) -> str:
    """The page.

    Args:
        summary: the numbers.
        texts: files to show in full, by name.
        facts: name and value of what it was run with.
    """
    statements = "".join(
        f"<p>{f'<b>{_text(s.verdict)}</b>: ' if s.verdict else ''}{_text(s.text)}"
        + (f' <span class="rule">{_text(s.rule)}</span>' if s.rule else "")
        + "</p>"
        for s in read(summary)
    )
    files = "".join(
        f"<details><summary>{_text(file)}</summary><pre>{_text(text)}</pre></details>"
        for file, text in texts.items()
    )
    count = len(summary["pairs"])
    some = f" Shown are the {MOST_PAIRS} of {count} that part most." if count > MOST_PAIRS else ""
    shown = [("steps of every training", str(summary["steps"]))]
    shown += [("measured steps", str(len(summary["measured"]))), *facts]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Diagnosis</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>Could balancing help these tasks?</h1>
<div class="answer">{statements}</div>
<h2>Tasks</h2>
{_table(task_table(summary))}<p class="note">{_TASKS}</p>
<h2>Every two tasks</h2>
{_table(pair_table(summary))}<p class="note">{_PAIRS}{some}</p>
<h2>Where tasks part</h2>
{_heat_map(summary)}
<h2>What each family would do to these gradients</h2>
{_table(family_table(summary))}<p class="note">{_FAMILIES}</p>
<h2>How it was run</h2>
<table class="facts">{"".join(_row("td", fact) for fact in shown)}</table>
{files}
</body></html>
"""


def _heat_map(summary: Mapping[str, Any]) -> str:
    groups, tasks = summary["groups"], summary["tasks"]
    apart = groups["halves"] is not None
    table = groups["halves"] if apart else groups["cosines"]
    order = list(combinations(range(len(tasks)), 2))
    columns = [f"{name(tasks[i], 12)} / {name(tasks[j], 12)}" for i, j in order]
    cells = [[g[i][j] for i, j in order] for g in table]
    if apart:
        columns += [f"{name(task, 20)}, floor" for task in tasks]
        own = [[g[t][t] for t in range(len(tasks))] for g in table]
        cells = [left + right for left, right in zip(cells, own, strict=True)]
    picture = heat_map(groups["names"], columns, cells, "cosines of task gradients by layers")
    note = _GROUPS if apart else "On the same batch; batches could not be divided."
    return f'<div class="scroll">{picture}</div><p class="note">{note}</p>'


def _table(lines: Table) -> str:
    rows = [_row("th", lines[0]), *(_row("td", line) for line in lines[1:])]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _row(cell: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{_text(text)}</{cell}>" for text in texts) + "</tr>"


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(visible(text)))
