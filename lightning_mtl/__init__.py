"""Multi-task balancing for PyTorch Lightning."""

from lightning_mtl.balancer import Balancer, GradientBalancer, LossBalancer
from lightning_mtl.gradient_balancers import CentralDirection, DualBalance, MinNorm, TaskTensioner
from lightning_mtl.loss_balancers import EqualWeighting, LogLoss, Scalarization
from lightning_mtl.losses import BadLossError
from lightning_mtl.metrics import ConflictRate, DeltaP, GradientCosine, GradientNorm
from lightning_mtl.module import MultiTaskModule
from lightning_mtl.monitor import GradientMonitor
from lightning_mtl.record import StepRecord
from lightning_mtl.task import Task
from lightning_mtl.version import __version__

__all__ = [
    "BadLossError",
    "Balancer",
    "CentralDirection",
    "ConflictRate",
    "DeltaP",
    "DualBalance",
    "EqualWeighting",
    "GradientBalancer",
    "GradientCosine",
    "GradientMonitor",
    "GradientNorm",
    "LogLoss",
    "LossBalancer",
    "MinNorm",
    "MultiTaskModule",
    "Scalarization",
    "StepRecord",
    "Task",
    "TaskTensioner",
    "__version__",
]
