"""Every file that a comparison leaves, and its answer on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.folder import write
from lightning_mtl.compare.table import Summary, baseline_json, console_table, summary_csv
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
    try:
        # Imported here since runs are forked from this process and do not need matplotlib.
        from lightning_mtl.compare.plots import plots

        pictures, faults = plots(summary)
    except Exception as error:  # of matplotlib's own: its cache, the user's settings
        pictures, faults = {}, [f"Nothing could be drawn. {error_text(error)}"]
    write(out / "report.html", report_html(summary, pictures, texts, facts, faults))
    for name, picture in pictures.items():
        write(out / name, picture)
    return faults
