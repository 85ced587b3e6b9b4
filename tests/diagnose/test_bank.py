"""The bank's stacked trainings against the Trainer, and the quoted evidence against its lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

import lightning_mtl

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import bank_table  # noqa: E402 # benchmarks are scripts: their folder is their path
import bank_truth  # noqa: E402
from bank_problems import Stream, Student, problem  # noqa: E402

STEPS = 12


def trained(given, seed: int, weights: list[float], *balancers) -> np.ndarray:
    """Test errors of one network after a training by the Trainer."""
    model = Student(given, STEPS)
    w, b, v, c = bank_truth.initial(given, seed)
    with torch.no_grad():
        model.trunk[0].weight.copy_(w.T)
        model.trunk[0].bias.copy_(b)
        for t, head in enumerate(model.heads if given.heads else [model.heads]):
            head.weight.copy_(v[:, t : t + 1].T)
            head.bias.copy_(c[t : t + 1])
    scalar = lightning_mtl.Scalarization(weights)
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*balancers] or [scalar],
    )
    trainer.fit(model, Stream(given, seed, STEPS))
    x, y = given.draw(bank_truth.EVALUATED, torch.Generator().manual_seed(77))
    with torch.no_grad():
        z = model.trunk(x)
        heads = model.heads if given.heads else [model.heads] * given.tasks
        out = torch.cat([head(z) for head in heads], 1)
    return (out - y).square().mean(0).numpy()


@pytest.mark.parametrize("kind", ["scale", "scale and direction"])
def test_a_stack_of_networks_is_trained_as_each_by_the_trainer(kind: str):
    given = problem(kind, 2, 0)
    fixed = np.asarray([0.5, 1.5])
    found = bank_truth.train(given, fixed, seeds=2, steps=STEPS, own_length=True)
    expected = {
        "equal": [1.0, 1.0],
        "fixed": [0.5, 1.5],
        "LogLoss": lightning_mtl.LogLoss(),
        "CentralDirection": lightning_mtl.CentralDirection(),
        "NashMTL": lightning_mtl.NashMTL(),
        "UPGrad": lightning_mtl.UPGrad(),
        "CAGrad": lightning_mtl.CAGrad(),
        "MinNorm": lightning_mtl.MinNorm(),
    }
    for name, how in expected.items():
        weights, balancers = (how, ()) if isinstance(how, list) else ([1.0, 1.0], (how,))
        ends = trained(given, 1, weights, *balancers)
        np.testing.assert_allclose(found[name][1], ends, rtol=2e-3, err_msg=name)


def records() -> list[dict]:
    text = (ROOT / "benchmarks" / "bank.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_what_the_command_quotes_is_what_the_bank_says():
    assert json.loads(bank_table.EVIDENCE.read_text()) == bank_table.evidence(records())


def test_the_tables_of_the_page_are_those_of_the_bank():
    page = (ROOT / "docs" / "diagnose.md").read_text(encoding="utf-8")
    for table in (bank_table.truths, bank_table.rules, bank_table.verdicts):
        assert table(records()) in page, table.__name__


def test_rules_are_tried_on_problems_that_they_are_not_made_from():
    first, second = bank_table.halves(records())
    names = [line["problem"] for line in first + second]
    assert len(set(names)) == len(names) == len(records())
    assert {line["kind"] for line in first} == {line["kind"] for line in second}


def test_better_needs_every_rival_and_the_margin():
    line = {"delta_p": {"new": [5.0, 6.0, 5.5], "low": [1.0, 2.2, 1.4], "near": [4.7, 5.6, 5.0]}}
    assert bank_table.better(line, "new", "low")
    assert not bank_table.better(line, "new", "low", "near")  # certain, and below the margin
    assert not bank_table.better(line, "low", "new")
