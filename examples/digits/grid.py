"""A comparison at every learning rate of the paper, and the best rate of every method.

python -m examples.digits.grid --out paper_results --seeds 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from examples.digits.data import HELD_OUT
from examples.digits.model import TwoDigits
from examples.footprint import footprint_table
from lightning_mtl.metrics import delta_p

HERE = Path(__file__).parent
RATES = (1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
METRICS = {"classify": ("MulticlassAccuracy", True), "reconstruct": ("MeanSquaredError", False)}

Metrics = dict[str, dict[str, float]]


def parse(args: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that go on to ``lightning-mtl compare``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options (--seeds, --workers, --only) go on to `lightning-mtl compare`.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; a subfolder a rate")
    parser.add_argument("--source", choices=tuple(HELD_OUT), help="instead of the config's")
    parser.add_argument("--root", type=Path, help="folder of the images, instead of the config's")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the paper's five")
    parser.add_argument("--config", type=Path, default=HERE / "paper.yaml")
    parser.add_argument("--balancers", type=Path, default=HERE / "balancers.yaml")
    parser.add_argument("--max-epochs", type=int, help="instead of the config's")
    parser.add_argument(
        "--pairs",
        type=int,
        nargs=2,
        metavar=("TRAIN", "EVAL"),
        help="pairs an epoch and for validation, instead of the config's",
    )
    return parser.parse_known_args(args)


def compare(rate: float, options: argparse.Namespace, rest: Sequence[str]) -> Path:
    """Run, or continue, the comparison at one rate; returns its folder."""
    config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    config["model"]["init_args"]["lr"] = rate
    for name in ("source", "root"):
        if (value := getattr(options, name)) is not None:
            config["data"]["init_args"][name] = str(value)
    if options.pairs:
        names = ("train_pairs", "eval_pairs")
        config["data"]["init_args"].update(zip(names, options.pairs, strict=True))
    if options.max_epochs:
        config["trainer"]["max_epochs"] = options.max_epochs
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"lr{rate:g}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    folder = options.out / f"lr{rate:g}"
    # Rates are chosen here, and fixed weights within each comparison.
    files = ["--config", path, "--balancers", options.balancers, "--out", folder]
    files += ["--rivals", "weights"]
    command = [sys.executable, "-m", "lightning_mtl", "compare", *map(str, files), *rest]
    # 1: a run failed. At the highest rates some diverge, which the other rates make up for.
    if (status := subprocess.run(command, check=False).returncode) > 1:
        raise SystemExit(status)
    return folder


def means(folder: Path) -> dict[str, Metrics]:
    """``{method: {task: {metric: mean over seeds}}}`` of the methods none of whose runs failed."""
    values: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    failed = set()
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] != "train" or record.get("stage") == "tune":
            continue
        method = " ".join(filter(None, (record["method"], record.get("task"))))
        if record["status"] != "finished":
            failed.add(method)
            continue
        for task, metrics in record["metrics"].items():
            for metric, value in metrics.items():
                values[method][task][metric].append(value)
    return {
        method: {
            task: {metric: statistics.mean(found) for metric, found in metrics.items()}
            for task, metrics in tasks.items()
        }
        for method, tasks in values.items()
        if method not in failed
    }


def best(results: dict[float, dict[str, Metrics]]) -> dict[str, tuple[float, Metrics, float]]:
    """``{method: (rate, metrics, Δp)}``, each method at its best rate on validation.

    Δp is relative to the best single-task model of every task: relative to those of the same rate,
    a rate that ruins the single tasks would win.
    """
    baseline: Metrics = {}
    for task, (metric, up) in METRICS.items():
        row = f"single-task {task}"
        values = [methods[row][task][metric] for methods in results.values() if row in methods]
        if not values:
            raise SystemExit(
                f"Expected single-task runs of `{task}`, but they failed at every rate."
            )
        baseline[task] = {metric: max(values) if up else min(values)}
    directions = {task: dict([metric]) for task, metric in METRICS.items()}
    found: dict[str, tuple[float, Metrics, float]] = {}
    for rate, methods in results.items():
        for method, metrics in methods.items():
            if method.startswith("single-task "):
                continue
            value = statistics.mean(delta_p(metrics, baseline, directions).values())
            if method not in found or value > found[method][2]:
                found[method] = (rate, metrics, value)
    return found


def main(args: Sequence[str] | None = None) -> None:
    options, rest = parse(args)
    results = {rate: means(compare(rate, options, rest)) for rate in options.rates}
    print(f"\n{'method':28}{'rate':>8}{'accuracy':>10}{'MSE':>9}{'Δp':>9}")
    for method, (rate, metrics, value) in best(results).items():
        accuracy, mse = (metrics[task][metric] for task, (metric, _) in METRICS.items())
        print(f"{method:28}{rate:>8g}{accuracy:>10.4f}{mse:>9.4f}{value:>+8.1f}%")
    config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    model = TwoDigits(**config["model"]["init_args"])
    print(f"\n{footprint_table(model, torch.rand(1, 1, 28, 28))}")


if __name__ == "__main__":
    main()
