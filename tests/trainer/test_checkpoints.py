"""Checkpoints of a Trainer hold plain data for every method; one that holds code is not run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_mtl import Balancer
from lightning_mtl.cli import main
from tests.common.method_rows.row import Method
from tests.common.methods import METHODS
from tests.common.models import resume_from, trainer, weights
from tests.ranks.layout_cases import SAFE, Continued, Saver
from tests.ranks.rank_cases import Labelled, _tensors, batches

STEPS, STOP = 5, 3


def fit(method: Method, save: Path | None, **resume: Any) -> tuple[Any, Any, Balancer]:
    """A few steps, or what is left of them."""
    balancer, module = method.make(), Labelled(False)
    every = getattr(balancer, "batches", 1)
    callbacks = [balancer, Saver(save, STOP)]
    run = trainer(callbacks=callbacks, accumulate_grad_batches=every, max_steps=STEPS)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what single methods say about these few steps
        run.fit(module, Continued(batches(0, 1, missing=False)), **resume)
    return run, module, balancer


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_resumes_with_weights_only(method: Method, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    _, whole, ended = fit(method, path)
    run, module, balancer = fit(method, None, **resume_from(path))
    assert run.global_step == STEPS
    assert torch.equal(weights(module), weights(whole))
    torch.testing.assert_close(_tensors(balancer), _tensors(ended), rtol=0, atol=0)


# --------------------------------------------------------------------------------- code in a file


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, a checkpoint that is good but for one object, and no marker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-mtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    config = {
        "model": {"class_path": "tests.compare.compare_model.TwoTasks"},
        "data": {"class_path": "tests.compare.compare_model.Points"},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml", "--trainer.default_root_dir", str(tmp_path)])
    (good,) = tmp_path.rglob("*.ckpt")
    content = torch.load(good, weights_only=True)
    torch.save({**content, "extra": Touch(tmp_path / "marker")}, tmp_path / "bad.ckpt")
    good.rename(tmp_path / "good.ckpt")
    return tmp_path


@pytest.mark.skipif(not SAFE, reason="Lightning before 2.6 unpickles whatever a checkpoint holds")
def test_code_in_a_checkpoint_is_not_run(poisoned: Path) -> None:
    for command in ("fit", "validate", "test", "predict"):
        options = [command, "--config", "config.yaml", "--ckpt_path"]
        with pytest.raises(Exception, match="Weights only load failed"):
            main([*options, "bad.ckpt"])
        assert not (poisoned / "marker").exists()
        main([*options, "good.ckpt"])
    torch.load(poisoned / "bad.ckpt", weights_only=False)
    assert (poisoned / "marker").exists()  # it would have been
