"""A Gramian from estimates of it and exact products with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.numerics.quadratic import Array, nnls, to_numpy

# Products that differ by less say the same, and their difference is rounding: of float32; or, in
# half precision, so many times what they are seen to contradict each other by.
_SAME, _ABOVE = 1e-6, 10.0


def estimated(
    estimates: Sequence[Tensor], weights: Sequence[Tensor], products: Sequence[Tensor]
) -> Tensor:
    r"""The non-negative combination of the estimates that fits the products best, made exact there.

    .. math:: M_0 = \sum_i c_i E_i, \qquad c = \arg\min_{c \ge 0} \sum_k \Big\lVert D^{-1}
              \Big(\sum_i c_i E_i w_k - M w_k\Big) \Big\rVert^2 / \lVert D^{-1} M w_k \rVert^2,
              \qquad D = \operatorname{diag}(E_0)^{1/2}

    followed by :func:`corrected`. The scaling by :math:`D` lets a task with small gradients count
    as much as one with large ones.

    Args:
        estimates: :math:`E_i`, positive semi-definite, shape ``(T, T)``.
        weights: :math:`w_k`, shape ``(T,)``.
        products: :math:`M w_k` with the true Gramian, shape ``(T,)``; one without length, with
            :math:`w_k^\top M w_k \le 0`, tells nothing and is left out.

    Returns:
        A positive semi-definite Gramian in the dtype of the estimates, the first of them where no
        product tells anything.
    """
    pairs = zip(weights, products, strict=True)
    kept = [(to_numpy(w), to_numpy(v)) for w, v in pairs if w @ v > 0]
    if not kept:
        return estimates[0]
    matrices = [to_numpy(e) for e in estimates]
    norms = np.sqrt(np.maximum(matrices[0].diagonal(), 0.0))
    inverse = 1.0 / np.where(norms > 0, norms, 1.0)
    columns, goals = [], []
    for w, v in kept:
        length = np.linalg.norm(v * inverse)
        columns.append(np.stack([(e @ w) * inverse for e in matrices], axis=1) / length)
        goals.append(v * inverse / length)
    a, b = np.concatenate(columns), np.concatenate(goals)
    lengths = np.linalg.norm(a, axis=0)
    lengths = np.where(lengths > 0, lengths, np.inf)  # an estimate that is zero, and stays so
    a = a / lengths
    shares = nnls(a.T @ a, a.T @ b) / lengths
    if not shares.any():  # every estimate points away from the products: keep the length at least
        before = sum(w @ matrices[0] @ w for w, _ in kept)
        shares[0] = sum(w @ v for w, v in kept) / before if before > 0 else 1.0
    start = sum(share * e for share, e in zip(shares, matrices, strict=True))
    like = estimates[0]
    return corrected(torch.as_tensor(start), *(torch.as_tensor(x) for x in _stacked(kept))).to(like)


def corrected(gramian: Tensor, weights: Tensor, products: Tensor) -> Tensor:
    r"""An estimate that takes on exact products, and stays positive semi-definite.

    .. math:: M_1 = P M_0 P^\top + V A^+ V^\top, \qquad P = I - V A^+ W^\top, \qquad V = M W,
              \qquad A = W^\top V, \qquad M_1 W = V

    As Davidon, Fletcher and Powell correct a matrix: of the two ways that keep it semi-definite it
    is the one that leaves tasks alone which the combination hardly moves.

    Args:
        gramian: :math:`M_0`, positive semi-definite, shape ``(T, T)``, float64.
        weights: :math:`W`, a column a product, shape ``(T, K)``.
        products: :math:`V`, shape ``(T, K)``, with a positive diagonal of :math:`W^\top V`.
    """
    unit = (weights * products).sum(0).rsqrt()  # columns of length one in M
    weights, products = weights * unit, products * unit
    lengths = weights.T @ products
    image = products @ _inverse(lengths)
    left = torch.eye(len(gramian), dtype=gramian.dtype) - image @ weights.T
    found: Tensor = left @ gramian @ left.T + image @ products.T
    return found


def _inverse(matrix: Tensor) -> Tensor:
    """Of what is above rounding, which shows in how far the matrix is from being symmetric."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    rounding = float((matrix - matrix.T).abs().max() / values[-1])
    kept = values > max(_SAME, _ABOVE * rounding) * values[-1]
    inverse: Tensor = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return inverse


def _stacked(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.stack([w for w, _ in pairs], 1), np.stack([v for _, v in pairs], 1)
