"""The page of a diagnosis: what is in the heat map, and the whole in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_mtl.diagnose.heat_map import colour, heat_map
from tests.diagnose.test_command import config, run


def test_colours_part_at_zero():
    assert colour(0.0, 0.5) == "#ffffff"
    assert colour(-0.5, 0.5) == "#b2182b"
    assert colour(0.5, 0.5) == colour(2.0, 0.5) == "#2166ac"
    assert colour(None, 0.5) == "#e4e4e4"


def test_names_cannot_leave_the_picture():
    found = heat_map(["<b>&"], ['a" onload="x'], [[None]], "cosines")
    assert "<b>" not in found
    assert 'onload="' not in found
    assert "–" in found


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "Expected chromium or google-chrome. Install it: apt-get install chromium"
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, config(scale=100.0), "--steps", "30", "--measure", "10") == 0
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    subprocess.run(
        [
            browser,
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1250,2400",
            f"--screenshot={picture}",
            (tmp_path / "diagnosis" / "diagnose.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    colours = {tuple(c) for c in np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)}
    assert {(33, 102, 172), (242, 246, 250)} <= colours  # the largest floor, and the answer
