"""A graph network of PyG with a task for nodes, one for links and one for graphs, and its port."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, global_mean_pool
from torch_geometric.utils import negative_sampling

from lightning_mtl import MultiTaskModule

TASKS = ("nodes", "links", "graphs")


class Network(nn.Module):
    """Two convolutions, and a head for nodes and one for graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(6, 16), GCNConv(16, 12)
        self.nodes, self.graphs = nn.Linear(12, 3), nn.Linear(12, 1)

    def encode(self, batch: Batch) -> Tensor:
        z = F.dropout(self.first(batch.x, batch.edge_index).relu(), 0.2, self.training)
        return self.second(z, batch.edge_index)


class Plain(LightningModule):
    """As it is trained without us."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = Network()

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        z = self.network.encode(batch)
        apart = negative_sampling(batch.edge_index, batch.num_nodes, batch.num_edges)
        pairs = torch.cat([batch.edge_index, apart], dim=1)
        linked = torch.zeros(pairs.shape[1])
        linked[: batch.num_edges] = 1
        score = (z[pairs[0]] * z[pairs[1]]).sum(dim=1)
        known = batch.known
        pooled = self.network.graphs(global_mean_pool(z, batch.batch)).squeeze(-1)
        return (
            F.cross_entropy(self.network.nodes(z[known]), batch.y[known]),
            F.binary_cross_entropy_with_logits(score, linked),
            F.mse_loss(pooled, batch.value),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        nodes, links, graphs = self.losses(batch)
        loss = nodes + links + graphs
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Ported(Plain, MultiTaskModule):
    """Inherits all but the sum."""

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        nodes, links, graphs = self.losses(batch)
        self.log("train_loss", nodes + links + graphs, batch_size=batch.num_graphs)
        return {"nodes": nodes, "links": links, "graphs": graphs}


def batches(count: int) -> list[Any]:
    """Three graphs of eight nodes each, half of whose labels are known."""
    draw = torch.Generator().manual_seed(0)

    def graph() -> Data:
        edges = torch.randint(0, 8, (2, 14), generator=draw)
        x = torch.randn(8, 6, generator=draw)
        return Data(
            x=x,
            edge_index=torch.cat([edges, edges.flip(0)], dim=1),
            y=x[:, :3].argmax(dim=1),
            known=torch.arange(8) % 2 == 0,
            value=x.sum()[None],
        )

    return [Batch.from_data_list([graph() for _ in range(3)]) for _ in range(count)]
