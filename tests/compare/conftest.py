"""No process of a test outlives it."""

import pytest

from tests.compare.compare_runs import started


@pytest.fixture(autouse=True)
def _leave_no_process():
    yield
    while started:
        process = started.pop()
        if process.is_alive():
            process.kill()
