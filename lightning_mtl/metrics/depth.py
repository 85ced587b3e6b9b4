"""Absolute and relative error over the pixels that have a measurement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _MaskedError(Metric):
    """The mean of an error over all valid values of all updates; NaN while there was none."""

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    error_sum: Tensor
    count: Tensor

    def __init__(self, invalid: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.invalid = invalid
        self.add_state("error_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: any shape, a floating dtype; values of half precision count in float32.
            target: the same shape; where it equals ``invalid``, nothing is counted.

        Raises:
            ValueError: different shapes.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"Expected a prediction of the target's shape {tuple(target.shape)} but found "
                f"{tuple(prediction.shape)}. Resize or squeeze one of them."
            )
        valid = target != self.invalid
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        target = target[valid].to(dtype)
        error = self._error(prediction[valid].to(dtype), target)
        self.error_sum += error.sum().to(self.error_sum.dtype)
        self.count += valid.sum()

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The sum of the errors over the number of valid values."""
        return self.error_sum / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A point, or a line over several values; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class MaskedAbsoluteError(_MaskedError):
    r"""Mean absolute error over valid targets, for depth in the unit of the target.

    .. math:: \frac{1}{\lvert V \rvert} \sum_{i \in V} \lvert \hat d_i - d_i \rvert, \qquad
        V = \{ i : d_i \ne \text{invalid} \}

    Every valid value of all updates weighs the same, so the result does not depend on how data is
    cut into batches; code in the literature averages the means of batches.

    Args:
        invalid: the target that stands for "no measurement". Default 0, as in the preprocessed
            NYUv2 and Cityscapes.
        kwargs: options of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import MaskedAbsoluteError
        >>> error = MaskedAbsoluteError()
        >>> error(torch.tensor([1.5, 9.0, 4.0]), torch.tensor([2.0, 0.0, 4.0]))
        tensor(0.2500)

    Reference: AErr in the tables of Lin et al., arXiv:2308.12029.
    """

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs()


class MaskedRelativeError(_MaskedError):
    r"""Mean absolute error relative to the target, over valid targets, as a fraction.

    .. math:: \frac{1}{\lvert V \rvert} \sum_{i \in V}
        \frac{\lvert \hat d_i - d_i \rvert}{\lvert d_i \rvert}, \qquad
        V = \{ i : d_i \ne \text{invalid} \}

    The absolute value in the denominator is ours; depths are positive. With an ``invalid`` other
    than 0, a target of 0 makes the result infinite or NaN.

    Args:
        invalid: the target that stands for "no measurement". Default 0, as in the preprocessed
            NYUv2 and Cityscapes.
        kwargs: options of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import MaskedRelativeError
        >>> error = MaskedRelativeError()
        >>> error(torch.tensor([1.5, 9.0, 4.0]), torch.tensor([2.0, 0.0, 4.0]))
        tensor(0.1250)

    Reference: RErr in the tables of Lin et al., arXiv:2308.12029.
    """

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs() / target.abs()
