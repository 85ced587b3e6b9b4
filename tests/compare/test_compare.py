"""`lightning-mtl compare`: the grid, its files, its answer, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, median, stdev

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything

from lightning_mtl import MinNorm
from lightning_mtl.cli import main
from lightning_mtl.compare.request import Request
from tests.common.places import ROOT
from tests.compare.compare_model import Points, TwoTasks
from tests.compare.compare_runs import PLAIN

METRICS = {"classify": "MulticlassAccuracy", "regress": "MeanSquaredError"}
HIGHER = {"classify": True, "regress": False}
CONFIG = {
    "model": {"class_path": "tests.compare.compare_model.TwoTasks", "init_args": {"width": 8}},
    "data": {"class_path": "tests.compare.compare_model.Points"},
    "trainer": {"max_epochs": 3, "accelerator": "cpu"},
}
GOOD = {
    "equal": [],
    "minnorm": [{"class_path": "MinNorm"}],
    "fixed-x3": [{"class_path": "Scalarization", "init_args": {"weights": {"regress": 3.0}}}],
}
BAD = {
    "broken": [{"class_path": "tests.compare.compare_model.Broken"}],
    "killed": [{"class_path": "tests.compare.compare_model.Killed"}],
}


def files(folder: Path, config: dict = CONFIG, balancers: dict = GOOD) -> list[str]:
    """Write the two files and give the options that name them."""
    (folder / "C.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "B.yaml").write_text(yaml.safe_dump(balancers, sort_keys=False))
    return [*PLAIN, "--config", "C.yaml", "--balancers", "B.yaml", "--out", "out"]


def start(folder: Path, *options: str) -> subprocess.Popen:
    """The command as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_mtl", "compare", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def records(folder: Path) -> dict[str, dict]:
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    return {record["run"]: record for record in map(json.loads, lines)}


def numbers(folder: Path) -> dict[str, dict]:
    """Metrics of all finished training runs."""
    return {
        name: {"steps": record["steps"], **record["metrics"]}
        for name, record in records(folder).items()
        if record["kind"] == "train" and record["status"] == "finished"
    }


class Grid(Namespace):
    folder: Path
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """A whole comparison, two balancers of which fail."""
    folder = tmp_path_factory.mktemp("grid")
    options = files(folder, balancers={**GOOD, **BAD})
    process = start(folder, *options, "--seeds", "2", "--workers", "2")
    stdout, stderr = process.communicate()
    return Grid(folder=folder, code=process.returncode, stdout=stdout, stderr=stderr)


def test_every_run_is_recorded(grid: Grid):
    expected = {f"single-task-{task}-seed{seed}" for task in METRICS for seed in (0, 1)}
    expected |= {f"{name}-seed{seed}" for name in {**GOOD, **BAD} for seed in (0, 1)}
    expected |= {f"{name}-seed0-timing" for name in {**GOOD, **BAD}} | {"equal-seed0-curves"}
    assert set(records(grid.folder)) == expected, grid.stderr
    assert {r["steps"] for r in numbers(grid.folder).values()} == {12}
    for kind in ("train", "timing"):
        finished = [r for r in records(grid.folder).values() if r["kind"] == kind]
        assert {r["method"] for r in finished if r["status"] == "failed"} == set(BAD)


def test_progress_covers_the_whole_grid(grid: Grid):
    lines = [line for line in grid.stdout.splitlines() if re.match(r"\[ ?\d+/20\]", line)]
    assert [int(line[1:3]) for line in lines] == list(range(1, 21))
    assert all(
        re.search(r"\| \d+ (s|min) so far, about \d+ (s|min) left$", line) for line in lines[:-1]
    )
    assert not grid.stderr


def test_failures_are_shown_and_the_others_go_on(grid: Grid):
    assert grid.code == 1
    report = (grid.folder / "out" / "report.html").read_text()
    for text in ("ArithmeticError: this balancer always fails", "ended with signal 9 (SIGKILL)"):
        assert text in grid.stdout
        assert text in report
    assert "broken (3 FAILED)" in grid.stdout
    assert "FAILED killed-seed1" in grid.stdout
    log = (grid.folder / "out" / "logs" / "broken-seed0.log").read_text()
    assert "in weights" in log
    assert log.rstrip().endswith("ArithmeticError: this balancer always fails")


def test_numbers_are_those_of_a_training_by_hand(grid: Grid):
    for name, seed, callbacks, tasks in (
        ("minnorm-seed0", 0, [MinNorm()], None),
        ("single-task-regress-seed1", 1, [], ["regress"]),
    ):
        seed_everything(seed, verbose=False)
        model = TwoTasks(width=8)
        model.active_tasks = tasks
        seed_everything(seed, verbose=False)
        trainer = Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, datamodule=Points())
        trainer.validate(model, datamodule=Points(), verbose=False)
        for task, found in records(grid.folder)[name]["metrics"].items():
            logged = trainer.callback_metrics[f"val/{task}/{METRICS[task]}"]
            assert found == {METRICS[task]: pytest.approx(float(logged), rel=1e-7)}


def test_summary_follows_from_the_results(grid: Grid):
    runs = numbers(grid.folder)
    base = {
        task: fmean(runs[f"single-task-{task}-seed{seed}"][task][metric] for seed in (0, 1))
        for task, metric in METRICS.items()
    }
    content = json.loads((grid.folder / "out" / "baseline.json").read_text())
    assert content["format"] == 1
    for task, metric in METRICS.items():
        assert content["tasks"][task] == {
            metric: {"value": pytest.approx(base[task]), "higher_is_better": HIGHER[task]}
        }

    with (grid.folder / "out" / "summary.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["single-task", *GOOD, *BAD]
    timing = {m: records(grid.folder)[f"{m}-seed0-timing"] for m in GOOD}
    for method in GOOD:
        row = rows[method]
        by_task = {}
        for task, metric in METRICS.items():
            values = [runs[f"{method}-seed{seed}"][task][metric] for seed in (0, 1)]
            assert float(row[f"{task}/{metric} mean"]) == pytest.approx(fmean(values))
            assert float(row[f"{task}/{metric} std"]) == pytest.approx(stdev(values))
            sign = 100 if HIGHER[task] else -100
            by_task[task] = [sign * (value - base[task]) / base[task] for value in values]
            assert float(row[f"delta_p/{task} mean"]) == pytest.approx(fmean(by_task[task]))
        over_seeds = [fmean(pair) for pair in zip(*by_task.values(), strict=True)]
        assert float(row["delta_p mean"]) == pytest.approx(fmean(over_seeds))
        assert float(row["delta_p std"]) == pytest.approx(stdev(over_seeds))
        assert f"{fmean(over_seeds):+.2f} ± {stdev(over_seeds):.2f}" in grid.stdout
        ratio = 1.0 if method == "equal" else timing[method]["step_ratio"]
        assert float(row["step_ratio"]) == pytest.approx(ratio, abs=1e-3)
        # one step of equal weighting for all rows, so that times and ratios order them alike
        turns = [ms for record in timing.values() for ms in record["equal_turns_ms"]]
        step = median(turns) * float(row["step_ratio"])
        assert float(row["step_ms"]) == pytest.approx(step)
        assert float(row["device_seconds mean"]) == pytest.approx(12 * step / 1000)
        assert float(row["peak_mb"]) > 0
    assert rows["broken"]["delta_p mean"] == ""
    assert rows["broken"]["failed"] == "broken-seed0; broken-seed1; broken-seed0-timing"


def test_baseline_file_gives_a_module_its_delta_p(grid: Grid):
    path = grid.folder / "out" / "baseline.json"
    model = TwoTasks(width=8, baseline=str(path))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, devices=1)
    trainer.validate(model, datamodule=Points(), verbose=False)
    base = json.loads(path.read_text())["tasks"]["regress"]["MeanSquaredError"]["value"]
    value = float(trainer.callback_metrics["val/regress/MeanSquaredError"])
    found = float(trainer.callback_metrics["val/delta_p/regress"])
    assert found == pytest.approx(100 * (base - value) / base, rel=1e-4)


def test_curves_start_from_the_same_weights_and_data(grid: Grid):
    curves = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (grid.folder / "out" / "curves").iterdir()
    }
    assert set(curves) == {"minnorm-seed0", "minnorm-seed1", "equal-seed0-curves"}
    for points in curves.values():
        assert [point["step"] for point in points] == list(range(12))
        assert all(-1 <= point["cosines"]["classify / regress"] <= 1 for point in points)
    first = [curves[name][0]["norms"] for name in ("minnorm-seed0", "equal-seed0-curves")]
    assert first[0] == pytest.approx(first[1])
    assert curves["minnorm-seed0"][-1]["norms"] != curves["equal-seed0-curves"][-1]["norms"]


class _Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attrs if name == "id"]


def test_report_needs_no_other_file(grid: Grid):
    report = (grid.folder / "out" / "report.html").read_text()
    sources = _Sources()
    sources.feed(report)
    assert report.count("<figure>") == 9
    assert len(set(sources.ids)) == len(sources.ids)
    within = {f"#{one}" for one in sources.ids}
    assert set(sources.found) | set(re.findall(r"url\(([^)]*)\)", report)) <= within
    assert f"<td>{torch.__version__}</td>" in report
    assert "class_path: Scalarization" in report
    for name in ("delta_p", "pareto_time", "pareto_memory", "runs", "gradient_norms"):
        assert (grid.folder / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")


def table(folder: Path) -> list[dict[str, str]]:
    """``summary.csv`` without what is measured in seconds and bytes."""
    with (folder / "out" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = ("step_", "device_", "peak_", "on_front/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_numbers(grid: Grid, tmp_path: Path):
    options = files(tmp_path)
    path = tmp_path / "out" / "results.jsonl"
    before = ""
    for _ in range(3):
        process = start(tmp_path, *options, "--seeds", "1", "--workers", "2")
        for _ in range(random.Random().randrange(2, 4)):  # the headline, then a line a run
            assert process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert path.read_text().startswith(before)
        before = path.read_text()
    assert 3 <= len(before.splitlines()) < 9
    path.write_text(before + before.splitlines()[0][:40])  # a line cut short

    process = start(tmp_path, *options, "--seeds", "2", "--workers", "1")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    assert stdout.startswith(f"14 runs, {len(before.splitlines())} of them finished before")
    assert path.read_text().startswith(before)
    expected = {n: v for n, v in numbers(grid.folder).items() if not n.startswith(tuple(BAD))}
    assert numbers(tmp_path) == expected
    assert table(tmp_path) == [row for row in table(grid.folder) if row["method"] not in BAD]
    folders = [folder / "out" for folder in (tmp_path, grid.folder)]
    for name in ("baseline.json", "curves/minnorm-seed0.jsonl", "curves/equal-seed0-curves.jsonl"):
        assert (folders[0] / name).read_text() == (folders[1] / name).read_text()


def test_another_comparison_in_the_folder(grid, here, capsys):
    longer = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_epochs": 5}}
    files(here, config=longer, balancers={**GOOD, **BAD})
    out = grid.folder / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    options = ["compare", *PLAIN, "--config", "C.yaml", "--balancers", "B.yaml", "--out", str(out)]
    assert main(options) == 2
    message = capsys.readouterr().err
    assert "config.trainer.max_epochs: 3 in the folder, 5 now" in message
    assert "another folder with --out" in message

    files(here, balancers={**GOOD, "broken": [{"class_path": "LogLoss"}]})
    assert main([*options, "--split", "test"]) == 2
    message = capsys.readouterr().err
    expected = (
        "balancers.broken.0.class_path: 'tests.compare.compare_model.Broken' in the folder, "
        "'LogLoss' now"
    )
    assert expected in message
    assert "split: 'val' in the folder, 'test' now" in message
    assert "balancers.killed.0.class_path" in message
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_split_names_the_metrics_that_are_read(here):
    files(here, balancers={"minnorm": [{"class_path": "MinNorm"}]})
    options = Namespace(
        config="C.yaml",
        balancers="B.yaml",
        seeds=1,
        workers=1,
        only=None,
        split="test",
        rivals="none",
        select="last",
        last_k=1,
    )
    request = Request(options)
    assert request.logged["regress"] == {"MeanSquaredError": "test/regress/MeanSquaredError"}
    assert request.directions == {t: {METRICS[t]: HIGHER[t]} for t in METRICS}
    assert list(request.methods) == ["equal", "minnorm"]  # the reference is always there


def test_a_config_that_changes_meanwhile_is_not_mixed(tmp_path: Path):
    options = files(tmp_path)
    process = start(tmp_path, *options, "--seeds", "1")
    assert process.stdout.readline().startswith("9 runs")  # it has read the request
    changed_config = {**CONFIG, "trainer": {"max_epochs": 1, "accelerator": "cpu"}}
    (tmp_path / "C.yaml").write_text(yaml.safe_dump(changed_config))
    stdout, _ = process.communicate()
    assert process.returncode == 1
    assert "Expected C.yaml as it was when the comparison started" in stdout
    assert {record["steps"] for record in numbers(tmp_path).values()} <= {36}
