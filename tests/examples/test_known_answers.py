"""examples/known_answers: what was put into each problem is there; copies differ by luck alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything

from examples.known_answers import problem
from examples.known_answers.copies import Copy
from examples.known_answers.problem import TASKS, Teacher, TwoRegressions
from tests.common.models import trainer
from tests.common.places import ROOT

FOLDER = Path(problem.__file__).parent
CONFIGS = ("helps.yaml", "cannot_help.yaml")


def made(name: str) -> tuple[TwoRegressions, Teacher, dict]:
    text = yaml.safe_load((FOLDER / name).read_text())
    return (
        TwoRegressions(**text["model"]["init_args"]),
        Teacher(**text["data"]["init_args"]),
        text["trainer"],
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rate_falls_over_the_steps_that_there_are(name: str):
    model, data, flags = made(name)
    assert model.hparams["steps"] == flags["max_epochs"] * len(data.train_dataloader())


def test_targets_have_variance_one_and_the_noise_of_the_file():
    clean, noisy = (Teacher(noise=s)._loader(2, 20_000, 20_000, shuffle=False) for s in (0.0, 2.0))
    (x, before), (same, after) = next(iter(clean)), next(iter(noisy))
    assert torch.equal(x, same)
    for task in TASKS:
        assert before[task].std() == pytest.approx(1.0, abs=0.05)
        assert (after[task] - before[task]).std() == pytest.approx(2.0, rel=0.03)


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own():
    loader = Teacher(train=100).train_dataloader()
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    stages = [Teacher().val_dataloader(), Teacher().test_dataloader(), loader]
    assert len({float(next(iter(stage))[0].sum()) for stage in stages}) == 3


def test_one_loss_is_a_thousand_times_the_other():
    model, data, _ = made("helps.yaml")
    x, targets = next(iter(data.val_dataloader()))
    predicted = {task: y.detach() for task, y in model(x).items()}
    losses = {task: model.tasks[task].loss(predicted[task], targets[task]) for task in TASKS}
    errors = {task: (predicted[task] - targets[task]).square().mean() for task in TASKS}
    assert float(losses["first"]) == pytest.approx(1000 * float(errors["first"]), rel=1e-5)
    assert float(losses["second"]) == pytest.approx(float(errors["second"]), rel=1e-5)


def run(number: int | None) -> torch.Tensor:
    seed_everything(3, verbose=False)
    model = TwoRegressions(width=4, steps=5)
    callbacks = [] if number is None else [Copy(number)]
    trainer(callbacks=callbacks, max_steps=5).fit(model, Teacher(train=200).train_dataloader())
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_copies_start_elsewhere_and_each_again_where_it_did():
    assert torch.equal(run(1), run(1))
    ends = [run(None), run(1), run(2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_a_copy_is_equal_weighting_but_for_its_start(monkeypatch):
    monkeypatch.setattr(Copy, "on_fit_start", lambda *_: None)
    torch.testing.assert_close(run(1), run(None), rtol=1e-6, atol=1e-7)


def test_copies_are_twelve():
    rows = yaml.safe_load((FOLDER / "copies.yaml").read_text())
    assert rows.pop("equal weighting") == []
    assert all(c["class_path"] == f"{Copy.__module__}.Copy" for (c,) in rows.values())
    assert sorted(c["init_args"]["number"] for (c,) in rows.values()) == list(range(1, 13))


@pytest.mark.slow  # 63 trainings
@pytest.mark.parametrize(("name", "answer"), [("helps.yaml", "Yes"), ("cannot_help.yaml", "No")])
def test_the_command_gives_the_answer(name: str, answer: str, tmp_path: Path):
    options = ["--config", str(FOLDER / name), "--balancers", str(FOLDER / "balancers.yaml")]
    options += ["--seeds", "5", "--workers", "2", "--split", "test", "--out", str(tmp_path / "out")]
    told = subprocess.run(
        [sys.executable, "-m", "lightning_mtl", "compare", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert f"\n{answer}: " in told.stdout or f"\n{answer}, " in told.stdout
