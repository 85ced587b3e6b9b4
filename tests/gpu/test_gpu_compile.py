"""Compiled networks on the device, with and without task gradients."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from lightning_mtl import DualBalance, LogLoss, MinNorm
from tests.common.models import Balanced, loader
from tests.gpu.fits import fit, parameters

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _compiler() -> Any:
    """Each test compiles by itself."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_with(way: str, device: str) -> Any:
    """``torch.compile`` in one of its ways, where the machine has what it needs."""
    if way != "aot_eager" and device == "cpu":
        pytest.skip("only a GPU has what this test looks at")
    if way == "aot_eager":
        return lambda network: torch.compile(network, backend="aot_eager")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler here, which Triton needs")
    mode = None if way == "inductor" else way
    return lambda network: torch.compile(network, mode=mode)


NONE, LOG, MIN, DUAL = list, lambda: [LogLoss()], lambda: [MinNorm()], lambda: [DualBalance()]
# Compiling takes seconds each: every way with what it may break on.
CASES = [
    *(
        ("aot_eager", part, make)
        for part in ("trunk", "network")
        for make in (NONE, LOG, MIN, DUAL)
    ),
    *(("inductor", "trunk", make) for make in (MIN, NONE, DUAL, LOG)),
    ("inductor", "network", MIN),
    ("reduce-overhead", "trunk", MIN),
    ("reduce-overhead", "trunk", NONE),
]
NAMES = {id(NONE): "none", id(LOG): "LogLoss", id(MIN): "MinNorm", id(DUAL): "DualBalance"}


@pytest.mark.parametrize(
    ("way", "part", "make"), CASES, ids=[f"{w}-{p}-{NAMES[id(m)]}" for w, p, m in CASES]
)
def test_compiled_networks_train_as_others(device: str, make: Any, part: str, way: str) -> None:
    compiled = compile_with(way, device)
    expected = fit(Balanced(), loader(40), device, *make())
    module = Balanced()
    if part == "trunk":
        module.net.trunk = compiled(module.net.trunk)
    else:
        module.net = compiled(module.net)
        module.configure = lambda m: torch.optim.SGD(
            m.net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3
        )
    fit(module, loader(40), device, *make())
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=1e-4, atol=1e-5)
