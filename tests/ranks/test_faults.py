"""A loss or gradient that cannot be used on one of two ranks: both do what `on_bad_loss` asks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.ranks import result, run_cases
from tests.ranks.fault_cases import BALANCERS, FAULTS, STEPS, fit
from tests.ranks.rank_cases import TASKS, start

RULES = ("raise", "skip_task", "skip_step")
KINDS = [("plain", 1), ("plain", 2)]
CASES = [
    (method, layout, every, rule, fault)
    for method in BALANCERS
    for layout, every in [*KINDS, *([("sharded", 1)] if method == "DualBalance" else [])]
    for rule in RULES
    for fault in FAULTS
    if fault != "negative_loss" or method == "LogLoss"
]
CASES += [
    (method, "fsdp2", 1, rule, fault)
    for method in ("none", "MinNorm")
    for rule in ("skip_task", "skip_step")
    for fault in ("nan_loss", "nan_gradient", "nan_head")  # the last in what one rank has of it
]


FIRST = [
    (method, "plain", 1, rule, fault)
    for method in BALANCERS
    for rule in RULES
    for fault in ("nan_loss", "nan_gradient")
]


class Launch:
    """Two processes that have met every fault, each at a random batch, task and rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw = random.Random()
        self.options: dict[Any, dict[str, Any]] = {}
        for case in [*CASES, *(("first", *case) for case in FIRST)]:
            method, layout, every, rule, fault = case[-5:]
            # Heads are told from the trunk in the first step, or before.
            batch = 0 if case[0] == "first" else draw.randrange(every, STEPS)
            self.options[case] = {
                "method": method,
                "layout": layout,
                "every": every,
                "rule": rule,
                "faults": {batch: (fault, draw.choice(TASKS))},
                "where": draw.randrange(2),
            }
        cases = [json.dumps(o) for o in self.options.values()]
        run_cases(folder, cases, "tests.ranks.fault_cases:run")

    def of(self, case: Any, rank: int) -> Any:
        return result(self.folder, list(self.options).index(case), rank)["value"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(tmp_path_factory.mktemp("faults"))


def without(case: Any, batch: int, task: str) -> dict[str, Any]:
    """What one process on the joined batches is to do without, for the same end."""
    method, _, every, rule, fault = case
    group = range(batch - batch % every, batch - batch % every + every)
    summed = method == "none" or (method == "LogLoss" and every == 1)
    if rule == "skip_step" or (summed and "loss" not in fault):
        # The gradient of a summed loss does not tell which task is at fault.
        return {"faults": {}, "left_out": tuple(group)}
    # The loss of one micro-batch, or the gradient of the task in the whole step.
    gone = [batch] if "loss" in fault else group
    return {"faults": dict.fromkeys(gone, ("absent", task))}


each = {"ids": lambda case: "-".join(map(str, case))}


@pytest.mark.parametrize("case", CASES, **each)
def test_both_ranks_do_the_same(launch: Launch, case: Any) -> None:
    method, layout, every, rule, _ = case
    first, second = launch.of(case, 0), launch.of(case, 1)
    told = str(launch.options[case])
    assert torch.equal(first["weights"], second["weights"]), told
    assert first["weights"].isfinite().all(), told
    assert first["steps"] == second["steps"]
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    ((batch, (_, task)),) = launch.options[case]["faults"].items()
    step = batch // every + 1
    if rule == "raise":
        for found in (first, second):
            name, message = found["error"]
            assert name == "BadLossError", told
            assert f"at optimiser step {step} " in message
            assert f"'{task}'" in message
        assert first["steps"] == step - 1
        ends = {"faults": {}, "left_out": tuple(range(batch - batch % every, STEPS))}
    else:
        assert first["error"] is second["error"] is None, told
        ends = without(case, batch, task)
    alone = fit(0, 1, method=method, layout=layout, every=every, rule="raise", **ends)
    assert alone["steps"] == first["steps"], told
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5, msg=told)
    if rule != "raise":
        torch.testing.assert_close(first["state"], alone["state"], rtol=1e-4, atol=1e-5)
    assert (alone["weights"] - start()).abs().max() > 1e-3  # it trained


@pytest.mark.parametrize("case", FIRST, **each)
def test_in_the_very_first_step(launch: Launch, case: Any) -> None:
    """It is left out whole, unless the task at fault can be dropped; so does one process."""
    options = launch.options[("first", *case)]
    first, second = (launch.of(("first", *case), rank) for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"].isfinite().all()
    method, layout, every, rule, _ = case
    alone = fit(
        0, 1, method=method, layout=layout, every=every, rule=rule, faults=options["faults"]
    )
    assert first["steps"] == second["steps"] == alone["steps"]
    for found in (first, second):
        assert (found["error"] is None) == (alone["error"] is None) == (rule != "raise")
        torch.testing.assert_close(found["state"], alone["state"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
