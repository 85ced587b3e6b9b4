"""One trunk backward pass with weights of an earlier step, and one of the heads."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.engine.forms.weighted import Weighted
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses


class Reuse(Weighted):
    """The weights of an earlier step for the trunk, and others, or ones, for the heads.

    Attributes:
        heads: weights of the head gradients, of all tasks; ``None`` for ones.
    """

    heads: Tensor | None = None

    def add(self, losses: TaskLosses, gradients: TaskGradients, stepping: bool) -> None:
        """Two backward passes of weighted sums, one of the shared parameters only."""
        self.note_uneven(losses, stepping)
        omega = self.weights_of(losses)
        if losses.tasks:
            setting = self.setting
            values = losses.stacked() * (setting.scale / setting.trainer.accumulate_grad_batches)
            shared = self.of(self.reused, losses, values)
            heads = values.new_ones(()) if self.heads is None else self.heads
            heads = self.of(heads, losses, values) if heads.ndim else heads
            gradients.add(0, values @ (omega * shared), retain_graph=True, heads=False)
            gradients.add(0, values @ (omega * heads), retain_graph=False, shared=False)

    def finish(self) -> None:
        """Write what was added up."""
        gradients = self.setting.gradients()
        gradients.agree()
        gradients.write_shared(gradients.combined(), every_column=False)
        gradients.write_heads(None)
        self.close()
