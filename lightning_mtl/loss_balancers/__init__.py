"""Loss balancers: a weight for every task loss. One file a method."""

from lightning_mtl.loss_balancers.equal_weighting import EqualWeighting
from lightning_mtl.loss_balancers.log_loss import LogLoss, log_loss_weights
from lightning_mtl.loss_balancers.scalarization import Scalarization

__all__ = ["EqualWeighting", "LogLoss", "Scalarization", "log_loss_weights"]
