"""A batch's way through the files of the package: how far a reader of one step has to walk.

Of one step of ``Trainer.fit``, until every ``.grad`` is there, the calls of the package's functions
are noted, and the returns from them. Counted are the files that are entered, the walks from one
file to another, and how many of these lead back to a file that had been left.

    python benchmarks/way.py [--way]

``--way`` prints the files in their order.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from networks import MODELS
from torch.utils.data import DataLoader
from ways import Balanced

import lightning_mtl

PACKAGE = str(Path(lightning_mtl.__file__).parent)
STEP = 3  # when everything that is found once is found
BALANCERS = ("no balancer", "MinNorm", "DualBalance")


class Walk(Callback):
    """Notes the files of one step."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.read: list[str] = []  # files of functions that are new
        self.known: set[Any] = set()

    def note(self, frame: Any, event: str, arg: Any) -> None:
        """Python's profiler calls this at every call and return."""
        if event == "return":
            frame = frame.f_back
        elif event != "call":
            return
        file = "" if frame is None else frame.f_code.co_filename
        if file.startswith(PACKAGE) and "_balancers" not in file:
            name = file[len(PACKAGE) + 1 :]
            enter(self.files, name)
            if event == "call" and frame.f_code not in self.known:
                self.known.add(frame.f_code)
                enter(self.read, name)

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, step: int) -> None:
        """Begin."""
        if step == STEP:
            sys.setprofile(self.note)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """End: every gradient is there."""
        sys.setprofile(None)


def enter(files: list[str], name: str) -> None:
    """Note a file unless one is in it already."""
    if not files or files[-1] != name:
        files.append(name)


def walked(balancer: str) -> Walk:
    """The files of one step, in their order."""
    model, walk = MODELS["tiny MLP, T=2"], Walk()
    callbacks = [walk] if balancer == "no balancer" else [walk, getattr(lightning_mtl, balancer)()]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Balanced(model.network()), DataLoader([model.batch()] * (STEP + 1), None))
    return walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", action="store_true", help="print the files in their order")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for balancer in BALANCERS:
        walk = walked(balancer)
        print(f"{balancer}: {told(walk.files)}; read once: {told(walk.read)}")
        if args.way:
            print("  " + " > ".join(walk.read))


def told(files: list[str]) -> str:
    number = len(set(files))
    return f"{number} files, {len(files) - 1} walks, {len(files) - number} of them back"


if __name__ == "__main__":
    main()
