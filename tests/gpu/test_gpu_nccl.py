"""One process with a real process group (NCCL on a GPU), against one without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_mtl import DualBalance, LogLoss, MinNorm, NashMTL, PCGrad, TaskTensioner
from tests.common.models import loader
from tests.gpu.fits import trainer_on
from tests.ranks.rank_cases import Fsdp2, Labelled, batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # of strategies for more than one process
]
BALANCERS: dict[str, Any] = {
    "none": list,
    "LogLoss": lambda: [LogLoss()],
    "MinNorm": lambda: [MinNorm()],
    "DualBalance": lambda: [DualBalance()],
    "NashMTL": lambda: [NashMTL()],
    "PCGrad": lambda: [PCGrad(order="ascending")],
    "TaskTensioner": lambda: [TaskTensioner()],
}
balancers = pytest.mark.parametrize("make", BALANCERS.values(), ids=BALANCERS)


@pytest.fixture(scope="module")
def group(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A process group of one, which meets in a file: no port, no network."""
    device: str = request.getfixturevalue("device")
    environment = {
        "NCCL_SOCKET_IFNAME": "lo",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # Lightning reads them, nobody meets
    }
    on_gpu = device == "cuda"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{tmp_path_factory.mktemp('group') / 'meeting'}",
            rank=0,
            world_size=1,
            device_id=torch.device("cuda", 0) if on_gpu else None,
        )
        yield device
        dist.destroy_process_group()


def trained(device: str, make: Any, variant: str, strategy: Any) -> torch.Tensor:
    """Parameters after twenty batches."""
    kind = Fsdp2 if isinstance(strategy, ModelParallelStrategy) else Labelled
    memory: Any = variant if variant in ("bf16", "blocks") else "full"
    torch.manual_seed(5)
    module = kind(
        variant == "missing", shard_gradients=variant == "sharded", gradient_memory=memory
    )
    flags: dict[str, Any] = {"accumulate_grad_batches": 2 if variant == "accumulate" else 1}
    if isinstance(strategy, DDPStrategy):
        flags["use_distributed_sampler"] = False
    run = trainer_on(device, *make(), strategy=strategy, **flags)
    run.fit(module, batches(0, 1, variant == "missing"))
    found = [p.detach() for p in module.net.parameters()]
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in found]
    return torch.cat([p.flatten().cpu() for p in found])


@balancers
@pytest.mark.parametrize("variant", ["plain", "accumulate", "missing", "sharded"])
def test_ddp_of_one_is_one_process(group: str, make: Any, variant: str) -> None:
    found = trained(group, make, variant, DDPStrategy())
    expected = trained(group, make, "plain" if variant == "sharded" else variant, "auto")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["bf16", "blocks"])
def test_memory_under_ddp(group: str, variant: str) -> None:
    make = BALANCERS["MinNorm"]
    found = trained(group, make, variant, DDPStrategy())
    expected = trained(group, make, variant, "auto")
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@balancers
def test_fsdp2_of_one_is_one_process(group: str, make: Any) -> None:
    if group == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch has no FSDP2 on the CPU")
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    found = trained(group, make, "plain", strategy)
    expected = trained(group, make, "plain", "auto")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_metrics_under_ddp(group: str) -> None:
    """Validation reduces its sums over the group."""
    logged = []
    for strategy in (DDPStrategy(), "auto"):
        torch.manual_seed(5)
        run = trainer_on(group, MinNorm(), strategy=strategy, use_distributed_sampler=False)
        module, data = Labelled(False), loader(tasks=("a", "b", "c"))
        run.fit(module, data, data)
        logged.append({key: float(value) for key, value in run.callback_metrics.items()})
    assert logged[0].keys() == logged[1].keys()
    for key, value in logged[0].items():
        assert value == pytest.approx(logged[1][key], rel=1e-4), key
