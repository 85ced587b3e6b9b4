"""Golden vectors of the convex methods that the table of methods does not reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_mtl.gradient_balancers import min_norm_weights
from lightning_mtl.gradient_balancers.cagrad import cagrad_weights
from lightning_mtl.gradient_balancers.sdmgrad import SDMGrad
from lightning_mtl.numerics.quadratic import (
    min_norm_of_rays,
    min_norm_point,
    nnls_rows,
    project_on_simplex,
    unit_gramian,
)
from tests.common.methods import fixture, vector
from tests.methods.test_vectors import close

NAMES = ["E2", "E3"]
USED = {
    f"{name}.{key}"
    for name in NAMES
    for key in (
        *("M", "n", "cos", "edm.k", "edm.gam", "up.wreg", "sdm.w", "sdm.ref5", "sdm.ref10"),
        *(f"mgda.{kind}.dnorm" for kind in ("none", "l2", "loss", "loss+")),
        *(f"cagrad{c}.{x}" for c in (0.4, 0.5) for x in "cw"),
    )
} | {"C3.edm.k", "C3.edm.gam"}


def gramian(name: str) -> torch.Tensor:
    jacobian, _ = fixture(name)
    return jacobian @ jacobian.T


@pytest.mark.parametrize("name", NAMES)
def test_gramian_norms_and_cosines(name: str) -> None:
    close(gramian(name), f"{name}.M", 1e-12)
    cosines, norms = unit_gramian(gramian(name).numpy())
    close(torch.from_numpy(cosines), f"{name}.cos", 1e-12)
    close(torch.from_numpy(norms), f"{name}.n", 1e-12)


@pytest.mark.parametrize("name", [*NAMES, "C3"])
def test_shares_of_the_central_direction(name: str) -> None:
    cosines, norms = unit_gramian(gramian(name).numpy())
    shares = min_norm_of_rays(cosines, np.ones(len(norms)))
    close(torch.from_numpy(shares), f"{name}.edm.k", 1e-12)
    close(torch.tensor(1 / (shares / norms).sum()), f"{name}.edm.gam", 1e-12)


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("name", NAMES)
def test_normalised_min_norm(name: str, normalization: str) -> None:
    jacobian, losses = fixture(name)
    norms = jacobian.norm(dim=1)
    divisor = {"none": 1, "l2": norms, "loss": losses, "loss+": losses * norms}[normalization]
    weights = min_norm_weights(jacobian @ jacobian.T, losses, normalization)
    close((weights / divisor) @ jacobian, f"{name}.mgda.{normalization}.dnorm", 1e-6)


@pytest.mark.parametrize("c", [0.4, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_radius_and_inner_weights_of_cagrad(name: str, c: float) -> None:
    jacobian, _ = fixture(name)
    added = cagrad_weights(jacobian @ jacobian.T, c, rescale=0) - 1 / len(jacobian)
    close((added @ jacobian).norm(), f"{name}.cagrad{c}.c", 1e-12)
    close(added / added.sum(), f"{name}.cagrad{c}.w", 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_upgrad_with_the_published_regularisation(name: str) -> None:
    """What the 1e-4 on the diagonal of the published code changes."""
    matrix = gramian(name).numpy()
    size = len(matrix)
    regularised = matrix / matrix.trace() + 1e-4 * np.eye(size)
    found = np.eye(size) / size + nnls_rows(regularised, -regularised / size)
    close(torch.from_numpy(found.sum(0)), f"{name}.up.wreg", 1e-6)
    assert np.abs(found.sum(0) - vector(f"{name}.up.w").numpy()).max() > 2e-5


def published_iteration(matrix: np.ndarray, lam: float, lr: float) -> np.ndarray:
    """SDMGrad's code: momentum 0.5, a projection after each of 20 steps."""
    size = len(matrix)
    scaled = matrix / np.sqrt(matrix.diagonal()).mean() ** 2
    w, speed = np.full(size, 1 / size), np.zeros(size)
    for _ in range(20):
        speed = 0.5 * speed + scaled @ (w + lam / size)
        w = project_on_simplex(w - lr * speed)
    return w


@pytest.mark.parametrize("name", NAMES)
def test_inner_weights_of_sdmgrad(name: str) -> None:
    """The exact ones; the published iteration ends elsewhere; the one for batches gets there."""
    jacobian, losses = fixture(name)
    matrix = gramian(name).numpy()
    along = matrix.mean(1)
    shifted = matrix + 0.3 * (along + along[:, None]) + 0.09 * along.mean()
    close(torch.from_numpy(min_norm_point(shifted)), f"{name}.sdm.w", 1e-6)
    for lr in (5, 10):
        close(torch.from_numpy(published_iteration(matrix, 0.3, lr)), f"{name}.sdm.ref{lr}", 1e-12)
        assert (vector(f"{name}.sdm.ref{lr}") - vector(f"{name}.sdm.w")).abs().max() > 0.4
    balancer = SDMGrad(batches=3)
    for _ in range(1500):
        found = balancer.direction(jacobian.expand(3, -1, -1), losses)
    close(balancer.offsets + 1 / len(losses), f"{name}.sdm.w", 1e-6)
    close(found, f"{name}.sdm.d", 1e-6)
