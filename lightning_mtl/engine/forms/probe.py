"""Task gradients by a few columns at a time, then one trunk backward pass with their weights."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.engine.forms.bad_sum import refuse_bad_sum
from lightning_mtl.engine.forms.balanced import Balanced
from lightning_mtl.engine.forms.blocks import Blocks
from lightning_mtl.engine.forms.last_layer import check_behind, check_shared, last_layer
from lightning_mtl.engine.forms.narrow import Probe
from lightning_mtl.engine.forms.products import Products
from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses


class Probed(Balanced):
    """Gradients at the last layer or the representation, or a block of parameters at a time."""

    _probe: Probe | None = None  # from a micro-batch to the direction

    @classmethod
    def check(cls, setting: Setting, losses: TaskLosses, marked: Sequence[Tensor]) -> None:
        """Refuse a representation that does not carry every task's way to the trunk."""
        balancer = setting.gradient_balancer
        if balancer is not None and balancer.gradients.startswith("representation"):
            check_behind(marked, losses.values, setting.gradients())

    def add(self, losses: TaskLosses, gradients: TaskGradients, stepping: bool) -> None:
        """The narrow rows and the head gradients; the graph is kept for the direction."""
        balancer = self.setting.gradient_balancer
        assert balancer is not None
        self._probe = self._open(balancer, gradients)
        self._probe.collect(losses)
        if self._probe.repeats and not self.setting.told_of_repeats:
            self.setting.told_of_repeats = True
            rank_zero_warn(
                "Backward passes are repeated with `gradient_memory='blocks'`: the graph of the "
                "losses has too few places that every path passes (skips over many layers, "
                "parameters used at several depths). Weights are exact. With a smaller "
                "`gradient_blocks` it takes less time and more memory."
            )

    def finish(self) -> None:
        """Balance, and take the direction by one backward pass of the trunk."""
        probe, self._probe = self._probe, None  # which keeps a graph
        assert probe is not None
        self.balance(probe)
        if not self.group.skip:
            refuse_bad_sum(self.setting, self.group)

    def _open(self, balancer: GradientBalancer, gradients: TaskGradients) -> Probe:
        """Rows at the level that the balancer asks for.

        Raises:
            ValueError: the shared parameters are not known yet, there are none, or the
                representation was not marked once.
        """
        module, scale = self.setting.module, self.setting.scale
        level, marked = balancer.gradients, self.marked
        if level == "parameters":
            check_shared(module, balancer, gradients, "`gradient_memory='blocks'`")
            return Blocks(gradients, module.gradient_blocks, scale)
        check_shared(module, balancer, gradients, f"`gradients='{level}'`")
        if level == "last_layer":
            tensors = last_layer(module, balancer, gradients)
            return Probe(gradients, tensors, representation=False, scale=scale)
        if len(marked) != 1 or not marked[0].requires_grad:
            raise ValueError(
                f"Expected one shared representation a batch with `gradients='{level}'` of "
                f"{type(balancer).__name__} but found {len(marked)}. Write `z = "
                f"self.shared_representation(self.encoder(x))` once in `forward`, with a trunk "
                f"that trains."
            )
        if balancer.products:
            (seen,) = self.group.seen
            return Products(gradients, marked[0], scale, module, seen)
        return Probe(gradients, marked, representation=True, scale=scale)
