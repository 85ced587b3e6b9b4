"""The command `compare` in processes that start quickly, to be stopped, killed or starved."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from lightning_mtl.cli import main

PATIENCE = 120.0  # seconds for what should take a few
started: list[BaseProcess] = []  # that a test which fails leaves behind
MODEL = "tests.compare.compare_model."
PLAIN = ("--rivals", "none")  # the rows of the file alone
CONFIG = {
    "model": {"class_path": MODEL + "TwoTasks", "init_args": {"width": 8}},
    "data": {"class_path": MODEL + "Points", "init_args": {"size": 24}},
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}


def files(folder: Path, balancers: dict | str, config: dict = CONFIG) -> list[str]:
    """Write the two files and give the options that name them."""
    (folder / "C.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    text = balancers if isinstance(balancers, str) else yaml.safe_dump(balancers, sort_keys=False)
    (folder / "B.yaml").write_text(text, encoding="utf-8")
    return ["--config", "C.yaml", "--balancers", "B.yaml", "--out", "out", "--seeds", "1", *PLAIN]


def start(folder: Path, options: list[str]) -> BaseProcess:
    """Start the command in ``folder``, as its own group; what it prints is in ``printed.txt``."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.compare.compare_runs"])
    process = context.Process(target=_command, args=(folder, options))
    process.start()
    started.append(process)
    return process


def _command(folder: Path, options: list[str]) -> None:
    os.setsid()
    # A shell lets what it starts in the background ignore the one, `nohup` the other, and children
    # inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    with Path("printed.txt").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    raise SystemExit(main(["compare", *options]))


def finished(process: BaseProcess) -> int:
    """The exit status of a command that ends by itself."""
    process.join(PATIENCE)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def until(reached: Callable[[], object], what: str) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, f"waited in vain for {what}"


def printed(folder: Path) -> str:
    return (folder / "printed.txt").read_text(encoding="utf-8")


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def kill(process: BaseProcess, how: int = signal.SIGKILL) -> None:
    assert process.pid is not None
    os.kill(process.pid, how)


def records(folder: Path) -> list[dict[str, Any]]:
    """Every line of the results, each of which has to be whole."""
    text = (folder / "out" / "results.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]
