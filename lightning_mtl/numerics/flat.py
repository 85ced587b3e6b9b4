"""Parameters as parts of one flat vector of real numbers, each with its own strides."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Shape, strides and offset of each part.
Places = list[tuple[torch.Size, tuple[int, ...], int]]


def real(tensor: Tensor) -> Tensor:
    """The tensor; a complex one as real numbers, with a last dimension of 2."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def wide(tensors: Iterable[Tensor]) -> torch.dtype:
    """What holds the numbers of all real tensors: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_device(parameters: Iterable[Tensor]) -> None:
    """Refuse shared parameters on several devices.

    Raises:
        ValueError: they are.
    """
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"Expected the shared parameters on one device but found them on "
            f"{sorted(map(str, devices))}. Keep the shared trunk on one device, or return the "
            f"part on one from `shared_parameters()`."
        )


def places(parameters: Iterable[Tensor]) -> Places:
    """Where each real parameter lies in a vector that has one after the other.

    With its own strides where these fill it without gap or overlap (``view`` would lose
    channels_last), else contiguous, as autograd's own gradients are.
    """
    found, offset = [], 0
    for p in parameters:
        like = torch.empty_like(p, device="meta")
        stride = like.stride() if like.stride() == p.stride() else like.contiguous().stride()
        found.append((p.shape, stride, offset))
        offset += p.numel()
    return found


def views(flat: Tensor, parts: Places) -> list[Tensor]:
    """The parts of a vector."""
    start = flat.storage_offset()
    return [flat.as_strided(shape, stride, start + offset) for shape, stride, offset in parts]


def as_grad(part: Tensor, parameter: Tensor) -> Tensor:
    """What a part is as the gradient of a parameter: in its dtype, complex where that is."""
    if parameter.is_complex() and not part.is_complex():
        part = torch.view_as_complex(part.clone())
    return part if part.dtype == parameter.dtype else part.to(parameter.dtype)


def with_places(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector that belong to real parameters."""
    return views(flat, places(parameters))


# References that Python does not see, such as another parameter's gradient. Not in every PyTorch.
_use_count: Callable[[Tensor], int] = getattr(Tensor, "_use_count", sys.getrefcount)


class Line:
    """A vector whose parts are given away as gradients, and taken back when nobody keeps them.

    Hooks may keep what they see, as they may where each step has gradients of its own. A new
    vector a step would do, but the memory of a large one comes page by page from the system.

    Args:
        vector: the memory.
        parts: where its parts lie.
    """

    def __init__(self, vector: Tensor, parts: Places) -> None:
        self.vector = vector
        self.views = views(vector, parts)
        self._own = self._holders()
        self.given = False

    def kept(self) -> bool:
        """Whether somebody has a part still, the part itself or another view of it."""
        return self.given and self._holders() != self._own

    def _holders(self) -> tuple[int, int, int]:
        memory = self.vector.untyped_storage()._cdata
        return (
            torch._C._storage_Use_Count(memory),
            sum(map(sys.getrefcount, self.views)),
            sum(map(_use_count, self.views)),
        )
