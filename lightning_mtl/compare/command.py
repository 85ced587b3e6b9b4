"""``lightning-mtl compare``: from the command line to the files of a comparison."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning_utilities.core.imports import RequirementCache

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.grid import Results, Run, claim, plan, write
from lightning_mtl.compare.pool import execute
from lightning_mtl.compare.progress import Progress, duration
from lightning_mtl.compare.request import Request
from lightning_mtl.compare.table import (
    Summary,
    baseline_json,
    console_table,
    summarise,
    summary_csv,
)
from lightning_mtl.version import __version__

_PLOT_EXTRA = RequirementCache("matplotlib")

_EPILOG = """\
B.yaml maps names to callbacks, for example
  equal: []
  minnorm: [{class_path: MinNorm}]
  fixed-x10: [{class_path: Scalarization, init_args: {weights: {depth: 10.0}}}]

The same command continues a comparison that was stopped: finished runs are kept, failed and
unfinished ones are run again. It may then be given more or fewer --seeds and another --only.

Exit status: 0 when all is well, 1 when a run failed, 2 when the request was wrong and nothing was
trained.
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
    add("--out", required=True, type=Path, help="folder for the results")
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
        The exit status: 0, 1 when a run failed, 2 when the request was wrong.
    """
    options = _parser().parse_args(args)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # runs are forked from this process, which must not start threads
    try:
        if not _PLOT_EXTRA:
            raise CompareError(
                "Expected matplotlib for the plots but found none. Install it with: "
                'pip install "lightning-mtl[plot]"'
            )
        return compare(options, shlex.join(["lightning-mtl", "compare", *args]))
    except CompareError as error:
        print(f"lightning-mtl compare: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def compare(options: argparse.Namespace, command: str) -> int:
    """Check the request, train what is not finished yet, and write every file.

    Args:
        options: the parsed command line.
        command: the command line as text, for the report.
    """
    request = Request(options)
    out: Path = options.out
    claim(out, request.identity())
    (out / "logs").mkdir(exist_ok=True)
    results = Results(out)
    runs = plan(list(request.directions), request.chosen, request.equal, options.seeds)
    todo = [run for run in runs if run.name not in results.records]
    progress = Progress(
        total=len(runs),
        kinds=Counter(run.kind for run in todo),
        before=results.of(runs),
        workers=options.workers,
    )
    print(progress.headline(), flush=True)

    def finished(run: Run, record: dict[str, Any]) -> None:
        results.append(record)
        print(progress.line(run, record), flush=True)

    # Step time and memory are measured at the end, with nothing beside the process.
    job = request.job(out / "logs")
    execute([run for run in todo if run.kind != "timing"], job, options.workers, finished)
    execute([run for run in todo if run.kind == "timing"], job, 1, finished)

    shown = plan(list(request.directions), list(request.methods), request.equal, options.seeds)
    records = results.of(shown)  # with methods of an earlier --only
    known = {*request.chosen, *(record["method"] for record in records)}
    kinds = {name: kind for name, kind in request.kinds.items() if name in known}
    summary = summarise(records, request.directions, kinds, results.curves(shown))
    _write(summary, options, command)
    took = duration(progress.elapsed())
    print(f"\n{console_table(summary)}\n\n" + "\n".join(answer(summary)))
    failed = any(row.errors for row in summary.rows)
    if failed:
        print(f"\nWhat failed runs printed, with their tracebacks, is in {out / 'logs'}.")
    print(f"\nDone in {took}. Report: {out / 'report.html'}", flush=True)
    return 1 if failed else 0


def _write(summary: Summary, options: argparse.Namespace, command: str) -> None:
    # Imported here since runs are forked from this process and do not need matplotlib.
    from lightning_mtl.compare.plots import plots
    from lightning_mtl.compare.report import report_html

    out: Path = options.out
    write(out / "summary.csv", summary_csv(summary))
    if not summary.no_delta_p:
        write(out / "baseline.json", baseline_json(summary))
    pictures = plots(summary)
    for name, picture in pictures.items():
        write(out / name, picture)
    paths = (options.config, options.balancers)
    texts = {path: Path(path).read_text(encoding="utf-8") for path in paths}
    write(out / "report.html", report_html(summary, pictures, texts, _facts(options, command)))


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
