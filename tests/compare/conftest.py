"""A folder of its own for a test, and no process that outlives it."""

from pathlib import Path

import pytest

from tests.compare.compare_runs import started


@pytest.fixture(autouse=True)
def _leave_no_process():
    yield
    while started:
        process = started.pop()
        if process.is_alive():
            process.kill()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path
