"""A Gramian at the representation, corrected by exact products with that of all parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from lightning_mtl.again import Seen, replayed
from lightning_mtl.host import to_host
from lightning_mtl.jacobian import TaskGradients
from lightning_mtl.probe import Probe

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule

_TOLERANCE = 0.1  # of a length that is known in two ways


class Products(Probe):
    r"""Task gradients :math:`R` at the representation, and exact products :math:`M w`.

    One trunk backward pass gives :math:`u = J^\top w`; one forward pass in forward mode gives the
    change :math:`\dot z` of the representation along :math:`u`, and with it
    :math:`M w = J u = R \dot z` for all tasks at once, whatever :math:`T` is. The estimate
    :math:`M_0 \propto R R^\top` then takes on this product and stays positive semi-definite:

    .. math:: M_1 = M_0 - \frac{M_0 w w^\top M_0}{w^\top M_0 w} + \frac{v v^\top}{w^\top v},
              \qquad v = M w

    Args:
        gradients: layout and head gradients.
        z: the shared representation.
        scale: what losses are multiplied by against underflow in half precision.
        module: whose forward pass is made again.
        seen: the batch.
        marked: where the module puts the representation when it is marked.
    """

    def __init__(
        self,
        gradients: TaskGradients,
        z: Tensor,
        scale: float,
        module: MultiTaskModule,
        seen: Seen,
        marked: list[Tensor],
    ) -> None:
        super().__init__(gradients, [z], representation=True, scale=scale)
        self.module, self.seen, self.marked = module, seen, marked

    def product(self, weights: Tensor) -> Tensor:
        """Inner products of all task gradients with their combination, on the host.

        Args:
            weights: shape ``(T,)``.

        Raises:
            ValueError: forward mode disagrees with backward mode.
        """
        (z,), gradients = self.tensors, self.gradients
        shared = [gradients.parameters[name] for name in gradients.shared or ()]
        output = (weights.to(self.rows) @ self.rows).view_as(z).to(z.dtype)
        grads = torch.autograd.grad([z], shared, [output], retain_graph=True, allow_unused=True)
        gradients.begin_row()
        gradients.add_to_row(0, grads)
        direction = gradients.combined()
        change = self._change(shared, gradients.row_views(0))
        product = self.sum_shards(self.rows @ change.flatten().to(self.rows))
        found, length = to_host(product, direction @ direction)
        self._check(float(weights.to(found) @ found), float(length))
        return found.to(weights)

    def _change(self, shared: Sequence[nn.Parameter], tangents: Sequence[Tensor]) -> Tensor:
        """The derivative of the representation along ``tangents``, in forward mode."""
        number = len(self.marked)
        flow = self.module._flow
        assert flow is not None
        flow.replaying = True
        try:
            with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
                # PyTorch's own rules for forward mode are compiled by what it calls deprecated.
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
                pairs = zip(shared, tangents, strict=True)
                duals = {id(p): forward_ad.make_dual(p.detach(), t.to(p.dtype)) for p, t in pairs}
                with _in_place_of(self.module, duals), replayed(self.module, self.seen):
                    again = self.marked[number:]
                if len(again) != 1:
                    raise ValueError(
                        f"Expected the shared representation once more for the same batch but "
                        f"found {len(again)}. Use `gradients='representation'`."
                    )
                change = forward_ad.unpack_dual(again[0]).tangent
                return torch.zeros_like(again[0]) if change is None else change
        except (NotImplementedError, RuntimeError) as error:
            if not any(word in str(error) for word in ("forward AD", "forward mode", "jvp")):
                raise  # out of memory, say
            raise type(error)(
                f"Expected forward-mode derivatives of every layer of the trunk with "
                f"`gradients='representation+1'` but found one without: {error} Use "
                f"`gradients='representation'` or 'parameters'."
            ) from error
        finally:
            flow.replaying = False
            del self.marked[number:]

    def _check(self, found: float, expected: float) -> None:
        """Compare a length in forward mode with that of backward mode."""
        if abs(found - expected) > _TOLERANCE * abs(expected):
            raise ValueError(
                f"Expected a squared length of {expected:.4g} in forward mode, as in backward "
                f"mode, but found {found:.4g}: the forward pass is not the same once more, or a "
                f"layer does not read its parameters by name (recurrent layers). Use "
                f"`gradients='representation'` or 'parameters'."
            )


def corrected(gramian: Tensor, weights: Tensor, product: Tensor) -> Tensor:
    """An estimate of a Gramian that takes on an exact product; itself where that has no length.

    Args:
        gramian: the estimate so far, positive semi-definite, shape ``(T, T)``.
        weights: :math:`w`, shape ``(T,)``.
        product: :math:`M w` with the true Gramian, shape ``(T,)``.
    """
    length, before = weights @ product, weights @ gramian @ weights
    if not (length > 0 and before > 0):
        return gramian
    gramian = gramian * (length / before)
    image = gramian @ weights
    return gramian + (torch.outer(product, product) - torch.outer(image, image)) / length


@contextmanager
def _in_place_of(module: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, by the identity of those, for a while."""
    places = [
        (m._parameters, name, p)
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None and id(p) in tensors
    ]
    try:
        for holder, name, p in places:
            holder[name] = tensors[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for holder, name, p in places:
            holder[name] = p
