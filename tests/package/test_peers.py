"""Faults that were found in other libraries for multi-task balancing, one test each: not here."""

from __future__ import annotations

import ast
import math
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, LossBalancer
from lightning_mtl.engine.guards import BadLossError
from lightning_mtl.gradient_balancers.aligned_mtl import AlignedMTL
from lightning_mtl.gradient_balancers.cagrad import CAGrad
from lightning_mtl.gradient_balancers.con_fig import ConFIG
from lightning_mtl.gradient_balancers.dual_balance import DualBalance
from lightning_mtl.gradient_balancers.dual_proj import DualProj
from lightning_mtl.gradient_balancers.excess_mtl import ExcessMTL
from lightning_mtl.gradient_balancers.fair_grad import FairGrad
from lightning_mtl.gradient_balancers.grad_vac import GradVac
from lightning_mtl.gradient_balancers.imtl import IMTL
from lightning_mtl.gradient_balancers.imtlg import IMTLG
from lightning_mtl.gradient_balancers.min_norm import MinNorm
from lightning_mtl.gradient_balancers.mo_co import MoCo
from lightning_mtl.gradient_balancers.nash_mtl import NashMTL
from lightning_mtl.gradient_balancers.pcgrad import PCGrad
from lightning_mtl.gradient_balancers.smooth import Smooth
from lightning_mtl.gradient_balancers.upgrad import UPGrad
from lightning_mtl.loss_balancers.dynamic_weight_average import DynamicWeightAverage
from lightning_mtl.loss_balancers.famo import FAMO
from lightning_mtl.loss_balancers.geometric_mean import GeometricMean
from tests.common.methods import METHODS, Method, direction, fixture, named
from tests.common.models import Balanced, Sum, loader, trainer, weights
from tests.common.places import ROOT
from tests.engine.test_edges import fit_both
from tests.engine.test_flow import Linear, one_step
from tests.methods.test_state import saved

# Those of which another library fails under bfloat16, and some more with weights from the Gramian.
GRAMIAN = [UPGrad, DualProj, CAGrad, NashMTL, FairGrad, IMTLG, AlignedMTL, ConFIG, MinNorm, PCGrad]
each = pytest.mark.parametrize("make", GRAMIAN, ids=lambda make: make.__name__)
gradient_methods = pytest.mark.parametrize(
    "method",
    [
        m
        for m in METHODS
        if issubclass(m.cls, GradientBalancer) and not issubclass(m.cls, LossBalancer)
    ],
    ids=lambda m: m.name,
)


def along(balancer: GradientBalancer, rows: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    jacobian = torch.as_tensor(rows, dtype=dtype)
    return balancer.direction(jacobian, torch.ones(len(jacobian), dtype=dtype))


def weighed(balancer: GradientBalancer, rows: Any) -> Tensor:
    jacobian = torch.as_tensor(rows, dtype=torch.float64)
    return balancer.weights(jacobian @ jacobian.T, torch.ones(len(jacobian), dtype=torch.float64))


@gradient_methods
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [(torch.bfloat16, 1.0, 1e-2), (torch.float16, 100.0, 2e-3)],
    ids=["bfloat16", "float16"],
)
def test_half_precision_gives_the_direction_of_float32(
    method: Method, dtype: torch.dtype, size: float, tolerance: float
) -> None:
    """Methods failed on bfloat16 or computed in it; float16 has no inner products of hundreds."""
    generator = torch.Generator().manual_seed(0)
    half, full = named(method, 3), named(method, 3)
    losses = torch.tensor([2.0, 0.5, 1.5])
    for _ in range(4):
        jacobian = (size * torch.randn(3, 64, generator=generator)).to(dtype)
        found = direction(half, jacobian, losses.to(dtype))
        expected = direction(full, jacobian.float(), losses)
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert float((found.float() - expected).norm()) <= tolerance * float(expected.norm())
    assert expected.any()


@each
def test_bf16_mixed_training(make: Any) -> None:
    module = Balanced()
    start = weights(module)
    trainer(callbacks=[make()], precision="bf16-mixed").fit(module, loader(), loader(16))
    assert weights(module).isfinite().all()
    assert float((weights(module) - start).norm()) > 1e-2


class Dtypes(Callback):
    """The dtypes of the gradients at each step."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
        self.seen |= {p.grad.dtype for p in module.parameters()}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
@pytest.mark.parametrize("make", [MinNorm, UPGrad, DualBalance, MoCo])
def test_gradients_have_the_dtype_of_their_parameters(make: Any, precision, dtype) -> None:
    """They were forced to float32."""
    dtypes = Dtypes()
    run = trainer(callbacks=[make(), dtypes], precision=precision)
    run.fit(Balanced(), loader(), loader(16))
    assert dtypes.seen == {dtype}


STATEFUL = {
    "GradVac": lambda: GradVac(seed=1),
    "ExcessMTL": lambda: ExcessMTL(warm_up=2),
    "NashMTL": lambda: NashMTL(update_weights_every=3),
    "Smooth": lambda: Smooth(MinNorm()),
    "MoCo": MoCo,
    "DynamicWeightAverage": lambda: DynamicWeightAverage(window=2),
    "FAMO": FAMO,
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_dict_is_whole_and_loads(name: str) -> None:
    """Six methods could not load their own state, two saved none, one lost Adam's moments."""
    generator = torch.Generator().manual_seed(0)
    first, fresh = STATEFUL[name](), STATEFUL[name]()
    for _ in range(5):
        losses = torch.rand(3, generator=generator) + 0.1
        direction(first, torch.randn(3, 8, generator=generator), losses)
    assert any(v is not None for v in saved(first)["state"].values())
    fresh.load_state_dict(saved(first))
    losses, without = torch.tensor([2.0, 0.5, 1.5]), STATEFUL[name]()
    found = []
    for _ in range(3):
        jacobian = torch.randn(3, 8, generator=generator)
        found.append([direction(b, jacobian, losses) for b in (first, fresh, without)])
    assert all(torch.equal(a, b) for a, b, _ in found)
    assert not all(torch.equal(a, c) for a, _, c in found)


@pytest.mark.parametrize("size", [3, 11])
def test_min_norm_is_exact_for_norms_1000_times_apart(size: int) -> None:
    """A fixed number of Frank-Wolfe steps left the norm up to three times too long."""
    generator = torch.Generator().manual_seed(size)
    scales = torch.logspace(0, 3, size, dtype=torch.float64)[:, None]
    for _ in range(20):
        rows = scales * torch.randn(size, 30, generator=generator, dtype=torch.float64)
        found = along(MinNorm(), rows)
        # Optimal if and only if no row has a smaller product with it than it has with itself.
        assert float((rows @ found).min()) >= (1 - 1e-9) * float(found @ found) > 0


def test_min_norm_of_one_task_and_of_long_gradients() -> None:
    """A sentinel of 1e8 for squared norms broke both."""
    assert torch.equal(along(MinNorm(), [[3.0, 4.0]]), torch.tensor([3.0, 4.0]).double())
    jacobian, _ = fixture("E3")
    expected = along(MinNorm(), jacobian)
    torch.testing.assert_close(along(MinNorm(), 1e6 * jacobian), 1e6 * expected)


@each
def test_small_gradients_are_balanced_too(make: Any) -> None:
    """Absolute tolerances turned methods into the average, or exploded."""
    jacobian, _ = fixture("E3")
    expected = along(make(), jacobian)
    found = along(make(), 1e-8 * jacobian)
    scale = 1.0 if make in (NashMTL, FairGrad) else 1e-8  # these two do not depend on it
    torch.testing.assert_close(found / scale, expected, rtol=1e-6, atol=1e-9)


@each
@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[1.0, 2.0, -1.0], [1.0, 2.0, -1.0]],
        [[1.0, 2.0, -1.0], [-1.0, -2.0, 1.0]],
        [[1.0, 2.0, -1.0]],
    ],
    ids=["one zero", "all zero", "identical", "opposite", "one task"],
)
def test_degenerate_gradients(make: Any, rows: Any) -> None:
    """NaN, LinAlgError, ValueError, IndexError and UnboundLocalError, each in some method."""
    jacobian = torch.tensor(rows, dtype=torch.float64)
    found, used = along(make(), rows), weighed(make(), rows)
    torch.testing.assert_close(used @ jacobian, found)
    assert used.isfinite().all()
    assert float(found.norm()) <= 2 * float(jacobian.norm()) + 1  # Nash-MTL has norm one at most
    if len(rows) == 1 or rows[0] == rows[1]:
        assert float(found @ jacobian[0]) >= 0  # along the only direction that there is
        if any(rows[0]):
            assert float(found @ jacobian[0]) > 0.99 * float(found.norm() * jacobian[0].norm()) > 0
    if len(rows) == 2 and rows[1] == [-x for x in rows[0]]:
        assert float(found.norm()) < 1e-9


@pytest.mark.parametrize("make", [IMTLG, IMTL])
def test_imtl_of_zero_and_identical_gradients(make: Any) -> None:
    """NaN for a zero gradient, LinAlgError for identical ones."""
    losses = torch.tensor([2.0, 0.5], dtype=torch.float64)
    first = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    found = direction(make(), torch.stack([first, 0 * first]), losses)
    assert found.isfinite().all()
    assert float(found @ first) >= 0
    found = direction(make(), torch.stack([first, first]), losses)
    torch.testing.assert_close(found / found.norm(), first / first.norm())


def test_nash_solves_where_others_fall_back_to_ones() -> None:
    """The weights of the step before, ones at first, were used without a word."""
    row = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    norm = float(row.norm())
    unclipped = lambda: NashMTL(max_norm=None)  # noqa: E731
    for rows, expected in (
        ([row], [1 / norm]),
        ([row, 0 * row], [1 / norm, 0.0]),
        ([row, row], [1 / (math.sqrt(2) * norm)] * 2),
        ([1e-8 * row, 1e-8 * row], [1e8 / (math.sqrt(2) * norm)] * 2),
    ):
        found = weighed(unclipped(), torch.stack(rows))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    opposite = torch.stack([row, -2 * row])
    used = weighed(unclipped(), opposite)
    assert float((used @ opposite).norm()) < 1e-9
    assert float((used - 1).abs().max()) > 1e-3
    jacobian, _ = fixture("E3")
    used = weighed(unclipped(), jacobian)
    torch.testing.assert_close(jacobian @ jacobian.T @ used, 1 / used)


def test_aligned_mtl_runs() -> None:
    """It called a function that PyTorch no longer has."""
    jacobian, _ = fixture("E3")
    system = torch.stack([along(AlignedMTL(), jacobian)])
    assert system.isfinite().all()
    values = torch.linalg.svdvals(jacobian)
    # A sum of T orthogonal gradients, each as long as the smallest singular value.
    assert float(system.norm()) == pytest.approx(math.sqrt(3) * float(values.min()))


def test_geometric_mean_reports_the_weights_it_uses() -> None:
    """The weights that were logged were not those of the gradient."""
    module = one_step(Linear([2.0, 0.5], [[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0]]), GeometricMean())
    expected = torch.tensor([0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(module.last_step.loss_weights.double(), expected)
    torch.testing.assert_close(torch.stack([-psi.detach() for psi in module.psi]), expected)


class Labels(Balanced):
    """Task b has no labels in every second batch; ``without`` is what its loss is then."""

    def __init__(self, without: Any) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.01))
        self.without = without

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        losses = dict(super().task_losses(batch, batch_idx))
        if batch_idx % 2:
            losses["b"] = self.without(losses["b"])
        return losses


@each
def test_missing_labels(make: Any) -> None:
    module = Labels(lambda loss: None)
    trainer(callbacks=[make()]).fit(module, loader(), loader(16))
    assert weights(module).isfinite().all()


def test_a_constant_loss_is_explained() -> None:
    """It was an error of autograd; here it says what to return, and a masked loss trains."""
    with pytest.raises(ValueError, match=r"loss of task 'b' to have a graph .* Return None for a"):
        trainer(callbacks=[UPGrad()]).fit(Labels(torch.zeros_like), loader(), loader(16))
    module = Labels(lambda loss: 0 * loss)
    with pytest.warns(UserWarning, match=r"The gradient of \['b'\] is exactly zero"):
        trainer(callbacks=[UPGrad()]).fit(module, loader(), loader(16))
    assert weights(module).isfinite().all()


def test_nan_losses_do_not_pass() -> None:
    module = Labels(lambda loss: loss * math.nan)
    with pytest.raises(BadLossError, match=r"at optimiser step 2 but found \{'b': nan\}"):
        trainer(callbacks=[UPGrad()]).fit(module, loader(), loader(16))
    assert weights(module).isfinite().all()


def test_a_trunk_parameter_may_serve_in_a_head() -> None:
    def make(base: Any) -> Any:
        module = base()
        forward = module.net.forward

        def reusing(x: Tensor) -> dict[str, Tensor]:
            found = forward(x)
            found["b"] = found["b"] + x @ module.net.trunk[0].weight.sum(0)
            return found

        module.net.forward = reusing
        return module

    plain, ours = fit_both(make, callbacks=lambda: [Sum()])
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-5)


class Zeroing(Balanced):
    """Clears gradients as the test says."""

    set_to_none = True

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=self.set_to_none)


@pytest.mark.parametrize("make", [MinNorm, UPGrad, DualBalance])
def test_gradients_that_are_none_are_filled(make: Any) -> None:
    """With gradients set to None, gradient methods did nothing."""
    found = []
    for set_to_none in (True, False):
        module = Zeroing()
        module.set_to_none = set_to_none
        start = weights(module)
        trainer(callbacks=[make()]).fit(module, loader(), loader(16))
        assert float((weights(module) - start).norm()) > 1e-2
        found.append(weights(module))
    assert torch.equal(*found)


class Encoder(Balanced):
    """Marks what all heads start from."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.shared_representation(self.net.trunk(x).tanh())
        return {name[5:]: head(z).squeeze(-1) for name, head in self.net.heads.items()}


@each
def test_the_encoder_trains_with_gradients_of_the_representation(make: Any) -> None:
    """It stayed as it was initialised."""
    module = Encoder()
    start = [p.detach().clone() for p in module.net.trunk.parameters()]
    balancer = make(gradients="representation")
    trainer(callbacks=[balancer]).fit(module, loader(), loader(16))
    for before, p in zip(start, module.net.trunk.parameters(), strict=True):
        assert float((p.detach() - before).norm()) > 1e-4


@each
def test_accumulated_gradients_are_those_of_the_large_batch(make: Any) -> None:
    """Accumulation was not supported: the last micro-batch, or methods applied to each."""
    found = []
    for size, every in ((8, 1), (4, 2)):
        module = Balanced()
        run = trainer(
            callbacks=[make(seed=1) if make is PCGrad else make()], accumulate_grad_batches=every
        )
        run.fit(module, loader(batch_size=size), loader(16))
        assert run.global_step == 10
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)


def test_nothing_but_the_core_is_needed() -> None:
    """Solvers needed quadprog, qpsolvers, cvxpy, clarabel, ecos or scipy."""
    core = {
        "lightning",
        "lightning_mtl",
        "numpy",
        "torch",
        "torchmetrics",
        *sys.stdlib_module_names,
    }
    package = ROOT / "lightning_mtl"
    for file in (*package.glob("numerics/*.py"), *package.glob("*_balancers/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= core, file
