"""What is wrong on one rank ends all of them at once, with an error that says where and what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mtl import DualBalance
from tests.common.faulty import parameters, same
from tests.common.models import Batched, trainer
from tests.common.ranks import result, run_cases
from tests.ranks.error_cases import CASES, Wrong
from tests.ranks.rank_cases import batches

OTHER = "Expected the same tasks in the same order on every rank but rank 0 trains {} and rank 1 {}"
STATE = "DualBalance expected its state `average` in shape {} but found {}: it belongs to a run wit"
ABC, FSDP2 = "['a', 'b', 'c']", "data_parallel_size=..., tensor_parallel_size=1"
# {case: (steps before, part of the message on rank 0, the same on rank 1)}; None: as on rank 0
EXPECTED: dict[str, tuple[int, str, str | None]] = {
    "names": (0, OTHER.format(ABC, "['a', 'b', 'd']"), None),
    "order": (0, OTHER.format(ABC, "['b', 'a', 'c']"), None),
    "active": (0, OTHER.format("['a', 'b']", "['b', 'c']"), None),
    "one declares": (0, OTHER.format(ABC, "[]"), None),
    "first batch": (0, OTHER.format(ABC, "['a', 'b', 'd']"), None),
    "first batch, and a balancer that knows the names": (
        0,
        OTHER.format(ABC, "['a', 'b', 'd']"),
        None,
    ),
    "a balancer that knows the names": (0, OTHER.format(ABC, "['a', 'b', 'd']"), None),
    "unknown task": (
        3,
        "Rank 1 cannot use what its `task_losses` returned: The dict that `task_losses` returned",
        "The dict that `task_losses` returned names the unknown task ['d']",
    ),
    "detached": (
        2,
        "Expected the loss of task 'c' to have a graph",
        "Rank 0 cannot use what its `task_losses` returned: Expected the loss of task 'c' to have",
    ),
    "no dict": (
        2,
        "Rank 1 cannot use what its `task_losses` returned: Expected `task_losses` to return a d",
        "Expected `task_losses` to return a dict {task: loss} but got Tensor",
    ),
    "bad on one": (2, "{'b': 'nan on rank 1'}", None),
    "bad on each": (2, "{'a': 'inf on rank 0', 'b': 'inf on rank 1'}", None),
    "miscounted": (
        1,
        "Rank 1 cannot use what its `task_losses` returned: Expected the loss of task 'b' as a sc",
        "Expected the loss of task 'b' as a scalar or as (mean, number of valid labels)",
    ),
    "absent on one": (2, "under FSDP2 but task ['b'] is there on [1] of 2 ranks", None),
    "absent on one, and another bad": (
        2,
        "under FSDP2 but task ['b'] is there on [1] of 2 ranks",
        None,
    ),
    "absent on one, synchronised": (
        2,
        "under SyncBatchNorm but task ['b'] is there on [1] of 2 ranks",
        None,
    ),
    "not all sharded": (0, "Call `fully_shard(self, mesh=...)` last in `configure_model`", None),
    "tensor parallel": (0, "but found 2: gradients divided inside a layer are not bal", None),
    "tensor parallel by default": (0, f"ModelParallelStrategy({FSDP2})", None),
}
for how in ("whole", "sharded"):
    for tasks, width in ((3, 60), (3, 47)):
        message = STATE.format((3, 94), (tasks, width))
        EXPECTED[f"state of {tasks} tasks and {width} columns, {how}"] = (0, message, None)
    own = 94 if how == "whole" else 47  # of each of two ranks
    message = STATE.format((3, own), (2, own))
    EXPECTED[f"state of 2 tasks and 94 columns, {how}"] = (0, message, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors")
    run_cases(path, [*CASES, f"checkpoint {path}"], "tests.ranks.error_cases:run")
    return path


def test_every_case_is_expected() -> None:
    assert set(EXPECTED) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_ends_with_an_error(folder: Path, case: str) -> None:
    steps, first, second = EXPECTED[case]
    for rank, message in enumerate((first, first if second is None else second)):
        found = result(folder, list(CASES).index(case), rank)
        name, told = found["error"]
        assert message in told, told
        assert name in ("BadLossError", "ValueError", "TypeError", "MisconfigurationException")
        assert found["steps"] == steps


def test_a_checkpoint_written_because_of_an_error_is_whole(folder: Path) -> None:
    for rank in (0, 1):
        found = result(folder, len(CASES), rank)
        assert found["error"][0] == "BadLossError"
        assert found["steps"] == 6
    saved = torch.load(folder / "on_exception.ckpt", weights_only=True)
    balancer, module = DualBalance(), Wrong(0)
    trainer(callbacks=[balancer]).fit(module, Batched(batches(0, 1, missing=False)[:6]))
    assert saved["global_step"] == 6
    average = saved["callbacks"]["DualBalance"]["state"]["average"]
    torch.testing.assert_close(average, balancer.average)
    torch.testing.assert_close(saved["state_dict"], dict(module.state_dict()))


# ------------------------------------------------------------------- strategies that are refused


def stand_in(name: str, run: Any) -> Any:
    """A strategy of that name that works: the real one needs a package that is not installed."""

    class Other:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(works, attribute)

    works, Other.__name__ = run.strategy, name
    return Other()


def fsdp1() -> FSDPStrategy:
    """The real one; only the GPU that it asks for is left out."""
    return FSDPStrategy(CPUAccelerator(), [torch.device("cpu")], LightningEnvironment())


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("FSDPStrategy", r"frees what the next .*: `ModelParallelStrategy\(.* with `fully_shard`"),
        (
            "DeepSpeedStrategy",
            r"owns the backward pass.*: `ModelParallelStrategy\(.* with `fully_s",
        ),
        ("XLAStrategy", "XLA devices. Train on GPUs or on the CPU, with 'auto' or 'ddp'"),
        ("XLAFSDPStrategy", "XLA devices. Train on GPUs or on the CPU, with 'auto' or 'ddp'"),
        (
            "SingleDeviceXLAStrategy",
            "XLA devices. Train on GPUs or on the CPU, with 'auto' or 'ddp",
        ),
        ("HorovodStrategy", "gives no task gradients to average over ranks. Use 'ddp'"),
    ],
)
def test_strategies_that_cannot_train(name: str, cure: str) -> None:
    """Neither DeepSpeed nor torch_xla is installed, so stand-ins bear the names of those."""
    run, module = trainer(), Wrong(0)
    strategy = fsdp1() if name == "FSDPStrategy" else stand_in(name, run)
    run._accelerator_connector.strategy = strategy
    before = parameters(module)
    message = f"^Expected a single device, DDP or FSDP2 but found {name}: .*{cure}"
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module, Batched(batches(0, 1, missing=False)[:2]))
    assert same(parameters(module), before)
