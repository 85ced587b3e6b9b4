"""What the graph of a loss reaches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_LEAF = torch._C._functions.AccumulateGrad


def is_leaf(node: Any) -> bool:
    """Whether a node stands for a leaf, its ``variable``; others may have an attribute so named."""
    return type(node) is _LEAF


def reachable(loss: Tensor, stop: Tensor | None = None) -> set[int]:
    """Ids of the leaves that a loss depends on, from its graph.

    Args:
        loss: with a graph.
        stop: a tensor behind which not to look.

    Raises:
        ValueError: reentrant activation checkpointing hides a part of the graph.
    """
    todo: list[Any] = [loss.grad_fn]
    seen, leaves = set[Any](), set[int]()
    if stop is not None:
        seen.add(stop.grad_fn)
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "Expected the whole graph of the losses but found reentrant activation "
                "checkpointing, which hides the parameters inside from task gradients. Call "
                "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
            )
        if is_leaf(node):
            leaves.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return leaves


def leads_to(node: Any, all_of: set[Any]) -> bool:
    """Whether a node of a graph was computed from all of some others, or is one of them."""
    todo, seen, missing = [node], set(), set(all_of)
    while todo and missing:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        missing.discard(node)
        todo += [following for following, _ in node.next_functions]
    return not missing


def compiled(roots: Iterable[Any]) -> bool:
    """Whether a part behind these nodes was compiled: it gives zeros where there is no path."""
    todo, seen = list(roots), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CompiledFunctionBackward":
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False
