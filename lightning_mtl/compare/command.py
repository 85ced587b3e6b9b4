"""``lightning-mtl compare``: from the command line to the files of a comparison."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from lightning_utilities.core.imports import RequirementCache

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.about import About
from lightning_mtl.compare.confirm import Plan
from lightning_mtl.compare.folder import claimed, refused
from lightning_mtl.compare.grid import FIRST_FRESH
from lightning_mtl.compare.output import show
from lightning_mtl.compare.phases import Phases
from lightning_mtl.compare.progress import duration
from lightning_mtl.compare.request import Request
from lightning_mtl.compare.results import Results
from lightning_mtl.compare.selection import BEST, LAST, SELECT
from lightning_mtl.compare.stopping import Stopped, deaf, stoppable
from lightning_mtl.compare.table import Row
from lightning_mtl.compare.texts import complain, name, one_line, say, visible
from lightning_mtl.compare.tuning.fairness import fairness
from lightning_mtl.compare.tuning.rivals import NAMES, TIME
from lightning_mtl.version import __version__

_PLOT_EXTRA = RequirementCache("matplotlib")
_STATISTICS_EXTRA = RequirementCache("scipy")

FEWEST = 3  # seeds of a confirmation

_EPILOG = """\
B.yaml maps names to callbacks, for example
  equal: []
  minnorm: [{class_path: MinNorm}]
  fixed-x10: [{class_path: Scalarization, init_args: {weights: {depth: 10.0}}}]

With --confirm M, the balancer that is best on the --seeds runs is trained again on M fresh seeds,
beside equal weighting and every fixed weighting, and those runs alone decide.

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
    add("--confirm", type=int, metavar="M", help="judge the best balancer on M fresh seeds")
    add("--margin", type=float, help="points of Δp that matter (default: 1)")
    add("--workers", type=int, default=1, help="runs side by side, a process each (default: 1)")
    add("--only", help="comma-separated names: of the file of balancers, run these only")
    add("--rivals", default="all", help=f"all, none or some of {','.join(NAMES)} (default: all)")
    add("--select", choices=SELECT, default=LAST, help="weights that count (default: last)")
    add("--last-k", type=int, default=5, metavar="K", help="with last_k_mean (default: 5)")
    add("--split", choices=("val", "test"), default="val", help="data to evaluate on")
    return parser


def check_extras() -> None:
    """Refuse now what would fail at the end.

    Raises:
        CompareError: a package is missing that draws or judges.
    """
    for found, package, purpose in (
        (_PLOT_EXTRA, "matplotlib", "plots"),
        (_STATISTICS_EXTRA, "scipy", "statistics"),
    ):
        if not found:
            raise CompareError(
                f"Expected {package} for the {purpose} but found none. Install it with: "
                f'pip install "lightning-mtl[compare]"'
            )


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
        check_extras()
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
    _check_numbers(options)
    request = Request(options)
    out = Path(options.out)
    with claimed(out, request.identity()):
        with refused(out):
            fixed = Plan.load(out)
            results = Results(out, request.directions)
        if fixed is not None:
            fixed.agree(out, options.confirm, options.seeds, options.margin)
            _check_rivals(fixed, request)
        for note in results.notes:
            complain(f"note: {visible(note)}")
        phases = Phases(request, results, options.seeds, options.workers)
        _about(request, phases, options, command).save(out)
        phases.tune()
        phases.grid()
        phases.longer()
        if options.confirm is not None:
            fixed = fixed or _fix(request, phases, options)
            if fixed is not None:
                _confirm(fixed, request, phases)
        about = _about(request, phases, options, command)  # methods of an earlier --only too
        about.save(out)
        failed = _report(about, phases, request, fixed)
        say(f"\nDone in {duration(phases.elapsed())}. Report: {out / 'report.html'}")
    return 1 if failed else 0


def _check_rivals(fixed: Plan, request: Request) -> None:
    missing = [rival for rival in fixed.rivals if rival not in request.methods]
    if missing:
        raise CompareError(
            f"Expected --rivals to name those that the confirmation was fixed against, but found "
            f"no {', '.join(map(name, missing))}. Give the same --rivals as then."
        )


def _check_numbers(options: argparse.Namespace) -> None:
    if options.margin is not None and not 0 < options.margin < float("inf"):
        raise CompareError(
            f"Expected --margin to be a number above 0 but found {options.margin}. Give the "
            f"smallest difference that matters, in points of Δp."
        )
    if options.confirm is None:
        return
    if options.confirm < FEWEST:
        raise CompareError(
            f"Expected --confirm to be at least {FEWEST} but found {options.confirm}. Five or more "
            f"find what is worth finding; see the power table in the documentation."
        )
    if options.seeds > FIRST_FRESH:
        raise CompareError(
            f"Expected at most {FIRST_FRESH} --seeds beside --confirm but found {options.seeds}: "
            f"the fresh seeds start there. Ask for fewer."
        )


def _fix(request: Request, phases: Phases, options: argparse.Namespace) -> Plan | None:
    """Pick what is to be confirmed and write it down, before any of its runs.

    Returns:
        ``None`` where there is nothing to pick; a message says why.
    """
    from lightning_mtl.compare.judge import ALPHA, MARGIN, PAIRED

    results = phases.results
    summary = _about(request, phases, options, "").summary(results.of(phases.runs()), {}, None)
    judgement = summary.judgement
    seeds = set(range(options.seeds))
    whole = [row for row in summary.methods if row.scores.keys() >= seeds]
    balancers = [row for row in whole if row.kind == "balancer"]
    rivals = [row for row in whole if row.kind != "balancer"]
    lost = [row.method for row in summary.methods if row.kind != "balancer" and row not in whole]
    lost += [  # all of whose trials failed
        row
        for row, choice in phases.choices().items()
        if choice.settings is None and request.kinds[row] != "balancer"
    ]
    if judgement is None or not balancers or lost:
        why = summary.no_delta_p or (
            f"{name(lost[0])}, a rival, lacks runs" if lost else "no balancer has all of its runs"
        )
        complain(f"note: nothing was confirmed, because {visible(why)}")
        return None

    def mean(row: Row) -> float:
        return sum(row.scores[seed] for seed in seeds) / len(seeds)

    best = max(balancers, key=mean)
    fixed = Plan(
        best.method,
        [row.method for row in rivals],
        options.seeds,
        options.confirm,
        MARGIN if options.margin is None else options.margin,
        ALPHA,
        PAIRED,
        max([best, *rivals], key=mean).method,
    )
    fixed.save(results.path.parent)
    return fixed


def _confirm(fixed: Plan, request: Request, phases: Phases) -> None:
    """Train what the plan lacks, on fresh seeds."""
    rivals = ", ".join(map(name, fixed.rivals))
    say(f"\nConfirming {name(fixed.balancer)} against {rivals} on {fixed.seeds} fresh seeds")
    runs = fixed.runs(list(request.directions), list(request.methods))
    phases.train(phases.with_settings(runs))


def _about(request: Request, phases: Phases, options: argparse.Namespace, command: str) -> About:
    """What the report has to know besides the runs."""
    records = phases.results.of(phases.runs())
    known = {*request.chosen, *(record["method"] for record in records)}
    choices = phases.choices()
    kinds = {name: kind for name, kind in request.kinds.items() if name in known}
    lost = {row for row, choice in choices.items() if choice.settings is None}
    return About(
        metrics=request.directions,
        methods={name: kind for name, kind in kinds.items() if name not in lost},
        unmeasured=list(request.unmeasured),
        seeds=options.seeds,
        margin=options.margin,
        texts=dict(request.texts),
        facts=_facts(options, command, phases),
        remarks=fairness(
            kinds,
            choices,
            phases.missing,
            phases.unjudged(),
            request.split,
            request.rehearsal.same_data,
            request.select,
        ),
    )


def _report(
    about: About,
    phases: Phases,
    request: Request,
    fixed: Plan | None,
) -> bool:
    """Write every file and print the answer; whether a run, or all trials of a row, failed."""
    results, shown = phases.results, phases.runs()
    fresh = fixed.runs(list(request.directions), list(request.methods)) if fixed else []
    del results.notes[:]
    curves = results.curves(shown)
    summary = about.summary(results.of([*shown, *fresh]), curves, fixed)
    results.notes += show(summary, results.path.parent, about.texts, about.facts)
    for note in results.notes:
        complain(f"note: {one_line(note)}")
    failed = any(row.errors for row in (*summary.rows, *summary.fresh))
    failed = failed or any(choice.settings is None for choice in phases.choices().values())
    if failed:
        say(
            f"\nWhat failed runs printed, with their tracebacks, is in "
            f"{results.path.with_name('logs')}."
        )
    return failed


def _facts(options: argparse.Namespace, command: str, phases: Phases) -> list[tuple[str, str]]:
    chosen = [(f"settings of {row}", str(choice)) for row, choice in phases.choices().items()]
    if phases.factor is not None:
        chosen.append((f"steps of {NAMES[TIME]}", f"{phases.factor:.2f} times those of the file"))
    if options.select != LAST:
        last_k = f"the last {options.last_k} validations, their metrics averaged"
        weights = "the best ones on validation data" if options.select == BEST else last_k
        chosen.append(("weights that count", weights))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {device}"
    return [
        ("command", command),
        ("seeds", ", ".join(map(str, range(options.seeds)))),
        ("evaluated on", "validation data" if options.split == "val" else "test data"),
        *chosen,
        ("lightning-mtl", __version__),
        ("lightning", lightning.__version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("machine", machine),
    ]
