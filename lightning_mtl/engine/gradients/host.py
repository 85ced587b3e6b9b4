"""The one transfer of a step: small tensors from the device to the host, where solvers run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.numerics.flat import real


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Small tensors on the CPU, in their own shapes and dtypes, by one transfer.

    Whoever waits for a device waits for all that it has still to do, so a step does it once.

    Args:
        tensors: real, of at most float64, on one device or the CPU.
    """
    if all(t.device.type == "cpu" for t in tensors):
        return [t.detach() if t.requires_grad else t for t in tensors]
    device = next(t.device for t in tensors if t.device.type != "cpu")
    flat = torch.cat([t.detach().to(device, torch.float64).flatten() for t in tensors]).cpu()
    parts = flat.split([t.numel() for t in tensors])
    return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]


def non_finite(tensors: Sequence[Tensor]) -> Tensor:
    """A number that is above zero if the tensors hold one that is not finite.

    On their device, in one pass, without waiting for it.
    """
    usable = [
        _dense_real(t) if t.layout is not torch.strided or t.is_complex() or t.requires_grad else t
        for t in tensors
    ]
    devices = list(dict.fromkeys(t.device for t in usable))
    found = [torch.zeros((), dtype=torch.float32, device=device) for device in devices]
    for flag, device in zip(found, devices, strict=True):
        group = [t for t in usable if t.device == device]
        torch._amp_foreach_non_finite_check_and_unscale_(group, flag, _one(device))
    if len(found) == 1:
        return found[0]
    return torch.stack([f.to(devices[0]) for f in found]).sum() if found else torch.zeros(())


def _dense_real(tensor: Tensor) -> Tensor:
    """All numbers of a tensor that is sparse, complex or has a graph."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return real(tensor)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every number in the tensors is finite."""
    return non_finite(tensors).item() == 0
