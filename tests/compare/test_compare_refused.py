"""What `compare` cannot carry out is refused before anything is trained: status 2, one message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from tests.compare.compare_runs import CONFIG, MODEL, files

GOOD = {"equal": [], "minnorm": [{"class_path": "MinNorm"}]}


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The message of a request that is refused, and that no file has changed."""

    def run(*options: str, balancers: dict | str = GOOD, config: dict = CONFIG) -> str:
        given = [*files(here, balancers, config), *options]
        before = contents(here)
        assert main(["compare", *given]) == 2
        assert contents(here) == before
        captured = capsys.readouterr()
        assert not captured.out
        assert captured.err.startswith("lightning-mtl compare: error: Expected ")
        assert "Traceback" not in captured.err
        return captured.err

    return run


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_folder_that_cannot_be_one(here: Path, refused: Callable[..., str]):
    (here / "file").write_text("mine")
    (here / "loop").symlink_to("loop")
    for out, message in (
        ("", 'to name a folder but found ""'),
        ("file", "Not a directory: 'file'"),
        ("file/below", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("new/" + "x" * 300, "File name too long"),
        ("y/" * 3000, "File name too long"),
        ("loop", "(File exists|symbolic links)"),
        ("a\0b", "null"),
    ):
        assert re.search(message, refused("--out", out)), out
    assert {p.name for p in here.iterdir()} == {"file", "loop", "C.yaml", "B.yaml"}


def test_a_folder_that_holds_files_of_the_same_names(here: Path, refused: Callable[..., str]):
    (here / "out" / "comparison.json").mkdir(parents=True)
    assert "Is a directory" in refused()


@pytest.mark.skipif(sys.platform != "linux", reason="a mount")
def test_a_folder_that_cannot_be_written(here: Path, refused: Callable[..., str]):
    """Also for an administrator, whom permissions do not bind."""
    out = here / "out"
    out.mkdir()
    mounts = (["--bind", "out", "out"], ["-o", "remount,ro,bind", "out"])
    try:
        for options in mounts:
            made = subprocess.run(["mount", *options], capture_output=True, check=False)
            if made.returncode:
                pytest.skip(f"only an administrator may mount: {made.stderr.decode()}")
        assert "Read-only file system" in refused()
        assert "Read-only file system" in refused("--out", "out/below")
    finally:
        subprocess.run(["umount", "-l", str(out)], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("balancers", "message"),
    [
        (
            "m: [MinNorm]\nm: [CAGrad]\n",
            r"once in B.yaml but found `m` at line 1 and again at line 2",
        ),
        ('1: [MinNorm]\n"1": [CAGrad]\n', r"found `1` at line 1 and again at line 2"),
        ("m:\n- class_path: MinNorm\n  class_path: CAGrad\n", r"`class_path` at line 2 .* line 3"),
        (
            "m:\n- class_path: X\n  init_args:\n    base: {class_path: Y, z: {c: 1,\n     c: 2}}\n",
            r"`c` at line 4 and again at line 5",
        ),
        ("a: &x [{class_path: MinNorm, class_path: CAGrad}]\nb: *x\n", r"`class_path` at line 1"),
        ("a: &x [*x]\n", r"`a` holds \[\[\.\.\.\]\]"),
        ("m: [{class_path: 3}]\n", r"balancer `m`"),
        ("m: \0", r"B.yaml to be YAML but could not read it.*#x0000"),
        ("? [a]\n: []\n", r"B.yaml to be YAML but could not read it"),
        ("- 1\n", r"to map a name to its callbacks.*found list"),
        ('" ": []', r"names of balancers that are not empty"),
    ],
)
def test_a_file_of_balancers(refused: Callable[..., str], balancers: str, message: str):
    assert re.search(message, refused(balancers=balancers), re.DOTALL)


def test_a_merged_key_may_be_replaced(refused: Callable[..., str]):
    """That is what merging is for: the file is read, and only the unknown name is refused."""
    balancers = "a: [&x {class_path: MinNorm}]\nb: [{<<: *x, class_path: CAGrad}]\n"
    assert "--only to name some of equal, a, b but" in refused("--only", "?", balancers=balancers)


def test_files_that_are_not_text(here: Path, refused: Callable[..., str]):
    (here / "latin").write_bytes("a: []\n# größe\n".encode("latin-1"))
    (here / "folder").mkdir()
    message = refused("--balancers", "latin")
    assert "latin to be YAML in UTF-8 but found other bytes at line 2" in message
    assert "latin to be YAML in UTF-8" in refused("--config", "latin")
    assert "a YAML file at folder but found none" in refused("--config", "folder")
    assert "File name too long" in refused("--balancers", "x" * 300)
    (here / "twice").write_text(json.dumps(CONFIG)[:-1] + ', "model": {}}')
    assert "once in twice but found `model`" in refused("--config", "twice")


def test_data_to_evaluate_on(refused: Callable[..., str]):
    config = {**CONFIG, "data": {"class_path": MODEL + "Untested"}}
    message = refused(config=config)
    assert "Expected `Untested` or `TwoTasks` to define `val_dataloader` but found none" in message
    message = refused("--split", "test", config=config)
    assert "define `test_dataloader` but found none, --split test, so no run could be" in message
    config = {k: v for k, v in CONFIG.items() if k != "data"}
    assert "Expected `TwoTasks` to define `train_dataloader`" in refused(config=config)
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "limit_val_batches": 0}}
    assert "found `trainer.limit_val_batches: 0` in C.yaml" in refused(config=config)
    for limit in ("limit_train_batches", "max_steps", "max_epochs"):
        config = {**CONFIG, "trainer": {**CONFIG["trainer"], limit: 0}}
        assert f"batches to train on but found `trainer.{limit}: 0`" in refused(config=config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Nothing", "An invalid dataloader was returned from `Nothing.train_dataloader"),
        ("NoBatch", "`train_dataloader` has no batch"),
        ("LateNone", "An invalid dataloader was returned from `LateNone.val_dataloader"),
        ("LateError", "FileNotFoundError: no archive in this folder"),
        ("LateEnd", "its process ended with exit status 3"),
    ],
)
def test_data_that_setup_prepares(refused: Callable[..., str], data: str, message: str):
    """Found in a process of its own, which goes as far as the first step of a training."""
    config = {**CONFIG, "data": {"class_path": MODEL + data}}
    found = refused(config=config)
    assert "a training to reach its first step with C.yaml but found an error" in found
    assert message in found


def test_test_data_that_raise(refused: Callable[..., str]):
    config = {**CONFIG, "data": {"class_path": MODEL + "NoTest"}}
    message = refused("--split", "test", config=config)
    assert "Expected test data to be there with C.yaml but found an error" in message
    assert "LookupError: no test data" in message


def test_a_model_that_ends_the_process(refused: Callable[..., str]):
    config = {**CONFIG, "model": {"class_path": MODEL + "Leaving"}}
    assert "building it failed. SystemExit: 0" in refused(config=config)


@pytest.mark.parametrize("content", ["", "\0\1", "{", "[]"])
def test_a_broken_comparison_in_the_folder(here: Path, refused: Callable[..., str], content: str):
    (here / "out").mkdir()
    (here / "out" / "comparison.json").write_text(content)
    assert "out" in refused()
