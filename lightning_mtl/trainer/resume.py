"""What an exact resume needs beside the parameters: random state, step counts, the loader."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_mtl.ranks import OneProcess
from lightning_mtl.saved import unreadable


def get_rng(device: torch.device) -> dict[str, Any]:
    """Random state as tensors and plain containers, which load with ``weights_only=True``."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng(state: dict[str, Any]) -> None:
    """Restore what :func:`get_rng` saved.

    Raises:
        ValueError: it was altered.
    """
    try:
        torch.set_rng_state(state["torch"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise unreadable("the run", f"no random state as 'rng' ({error!r})") from error


def rng_of(saved: list[dict[str, Any]], ranks: OneProcess) -> dict[str, Any] | None:
    """The saved random state of this rank; a run with another number of ranks is warned."""
    if len(saved) != ranks.size:
        rank_zero_warn(
            f"The checkpoint was written by {len(saved)} processes and is resumed by {ranks.size}: "
            f"weights and balancers continue exactly, but dropout and shuffling see other random "
            f"numbers, and batches are divided otherwise. Resume with {len(saved)} for the same "
            f"run."
        )
    return saved[ranks.rank] if ranks.rank < len(saved) else None


def sync_progress(trainer: Trainer) -> None:
    """Make both of Lightning's step counts agree, whatever mode ``global_step`` is read in.

    Several optimizers count as one step, and a checkpoint of automatic optimisation resumes at its
    step.
    """
    loop = trainer.fit_loop.epoch_loop
    steps = loop.automatic_optimization.optim_progress.optimizer_steps
    total = loop.manual_optimization.optim_step_progress.total
    total.ready = total.completed = steps


def restore_loader(trainer: Trainer) -> None:
    """Put the training loader where it was, or warn that it starts over.

    An ordinary DataLoader begins the next epoch as the run that never stopped did.

    Lightning leaves the saved position aside when ``configure_optimizers`` reads
    ``estimated_stepping_batches``, which sets up the loaders before the checkpoint is read.
    """
    loop: Any = trainer.fit_loop
    loaders = loop._combined_loader.flattened
    batches = loop.epoch_loop.batch_progress.current
    ended = batches.ready == trainer.num_training_batches
    if trainer.enable_validation:  # which draws too, and is not made up for after a checkpoint
        ended &= batches.completed == batches.ready
    if ended and all(map(_draws_from_torch, loaders)):
        # The next epoch's order and seeds follow from the random state that is back in place:
        # Lightning drew them before that, when it set up the loaders. Its first versions draw them
        # once more where they do not count as restarting.
        if loop.restarting or hasattr(loop, "is_resuming"):
            iter(loop._data_fetcher)
    elif not all(hasattr(loader, "load_state_dict") for loader in loaders):
        if not batches.ready:
            return  # saved before the first batch, as searches for a learning rate do
        rank_zero_warn(
            "Resuming with a training loader that cannot save its position: it starts over, so "
            "this run sees other batches than one that never stopped. For an exact resume give the "
            "loader `state_dict` and `load_state_dict` (for example torchdata's "
            "StatefulDataLoader)."
        )
    if loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)


def _draws_from_torch(loader: Any) -> bool:
    """Whether an epoch of the loader follows from PyTorch's random state and the epoch's number."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    samplers = (loader, loader.sampler, loader.batch_sampler)
    return all(getattr(sampler, "generator", None) is None for sampler in samplers)
