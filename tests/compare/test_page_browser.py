"""The report page in Chromium: nothing cut or wider than the window, and it sorts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from tests.compare import made

pytestmark = pytest.mark.slow

# Frames have widths below the smallest that a window may have, and their media queries follow them.
_PROBE = """<!doctype html><html><body style="margin:0">
<iframe src="out/report.html" style="border:0;width:1400px;height:900px"></iframe>
<iframe src="out/report.html" style="border:0;width:390px;height:800px"></iframe>
<pre id="found"></pre><script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, box = page.querySelector(".scroll");
    const table = box.querySelector("table"), cells = [...table.querySelectorAll("th, td")];
    const outside = [...page.querySelectorAll("figure svg")].filter((s) => s.clientWidth).flatMap(
      (svg) => { const room = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text")].filter((text) => {
          const at = text.getBoundingClientRect();
          return at.left < room.left - 3 || at.right > room.right + 3; }).map((t) => t.textContent);
      });
    const before = { page: page.documentElement.scrollWidth, window: frame.clientWidth,
      table: box.scrollWidth, room: box.clientWidth,
      cut: cells.filter((c) => c.scrollWidth > c.clientWidth + 1).map((c) => c.textContent),
      outside, pictures: page.querySelectorAll("figure").length,
      paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor };
    const first = table.tBodies[0].rows[0].cells[0];
    const left = first.getBoundingClientRect().left;
    box.scrollLeft = 10000;
    before.sticky = Math.abs(first.getBoundingClientRect().left - left) < 1;
    const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].dataset.v);
    before.names = names();
    const ratio = [...table.tHead.rows[0].cells].findIndex((c) => /×/.test(c.textContent));
    const press = () => table.tHead.rows[0].cells[ratio].querySelector("button").click();
    press(); before.down = names(); press(); before.up = names();
    return before;
  });
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script></body></html>"""


def browse(folder: Path, *flags: str) -> list[dict]:
    """What the probe found in a window and on a phone."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "Expected chromium or google-chrome. Install it: apt-get install chromium"
    (folder / "probe.html").write_text(_PROBE)
    flags = (*flags, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1800")
    flags = (*flags, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}")
    page = subprocess.run(
        [browser, *flags, "--dump-dom", (folder / "probe.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
        text=True,
    ).stdout
    found = re.search(r'<pre id="found">(.*?)</pre>', page, re.DOTALL)
    assert found
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize(("rows", "metrics"), [(3, 2), (17, 2), (17, 8), (46, 8)])
def test_the_page_fits_a_window_and_a_phone(tmp_path: Path, rows: int, metrics: int) -> None:
    found = made.lines(rows, metrics)
    assert main(["report", str(made.write(tmp_path / "out", found))]) == 0
    ratios = {r["method"]: r["step_ratio"] for r in found if r.get("kind") == "timing"}
    by_ratio = sorted(ratios, key=lambda name: ratios[name])
    for view in browse(tmp_path):
        assert view["page"] <= view["window"], "the page is wider than its window"
        assert view["cut"] == []
        assert view["outside"] == []
        assert view["pictures"] == 5
        assert view["sticky"]
        assert view["up"] == [*by_ratio, "single-task"]  # without a number: last, both ways
        assert view["down"] == [*by_ratio[::-1], "single-task"]
        assert view["paper"] == "rgb(255, 255, 255)"
        if view["window"] == 1400:
            assert view["table"] <= view["room"], "a column has to be scrolled to"


def test_dark_pages_and_names_of_any_length_and_direction(tmp_path: Path) -> None:
    names = [
        "<b>&",
        "\u0634\u0628\u0643\u0629 \u0639\u0635\u0628\u064a\u0629",
        "x" * 300,
        "日本" * 20,
    ]
    found = made.lines(7, 3, names=names)
    assert main(["report", str(made.write(tmp_path / "out", found))]) == 0
    for view in browse(tmp_path, "--blink-settings=preferredColorScheme=0"):
        assert view["page"] <= view["window"]
        assert view["cut"] == []
        assert view["paper"] == "rgb(20, 23, 26)"
        assert set(names) < set(view["names"])
