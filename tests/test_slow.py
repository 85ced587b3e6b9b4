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

from tests.test_compare import files, numbers, start

pytestmark = pytest.mark.slow


def test_a_comparison_killed_again_and_again_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        options = files(folder)
    stdout, stderr = start(whole, *options, "--seeds", "2", "--workers", "2").communicate()
    assert "Done in" in stdout, stderr

    stops = random.Random()
    for _ in range(6):
        process = start(killed, *options, "--seeds", "2", "--workers", "2")
        for _ in range(stops.randrange(1, 4)):  # the headline, then a line a run
            process.stdout.readline()
        for _ in range(stops.randrange(10_000_000)):  # and some time into the next one
            pass
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    stdout, stderr = start(killed, *options, "--seeds", "2", "--workers", "2").communicate()
    assert "Done in" in stdout, stderr
    assert numbers(killed) == numbers(whole)
    assert (killed / "out" / "baseline.json").read_text() == (
        whole / "out" / "baseline.json"
    ).read_text()


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
