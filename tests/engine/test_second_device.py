"""Every method on a device that is not the processor, as far as that can be tried without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.common.places import ROOT
from tests.engine.second_device import AVAILABLE, CASES

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch has no devices in Python")
# One transfer to the host a step, which holds for the methods that people use most; a second one
# where a method gives a direction, which is looked at before it is written.
ONCE = ("none", "LogLoss", "MinNorm", "DualBalance", "CAGrad", "NashMTL", "UPGrad")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came out of each case, of one launch."""
    path = tmp_path_factory.mktemp("second_device") / "found.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.second_device", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
def test_trains_as_on_the_processor(found: Any, case: str) -> None:
    result = found[case]
    assert "error" not in result, result.get("error")
    if not case.startswith("host"):  # sums of blocks in another order
        assert result["there"] == result["here"]
    assert result["there"] == pytest.approx(result["here"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.startswith("full|1") and c.split("|")[2].split("(")[0] in ONCE]
)
def test_one_transfer_a_step(found: Any, case: str) -> None:
    number = 2 if "DualBalance" in case else 1
    assert found[case]["crossed"]["to host"] == number, found[case]["crossed"]
