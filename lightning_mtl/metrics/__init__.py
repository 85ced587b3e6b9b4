"""What balancing did to the tasks: Δp, gradients and conflicts; metrics of depth and normals."""

from lightning_mtl.metrics.delta_p import DeltaP, delta_p, load_baseline
from lightning_mtl.metrics.depth import MaskedAbsoluteError, MaskedRelativeError
from lightning_mtl.metrics.gradients import (
    ConflictRate,
    GradientCosine,
    GradientNorm,
    conflict_rate,
    gradient_cosines,
    gradient_norms,
)
from lightning_mtl.metrics.normals import MeanAngle, MedianAngle, WithinAngle, angular_errors

__all__ = [
    "ConflictRate",
    "DeltaP",
    "GradientCosine",
    "GradientNorm",
    "MaskedAbsoluteError",
    "MaskedRelativeError",
    "MeanAngle",
    "MedianAngle",
    "WithinAngle",
    "angular_errors",
    "conflict_rate",
    "delta_p",
    "gradient_cosines",
    "gradient_norms",
    "load_baseline",
]
