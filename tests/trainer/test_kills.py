"""Runs that are killed, hang or meet a full disk: what is saved is whole, and goes on exactly.

Lightning writes a checkpoint where ``tempfile`` says and moves it, in one step only within one file
system: there the runs of this file have both.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.kill_run import EPOCHS, LOST, STEPS, start

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="signals and forked processes are POSIX"
)
PATIENCE = 60.0  # seconds for what should take one or two


def until(reached: Callable[[], Any], process: BaseProcess, every: float = 0.001) -> bool:
    """Wait for something to happen while a process runs; whether it did."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if reached():
            return True
        if process.exitcode is not None:
            return False
        time.sleep(every)
    raise AssertionError("waited in vain")


def finished(folder: Path, world: int = 1) -> list[dict[str, Any]]:
    """Run to the end; what every rank has come to."""
    processes = start(folder, world)
    for process in processes:
        process.join(PATIENCE)
    log = (folder / "log.0.txt").read_text()
    assert [p.exitcode for p in processes] == [0] * world, log
    return [torch.load(folder / f"final.{rank}.pt", weights_only=True) for rank in range(world)]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Bit for bit."""
    assert found[0]["steps"] == EPOCHS * STEPS
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def inode(path: Path) -> int:
    """Another with every file that takes the place of one; 0 for none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def replaced(path: Path) -> Callable[[], bool]:
    """Whether there is another file than now."""
    before = inode(path)
    return lambda: inode(path) not in (0, before)


def checkpoints(folder: Path, process: BaseProcess, number: int) -> bool:
    """Wait for so many checkpoints."""
    last = folder / "saved" / "last.ckpt"
    return all(until(replaced(last), process) for _ in range(number))


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL


def kill_at_random(folder: Path, draw: random.Random) -> int:
    """Kill a run somewhere after a few more checkpoints; 1 for a kill, 0 when it was too late."""
    (process,) = start(folder)
    if not checkpoints(folder, process, draw.randrange(1, 5)):
        return 0
    for _ in range(draw.randrange(200_000)):  # and somewhere in what follows
        pass
    if process.exitcode is not None:
        return 0
    kill(process)
    return 1


def kill_while_writing(folder: Path, draw: random.Random) -> int:
    """Kill a run in the middle of writing a checkpoint; the half that is left proves it."""
    writing = folder / "tmp"
    (process,) = start(folder)
    if not checkpoints(folder, process, draw.randrange(1, 5)):
        return 0
    until(lambda: any(writing.iterdir()), process, every=0)
    if process.exitcode is not None:
        return 0
    kill(process)
    halves = list(writing.iterdir())
    for half in halves:
        half.unlink()
    return len(halves)


def killed(folder: Path, kills: int) -> list[dict[str, Any]]:
    """What a run comes to that is killed so often, one time in three during a write."""
    draw = random.Random()
    done, how = 0, [kill_at_random, kill_while_writing, kill_at_random]
    while done < kills:
        hit = how[done % 3](folder, draw)
        done += hit
        if not hit and (folder / "final.0.pt").exists():  # over before the kill: once more
            for file in [*(folder / "saved").iterdir(), folder / "final.0.pt"]:
                file.unlink()
    return finished(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run that is never stopped."""
    return finished(tmp_path_factory.mktemp("whole"))


def test_killed_three_times(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    same(killed(tmp_path, 3), whole)


@pytest.mark.slow
def test_killed_twenty_times(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    for number in range(4):  # each run has only so many steps to be killed in
        same(killed(tmp_path / str(number), 5), whole)


def test_full_disk(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk.

    Both make ``write`` fail in the middle of a file with an ``OSError``, here "File too large",
    there "No space left on device"; a small file system of one's own needs an administrator.
    """
    (process,) = start(tmp_path, largest=1_000_000)
    process.join(PATIENCE)
    assert process.exitcode == 1
    log = (tmp_path / "log.0.txt").read_text()
    assert log.rstrip().endswith("OSError: [Errno 27] File too large")
    assert "save_checkpoint" in log  # the traceback says what could not be written
    for path in (tmp_path / "saved").iterdir():
        assert torch.load(path, weights_only=True)["global_step"] == 5
    assert not list((tmp_path / "tmp").iterdir())  # no half file is left to fill the disk
    same(finished(tmp_path), whole)


# ------------------------------------------------------------------------------- one of two ranks


@pytest.fixture(scope="module")
def whole_on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run of two ranks that is never stopped."""
    return finished(tmp_path_factory.mktemp("two"), world=2)


@pytest.mark.parametrize(
    ("how", "lost"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 1),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    ],
)
def test_one_of_two_ranks_is_lost(
    whole_on_two: list[dict[str, Any]], tmp_path: Path, how: signal.Signals, lost: int
) -> None:
    """Killed, or stopped so that it answers no more: the other does not wait for ever."""
    processes = start(tmp_path, world=2)
    assert checkpoints(tmp_path, processes[0], random.Random().randrange(1, 12))
    os.kill(processes[lost].pid, how)
    since = time.monotonic()
    other = processes[1 - lost]
    other.join(PATIENCE)
    took = time.monotonic() - since
    processes[lost].kill()
    processes[lost].join(PATIENCE)
    log = (tmp_path / f"log.{1 - lost}.txt").read_text()
    assert other.exitcode == 1, log
    assert took < LOST + 12, log
    assert "RuntimeError" in log
    same(finished(tmp_path, world=2), whole_on_two)
