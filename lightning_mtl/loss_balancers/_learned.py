"""What loss balancers share that learn the logarithm of a factor for every loss."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.arguments import in_range
from lightning_mtl.balancer import LossBalancer, at_least_float32
from lightning_mtl.numerics.adam import adam_step

_FARTHEST = 70.0  # the logarithm of about 1e30: weights stay float32 numbers
_STEEPEST = 1e15  # its square is a float32 number


class Learned(LossBalancer):
    r"""Learn :math:`s_t` by one step of Adam after each optimiser step.

    :math:`s_t` is kept within 70 of zero and its gradient within 1e15. A class gives
    :meth:`slope`, and its weights by :meth:`learned`.

    Args:
        state: the name that :math:`s` has in checkpoints.
        init: the first :math:`s_t` of every task.
        lr: learning rate of :math:`s`.

    Raises:
        ValueError: ``init`` is not within 70 of zero, or ``lr`` is not above zero.
    """

    needs_current_losses = False
    moments: Tensor | None

    def __init__(self, state: str, init: float, lr: float) -> None:
        super().__init__()
        self.init = in_range(self, "init", init, -_FARTHEST, _FARTHEST, open_high=False)
        self.lr = in_range(self, "lr", lr, open_low=True)
        self._learned = state
        self.add_state(state, self.init, per_task=True)
        self.add_state("moments", 0.0, per_task=True)

    def learned(self, losses: Tensor) -> Tensor:
        """:math:`s`, in at least float32, shape ``(T,)``; changes in place are kept."""
        return self.per_task_state(self._learned, at_least_float32(losses))

    def slope(self, s: Tensor, losses: Tensor) -> Tensor:
        r""":math:`\partial L / \partial s`, shape ``(T,)``."""
        raise NotImplementedError

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        """One step of Adam on what is learned of these tasks.

        Args:
            losses: task losses of the step, shape ``(T,)``.
            after: not used.
        """
        super().update(losses, after)
        wide = at_least_float32(losses)
        s = self.learned(wide)
        moments = self.per_task_state("moments", wide, (3,))
        gradient = self.slope(s, wide).clamp(-_STEEPEST, _STEEPEST)
        adam_step(s, gradient, moments, self.lr)
        s.clamp_(-_FARTHEST, _FARTHEST)
