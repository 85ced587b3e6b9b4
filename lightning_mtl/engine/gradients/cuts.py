"""Where every path of a graph passes: the graph in parts, each with the parameters used in it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_mtl.engine.gradients.graph import is_leaf
from lightning_mtl.numerics.flat import real

_CACHED = 1 << 18  # numbers: 1 MB in float32


@dataclass
class Part:
    """What lies between a place where all paths from the losses pass and the next such place.

    Attributes:
        top: where it begins; ``None`` for the losses.
        width: how many numbers the tensor there has.
        used: leaves that are used in it, from the losses down; some may be named twice.
    """

    top: GradientEdge | None
    width: int
    used: list[Tensor] = field(default_factory=list)


def parts(losses: Sequence[Tensor]) -> list[Part]:
    """The graph of the losses from the top down; one part where no place has all paths.

    A place is an output of a node: with the edges that jump over each point of the order in which
    the nodes were made, it is one that all of them lead to. What only leads to leaves, such as a
    transposed weight, belongs to where it is used.

    Args:
        losses: with a graph, or leaves.

    Raises:
        ValueError: a module has hooks of its backward pass.
    """
    roots = [(loss.grad_fn, loss.output_nr) for loss in losses if loss.grad_fn is not None]
    order = _made_last_first([node for node, _ in roots])
    place = {node: i for i, node in enumerate(order)}
    first: dict[tuple[Any, int], int] = dict.fromkeys(roots, -1)  # who leads to an output first
    used: list[list[Tensor]] = [[] for _ in order]
    leaves = {node: _leaves_of(node) for node in order}
    for node in {node for node, _ in roots}:
        leaves[node] = []
    for i, node in enumerate(order):
        if leaves[node]:
            continue  # taken where it is used
        for child, number in node.next_functions:
            if child is None:
                continue
            if is_leaf(child):
                used[i].append(child.variable)
            elif leaves[child]:
                used[i] += leaves[child]
            elif place[child] <= i:  # made by several threads, say: their order tells nothing
                return [Part(None, 0, _all_leaves(order))]
            else:
                first.setdefault((child, number), i)
    begin: list[list[tuple[Any, int]]] = [[] for _ in range(len(order) + 1)]
    end: list[list[tuple[Any, int]]] = [[] for _ in range(len(order) + 1)]
    for edge, i in first.items():
        begin[i + 1].append(edge)
        end[place[edge[0]] + 1].append(edge)
    found = [Part(None, 0, [loss for loss in losses if loss.grad_fn is None])]
    open_edges = set[tuple[Any, int]]()
    for i, leaves_here in enumerate(used):
        open_edges.difference_update(end[i])
        open_edges.update(begin[i])
        if i and len(open_edges) == 1:
            (edge,) = open_edges
            tensor = edge[0]._input_metadata[edge[1]]
            if found[-1].top != GradientEdge(*edge) and not tensor.is_nested_tensor:
                found.append(Part(GradientEdge(*edge), math.prod(tensor.shape)))
        found[-1].used += leaves_here
    return found


@dataclass
class Block:
    """Consecutive parts whose rows are taken together.

    Attributes:
        top: where it begins; ``None`` for the losses.
        bottom: where the next one begins; ``None`` for none.
        groups: the wanted leaves in groups, each taken by passes of its own.
        others: all other leaves that are used in it.
    """

    top: GradientEdge | None
    bottom: GradientEdge | None
    groups: list[list[Tensor]]
    others: list[Tensor]

    @property
    def repeats(self) -> bool:
        """Whether tasks go through a part of the graph more than once for it."""
        return len(self.groups) > 1


def blocks(found: Sequence[Part], wanted: Collection[int], number: int, tasks: int) -> list[Block]:
    """Put parts together to ``number`` blocks of equal size or more.

    More than ``number`` cost no pass where parts end, and rows that stay in the cache are the
    faster for it; a part that is larger is divided by passes of its own.

    A leaf that is used in several blocks comes last, by passes from the losses, since a pass
    through one block has a part of its gradient only.

    Args:
        found: see :func:`parts`.
        wanted: ids of the leaves whose rows are wanted.
        number: of blocks, about and at least.
        tasks: how many rows a block has.
    """
    every = {id(leaf): leaf for part in found for leaf in part.used}
    size = {i: _size(leaf) for i, leaf in every.items() if i in wanted}
    # A leaf is never divided, and a small one beside a large one, its bias say, costs no pass.
    widest = max(sum(size.values()) / number, *size.values(), 0)
    widest += min(widest / 4, max(widest / 16, 1 << 14))
    enough = _CACHED // tasks
    tops, width, choice = [0], 0, 0  # where blocks begin; `choice`: where the next one may
    for i, part in enumerate(found):
        more = sum(size.get(i, 0) for i in {id(leaf) for leaf in part.used})
        if not more:
            if i and (choice <= tops[-1] or part.width < found[choice].width):
                choice = i
            continue
        if choice <= tops[-1] or part.width <= found[choice].width:
            choice = i
        if width and (width >= enough or width + more > widest) and choice > tops[-1]:
            tops.append(choice)
            width = 0
        width, choice = width + more, 0
    bounds = [*tops, len(found)]
    pieces = [
        {id(leaf): leaf for part in found[a:b] for leaf in part.used} for a, b in pairwise(bounds)
    ]
    times: dict[int, int] = {}
    for piece in pieces:
        for i in piece:
            times[i] = times.get(i, 0) + 1
    made = []
    for n, piece in enumerate(pieces):
        own = {i: leaf for i, leaf in piece.items() if times[i] == 1}
        bottom = found[bounds[n + 1]].top if n + 1 < len(tops) else None
        made.append(_block(found[bounds[n]].top, bottom, own, size, widest))
    several = {i: every[i] for i, count in times.items() if count > 1}
    return [*made, _block(None, None, several, size, widest)] if several else made


def _block(
    top: GradientEdge | None,
    bottom: GradientEdge | None,
    leaves: dict[int, Tensor],
    size: dict[int, int],
    widest: float,
) -> Block:
    groups: list[list[Tensor]] = [[]]
    width = 0
    for i, leaf in leaves.items():
        if i in size:
            if groups[-1] and width + size[i] > widest:
                groups.append([])
                width = 0
            groups[-1].append(leaf)
            width += size[i]
    return Block(top, bottom, groups, [leaf for i, leaf in leaves.items() if i not in size])


def _size(leaf: Tensor) -> int:
    return real(leaf.detach()).numel()


def _made_last_first(roots: Sequence[Any]) -> list[Any]:
    """All nodes behind ``roots`` but leaves, those that were made last first."""
    todo, seen = list(roots), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or is_leaf(node):
            continue
        if node.name() == "BackwardHookFunctionBackward":
            raise ValueError(
                "Expected no module with hooks of its backward pass "
                "(`register_full_backward_hook`, `register_full_backward_pre_hook`) under "
                "`gradient_memory='blocks'` but found one in the graph of the losses: where a "
                "block ends inside of it, it would see one task's gradient with another's. Remove "
                "the hook, register it on tensors, or use `gradient_memory='full'`."
            )
        seen.add(node)
        todo += [child for child, _ in node.next_functions]
    return sorted(seen, key=lambda node: -node._sequence_nr())


def _leaves_of(node: Any) -> list[Tensor]:
    """Leaves behind a node that leads to leaves alone; empty for other nodes."""
    children = [child for child, _ in node.next_functions if child is not None]
    if not all(map(is_leaf, children)):
        return []
    return [child.variable for child in children]


def _all_leaves(order: Sequence[Any]) -> list[Tensor]:
    children = [child for node in order for child, _ in node.next_functions if child is not None]
    return [child.variable for child in children if is_leaf(child)]


def coarsest(losses: Sequence[Tensor]) -> float:
    """The relative rounding of the gradients behind losses, where it is largest."""
    nodes = _made_last_first([loss.grad_fn for loss in losses])
    found = [tensor for node in nodes for tensor in node._input_metadata]
    rounding = [torch.finfo(t.dtype).eps for t in found if t.dtype.is_floating_point]
    tf32 = [2.0**-10 for t in found if t.device.type != "cpu" and t.dtype == torch.float32]
    return max(rounding + tf32, default=0.0)


def zeros_at(place: GradientEdge) -> Tensor:
    """Zeros of the shape of the tensor there."""
    tensor = place.node._input_metadata[place.output_nr]
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@contextmanager
def entering(top: GradientEdge, gradient: Tensor | None) -> Iterator[None]:
    """Let a gradient enter as it is: hooks of the tensor there changed it in the block above.

    Hooks of the node have not seen it, and see it now. ``None`` enters as what is not defined.

    Raises:
        ValueError: in the backward pass, when a hook of the tensor changes it in place.
    """
    before = 0 if gradient is None else gradient._version

    def replace(grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        if gradient is not None and gradient._version != before:
            raise ValueError(
                "Expected hooks of tensors to return another gradient under "
                "`gradient_memory='blocks'` but found one that changed it in place, which counts "
                "twice where a block ends. Return `g * 0.5` instead of `g.mul_(0.5)`, or use "
                "`gradient_memory='full'`."
            )
        return tuple(gradient if i == top.output_nr else g for i, g in enumerate(grads))

    handle = top.node.register_prehook(replace)
    hooks: Any = handle.hooks_dict_ref()
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)  # the engine calls them in the order in which they were put
    try:
        yield
    finally:
        handle.remove()
