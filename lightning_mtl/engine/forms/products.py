"""A Gramian at the representation, corrected by exact products with that of all parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.again import Reached, Seen, replayed
from lightning_mtl.engine.forms.narrow import Probe
from lightning_mtl.engine.gradients.host import to_host
from lightning_mtl.engine.gradients.over_columns import Product
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.flat import as_grad, real

_TOLERANCE = 0.1  # of a length that is known in two ways
_COMPONENTS = 8  # of the representation; twice as many moved cosines by 0.001 at most in trials


class Products(Probe):
    r"""Task gradients :math:`R` at the representation, and exact products :math:`M w`.

    One trunk backward pass gives :math:`u = J^\top w`; one forward pass in forward mode gives the
    change :math:`\dot z` of the representation along :math:`u`, and with it
    :math:`M w = J u = R \dot z` for all tasks at once, whatever :math:`T` is.

    Two estimates of :math:`M` are fitted to the products. With samples :math:`b` and
    :math:`r_t^b` the row of task :math:`t` at sample :math:`b`,

    .. math:: E_0 = \sum_b \langle r_t^b, r_s^b \rangle, \qquad
              E_1 = \sum_{b, c} \langle \phi_b, \phi_c \rangle \langle r_t^b, r_s^c \rangle

    where :math:`\phi` are a few principal components of the representation. :math:`E_0` would be
    exact if samples shared no activations, and :math:`E_1`, with all components, for the weights
    of a linear layer behind the representation. Real trunks lie in between.

    Args:
        gradients: layout and head gradients.
        z: the shared representation.
        scale: what losses are multiplied by against underflow in half precision.
        module: whose forward pass is made again.
        seen: the batch.
    """

    def __init__(
        self,
        gradients: TaskGradients,
        z: Tensor,
        scale: float,
        module: TaskModule,
        seen: Seen,
    ) -> None:
        super().__init__(gradients, [z], representation=True, scale=scale)
        self.module, self.seen = module, seen
        self._estimates: list[Tensor] = []

    def gramian(self, rows: Tensor) -> Tensor:
        """The mean of both estimates, the second in the size of the first, shape ``(T, T)``."""
        first, second = super().gramian(rows), self._of_activations()
        second = torch.where(second.isfinite().all(), second, 0.0)
        self._estimates = [first, second]
        size = first.diagonal().mean() / second.diagonal().mean()
        mean = 0.5 * (first + second * size)
        return torch.where(size.isfinite(), mean, first)

    @property
    def product(self) -> Product:
        """Exact products with the Gramian of all shared parameters."""
        return self._product

    def _product(self, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Inner products of all task gradients with their combination.

        Args:
            weights: shape ``(T,)``.

        Returns:
            The products, shape ``(T,)``, and the estimates :math:`E_0` and :math:`E_1`; on the
            host.

        Raises:
            ValueError: forward mode disagrees with backward mode.
        """
        (z,), gradients = self.tensors, self.gradients
        shared = [gradients.parameters[name] for name in gradients.shared or ()]
        output = as_grad((weights.to(self.rows) @ self.rows).view_as(real(z.detach())), z)
        grads = torch.autograd.grad([z], shared, [output], retain_graph=True, allow_unused=True)
        gradients.begin_row()
        gradients.add_to_row(0, grads)
        direction = gradients.combined()
        change = self._change(shared, gradients.row_views(0))
        product = self.sum_shards(inner.along(self.rows, real(change).flatten()))
        length = inner.gramian(direction[None])
        found, length, *self._estimates = to_host(product, length, *self._estimates)
        self._check(float(weights.to(found) @ found), float(length))
        return found.to(weights), [e.to(weights) for e in self._estimates]

    def _of_activations(self) -> Tensor:
        """The estimate :math:`E_1`, shape ``(T, T)``; zeros if ranks differ in the width of z."""
        ranks, z = self.gradients.ranks, self.representation
        assert z is not None
        samples = z.to(self.rows).reshape(len(z) if z.ndim > 1 else 1, -1)
        width = samples.shape[1]
        if not ranks.alone:
            ends = ranks.max_(torch.tensor([width, -width], device=z.device))
            if ends.sum() != 0:  # padded to different lengths, say
                return self.rows.new_zeros(len(self.rows), len(self.rows), dtype=torch.float64)
        # One step of subspace iteration, from cosines: no random numbers, the same on every rank.
        number = min(_COMPONENTS, width, len(samples) if ranks.alone else width)
        places = torch.arange(width, device=z.device, dtype=samples.dtype)
        start = torch.cos(places[:number] * places[:, None])
        basis = torch.linalg.qr(ranks.sum_(samples.T @ (samples @ start)))[0]
        rows = self.rows.view(-1, *samples.shape)
        sums = ranks.sum_((samples @ basis).T @ rows)  # (T, components, width)
        return inner.gramian(sums.flatten(1))

    def _change(self, shared: Sequence[nn.Parameter], tangents: Sequence[Tensor]) -> Tensor:
        """The derivative of the representation along ``tangents``, in forward mode."""
        flow = self.module._flow
        assert flow is not None
        flow.replaying = True
        try:
            with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
                # PyTorch's own rules for forward mode are compiled by what it calls deprecated.
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
                pairs = zip(shared, tangents, strict=True)
                duals = {id(p): forward_ad.make_dual(p.detach(), as_grad(t, p)) for p, t in pairs}
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                    again = self._again(duals)
                change = forward_ad.unpack_dual(again).tangent
                return torch.zeros_like(again) if change is None else change
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

    def _again(self, duals: dict[int, Tensor]) -> Tensor:
        """The representation of the batch with other tensors in the place of the parameters."""
        try:
            with _in_place_of(self.module, duals), replayed(self.module, self.seen):
                pass
        except Reached as reached:
            return reached.representation
        flow = self.module._flow
        found = "it was not marked"
        if flow is not None and not flow.replaying:
            found = "something caught what ends the forward pass there (an `except:`, say)"
        raise ValueError(
            f"Expected the shared representation once more for the same batch but {found}. Use "
            f"`gradients='representation'`."
        )

    def _check(self, found: float, expected: float) -> None:
        """Compare a length in forward mode with that of backward mode."""
        if abs(found - expected) > _TOLERANCE * abs(expected):
            raise ValueError(
                f"Expected a squared length of {expected:.4g} in forward mode, as in backward "
                f"mode, but found {found:.4g}: the forward pass is not the same once more, or a "
                f"layer does not read its parameters by name (recurrent layers). Use "
                f"`gradients='representation'` or 'parameters'."
            )


@contextmanager
def _in_place_of(module: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, by the identity of those, for a while."""
    places = [
        (m._parameters, name, p)
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None and id(p) in tensors
    ]
    missing = len(tensors.keys() - {id(p) for _, _, p in places})
    if missing:
        raise ValueError(
            f"Expected every shared parameter in {type(module).__name__} with `gradients="
            f"'representation+1'` but {missing} of them are held by an optimizer alone, outside of "
            f"it. Register the modules that hold them, or use `gradients='representation'`."
        )
    try:
        for holder, name, p in places:
            holder[name] = tensors[id(p)]  # type: ignore[assignment] # no Parameter, for a while
        yield
    finally:
        for holder, name, p in places:
            holder[name] = p
