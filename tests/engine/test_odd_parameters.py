"""Parameters of unusual kinds, complex, sparse, lazy, empty, with gaps: right or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import SAMO, Every, MinNorm, MultiTaskModule, NashMTL
from tests.common.faulty import fitted, parameters, same
from tests.common.models import Sum, loader, resume_from, trainer


class Odd(MultiTaskModule):
    """Two linear heads on a trunk; what is unusual comes in between, for ``b`` too if shared."""

    def __init__(self, make: Any, shared: bool = True, **kwargs: Any) -> None:
        super().__init__(tasks=("a", "b"), **kwargs)
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
        self.shared = shared
        self.odd = make()

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        z = self.trunk(x).tanh()
        both = [self.odd(z), self.odd(z) if self.shared else z]
        found = [head(z).squeeze(-1) for head, z in zip(self.heads, both, strict=True)]
        return {
            t: (f - y).square().mean() for f, (t, y) in zip(found, targets.items(), strict=True)
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))

    def forward(self, z: Tensor) -> Tensor:
        found = z.to(self.w.dtype) @ self.w
        return found.abs() + 0.3 * found.imag


class Looked(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 6, sparse=sparse)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.table((z[:, 0].abs() * 8).long().clamp(max=7))


class Scaled(nn.Module):
    """By whatever parameter there is, of six elements or none."""

    def __init__(self, *parameters: Tensor) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(p) for p in parameters])

    def forward(self, z: Tensor) -> Tensor:
        for p in self.w:
            z = z * p.reshape(-1)[:6].to(z) if p.numel() else z + p.sum()
        return z


KINDS: dict[str, Any] = {
    "complex": Complex,
    "dense table": lambda: Looked(sparse=False),
    "lazy": lambda: nn.LazyLinear(6),
    "scalar and empty": lambda: Scaled(torch.tensor(2.0), torch.zeros(0, 4)),
    "gaps": lambda: Scaled(torch.ones(12)[::2]),
    "transposed": lambda: Scaled(torch.ones(3, 2).T),
    "double": lambda: Scaled(torch.ones(6, dtype=torch.float64)),
}
FORMS: dict[str, Any] = {
    "rows": (Sum, {}),
    "blocks": (Sum, {"gradient_memory": "blocks"}),
    "bf16": (Sum, {"gradient_memory": "bf16"}),
    "last layer": (lambda: Sum(gradients="last_layer"), {}),
    "reuse": (lambda: Every(2, Sum()), {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_the_long_way_round(kind: str, shared: bool, form: str) -> None:
    """Equal weights of task gradients are the plain sum, in every form."""
    balancer, options = FORMS[form]
    expected = fitted(Odd(KINDS[kind], shared), loader(24))
    found = fitted(Odd(KINDS[kind], shared, **options), loader(24), [balancer()])
    atol = 2e-2 if form == "bf16" else 1e-5
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=1e-4, atol=atol)
    start = Odd(KINDS[kind]).trunk.weight
    assert not torch.equal(start, expected["parameters"]["trunk.weight"])


def test_complex_parameters_count_as_pairs_of_numbers() -> None:
    """MinNorm's weights are those of the same network with real parameters."""

    class Pairs(Complex):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.view_as_real(self.w.detach()).clone())

        def forward(self, z: Tensor) -> Tensor:
            w = torch.view_as_complex(self.w)
            found = z.to(w.dtype) @ w
            return found.abs() + 0.3 * found.imag

    for balancer in (MinNorm, NashMTL, lambda: SAMO(seed=1)):
        one, two = Odd(Complex), Odd(Pairs)
        fitted(one, loader(24), [balancer()])
        fitted(two, loader(24), [balancer()])
        torch.testing.assert_close(torch.view_as_real(one.odd.w), two.odd.w, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.trunk.weight, two.trunk.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_sparse_shared_table_is_refused(form: str) -> None:
    balancer, options = FORMS[form]
    module = Odd(lambda: Looked(sparse=True), **options)
    before = parameters(module)
    message = r"but found sparse ones of \['odd.table.weight'\]. Use nn.Embedding\(sparse=False\)"
    with pytest.raises(ValueError, match=message):
        fitted(module, loader(24), [balancer()])
    assert same(parameters(module), before)


@pytest.mark.filterwarnings("ignore:Resuming with a training loader that cannot save")
def test_a_sparse_shared_table_is_refused_after_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(callbacks=[Sum()])
    run.fit(Odd(lambda: Looked(sparse=False)), loader(8))
    run.save_checkpoint(tmp_path / "dense.ckpt")
    module = Odd(lambda: Looked(sparse=True))
    run = trainer(callbacks=[Sum()], max_epochs=2)
    with pytest.raises(ValueError, match=r"sparse ones of \['odd.table.weight'\]"):
        run.fit(module, loader(8), **resume_from(tmp_path / "dense.ckpt"))


@pytest.mark.parametrize("balancer", [None, Sum])
def test_a_sparse_table_of_one_task_trains(balancer: Any) -> None:
    expected = fitted(Odd(lambda: Looked(sparse=False), shared=False), loader(24))
    module = Odd(lambda: Looked(sparse=True), shared=False)
    fitted(module, loader(24), [balancer()] if balancer else [])
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(module.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Complex, lambda: Looked(sparse=True)], ids=["complex", "sparse"])
def test_a_bad_gradient_of_one_task_is_seen_there(make: Any) -> None:
    """The loss is finite, the gradient is not."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, z: Tensor) -> Tensor:
            found = self.inner(z.detach())
            return z + (found - found).abs().sqrt()

    module = Odd(Root, shared=False)
    before = parameters(module)
    with pytest.raises(ValueError, match="gradient"):
        fitted(module, loader(24), [Sum()])
    assert same(parameters(module), before)
