"""Long runs, in `make test-slow`: many kills, and the report in a real browser."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.compare.test_compare import files, numbers, start, table

pytestmark = pytest.mark.slow


def test_a_comparison_killed_twenty_times_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole, draw, kills = tmp_path / "whole", random.Random(), 0
    whole.mkdir()
    options = [*files(whole), "--seeds", "2", "--workers", "2"]
    stdout, stderr = start(whole, *options).communicate()
    assert "Done in" in stdout, stderr

    while kills < 20:  # a comparison has only so many runs to be killed in
        folder = tmp_path / str(kills)
        folder.mkdir()
        files(folder)
        for _ in range(5):
            process = start(folder, *options)
            for _ in range(draw.randrange(1, 4)):  # the headline, then a line a run
                process.stdout.readline()
            for _ in range(draw.randrange(10_000_000)):  # and some time into the next one
                pass
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        stdout, stderr = start(folder, *options).communicate()
        assert "Done in" in stdout, stderr
        assert numbers(folder) == numbers(whole)
        assert table(folder) == table(whole)
        baselines = [(f / "out" / "baseline.json").read_text() for f in (folder, whole)]
        assert baselines[0] == baselines[1]


def test_the_report_in_a_browser(tmp_path: Path) -> None:
    options = files(tmp_path)
    stdout, stderr = start(tmp_path, *options, "--seeds", "1", "--workers", "2").communicate()
    assert "Done in" in stdout, stderr
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "Expected chromium or google-chrome. Install it: apt-get install chromium"
    moved = tmp_path / "elsewhere"  # the page needs no file beside it
    moved.mkdir()
    shutil.copy(tmp_path / "out" / "report.html", moved)
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1100,4000",
            f"--screenshot={picture}",
            (moved / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    colours = {tuple(c) for c in pixels.reshape(-1, 3)[::7]}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # the bars of the plots are there
