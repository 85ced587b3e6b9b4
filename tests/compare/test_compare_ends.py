"""`compare` that is stopped, killed, started twice or out of disk keeps what it has."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from tests.common.places import ROOT
from tests.compare.compare_runs import (
    CONFIG,
    MODEL,
    files,
    finished,
    gone,
    kill,
    printed,
    records,
    start,
    until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc and tmpfs")
STUCK = {"equal": [], "stuck": [{"class_path": MODEL + "Stuck"}]}
BROKEN = {"equal": [], "broken": [{"class_path": MODEL + "Broken"}]}


def program(
    folder: Path, options: list[str], before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_mtl", "compare", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=before,
        capture_output=True,
        text=True,
        check=False,
    )


def reached(folder: Path, options: list[str] | None = None):
    """Start a comparison and wait until its last training hangs in C code."""
    process = start(folder, options or files(folder, STUCK))
    pid = folder / "stuck.pid"
    until(lambda: pid.exists() and pid.read_text(), "the run that hangs")
    return process, int(pid.read_text())


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_a_word(tmp_path: Path, how: signal.Signals, code: int):
    process, worker = reached(tmp_path)
    kill(process, how)
    assert finished(process) == code
    text = printed(tmp_path)
    assert f"stopped by {how.name}. Runs that had finished are kept in out" in text
    assert "Traceback" not in text
    assert gone(worker)
    assert {r["method"] for r in records(tmp_path)} == {"single-task", "equal"}


def test_ctrl_c_of_a_terminal_reaches_everybody(tmp_path: Path):
    process, worker = reached(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert finished(process) == 130
    assert printed(tmp_path).count("KeyboardInterrupt") == 0
    assert gone(worker)


def test_a_worker_in_c_code_does_not_outlive_the_command(tmp_path: Path):
    process, worker = reached(tmp_path)
    assert not gone(worker)
    kill(process)
    assert finished(process) == -signal.SIGKILL
    until(lambda: gone(worker), "the end of the worker")
    assert len(records(tmp_path)) == 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nor_do_workers_of_its_data_loader(tmp_path: Path, how: signal.Signals):
    """The run is killed, and can tell them nothing; they look for it only between batches."""
    data = {"class_path": MODEL + "StuckLoading"}
    process, loader = reached(tmp_path, files(tmp_path, {"equal": []}, {**CONFIG, "data": data}))
    kill(process, how)
    assert finished(process) == (143 if how == signal.SIGTERM else -how)
    until(lambda: gone(loader), "the end of the loader's worker")


def test_a_second_start_is_refused_and_a_dead_owner_keeps_nothing(tmp_path: Path):
    process, _ = reached(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    other = program(tmp_path, files(tmp_path, STUCK))
    assert other.returncode == 2
    assert not other.stdout
    assert other.stderr.startswith("lightning-mtl compare: error: Expected out to be free but ano")
    assert f"`lightning-mtl compare` (process {process.pid}) works on it" in other.stderr
    assert other.stderr.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before

    kill(process)
    finished(process)
    (tmp_path / "stuck.pid").unlink()
    again = start(tmp_path, files(tmp_path, STUCK))
    until((tmp_path / "stuck.pid").exists, "the run that hangs")
    assert "7 runs, 3 of them finished before" in printed(tmp_path)
    kill(again, signal.SIGTERM)
    assert finished(again) == 143


@pytest.mark.slow  # a disk that is full says the same
def test_files_that_may_grow_no_more(tmp_path: Path):
    """The limit is met in the middle of a line; what was written of it is taken away."""
    options = files(tmp_path, BROKEN)
    limit = (1300, resource.RLIM_INFINITY)
    ended = program(tmp_path, options, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr == (
        "lightning-mtl compare: error: [Errno 27] File too large: 'out/results.jsonl'. The "
        "comparison stopped here. Finished runs are kept in out: the same command goes on from "
        "there.\n"
    )
    assert len(records(tmp_path)) == ended.stdout.count("\n") - 1  # a line each, and the headline
    assert len(records(tmp_path)) >= 3
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 24 pages."""
    disk = tmp_path / "out"
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=96k", "none", str(disk)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"only an administrator may mount: {made.stderr.decode()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path):
    options = files(tmp_path, BROKEN)
    stuffing = small_disk / "stuffing"
    stuffing.write_bytes(b"x" * (96 - 36) * 1024)  # room for a few files
    assert finished(start(tmp_path, options)) == 1
    text = printed(tmp_path)
    assert "error: [Errno 28] No space left on device: 'out/" in text
    assert "Traceback" not in text
    kept = [r["run"] for r in records(tmp_path) if r["status"] == "finished"]
    assert kept
    stuffing.unlink()
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert finished(start(tmp_path, options)) == 1  # the broken balancer
    assert f"7 runs, {len(kept)} of them finished before" in printed(tmp_path)
    assert {r["run"] for r in records(tmp_path)} >= {*kept, "equal-seed0", "broken-seed0"}
    assert (small_disk / "report.html").read_text().endswith("</html>\n")


def test_a_disk_without_room_for_the_start(small_disk: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (small_disk / "stuffing").write_bytes(b"x" * 96 * 1024)
    assert main(["compare", *files(tmp_path, BROKEN)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert "No space left on device" in captured.err
    assert captured.err.count("\n") == 1
