"""Stop at a step and resume on the device: bit for bit, the device's random numbers included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mtl import Balancer
from tests.common.models import Balanced, resume_from
from tests.gpu.fits import parameters, states, trainer_on
from tests.trainer.test_resume import BALANCERS, SavedLoader

pytestmark = pytest.mark.gpu
MEMORIES = ("full", "host")


def fit(
    balancers: list[Any],
    folder: Path,
    device: str,
    resume: Path | None = None,
    precision: Any = "32-true",
    every: int = 1,
    memory: Any = "full",
) -> tuple[Any, Any]:
    module = Balanced(dropout=0.3, gradient_memory=memory)
    if precision == "64-true":
        module.double()  # Lightning loads a checkpoint before it makes the module float64
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer_on(
        device,
        *(make() for make in balancers),
        keep,
        precision=precision,
        accumulate_grad_batches=every,
        max_epochs=2,
        enable_checkpointing=True,
    )
    # A resumed run starts from other random numbers: the checkpoint has to bring its own.
    torch.manual_seed(7 if resume is None else 99)
    run.fit(module, SavedLoader(), **(resume_from(resume) if resume else {}))
    return run, module


def same(run: Any, module: Any, again: Any, resumed: Any) -> None:
    assert again.global_step == run.global_step
    assert torch.equal(parameters(resumed.net), parameters(module.net))
    for before, after in zip(run.callbacks, again.callbacks, strict=True):
        if isinstance(before, Balancer):
            for mine, theirs in zip(states(after), states(before), strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("balancers", BALANCERS.values(), ids=BALANCERS)
def test_bit_for_bit(device: str, tmp_path: Path, balancers: list[Any], every: int) -> None:
    run, module = fit(balancers, tmp_path, device, every=every)
    for step in (1, 3):
        again, resumed = fit(
            balancers, tmp_path, device, tmp_path / f"step={step}.ckpt", every=every
        )
        same(run, module, again, resumed)


@pytest.mark.parametrize("balancers", [BALANCERS["none"], BALANCERS["DualBalance"]])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "64-true"])
def test_in_other_precisions(
    device: str, tmp_path: Path, balancers: list[Any], precision: str
) -> None:
    if precision == "16-mixed" and device == "cpu":
        pytest.skip("only a GPU has what this test looks at")
    run, module = fit(balancers, tmp_path, device, precision=precision)
    again, resumed = fit(balancers, tmp_path, device, tmp_path / "step=3.ckpt", precision)
    same(run, module, again, resumed)


@pytest.mark.parametrize("memory", MEMORIES)
def test_state_in_either_memory(device: str, tmp_path: Path, memory: str) -> None:
    balancers = BALANCERS["DualBalance"]
    run, module = fit(balancers, tmp_path, device, memory=memory)
    saved = tmp_path / "step=3.ckpt"
    again, resumed = fit(balancers, tmp_path, device, saved, memory=memory)
    same(run, module, again, resumed)
    # The other memory continues the same run, to rounding where sums are other ones.
    other = next(name for name in MEMORIES if name != memory)
    _, moved = fit(balancers, tmp_path, device, saved, memory=other)
    torch.testing.assert_close(parameters(moved.net), parameters(module.net), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("balancers", BALANCERS.values(), ids=BALANCERS)
def test_a_checkpoint_goes_from_one_to_the_other(
    cuda: str, tmp_path: Path, balancers: list[Any]
) -> None:
    """From the GPU to the processor and back; dropout then sees other random numbers."""
    fit(balancers, tmp_path, cuda)
    run, module = fit(balancers, tmp_path, "cpu", tmp_path / "step=3.ckpt")
    assert run.global_step == 20
    assert parameters(module.net).isfinite().all()
    last = Path(run.checkpoint_callback.best_model_path)
    again, _ = fit(balancers, tmp_path, cuda, last)
    assert again.global_step == 20
