"""chemprop's MPNN with missing labels, as it is and inherited."""

from __future__ import annotations

from typing import Any

import numpy as np
from chemprop import nn as chemprop_nn
from chemprop.data import MoleculeDatapoint, MoleculeDataset, collate_batch
from chemprop.models import MPNN
from torch import Tensor
from torch.nn import functional as F

from lightning_mtl import MultiTaskModule

TASKS = ("solubility", "toxicity", "affinity")
MOLECULES = (
    "CCO",
    "c1ccccc1O",
    "CC(=O)O",
    "CCN(CC)CC",
    "C1CCCCC1",
    "CC(C)Cl",
    "OCC(O)CO",
    "c1ccncc1",
)


def parts() -> dict[str, Any]:
    """What an MPNN is made of, at a size for tests."""
    return {
        "message_passing": chemprop_nn.BondMessagePassing(d_h=12, depth=2, dropout=0.1),
        "agg": chemprop_nn.MeanAggregation(),
        "predictor": chemprop_nn.RegressionFFN(n_tasks=len(TASKS), input_dim=12, hidden_dim=12),
        "batch_norm": True,
        "warmup_epochs": 1,
        "init_lr": 1e-3,
        "max_lr": 1e-2,
    }


class Plain(MPNN):
    """As it is trained without us."""

    def __init__(self) -> None:
        super().__init__(**parts())


class Ported(MPNN, MultiTaskModule):
    """Its losses a task: each one's share of their mean over all labels that are there."""

    training_step = MultiTaskModule.training_step

    def __init__(self) -> None:
        super().__init__(**parts())

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        molecules, atoms, extra, targets, weights, below, above = batch
        there = targets.isfinite()
        targets = targets.nan_to_num(nan=0.0)
        predictions = self.predictor.train_step(self.fingerprint(molecules, atoms, extra))
        errors = F.mse_loss(predictions, targets, reduction="none") * weights * there
        self.criterion(predictions.detach(), targets, there, weights, below, above)  # logged
        size = self.get_batch_size(batch)
        self.log("train_loss", self.criterion, batch_size=size, prog_bar=True, on_epoch=True)
        shares = errors.sum(dim=0) / there.sum()
        return {task: shares[i] for i, task in enumerate(TASKS) if there[:, i].any()}


def batches(count: int) -> list[Any]:
    """Five molecules each; a third of the labels is missing, and in one batch all of a task."""
    draw = np.random.default_rng(0)
    found = []
    for index in range(count):
        labels = draw.normal(size=(5, len(TASKS)))
        labels[draw.random(labels.shape) < 1 / 3] = np.nan
        labels[0] = 1.0
        if index == 2:
            labels[:, 1] = np.nan
        data = [
            MoleculeDatapoint.from_smi(smiles, y)
            for smiles, y in zip(draw.choice(MOLECULES, 5), labels, strict=True)
        ]
        dataset = MoleculeDataset(data)
        found.append(collate_batch([dataset[i] for i in range(5)]))
    return found
