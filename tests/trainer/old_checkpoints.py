"""Checkpoints of every balancer as an earlier version wrote them, and where a resumed run ended.

``python -m tests.trainer.old_checkpoints`` writes the file; it was run once, by the version that it
tells of. Users' checkpoints outlive the layout of the package, so the file stays as it is.
"""

from __future__ import annotations

import gzip
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.common.methods import METHODS
from tests.common.models import Balanced, loader, resume_from, trainer, weights
from tests.common.places import DATA

FILE = DATA / "checkpoints_of_0_1_dev.pt.gz"
THREE = ("a", "b", "c")
ROWS = list({m.cls: m for m in reversed(METHODS)}.values())  # a row a class


def run(method: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A fit of some batches; each epoch has five."""
    balancer = method.make()
    every = getattr(balancer, "batches", 1)
    fit = trainer(callbacks=[balancer], accumulate_grad_batches=every, **kwargs)
    return fit, Balanced(tasks=THREE)


def saved(method: Any, folder: Path) -> dict[str, Any]:
    """A checkpoint at an epoch's end, and the weights at the end of the next."""
    fit, module = run(method, max_epochs=1)
    fit.fit(module, loader(40, tasks=THREE))
    fit.save_checkpoint(folder / "first.ckpt")
    content = (folder / "first.ckpt").read_bytes()
    return {"checkpoint": content, "weights": resumed(method, content, folder)}


def resumed(method: Any, content: bytes, folder: Path) -> torch.Tensor:
    """The weights after one more epoch."""
    (folder / "again.ckpt").write_bytes(content)
    fit, module = run(method, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(module, loader(40, tasks=THREE), **resume_from(folder / "again.ckpt"))
    return weights(module)


def load() -> dict[str, dict[str, Any]]:
    """What the file holds, by the name of the row."""
    found: dict[str, dict[str, Any]] = torch.load(
        io.BytesIO(gzip.decompress(FILE.read_bytes())), weights_only=True
    )
    return found


def main() -> None:
    """Write the file."""
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    found = {method.name: saved(method, folder) for method in ROWS}
    FILE.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(found, buffer)
    FILE.write_bytes(gzip.compress(buffer.getvalue(), 9, mtime=0))


if __name__ == "__main__":
    main()
