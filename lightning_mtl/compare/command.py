"""``lightning-mtl compare``: from the command line to the files of a comparison."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning_utilities.core.imports import RequirementCache

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.folder import claimed, refused, write
from lightning_mtl.compare.grid import SINGLE, Run, plan
from lightning_mtl.compare.pool import execute
from lightning_mtl.compare.progress import Progress, duration
from lightning_mtl.compare.request import Request
from lightning_mtl.compare.results import Results
from lightning_mtl.compare.stopping import Stopped, deaf, stoppable, undisturbed
from lightning_mtl.compare.table import (
    Summary,
    baseline_json,
    console_table,
    summarise,
    summary_csv,
)
from lightning_mtl.compare.texts import complain, error_text, one_line, say, visible
from lightning_mtl.version import __version__

_PLOT_EXTRA = RequirementCache("matplotlib")

_EPILOG = """\
B.yaml maps names to callbacks, for example
  equal: []
  minnorm: [{class_path: MinNorm}]
  fixed-x10: [{class_path: Scalarization, init_args: {weights: {depth: 10.0}}}]

The same command continues a comparison that was stopped: finished runs are kept, failed and
unfinished ones are run again. It may then be given more or fewer --seeds and another --only.

Exit status: 0 when all is well; 1 when a run failed, or something such as a full disk ended the
comparison; 2 when the request was wrong and nothing was trained; 130 after Ctrl-C and 143 after
SIGTERM. Finished runs are kept in every case.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-mtl compare",
        description="Train single-task baselines and every balancer over seeds: does it help?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, help="model, data and trainer: the file that `fit` takes")
    add("--balancers", required=True, help="YAML: name -> callbacks; none: equal weighting")
    add("--out", required=True, help="folder for the results")
    add("--seeds", type=int, default=3, help="runs a method, seeds 0 to N-1 (default: 3)")
    add("--workers", type=int, default=1, help="runs side by side, a process each (default: 1)")
    add("--only", help="comma-separated names: of the file of balancers, run these only")
    add("--split", choices=("val", "test"), default="val", help="data to evaluate on")
    return parser


def main(args: Sequence[str]) -> int:
    """Run a comparison.

    Args:
        args: the command line after ``compare``.

    Returns:
        The exit status: 0; 1 when a run failed or a file could not be written; 2 when the request
        was wrong; 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = _parser().parse_args(args)
    with stoppable():
        return _main(options, shlex.join(["lightning-mtl", "compare", *args]))


def _main(options: argparse.Namespace, command: str) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # runs are forked from this process, which must not start threads
    try:
        if not _PLOT_EXTRA:
            raise CompareError(
                "Expected matplotlib for the plots but found none. Install it with: "
                'pip install "lightning-mtl[plot]"'
            )
        return compare(options, command)
    except CompareError as error:
        complain(f"error: {visible(str(error))}")
        return 2
    except OSError as error:
        complain(
            f"error: {one_line(str(error))}. The comparison stopped here. Finished runs are kept "
            f"in {options.out}: the same command goes on from there."
        )
        return 1
    except Stopped as stop:
        deaf()
        complain(
            f"stopped by {signal.Signals(stop.number).name}. Runs that had finished are kept in "
            f"{options.out}: the same command goes on from there."
        )
        return 128 + stop.number
    finally:
        torch.set_num_threads(threads)


def compare(options: argparse.Namespace, command: str) -> int:
    """Check the request, train what is not finished yet, and write every file.

    Args:
        options: the parsed command line.
        command: the command line as text, for the report.
    """
    if not options.out:
        raise CompareError('Expected --out to name a folder but found "". Name one.')
    request = Request(options)
    out = Path(options.out)
    with claimed(out, request.identity()):
        with refused(out):
            results = Results(out, request.directions)
        for note in results.notes:
            complain(f"note: {visible(note)}")
        progress = _run(request, results, options)
        failed = _report(request, results, options, command)
        say(f"\nDone in {duration(progress.elapsed())}. Report: {out / 'report.html'}")
    return 1 if failed else 0


def _run(request: Request, results: Results, options: argparse.Namespace) -> Progress:
    """Train what is not finished yet."""
    chosen = {SINGLE, *request.chosen}
    runs = [run for run in _grid(request, options) if run.method in chosen]
    todo = [run for run in runs if run not in results.records]
    progress = Progress(
        total=len(runs),
        kinds=Counter(run.kind for run in todo),
        before=results.of(runs),
        workers=options.workers,
    )
    say(progress.headline())

    def finished(run: Run, record: dict[str, Any]) -> None:
        with undisturbed():
            results.append(run, record)
        say(progress.line(run, record))

    # Step time and memory are measured at the end, with nothing beside the process.
    job = request.job(results.path.with_name("logs"))
    execute([run for run in todo if run.kind != "timing"], job, options.workers, finished)
    execute([run for run in todo if run.kind == "timing"], job, 1, finished)
    return progress


def _grid(request: Request, options: argparse.Namespace) -> list[Run]:
    return plan(list(request.directions), list(request.methods), request.equal, options.seeds)


def _report(request: Request, results: Results, options: argparse.Namespace, command: str) -> bool:
    """Write every file and print the answer; whether a run failed."""
    shown = _grid(request, options)
    records = results.of(shown)  # with methods of an earlier --only
    known = {*request.chosen, *(record["method"] for record in records)}
    kinds = {name: kind for name, kind in request.kinds.items() if name in known}
    del results.notes[:]
    curves = results.curves(shown)
    summary = summarise(records, request.directions, kinds, curves, request.unmeasured)
    out = results.path.parent
    try:
        results.notes += _write(summary, out, request.texts, _facts(options, command))
    finally:  # where there is no room for the files, the console has the numbers at least
        say(f"\n{visible(console_table(summary))}\n\n" + visible("\n".join(answer(summary))))
    for note in results.notes:
        complain(f"note: {one_line(note)}")
    failed = any(row.errors for row in summary.rows)
    if failed:
        say(f"\nWhat failed runs printed, with their tracebacks, is in {out / 'logs'}.")
    return failed


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


def _facts(options: argparse.Namespace, command: str) -> list[tuple[str, str]]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {device}"
    return [
        ("command", command),
        ("seeds", ", ".join(map(str, range(options.seeds)))),
        ("evaluated on", "validation data" if options.split == "val" else "test data"),
        ("lightning-mtl", __version__),
        ("lightning", lightning.__version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("machine", machine),
    ]
