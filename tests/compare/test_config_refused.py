"""Balancer files, configs and options that cannot run: refused before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from tests.compare.compare_runs import PLAIN
from tests.compare.test_compare import CONFIG, files


def refused(folder: Path, capsys: pytest.CaptureFixture, *options: str) -> str:
    """The message of a request that trains nothing and leaves no folder."""
    assert main(["compare", *files_or(folder, options)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert not (folder / "out").exists()
    return captured.err


def files_or(folder: Path, options: tuple[str, ...]) -> list[str]:
    return [*PLAIN, "--config", "C.yaml", "--balancers", "B.yaml", "--out", "out", *options]


def one(class_path: str, **init_args: object) -> dict:
    return {"equal": [], "mine": [{"class_path": class_path, "init_args": init_args}]}


MODEL = "tests.compare.compare_model."


@pytest.mark.parametrize(
    ("balancers", "message"),
    [
        (one("MinNrom"), r"balancer `mine`.*no class `MinNrom`. Did you mean `MinNorm`\?"),
        (one("no_such.Balancer"), r"balancer `mine`.*no_such"),
        (one(MODEL + "Nothing"), r"balancer `mine`.*Nothing"),
        (one(MODEL + "Picky"), r"balancer `mine`.*rate"),
        (one(MODEL + "Picky", rate=-1.0), r"balancer `mine`.*`rate` above 0 but found -1.0"),
        (one("Scalarization", weights={"nope": 1.0}), r"`mine` does not fit the model.*nope"),
        (
            {"two": [{"class_path": "MinNorm"}, {"class_path": "CentralDirection"}]},
            r"`two` does not fit the model.*MinNorm, CentralDirection",
        ),
        ({"equal": [{"class_path": "MinNorm"}]}, r"`equal` in B.yaml to be equal weighting"),
        ({"single-task": []}, r"do not start with `single-task`"),
        ({"": []}, r"names of balancers that are not empty.*\[''\]"),
        ({"mine": [{"init_args": {}}]}, r"`mine` holds.*Give it a `class_path`"),
        ({}, r"to map a name to its callbacks.*at least one"),
    ],
)
def test_balancers_that_cannot_run(here, capsys, balancers, message):
    files(here, balancers=balancers)
    assert re.search(message, refused(here, capsys), re.DOTALL)


def changed(path: str, value: object) -> dict:
    """The config with another value at ``path``."""
    config = json.loads(json.dumps(CONFIG))
    *folders, last = path.split(".")
    inner = config
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("model.class_path", MODEL + "Nothing"), r"C.yaml to be a config.*Nothing"),
        (changed("model.init_args.measured", "none"), r"at least one task.*for classify, regress"),
        (changed("model.init_args.width", "wide"), r"C.yaml to be a config.*width"),
        (changed("trainer.max_epoch", 3), r"C.yaml to be a config.*max_epoch"),
        (changed("trainer.devices", 2), r"one device a run but C.yaml asks for 2"),
        (changed("trainer.callbacks", {"class_path": "MinNorm"}), r"no balancer.*found MinNorm"),
        (changed("ckpt_path", "last.ckpt"), r"no `ckpt_path`.*last.ckpt"),
    ],
)
def test_configs_that_cannot_run(here, capsys, config, message):
    files(here, config=config)
    assert re.search(message, refused(here, capsys), re.DOTALL)


def test_options_that_make_no_sense(here, capsys):
    files(here)
    assert "--seeds to be at least 1 but found 0" in refused(here, capsys, "--seeds", "0")
    assert "--workers to be at least 1" in refused(here, capsys, "--workers", "-1")
    message = refused(here, capsys, "--only", "minnorm,nope")
    assert "--only to name some of equal, minnorm, fixed-x3 but found ['nope']" in message
    (here / "B.yaml").write_text("equal: [")
    assert "Expected B.yaml to be YAML" in refused(here, capsys)
    (here / "B.yaml").unlink()
    assert "a YAML file at B.yaml but found none" in refused(here, capsys)
