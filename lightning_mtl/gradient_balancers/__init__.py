"""Gradient balancers: one direction from the task gradients. One file a method."""

from lightning_mtl.gradient_balancers.central_direction import (
    CentralDirection,
    central_direction_weights,
)
from lightning_mtl.gradient_balancers.dual_balance import DualBalance, dual_balance_weights
from lightning_mtl.gradient_balancers.min_norm import MinNorm, min_norm_weights
from lightning_mtl.gradient_balancers.task_tensioner import TaskTensioner, tension_weights

__all__ = [
    "CentralDirection",
    "DualBalance",
    "MinNorm",
    "TaskTensioner",
    "central_direction_weights",
    "dual_balance_weights",
    "min_norm_weights",
    "tension_weights",
]
