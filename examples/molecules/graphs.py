"""Edges of a batch of molecules: between all atoms, and how long they are."""

from __future__ import annotations

from typing import Any

import torch


def completed(batch: Any) -> Any:
    """An edge between every two atoms of a molecule, with the bond between them.

    Args:
        batch: of PyTorch Geometric, with ``pos`` ``(A, 3)``, ``ptr`` ``(N + 1,)``, and the bonds
            ``edge_index`` ``(2, B)`` and ``edge_attr`` ``(B, 4)``.

    Returns:
        A copy with ``edge_index`` ``(2, E)``, ordered by source and then by target as in PyTorch
        Geometric's example, and ``edge_attr`` ``(E, 4)``: the kind of the bond, zeros where there
        is none.
    """
    sizes = batch.ptr.diff()
    device = batch.pos.device
    # Atom a of a molecule of n atoms is the source of n - 1 edges.
    graph = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    degree = sizes[graph] - 1
    atoms = torch.arange(len(graph), device=device)
    source = torch.repeat_interleave(atoms, degree)
    first = torch.cumsum(degree, 0) - degree  # the number of an atom's first edge
    place = torch.arange(len(source), device=device) - first[source]
    target = batch.ptr[graph[source]] + place
    target = target + (target >= source).long()  # no edge from an atom to itself
    # An edge's number: the source's first one, and the target's place among the others.
    begin, end = batch.edge_index
    place = end - batch.ptr[graph[begin]]
    number = first[begin] + place - (end > begin).long()
    bonds = batch.edge_attr.new_zeros(len(source), batch.edge_attr.shape[1])
    bonds[number] = batch.edge_attr
    found = batch.clone()
    found.edge_index, found.edge_attr = torch.stack([source, target]), bonds
    return found


def with_lengths(batch: Any) -> Any:
    """A copy whose edges have their length in Ångström as the last of their features."""
    source, target = batch.edge_index
    length = (batch.pos[target] - batch.pos[source]).norm(dim=1, keepdim=True)
    found = batch.clone()
    found.edge_attr = torch.cat([batch.edge_attr, length.to(batch.edge_attr.dtype)], dim=1)
    return found
