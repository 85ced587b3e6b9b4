"""What balancing did to the tasks: Δp against baselines, gradient norms, cosines and conflicts."""

from lightning_mtl.metrics.delta_p import DeltaP, delta_p, load_baseline
from lightning_mtl.metrics.gradients import (
    ConflictRate,
    GradientCosine,
    GradientNorm,
    conflict_rate,
    gradient_cosines,
    gradient_norms,
)

__all__ = [
    "ConflictRate",
    "DeltaP",
    "GradientCosine",
    "GradientNorm",
    "conflict_rate",
    "delta_p",
    "gradient_cosines",
    "gradient_norms",
    "load_baseline",
]
