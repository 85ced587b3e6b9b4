"""What the tests of every example do with its files: take two steps, read rows, run the command."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

import lightning_mtl
from tests.common.places import ROOT

BRIEF = {
    "accelerator": "cpu",
    "max_steps": 2,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def two_steps(
    path: Path, folder: Path, *, model: dict[str, Any], data: dict[str, Any], **trainer: Any
) -> Any:
    """Two steps of a configuration with other arguments; the CLI that built them.

    Args:
        path: of the configuration.
        folder: for what is written.
        model: arguments that are replaced. ``weights`` is left out: nothing is downloaded.
        data: arguments that are replaced.
        trainer: flags that are replaced.
    """
    from lightning_mtl.cli import MultiTaskCLI

    text = yaml.safe_load(path.read_text())
    text["model"]["init_args"].pop("weights", None)
    text["model"]["init_args"] |= model
    text["data"]["init_args"] |= data
    text["trainer"] |= {**BRIEF, "default_root_dir": str(folder), **trainer}
    config = folder / path.name
    config.write_text(yaml.safe_dump(text))
    cli = MultiTaskCLI(["--config", str(config)], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    return cli


def rows_of(path: Path) -> dict[str, Any]:
    """The rows of a file of balancers, each of which can be made."""
    rows: dict[str, Any] = yaml.safe_load(path.read_text())
    for callback in chain.from_iterable(rows.values()):
        cls = getattr(lightning_mtl, callback["class_path"])
        assert isinstance(cls(**callback.get("init_args", {})), lightning_mtl.Balancer)
    return rows


def trained_by_the_command(path: Path, folder: Path, data: dict[str, Any], **trainer: Any) -> None:
    """`lightning-mtl fit` with DB-MTL in a process of its own, which writes a checkpoint."""
    text = yaml.safe_load(path.read_text())
    text["data"]["init_args"] |= data
    text["trainer"] |= {"default_root_dir": str(folder), **trainer}
    config = folder / path.name
    config.write_text(yaml.safe_dump(text))
    command = [sys.executable, "-m", "lightning_mtl", "fit", "--config", str(config)]
    run = subprocess.run(
        [*command, "--trainer.callbacks+=DualBalance"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list(folder.rglob("*.ckpt"))
