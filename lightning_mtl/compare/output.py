"""Every file that a comparison leaves, and its answer on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.cells import console_table
from lightning_mtl.compare.folder import write
from lightning_mtl.compare.sheets import (
    baseline_json,
    confirm_csv,
    gradients_csv,
    models_csv,
    summary_csv,
)
from lightning_mtl.compare.table import Summary
from lightning_mtl.compare.texts import error_text, say, visible


def show(
    summary: Summary, out: Path, texts: Mapping[str, str], facts: Sequence[tuple[str, str]]
) -> list[str]:
    """Write the files and print table and answer; what could not be drawn, in words."""
    try:
        return _write(summary, out, texts, facts)
    finally:  # where there is no room for the files, the console has the numbers at least
        say(f"\n{visible(console_table(summary))}\n\n" + visible("\n".join(answer(summary))))


def _write(
    summary: Summary, out: Path, texts: Mapping[str, str], facts: Sequence[tuple[str, str]]
) -> list[str]:
    """Write the files; what could not be drawn, in words."""
    from lightning_mtl.compare.report import report_html

    write(out / "summary.csv", summary_csv(summary))
    if not summary.no_delta_p:
        write(out / "baseline.json", baseline_json(summary))
    if summary.plan is not None:
        write(out / "confirm.csv", confirm_csv(summary))
    if summary.models is not None:
        write(out / "models.csv", models_csv(summary))
    if summary.curves:
        write(out / "gradients.csv", gradients_csv(summary))
    try:
        # Imported here since runs are forked from this process and do not need matplotlib.
        from lightning_mtl.compare.figures import figures

        pictures, faults = figures(summary)
    except Exception as error:  # of matplotlib's own: its cache, the user's settings
        pictures, faults = [], [f"Nothing could be drawn. {error_text(error)}"]
    write(out / "report.html", report_html(summary, pictures, texts, facts, faults))
    for picture in pictures:
        write(out / picture.file, picture.png)
    return faults
