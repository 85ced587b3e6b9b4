"""``lightning-mtl diagnose``: from the command line to the files of a diagnosis."""

from __future__ import annotations

import argparse
import logging
import shlex
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_utilities.core.imports import RequirementCache

from lightning_mtl.compare.texts import complain, one_line, say, visible
from lightning_mtl.diagnose import DiagnoseError

_STATISTICS_EXTRA = RequirementCache("scipy")

_EPILOG = """\
Nothing of the config is changed: the training is the one that `fit` begins, with equal weighting.
Then every task is trained alone for as many steps. Task gradients are measured on some of the
steps, on halves of the batch, and with other dropout masks. Written are diagnose.json and
diagnose.html, which holds everything.

Exit status: 0 when all is well; 1 when a file could not be written; 2 when the request was wrong or
a training failed, and nothing was written; 130 after Ctrl-C.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-mtl diagnose",
        description="A short run with equal weighting: which family of balancers could help?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, help="model, data and trainer: the file that `fit` takes")
    add("--out", default="diagnosis", help="folder for the files (default: diagnosis)")
    add("--steps", type=int, default=200, help="optimiser steps of every training (default: 200)")
    add("--measure", type=int, default=40, help="steps to measure gradients at (default: 40)")
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    add("--no-alone", action="store_true", help="do not train the tasks alone: T times faster")
    return parser


def main(args: Sequence[str]) -> int:
    """Diagnose a config.

    Args:
        args: the command line after ``diagnose``.

    Returns:
        The exit status: 0; 1 when a file could not be written; 2 when the request was wrong or a
        training failed; 130 after Ctrl-C.
    """
    options = _parser().parse_args(args)
    command = shlex.join(["lightning-mtl", "diagnose", *args])
    try:
        diagnose(options, command)
    except DiagnoseError as error:
        complain(f"error: {visible(str(error))}", "diagnose")
        return 2
    except OSError as error:
        complain(f"error: {one_line(str(error))}. Give another --out.", "diagnose")
        return 1
    except KeyboardInterrupt:
        complain("stopped. Nothing was written.", "diagnose")
        return 130
    return 0


def diagnose(options: argparse.Namespace, command: str) -> None:
    """Measure, write the files and print the reading.

    Args:
        options: the parsed command line.
        command: the command line as text, for the report.

    Raises:
        DiagnoseError: the request cannot be carried out, or a training failed.
        OSError: a file could not be written.
    """
    if not _STATISTICS_EXTRA:
        raise DiagnoseError(
            "Expected scipy for the statistics but found none. Install it with: "
            'pip install "lightning-mtl[compare]"'
        )
    from lightning_mtl.diagnose.report import write_files
    from lightning_mtl.diagnose.request import Request
    from lightning_mtl.diagnose.study import study
    from lightning_mtl.diagnose.summary import summarise
    from lightning_mtl.diagnose.text import console

    started = time.perf_counter()
    logging.disable(logging.INFO)  # Lightning's notes on devices and sizes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            request = Request(options)
            say(
                f"Measuring {min(options.measure, options.steps)} of {options.steps} steps with "
                f"equal weighting{'' if options.no_alone else ', then each task alone'}"
            )
            found = study(request.train, options.steps, options.measure, alone=not options.no_alone)
            summary = summarise(found)
    finally:
        logging.disable(logging.NOTSET)
    summary["notes"] = request.notes
    facts = [
        ("command", command),
        ("threads", str(torch.get_num_threads())),
        ("seconds", f"{time.perf_counter() - started:.0f}"),
    ]
    out = Path(options.out)
    try:
        write_files(summary, out, {request.config: request.text}, facts)
    finally:  # where there is no room for the files, the console has the reading at least
        say(f"\n{visible(console(summary))}")
    say(f"\nReport: {out / 'diagnose.html'}")
