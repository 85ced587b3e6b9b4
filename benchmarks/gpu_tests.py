"""Run the tests of ``tests/gpu`` and write the outcome of each as it is known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gpu_results import Results

ROOT = Path(__file__).parents[1]


class Outcomes:
    """A plugin of pytest that writes outcomes to the results, and stops when the time is over.

    Args:
        results: where outcomes go.
        end: when to stop, on the monotonic clock.
    """

    def __init__(self, results: Results, end: float) -> None:
        self.results = results
        self.end = end
        found = results.read().get("tests", {})
        self.counts = {
            "passed": 0,
            "failed": 0,
            "skipped": 0,
            "error": 0,
            **found.get("counts", {}),
        }
        self.failures: dict[str, str] = found.get("failures", {})
        self.skips: dict[str, int] = found.get("skips", {})
        self.warnings: dict[str, int] = found.get("warnings", {})
        self.seconds: dict[str, float] = found.get("slowest", {})
        self.collected = self.ended = 0

    def pytest_collection_finish(self, session: Any) -> None:
        self.collected = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.write(running=nodeid)  # a test that hangs is known by this

    def pytest_runtest_logreport(self, report: Any) -> None:
        outcome = report.outcome
        if outcome == "failed" and report.when != "call":
            outcome = "error"
        if report.when == "call" or outcome != "passed":
            self.counts[outcome] += 1
        if outcome in ("failed", "error"):
            self.failures[report.nodeid] = str(report.longrepr)[-3000:]
        elif outcome == "skipped":
            reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")
            self.skips[reason] = self.skips.get(reason, 0) + 1
        if report.when == "call":
            self.seconds[report.nodeid] = round(report.duration, 2)

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        self.ended += 1

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        if time.monotonic() > self.end:
            item.session.shouldstop = "no time was left"

    def pytest_warning_recorded(self, warning_message: Any, when: Any, nodeid: Any) -> None:
        category = warning_message.category.__name__
        text = f"{category}: {str(warning_message.message).strip()}"[:300]
        self.warnings[text] = self.warnings.get(text, 0) + 1

    def write(self, running: str = "") -> None:
        slowest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:20]
        self.results.add(
            "tests",
            {
                "counts": self.counts,
                "failures": self.failures,
                "skips": self.skips,
                "warnings": self.warnings,
                "slowest": dict(slowest),
                "running": running,
            },
        )


def run_tests(files: list[Path], results: Results, device: str, end: float) -> str:
    """Run them in the order of ``files``; what the time did not suffice for."""
    import pytest

    outcomes = Outcomes(results, end)
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    arguments += ["--device", device, "-W", "default", "--tb=short", "--show-capture=no"]
    if device == "cpu":  # to try the logic; all of them: pytest tests/gpu --device cpu
        arguments += ["--few", "1"]
    status = pytest.main([*arguments, *map(str, files)], plugins=[outcomes])
    outcomes.write()
    if status not in (0, 1, 2):  # passed, failed, stopped
        raise RuntimeError(f"pytest ended with status {int(status)}.")
    left = outcomes.collected - outcomes.ended
    return f"{left} of {outcomes.collected} tests were not begun" if left else ""
