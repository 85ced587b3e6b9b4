"""`lightning-mtl fit | validate | test | predict`: Lightning's command line with balancers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lightning_mtl.cli import main
from lightning_mtl.parsing import MultiTaskCLI
from tests.common.places import ROOT
from tests.compare.compare_model import Points, TwoTasks

MODEL = "tests.compare.compare_model"
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "my_model.TwoTasks", "init_args": {"width": 5}},
    "data": {"class_path": "my_model.Points"},
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "LogLoss"},
            {
                "class_path": "TaskTensioner",
                "init_args": {"base": {"class_path": "MinNorm"}, "window": 4},
            },
            {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "saved", "save_last": True}},
        ],
    },
}


@pytest.fixture(autouse=True)
def _names_that_go_away(monkeypatch: pytest.MonkeyPatch):
    # Lightning's command line calls jsonargparse by names of the past; nothing of ours.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the user's, trained there by the installed program."""
    folder = tmp_path_factory.mktemp("fit")
    shutil.copy(ROOT / "tests" / "compare" / "compare_model.py", folder / "my_model.py")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    # What a console script is: a program in another folder, so Python does not add the current one.
    program = tmp_path_factory.mktemp("bin") / "lightning-mtl"
    program.write_text("import sys\nfrom lightning_mtl.cli import main\nsys.exit(main())\n")
    options = ["--config", "config.yaml", "--optimizer", "Adam", "--optimizer.lr", "0.02"]
    run = subprocess.run(
        [sys.executable, str(program), "fit", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture
def here(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(fitted))
    monkeypatch.chdir(fitted)
    monkeypatch.setattr(sys, "argv", ["lightning-mtl"])
    return fitted


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "saved" / "last.ckpt", weights_only=True)


def test_fit_trains_with_the_balancers_of_the_config(fitted: Path):
    saved = checkpoint(fitted)
    assert saved["global_step"] == 8
    assert {"LogLoss", "TaskTensioner(MinNorm)"} <= set(saved["callbacks"])
    assert saved["callbacks"]["TaskTensioner(MinNorm)"]["hyperparameters"]["window"] == 4
    assert saved["hyper_parameters"]["width"] == 5
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.02


def test_commands_evaluate_the_checkpoint(here: Path, capsys: pytest.CaptureFixture):
    model = TwoTasks(width=5)
    model.load_state_dict(checkpoint(here)["state_dict"])
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    for command, evaluate in (("validate", trainer.validate), ("test", trainer.test)):
        (expected,) = evaluate(model, datamodule=Points(), verbose=False)
        main([command, "--config", "config.yaml", "--ckpt_path", "saved/last.ckpt"])
        table = capsys.readouterr().out
        assert len(expected) == 4
        for name, value in expected.items():
            assert name in table
            assert f"{value:.12f}"[:8] in table, table
    main(["predict", "--config", "config.yaml", "--ckpt_path", "saved/last.ckpt"])


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_checkpoints_load_safely_by_default(command: str, capsys: pytest.CaptureFixture):
    options = [
        "--model",
        "tests.compare.compare_model.TwoTasks",
        "--data",
        "tests.compare.compare_model.Points",
    ]
    with pytest.raises(SystemExit) as stop:
        main([command, *options, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"] == "tests.compare.compare_model.TwoTasks"
    assert config.get("weights_only", True) is True  # Lightning has the option from 2.6 on


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", "tests.compare.compare_model.Nothing"),
        ("model", "lightning.pytorch.demos.boring_classes.BoringModel"),
        ("trainer.callbacks", "MinNrom"),
    ],
)
def test_a_class_that_does_not_fit(here: Path, capsys: pytest.CaptureFixture, option, value):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "config.yaml", f"--{option}", value])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert option in message
    assert value.split(".")[-1] in message
    assert checkpoint(here)["global_step"] == 8


def test_losses_and_baselines_of_every_form(here: Path):
    """A function without annotations by its path; a baseline whose values have directions."""
    losses = ["torch.nn.MSELoss", "torch.nn.functional.mse_loss", "my_model.plain_loss"]
    tasks = {
        str(i): {"class_path": "lightning_mtl.Task", "init_args": {"loss": f}}
        for i, f in enumerate(losses)
    }
    for task in tasks.values():
        task["init_args"]["metrics"] = {"class_path": "torchmetrics.MeanSquaredError"}
    value = {"MeanSquaredError": {"value": 0.5, "higher_is_better": False}}
    given = {"tasks": tasks, "baseline": dict.fromkeys(tasks, value)}
    model = {"class_path": "my_model.Given", "init_args": given}
    Path("forms.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    cli = MultiTaskCLI(["--config", "forms.yaml"], run=False, save_config_callback=None)
    assert [type(t.loss).__name__ for t in cli.model.tasks.values()] == [
        "MSELoss",
        "function",
        "function",
    ]
    assert cli.model.tasks["2"].loss(torch.zeros(1), torch.ones(1)) == 1
    printed = cli.parser.dump(cli.config)
    Path("printed.yaml").write_text(printed)
    again = MultiTaskCLI(["--config", "printed.yaml"], run=False, save_config_callback=None)
    assert again.parser.dump(again.config) == printed


@pytest.mark.parametrize(
    ("named", "arguments", "words"),
    [
        ("functools.partial", {"func": "torch.nn.functional.mse_loss"}, "Name a class, such as"),
        ("torch.nn.functional.mse_loss", {"reduction": "sum"}, "Name a class, such as"),
        ("torch.nn.MSELoss", {"reductoin": "sum"}, "Did you mean `reduction`?"),
    ],
)
def test_a_function_with_arguments(
    here: Path, capsys: pytest.CaptureFixture, named, arguments, words
):
    task = {
        "class_path": "lightning_mtl.Task",
        "init_args": {"loss": {"class_path": named, "init_args": arguments}},
    }
    model = {"class_path": "my_model.Given", "init_args": {"tasks": {"a": task}, "baseline": {}}}
    Path("partial.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "partial.yaml"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_help_names_every_command(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "lightning-mtl compare --help"):
        assert command in " ".join(text.split())
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    assert "Exit status: 0" in capsys.readouterr().out
