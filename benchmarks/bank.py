"""The bank of small problems: what ``lightning-mtl diagnose`` says, beside what balancing brings.

    python benchmarks/bank.py --out bank.jsonl [--kinds "scale,alike"] [--own-length]

Each problem is diagnosed in a real Trainer (100 steps, 25 measured). Then equal weighting, the
fixed weights that the diagnosis names, one method of every family, and every task alone are
trained for 300 steps on 5 seeds, and ``lightning_mtl.compare.verdict`` says of each family whether
it is better than equal weighting, and whether better than the fixed weights too: paired t-tests at
5 %, margin 1 point of Δp. A line a problem; ``benchmarks/bank_table.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bank_problems import KINDS, Problem, Stream, Student, problem
from bank_truth import train
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_mtl.diagnose.study import study
from lightning_mtl.diagnose.summary import summarise

SIZES = {2: 4, 4: 3, 12: 2}  # tasks: problems of each kind
STEPS, SEEDS, LOOK, MEASURED = 300, 5, 100, 25


def diagnosis(given: Problem) -> dict[str, Any]:
    """The numbers of a diagnosis."""

    def run(callbacks: Sequence[Callback], task: str | None) -> None:
        seed_everything(0, verbose=False)
        model = Student(given, STEPS)
        model.active_tasks = None if task is None else [task]
        trainer = Trainer(
            max_steps=LOOK,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(model, Stream(given, 500, LOOK))

    return summarise(study(run, LOOK, MEASURED))


def needed(found: dict[str, Any]) -> dict[str, Any]:
    """What the rules of a reading look at."""
    rows = [{key: row[key] for key in ("example", "worst", "share")} for row in found["families"]]
    return {
        "families": rows,
        "fixed_weights": found["fixed_weights"],
        "alone": found["alone"],
        "pairs": [{"verdict": pair["verdict"]} for pair in found["pairs"]],
        "noise": {"floor": found["noise"]["floor"]},
        "norm": {"spread": found["norm"]["spread"]},
    }


def record(given: Problem, *, own_length: bool = False) -> dict[str, Any]:
    """One line of the file; what is in it already is not repeated."""
    started = time.process_time()
    found = diagnosis(given)
    looked = time.process_time()
    fixed = np.asarray(found["fixed_weights"])
    ends = train(given, fixed, SEEDS, STEPS, own_length=own_length)
    base = ends.pop("single").mean(0)
    scores = {m: (100 * (1 - e / base)).mean(1).round(3).tolist() for m, e in ends.items()}
    return {
        "problem": given.name,
        "kind": given.kind,
        "tasks": given.tasks,
        "number": given.number,
        "delta_p": scores,
        "diagnosis": needed(found),
        "seconds": [round(looked - started, 2), round(time.process_time() - looked, 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--own-length", action="store_true", help="directions as methods make them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    done = set()
    if options.out.exists():
        done = {json.loads(line)["problem"] for line in options.out.read_text().splitlines()}
    for number in range(max(SIZES.values())):  # so that a run cut short has all kinds
        for kind in options.kinds.split(","):
            for tasks in (size for size, count in SIZES.items() if number < count):
                given = problem(kind, tasks, number)
                if given.name in done:
                    continue
                line = record(given, own_length=options.own_length)
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(given.name, line["seconds"], flush=True)


if __name__ == "__main__":
    main()
