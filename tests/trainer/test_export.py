"""A module leaves the Trainer and comes from YAML as a LightningModule does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from lightning_mtl import MinNorm, MultiTaskModule, Task
from lightning_mtl.cli import main
from tests.common.models import Network, Samples, loader, sgd, trainer


class Exported(MultiTaskModule):
    """With layers that TorchScript understands."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(
            {
                "a": Task(nn.MSELoss(), [MeanSquaredError(), MeanAbsoluteError()]),
                "b": Task(nn.functional.mse_loss),
            },
            on_bad_loss="skip_step",
        )
        self.save_hyperparameters()
        self.trunk, self.a, self.b = nn.Linear(4, width), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {"a": self.a(z).squeeze(-1), "b": self.b(z).squeeze(-1)}

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def _checkpoint(module: Any, path: Path) -> Any:
    run = trainer(callbacks=[MinNorm()])
    run.fit(module, loader(8))
    run.save_checkpoint(path / "at.ckpt")
    loaded = Exported.load_from_checkpoint(path / "at.ckpt", weights_only=True)
    assert (loaded.hparams.width, loaded.on_bad_loss) == (5, "skip_step")
    return loaded


WAYS: dict[str, Any] = {
    "script": lambda module, path: module.to_torchscript(),
    "jit.script": lambda module, path: torch.jit.load(_saved(torch.jit.script(module), path)),
    "trace": lambda module, path: torch.jit.trace(module, torch.ones(2, 4), strict=False),
    "export": lambda module, path: torch.export.export(module, (torch.ones(2, 4),)).module(),
    "pickle": lambda module, path: pickle.loads(pickle.dumps(module)),
    "copy": lambda module, path: copy.deepcopy(module),
    "checkpoint": _checkpoint,
}


def _saved(scripted: Any, path: Path) -> str:
    scripted.save(str(path / "module.pt"))
    return str(path / "module.pt")


@pytest.mark.filterwarnings("ignore")  # TorchScript and tracing are deprecated, each in its words
@pytest.mark.parametrize(
    ("way", "fitted"),  # these two need a Trainer, of a plain LightningModule as well
    [(way, False) for way in WAYS if way not in ("jit.script", "trace")]
    + [(w, True) for w in WAYS],
)
def test_a_module_leaves_the_trainer(way: str, fitted: bool, tmp_path: Path) -> None:
    module = Exported(width=5)
    run = trainer(callbacks=[MinNorm()])
    if fitted:
        run.fit(module, loader(8))
    found, x = WAYS[way](module, tmp_path), torch.randn(2, 4)
    with torch.no_grad():
        for task, expected in module(x).items():
            torch.testing.assert_close(found(x)[task], expected)


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Samples(16), batch_size=4)

    val_dataloader = train_dataloader


class FromYaml(MultiTaskModule):
    def __init__(self, tasks: dict[str, Task]) -> None:
        super().__init__(tasks)
        self.net = Network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


METRIC = {"class_path": "torchmetrics.MeanAbsoluteError"}
LOSSES: dict[str, Any] = {
    "class": {"class_path": "torch.nn.MSELoss"},
    "arguments": {"class_path": "torch.nn.HuberLoss", "init_args": {"delta": 2.0}},
    "short": "torch.nn.MSELoss",
    "function": "torch.nn.functional.mse_loss",
}
METRICS: dict[str, tuple[Any, list[str]]] = {
    "none": (None, []),
    "one": (METRIC, ["MeanAbsoluteError"]),
    "a list": ([METRIC, {"class_path": "torchmetrics.MeanSquaredError"}], ["MeanSquaredError"]),
    "a dict": ({"error": METRIC}, ["error"]),
}


@pytest.mark.filterwarnings("ignore")  # words of Lightning about loaders, seeds and the parser
@pytest.mark.parametrize(("loss", "metrics"), [*zip(LOSSES, METRICS, strict=True)])
def test_tasks_from_yaml(
    loss: str, metrics: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)
    given, names = METRICS[metrics]
    task = {"loss": LOSSES[loss], "metrics": given}
    task = {"class_path": "lightning_mtl.Task", "init_args": task}
    config = {
        "model": {
            "class_path": "tests.trainer.test_export.FromYaml",
            "init_args": {"tasks": {"a": task, "b": task}},
        },
        "data": "tests.trainer.test_export.Data",
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["validate", "--config", "config.yaml"])
    table = capsys.readouterr().out
    for name in ("val/loss/a", "val/loss/b", *(f"val/b/{metric}" for metric in names)):
        assert name in table
