"""Where task gradients are kept: less memory, and the same training as far as it is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mtl import SAMO, DualBalance, GradientBalancer, LogLoss, MinNorm
from lightning_mtl.numerics.inner import along, gramian, norms
from lightning_mtl.numerics.storage import allocate, combine
from tests.common.method_rows.row import Method
from tests.common.methods import METHODS
from tests.common.models import Balanced, loader, trainer, weights
from tests.engine.test_forms import Observer


def takes_rows(method: Method) -> bool:
    made = method.make()
    rows = isinstance(made, GradientBalancer) and made.needs_jacobian
    return rows and not isinstance(made, SAMO) and made.gradients == "parameters"  # type: ignore[attr-defined]


ROWS = [m for m in METHODS if takes_rows(m)]
WEIGHTED = [m for m in ROWS if m.make().gramian_weighted and not m.flags]  # type: ignore[attr-defined]
each = {"ids": lambda m: m.name}


def fit(memory: str, *callbacks: Any, module: type = Balanced, **kwargs: Any) -> Any:
    """A module after twenty steps."""
    options = {k: kwargs.pop(k) for k in ("gradient_blocks", "on_bad_loss") if k in kwargs}
    made = module(gradient_memory=memory, tasks=("a", "b", "c"), **options)
    run = trainer(callbacks=list(callbacks), **kwargs)
    run.fit(made, loader(tasks=("a", "b", "c")))
    return made


@pytest.mark.parametrize("method", WEIGHTED, **each)
def test_blocks_train_as_the_whole_matrix(method: Method) -> None:
    whole = fit("full", method.make(), max_steps=8)
    blocks = fit("blocks", method.make(), max_steps=8, gradient_blocks=3)
    torch.testing.assert_close(weights(blocks), weights(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 99])
@pytest.mark.parametrize("first", [[], [LogLoss()]])
def test_any_number_of_blocks(number: int, first: list[Any]) -> None:
    whole = fit("full", *first, MinNorm())
    blocks = fit("blocks", *first, MinNorm(), gradient_blocks=number)
    torch.testing.assert_close(weights(blocks), weights(whole), rtol=0, atol=1e-5)
    rows = blocks._flow.layout._gradients
    assert rows is None  # released with the fit


def test_blocks_hold_no_whole_matrix() -> None:
    """Nor a vector as wide: gradients are those of a step, as in plain training."""
    seen: list[Any] = []

    class Looks(Observer):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gradients = pl_module._flow.layout._gradients
            seen.extend((gradients.rows, gradients._line, gradients._narrow))

    fit("blocks", MinNorm(), Looks())
    assert set(seen) == {None}


def test_blocks_are_recorded_as_the_whole_matrix() -> None:
    whole, blocks = Observer(), Observer()
    fit("full", MinNorm(), whole)
    fit("blocks", MinNorm(), blocks)
    assert len(whole.records) == len(blocks.records) == 20
    for expected, found in zip(whole.records, blocks.records, strict=True):
        for name in ("losses", "gradient_weights", "gramian", "alignment", "direction_norm"):
            want = getattr(expected, name)
            torch.testing.assert_close(getattr(found, name), want, rtol=1e-3, atol=1e-4)


class Holes(Balanced):
    """A task is absent in some batches, and its gradient is not finite in others."""

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = dict(super().task_losses(batch, batch_idx))
        if batch_idx % 4 == 1:
            del losses["b"]
        if batch_idx % 5 == 2:
            losses["c"] = losses["c"] + (losses["c"] * 0).sqrt()
        return losses


@pytest.mark.filterwarnings("ignore:A loss or a gradient of optimiser step")
@pytest.mark.parametrize("rule", ["skip_task", "skip_step"])
@pytest.mark.parametrize("memory", ["blocks", "host"])
def test_absent_tasks_and_bad_gradients(memory: str, rule: str) -> None:
    whole = fit("full", MinNorm(), module=Holes, on_bad_loss=rule)
    other = fit(memory, MinNorm(), module=Holes, on_bad_loss=rule)
    assert weights(whole).isfinite().all()
    torch.testing.assert_close(weights(other), weights(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ROWS, **each)
def test_host_memory_changes_nothing(method: Method) -> None:
    """On the CPU; where there is a GPU, the arithmetic moves to the host with the rows."""
    whole = fit("full", method.make(), max_steps=4, **method.flags)
    host = fit("host", method.make(), max_steps=4, **method.flags)
    assert torch.equal(weights(host), weights(whole))


@pytest.mark.parametrize("method", ROWS, **each)
def test_half_precision_goes_the_same_way(method: Method) -> None:
    """One step, in which no decision by the sign of a rounded number is taken twice."""
    start = weights(Balanced(tasks=("a", "b", "c")))
    whole = weights(fit("full", method.make(), max_steps=1, **method.flags)) - start
    half = weights(fit("bf16", method.make(), max_steps=1, **method.flags)) - start
    assert half.isfinite().all()
    cosine = torch.cosine_similarity(half.double(), whole.double(), dim=0)
    assert cosine > 0.99, float(cosine)
    assert (half - whole).norm() < 0.1 * whole.norm()


def test_half_precision_also_for_state() -> None:
    balancer = DualBalance()
    half = fit("bf16", balancer)
    assert balancer.average is not None
    assert balancer.average.dtype == torch.bfloat16
    whole = fit("full", DualBalance())
    assert (weights(half) - weights(whole)).norm() < 0.05 * weights(whole).norm()


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (3, 1 << 19), (7, 300_001)])
def test_arithmetic_in_parts(rows: int, columns: int) -> None:
    """Rows in bfloat16 give the sums of their own values, in float32."""
    torch.manual_seed(0)
    half = allocate(rows, columns, "bf16", torch.zeros(0), torch.float32)
    half.copy_(torch.randn(rows, columns))
    exact, w = half.double(), torch.randn(rows)
    out, vector = torch.zeros(columns), torch.randn(columns)
    close: dict[str, float] = {"rtol": 1e-4, "atol": 2e-2}
    torch.testing.assert_close(gramian(half).double(), exact @ exact.T, **close)
    torch.testing.assert_close(combine(half, w, out).double(), w.double() @ exact, **close)
    torch.testing.assert_close(along(half, vector).double(), exact @ vector.double(), **close)


@pytest.mark.parametrize(
    ("memory", "balancer", "flags", "words"),
    [
        ("blocks", DualBalance(), {}, "DualBalance, which needs task gradients whole"),
        ("blocks", SAMO(), {}, "SAMO"),
        ("blocks", MinNorm(), {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
    ],
)
def test_what_blocks_cannot_do(memory: str, balancer: Any, flags: Any, words: str) -> None:
    module = Balanced(gradient_memory=memory)
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=words):
        trainer(callbacks=[balancer], **flags).fit(module, loader())
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"gradient_memory": "disk"}, "'bf16', 'host', 'blocks'.*'disk'"),
        ({"gradient_blocks": 0}, "`gradient_blocks` of Balanced .* at least 1, found 0"),
    ],
)
def test_arguments(kwargs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Balanced(**kwargs)


def test_blocks_with_a_task_that_comes_late_train_as_the_whole_matrix() -> None:
    class Late(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = dict(super().task_losses(batch, batch_idx))
            return losses if batch_idx else {"a": losses["a"]}

    whole, blocks = fit("full", MinNorm(), module=Late), fit("blocks", MinNorm(), module=Late)
    torch.testing.assert_close(weights(blocks), weights(whole), rtol=0, atol=1e-5)


def test_half_precision_is_recorded_in_full() -> None:
    """What a monitor shows is no number of three digits."""
    observer = Observer()
    fit("bf16", DualBalance(), observer, max_steps=2)
    for record in observer.records:
        assert record.alignment.dtype == record.direction_norm.dtype == torch.float64
    observer = Observer()
    fit("bf16", MinNorm(), observer, max_steps=2)
    for record in observer.records:  # three digits would not do
        w, gramian = record.gradient_weights, record.gramian
        torch.testing.assert_close(record.alignment, gramian @ w, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            record.direction_norm.square(), w @ gramian @ w, rtol=1e-4, atol=0
        )


def test_norms_of_narrow_rows_are_those_of_wide_ones() -> None:
    torch.manual_seed(0)
    rows = (1e3 * torch.randn(3, 3_000_000)).bfloat16()  # a few columns at a time, more than once
    rows[1] = 0
    exact = torch.linalg.vector_norm(rows.double(), dim=1)
    torch.testing.assert_close(norms(rows), exact, rtol=1e-12, atol=0)
    assert norms(rows[:, :0]).tolist() == [0.0, 0.0, 0.0]
    assert not norms(torch.full((1, 4), torch.nan).bfloat16()).isfinite()
