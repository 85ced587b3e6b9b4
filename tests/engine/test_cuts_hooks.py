"""Hooks and functions of the user's, block by block: as with rows, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_mtl import UPGrad
from tests.common.models import Batched, trainer
from tests.engine.test_cuts import TASKS, Mlp, Module, Net, fitted


class Doubled(torch.autograd.Function):
    """Keeps an attribute that leaves have, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = 3
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * g


class InPlace(torch.autograd.Function):
    """Overwrites the gradient that it gets, where two ways meet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x + 2 * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g.mul_(2), g.clone()


class Stopped(Doubled):
    """Gives no gradient at all."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


class Clipped(Doubled):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / g.norm()


class Auxiliary(torch.autograd.Function):
    """Adds a loss in the backward pass, as code for mixtures of experts does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, torch.ones((), dtype=g.dtype)


def changed(change: Callable[[int, Tensor], Tensor]) -> Callable[[], Net]:
    """A chain whose layers' outputs are changed, or given hooks."""

    class Changed(Mlp):
        method = UPGrad

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for i, layer in enumerate(self.trunk[::2]):
                x = change(i, layer(x)).tanh()
            return self.outputs(x)

    return Changed


class Beside(Net):
    """Two weights between two places: passes of their own, from one gradient."""

    method = UPGrad

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for one, two in zip(self.pairs[::2], self.pairs[1::2], strict=True):
            x = InPlace.apply(one(x).tanh(), two(x).sigmoid())
        return self.outputs(x)


class FirstApart(Net):
    """Two tasks share nothing in the first batch; a third one shares with both of them later."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))
        self.batches = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.batches += 1
        one, two = self.one(x).tanh(), self.two(x).tanh()
        if self.batches == 1:
            return {"a": self.heads["a"](one), "b": self.heads["b"](two)}
        return self.outputs(one, two, self.three(one + two).tanh())


class Jagged(Mlp):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        ends = torch.tensor([0, 2, len(x)])
        z = torch.nested.nested_tensor_from_jagged(self.trunk[0](x), ends)
        for layer in self.trunk[2:6:2]:
            z = torch.tanh(linear(z, layer.weight, layer.bias))
        return self.outputs(self.trunk[6:](z.values()))


class SparseHead(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 6, sparse=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        words = self.words(torch.arange(len(x)) % 5).sum(1, keepdim=True)
        return {**found, "a": found["a"] + words}


EXACT: dict[str, Callable[[], Net]] = {
    "attribute of leaves": changed(lambda i, x: Doubled.apply(x) if i == 2 else x),
    "gradient changed in place": Beside,
    "no gradient": changed(lambda i, x: Stopped.apply(x) if i == 2 else x),
    "nodes below no gradient": changed(
        lambda i, x: (
            Stopped.apply(x) if i == 4 else Auxiliary.apply(x, x.square().mean()) if i == 2 else x
        )
    ),
    "shared later": FirstApart,
    "nested tensors": Jagged,
    "sparse head": SparseHead,
}


@pytest.mark.filterwarnings("ignore")  # prototypes of torch, what `a` does not reach
@pytest.mark.parametrize("number", [2, 99])
@pytest.mark.parametrize("name", EXACT)
def test_as_with_rows(name: str, number: int) -> None:
    (whole, _), (found, _) = (fitted(EXACT[name], m, number) for m in ("full", "blocks"))
    assert whole.isfinite().all()
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_a_loss_that_is_a_parameter() -> None:
    class Free(Module):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(Mlp, **kwargs)
            self.free = nn.Parameter(torch.ones((), dtype=torch.float64))

        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return {**super().task_losses(batch, batch_idx), "c": self.free}

    ends = []
    for memory in ("full", "blocks"):
        module = Free(gradient_memory=memory)
        generator = torch.Generator().manual_seed(0)
        data = Batched(torch.randn(4, 5, 6, dtype=torch.float64, generator=generator))
        trainer(callbacks=[UPGrad()], precision="64-true").fit(module, data)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)


def hooked(hook: Callable[[Tensor], Tensor]) -> Callable[[], Net]:
    def change(i: int, x: Tensor) -> Tensor:
        x.register_hook(hook)
        return x

    return changed(change)


class HookedParameter(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.trunk[4].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))


class HookedModule(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.trunk[2].register_full_backward_hook(lambda m, below, above: None)


class PreHookedModule(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.trunk[2].register_full_backward_pre_hook(lambda m, above: None)


REFUSED: dict[str, tuple[Callable[[], Net], str]] = {
    "tensor hook": (hooked(lambda g: g.clamp(-1e-3, 1e-3)), "is not linear"),
    "parameter hook": (HookedParameter, "is not linear"),
    "function": (changed(lambda i, x: Clipped.apply(x) if i == 2 else x), "is not linear"),
    "auxiliary loss": (
        changed(lambda i, x: Auxiliary.apply(x, x.square().mean()) if i == 2 else x),
        "is not linear",
    ),
    "hook in place": (hooked(lambda g: g.neg_()), "changed it in place"),
    "module hook": (HookedModule, "no module with hooks of its backward pass"),
    "module pre-hook": (PreHookedModule, "no module with hooks of its backward pass"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    """And nothing is changed."""
    kind, words = REFUSED[name]
    module = Module(kind, gradient_memory="blocks", gradient_blocks=99)
    before = [p.detach().clone() for p in module.parameters()]
    data = Batched(torch.randn(4, 5, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=words):
        trainer(callbacks=[UPGrad()], precision="64-true").fit(module, data)
    assert all(map(torch.equal, before, module.parameters()))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_rounding_is_no_fault(precision: str) -> None:
    """Of two directions that nearly cancel, in every precision."""

    class Opposed(Module):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            found = self.net(batch.to(next(self.parameters()).dtype))
            sign = dict(zip(TASKS, (1.0, -1.0, 1e-4), strict=True))
            return {t: sign[t] * y.float().mean() for t, y in found.items()}

    module = Opposed(Mlp, gradient_memory="blocks", gradient_blocks=99)
    module.net.float()
    with torch.no_grad():
        for task in "bc":
            module.net.heads[task].load_state_dict(module.net.heads["a"].state_dict())
    data = Batched(torch.randn(4, 64, 6))
    fit = trainer(callbacks=[UPGrad()], precision=precision)
    fit.fit(module, data)
    assert fit.global_step == 4


@pytest.mark.parametrize(
    ("name", "before", "value"),
    [
        ("gradient_memory", "full", "blocks"),
        ("gradient_memory", "blocks", "full"),
        ("shard_gradients", False, True),
    ],
)
def test_the_memory_stays_during_a_fit(name: str, before: Any, value: Any) -> None:
    class Changes(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            setattr(self, name, before)  # as it is
            if batch_idx == 1:
                setattr(self, name, value)

    module = Changes(Mlp, **{name: before})
    data = Batched(torch.randn(4, 5, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=f"Expected `{name}` of Changes to stay {before!r}"):
        trainer(callbacks=[UPGrad()], precision="64-true").fit(module, data)
    setattr(module, name, value)  # the fit is over
