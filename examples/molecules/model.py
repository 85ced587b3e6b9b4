"""The network of neural message passing for QM9, with a linear head a property."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import NNConv
from torch_geometric.nn.aggr import Set2Set
from torchmetrics import MeanAbsoluteError

from examples.molecules.data import TARGETS, MoleculesDataModule, check_targets
from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.metrics import delta_p

ATOM, EDGE = 11, 5  # features of an atom; of an edge, its length included


class ScaledAbsoluteError(MeanAbsoluteError):
    """Mean absolute error of standardised targets, in units of the targets."""

    unit = 1.0  # what a standardised error of 1 means; the model sets it from the data

    def compute(self) -> Tensor:
        """The mean error, times the unit."""
        return self.unit * super().compute()


class Encoder(nn.Module):
    """Message passing along all edges, and one vector a molecule.

    Args:
        dim: width of atoms and molecules.
        edge: width of the hidden layer of the network that makes a matrix of every edge.

    Reference: Gilmer, Schoenholz, Riley, Vinyals & Dahl, *Neural message passing for quantum
    chemistry*, ICML 2017, as in PyTorch Geometric's example ``qm9_nn_conv.py``.
    """

    def __init__(self, dim: int, edge: int) -> None:
        super().__init__()
        self.atoms = nn.Linear(ATOM, dim)
        matrices = nn.Sequential(nn.Linear(EDGE, edge), nn.ReLU(), nn.Linear(edge, dim * dim))
        self.messages = NNConv(dim, dim, matrices, aggr="mean")
        self.update = nn.GRU(dim, dim)
        self.pool = Set2Set(dim, processing_steps=3)
        self.molecule = nn.Linear(2 * dim, dim)

    def forward(self, graphs: Any) -> Tensor:
        out = F.relu(self.atoms(graphs.x))
        hidden = out[None]
        for _ in range(3):
            message = F.relu(self.messages(out, graphs.edge_index, graphs.edge_attr))
            out, hidden = self.update(message[None], hidden)
            out = out[0]
        return F.relu(self.molecule(self.pool(out, graphs.batch)))


class Molecules(MultiTaskModule):
    """Predict properties of molecules: squared errors of standardised values; absolute errors.

    Predictions are ``(N,)``, standardised; errors are those of the table, in Debye, Bohr³, meV,
    Bohr² and cal / (mol K).

    The learning rate falls when Δp on validation data stops rising: relative to ``baseline``, or,
    without one, to the first validation, as in the published code.

    Args:
        tasks: which properties, by default all eleven.
        dim: width of the encoder. Default 64, as in PyTorch Geometric's example, of which is the
            next one as well.
        edge: width of the network of the edges.
        lr: learning rate of Adam. Default 1e-3, as in DB-MTL (arXiv:2308.12029, section 4.2).
        factor: by which it falls. Default: that of the published code, of which are the next two
            as well.
        patience: validations without a rise.
        min_lr: where it ends.
        baseline: single-task results for Δp, as in :class:`~lightning_mtl.MultiTaskModule`.

    Raises:
        ValueError: unknown tasks.
    """

    first: Tensor

    def __init__(
        self,
        tasks: Sequence[str] = (*TARGETS,),
        dim: int = 64,
        edge: int = 128,
        lr: float = 1e-3,
        factor: float = 0.7,
        patience: int = 5,
        min_lr: float = 1e-5,
        baseline: str | None = None,
    ) -> None:
        tasks = check_targets(tasks)
        declared = {task: Task(nn.MSELoss(), {"MAE": ScaledAbsoluteError()}) for task in tasks}
        super().__init__(declared, baseline=baseline)
        self.save_hyperparameters()
        self.encoder = Encoder(dim, edge)
        self.heads = nn.ModuleDict({task: nn.Linear(dim, 1) for task in tasks})
        # Errors of the first validation, NaN before it; saved, so that a resumed run keeps them.
        self.register_buffer("first", torch.full((len(tasks),), torch.nan))

    def forward(self, graphs: Any) -> dict[str, Tensor]:
        z = self.shared_representation(self.encoder(graphs))
        return {task: self.heads[task](z)[:, 0] for task in self.training_tasks}

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, MoleculesDataModule):
            for name, task in self.tasks.items():
                for part in ("val", "test"):
                    task.stage(part)["MAE"].unit = data.deviation[name]

    def on_validation_epoch_end(self) -> None:
        """Log ``val/improvement``: Δp relative to the first validation."""
        if self.trainer.sanity_checking or self.hparams.baseline is not None:
            return
        directions = {task: {"MAE": False} for task in self.training_tasks}
        errors = {t: self.trainer.callback_metrics[f"val/{t}/MAE"].item() for t in directions}
        place = {task: index for index, task in enumerate(self.task_names)}
        for task, error in errors.items():
            if self.first[place[task]].isnan():
                self.first[place[task]] = error
        now = {task: {"MAE": error} for task, error in errors.items()}
        then = {task: {"MAE": self.first[place[task]].item()} for task in errors}
        found = delta_p(now, then, directions)
        self.log("val/improvement", sum(found.values()) / len(found), sync_dist=False)

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.hparams
        optimizer = torch.optim.Adam(self.parameters(), options.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            "max",
            factor=options.factor,
            patience=options.patience,
            min_lr=options.min_lr,
        )
        monitor = "val/improvement" if options.baseline is None else "val/delta_p"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": monitor, "strict": False},
        }
