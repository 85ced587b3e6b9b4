"""The truth tables of AND and XOR, in mini-batches of two."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

GATES = ("and", "xor")
INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
BATCH = 2

Batch = tuple[Tensor, dict[str, Tensor]]


def truth(gate: str, scale: float = 1.0) -> Tensor:
    """What a gate makes of :data:`INPUTS`, shape ``(4,)``, float32; XOR times ``scale``.

    Raises:
        ValueError: ``gate`` is none of :data:`GATES`.
    """
    if gate not in GATES:
        raise ValueError(f"Expected a gate of {GATES} but found {gate!r}.")
    first, second = INPUTS.bool().T
    if gate == "and":
        return (first & second).float()
    return (first ^ second).float() * scale


def orders(seed: int, epochs: int) -> Tensor:
    """In which order each epoch shows the four inputs, shape ``(epochs, 4)``, int64.

    A longer sequence begins with a shorter one.
    """
    rows = np.tile(np.arange(len(INPUTS)), (epochs, 1))
    return torch.from_numpy(np.random.default_rng(seed).permuted(rows, axis=1))


class Shuffled:
    """A training loader that can save its position: epoch ``n`` depends on the seed and ``n`` only.

    Args:
        scale: what the targets of XOR are multiplied by.
        seed: of the order.
        epochs: how many orders are drawn; after that they begin again.
    """

    def __init__(self, scale: float, seed: int, epochs: int) -> None:
        self.targets = {gate: truth(gate, scale).unsqueeze(1) for gate in GATES}
        self.orders = orders(seed, epochs)
        self.position = 0  # batches drawn

    def __len__(self) -> int:
        return len(INPUTS) // BATCH

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            epoch, batch = divmod(self.position, len(self))
            index = self.orders[epoch % len(self.orders)].split(BATCH)[batch]
            self.position += 1
            yield INPUTS[index], {gate: values[index] for gate, values in self.targets.items()}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class LogicGatesDataModule(LightningDataModule):
    """Both gates. Training, validation and test are the same four inputs, as in the paper.

    Args:
        scale: the paper's :math:`c`, what the targets of XOR are multiplied by: 1 or 10.
        epochs: how many different orders there are; the paper's limit of epochs.
        seed: of the order; by default the one given to ``seed_everything``.

    Raises:
        ValueError: ``scale`` or ``epochs`` is not above zero.
    """

    def __init__(self, scale: float = 1.0, epochs: int = 3000, seed: int | None = None) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("epochs", epochs)):
            if not value > 0:
                raise ValueError(f"Expected `{name}` above zero but found {value!r}.")
        self.scale = scale
        self.epochs = epochs
        self.seed = seed

    def train_dataloader(self) -> Shuffled:
        seed = torch.initial_seed() if self.seed is None else self.seed
        return Shuffled(self.scale, seed, self.epochs)

    def val_dataloader(self) -> DataLoader[Batch]:
        batch = INPUTS, {gate: truth(gate, self.scale).unsqueeze(1) for gate in GATES}
        return DataLoader([batch], batch_size=None)

    test_dataloader = val_dataloader
