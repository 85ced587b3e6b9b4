"""Angles between predicted and true surface normals: mean, median, share within t degrees."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

BINS_PER_DEGREE = 1000


def angular_errors(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Angles between vectors in degrees, of those whose target is not the zero vector.

    .. math:: \theta = 2 \arctan \frac{\lVert u - v \rVert}{\lVert u + v \rVert}, \qquad
        u = \frac{\hat n}{\lVert \hat n \rVert}, \quad v = \frac{n}{\lVert n \rVert}

    which equals :math:`\arccos(u \cdot v)` and keeps its precision at small angles.

    Args:
        prediction: shape ``(N, 3, ...)``, any length of the vectors; a zero vector has 90 degrees.
        target: the same shape. A zero vector stands for "no measurement". Published code asks
            whether the *sum* of the components is zero, which is also so for some real directions.

    Returns:
        One angle in [0, 180] for every valid vector, shape ``(V,)``, float32 or float64.

    Raises:
        ValueError: different shapes, or not three components.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import angular_errors
        >>> up = torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
        >>> angular_errors(up, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])).round()
        tensor([45.])
    """
    if prediction.shape != target.shape or target.dim() < 2 or target.shape[1] != 3:
        raise ValueError(
            f"Expected predicted and true vectors of shape (N, 3, ...) but found "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}. The three components are in "
            f"dimension 1."
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.movedim(1, -1), target.movedim(1, -1)
    valid = (target != 0).any(dim=-1)
    u = F.normalize(prediction[valid].to(dtype), dim=-1)
    v = F.normalize(target[valid].to(dtype), dim=-1)
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))


class _AngleMetric(Metric):
    """A number from the angles of all updates; NaN while there was none."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of vectors, both of shape ``(N, 3, ...)``.

        :func:`~lightning_mtl.metrics.angular_errors` says which count.
        """
        self._add(angular_errors(prediction, target))

    def _add(self, angles: Tensor) -> None:
        raise NotImplementedError

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A point, or a line over several values; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class MeanAngle(_AngleMetric):
    """Mean angle between predicted and true normals in degrees, over all valid pixels.

    Args:
        kwargs: options of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import MeanAngle
        >>> predicted = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> MeanAngle()(predicted, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])).round()
        tensor(45.)

    Reference: Eigen & Fergus, ICCV 2015; "Angle Distance" of Lin et al., arXiv:2308.12029.
    """

    higher_is_better = False
    angle_sum: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("angle_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, angles: Tensor) -> None:
        self.angle_sum += angles.sum().to(self.angle_sum.dtype)
        self.count += len(angles)

    def compute(self) -> Tensor:
        """The sum of the angles over their number."""
        return self.angle_sum / self.count


class MedianAngle(_AngleMetric):
    """Median angle between predicted and true normals in degrees, over all valid pixels.

    The angles are counted in bins of 0.001 degree, 1.4 MB however many pixels there are, and the
    result is the middle of the bin of the lower median: within 0.0005 degree of it. NaN when an
    angle was.

    Args:
        kwargs: options of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import MedianAngle
        >>> predicted = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
        >>> MedianAngle()(predicted, torch.tensor([[0.0, 0.0, 1.0]] * 3)).round()
        tensor(0.)

    Reference: Eigen & Fergus, ICCV 2015; "Angle Distance" of Lin et al., arXiv:2308.12029.
    """

    higher_is_better = False
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The last bin is for angles that are not a number.
        bins = torch.zeros(180 * BINS_PER_DEGREE + 1, dtype=torch.long)
        self.add_state("counts", bins, dist_reduce_fx="sum")

    def _add(self, angles: Tensor) -> None:
        last = len(self.counts) - 1
        # 180 degrees itself belongs to the bin below it.
        bins = (angles * BINS_PER_DEGREE).clamp(max=last - 1)
        bins = bins.nan_to_num(nan=last).long()
        self.counts += torch.bincount(bins, minlength=last + 1)

    def compute(self) -> Tensor:
        """The middle of the bin in which half of all angles is reached."""
        reached = self.counts.cumsum(0)
        total = reached[-1]
        index = torch.searchsorted(reached, (total + 1) // 2)
        median = (index + 0.5) / BINS_PER_DEGREE
        return torch.where((total > 0) & (self.counts[-1] == 0), median, torch.nan)


class WithinAngle(_AngleMetric):
    """Share of normals that are less than ``degrees`` off, in [0, 1], over all valid pixels.

    Args:
        degrees: the bound; tables have 11.25, 22.5 and 30.
        kwargs: options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: a bound outside (0, 180].

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import WithinAngle
        >>> predicted = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> WithinAngle(11.25)(predicted, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        tensor(0.5000)

    Reference: Eigen & Fergus, ICCV 2015; "Within t°" of Lin et al., arXiv:2308.12029.
    """

    higher_is_better = True
    plot_upper_bound = 1.0
    within: Tensor
    count: Tensor

    def __init__(self, degrees: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < degrees <= 180:
            raise ValueError(f"Expected `degrees` to be in (0, 180] but found {degrees}.")
        self.degrees = degrees
        self.add_state("within", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, angles: Tensor) -> None:
        self.within += (angles < self.degrees).sum()
        self.count += len(angles)

    def compute(self) -> Tensor:
        """The number of angles below the bound over the number of angles."""
        return self.within / self.count
