"""Where the tests of this folder train, and float32 that is float32 there.

They are for one NVIDIA GPU (`make gpu`), and skipped where there is none. `pytest tests/gpu
--device cpu` compares the processor with itself: that tries their logic, and no more.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

# Read when cuBLAS starts: sums in one order, so that a resumed run is bit for bit the same.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where to train: `cuda` or `cpu`."""
    chosen: str = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; `--device cpu` tries the logic of this test")
    return chosen


@pytest.fixture
def cuda(device: str) -> str:
    """The GPU, for what a processor has nothing of."""
    if device != "cuda":
        pytest.skip("only a GPU has what this test looks at")
    return device


@pytest.fixture(autouse=True)
def _float32(request: pytest.FixtureRequest):
    """Convolutions without TensorFloat-32, which PyTorch allows them unless told otherwise."""
    if request.config.getoption("--device") == "cpu" or not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first few cases of each test of this folder, where that is asked for."""
    few, seen = config.getoption("--few"), Counter()
    if few is None:
        return
    kept = []
    for item in items:
        if Path(__file__).parent in item.path.parents:
            name = getattr(item, "originalname", item.name)
            seen[item.path, name] += 1
            if seen[item.path, name] > few:
                continue
        kept.append(item)
    items[:] = kept
