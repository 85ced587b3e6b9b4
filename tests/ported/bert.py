"""A BERT of the transformers library with three heads, as a LightningModule and that one ported."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, get_linear_schedule_with_warmup

from lightning_mtl import MultiTaskModule

TASKS = ("sentiment", "entities", "similarity")


class Reader(nn.Module):
    """One encoder; heads on the sentence, on every token, and on the sentence again."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
        self.bert = BertModel(config)
        self.sentiment = nn.Linear(16, 3)
        self.entities = nn.Linear(16, 5)
        self.similarity = nn.Linear(16, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        sentence = found.pooler_output
        return (
            self.sentiment(sentence),
            self.entities(found.last_hidden_state),
            self.similarity(sentence).squeeze(-1),
        )


class Optimised(LightningModule):
    """Two groups of parameters and a warm-up, as BERT is fine-tuned."""

    def configure_optimizers(self) -> Any:
        plain = {id(p) for p in self.parameters() if p.ndim < 2}
        groups = [
            {"params": [p for p in self.parameters() if id(p) not in plain], "weight_decay": 0.01},
            {"params": [p for p in self.parameters() if id(p) in plain], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=2e-3)
        total = self.trainer.estimated_stepping_batches
        schedule = get_linear_schedule_with_warmup(optimizer, 2, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Plain(Optimised):
    """As it is trained without us."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch["labels"]
        sentiment, entities, similarity = self.reader(batch["input_ids"], batch["attention_mask"])
        first = F.cross_entropy(sentiment, labels["sentiment"])
        second = F.cross_entropy(entities.flatten(0, 1), labels["entities"].flatten())
        third = F.mse_loss(similarity, labels["similarity"])
        self.log("entities", second)
        return first + second + third


class Ported(Optimised, MultiTaskModule):
    """A copy in which the losses are returned apart."""

    def __init__(self) -> None:
        super().__init__(tasks=TASKS)
        self.reader = Reader()

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        labels = batch["labels"]
        sentiment, entities, similarity = self.reader(batch["input_ids"], batch["attention_mask"])
        first = F.cross_entropy(sentiment, labels["sentiment"])
        second = F.cross_entropy(entities.flatten(0, 1), labels["entities"].flatten())
        third = F.mse_loss(similarity, labels["similarity"])
        self.log("entities", second)
        return {"sentiment": first, "entities": second, "similarity": third}


def batches(count: int) -> list[Any]:
    """Four sentences of up to eight tokens each; padding has the label -100."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        tokens = torch.randint(3, 40, (4, 8), generator=draw)
        there = torch.arange(8) < torch.randint(3, 9, (4, 1), generator=draw)
        found.append(
            {
                "input_ids": tokens * there,
                "attention_mask": there.long(),
                "labels": {
                    "sentiment": tokens[:, 0] % 3,
                    "entities": torch.where(there, tokens % 5, -100),
                    "similarity": torch.rand(4, generator=draw),
                },
            }
        )
    return found
