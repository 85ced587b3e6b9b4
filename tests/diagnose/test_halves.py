"""Halves of batches of any structure: every sample in one of them, and what cannot be divided."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.diagnose.halves import UnsplittableError, halves

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float


X = torch.arange(10.0).reshape(5, 2)
BATCHES = {
    "tuple": (X, {"a": X[:, 0], "b": X[:, :1]}),
    "list": [X, [X, X[:, 0]]],
    "named": Pair(X, X[:, 0]),
    "dataclass": {"in": Frozen(X, 2.0), "name": "batch"},
    "numpy": {"x": X, "y": np.arange(5)},
    "texts": {"x": X, "text": ["a", "b", "c", "d", "e"]},
    "scalar": (X, torch.tensor(3.0)),
}


def first_tensor(value):
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Frozen):
        return value.x
    return first_tensor(next(iter(value.values())) if isinstance(value, dict) else value[0])


@pytest.mark.parametrize("name", BATCHES)
def test_samples_are_divided(name):
    batch = BATCHES[name]
    one, other, size = halves(batch)
    assert size == 2
    assert type(one) is type(batch)
    assert torch.equal(first_tensor(one), X[[0, 2]])
    assert torch.equal(first_tensor(other), X[[1, 3]])
    assert torch.equal(first_tensor(batch), X)  # the batch is as it was


def test_what_is_no_sample_stays():
    one, _, _ = halves(BATCHES["texts"])
    assert one["text"] == ["a", "c"]
    one, _, _ = halves(BATCHES["dataclass"])
    assert one["in"].scale == 2
    assert one["name"] == "batch"
    one, _, _ = halves(BATCHES["scalar"])
    assert one[1] == 3


class Graph:
    x = X


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ((X, X[:3]), "first dimensions of [3, 5]"),
        (X[:1], "1 sample"),
        ({"n": 3}, "no tensor"),
        (Graph(), "a Graph"),
        ([torch.zeros(3, 4, 4), torch.zeros(2, 4, 4)], "first dimensions of [2, 3]"),
    ],
)
def test_what_cannot_be_divided_says_why(batch, why):
    with pytest.raises(UnsplittableError) as error:
        halves(batch)
    assert why in str(error.value)
