"""examples/digits: files in the format of MNIST, and an error that names the file that is wrong."""

import gzip
import re
import struct
from pathlib import Path

import pytest
import torch

from examples.digits import grid
from examples.digits.data import DigitsDataModule
from examples.digits.idx import read_idx
from examples.digits.model import TwoDigits
from examples.footprint import footprint, footprint_table, separate
from tests.common.models import trainer

FOLDER = Path(grid.__file__).parent
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: torch.Tensor) -> bytes:
    """An array of bytes in the file format, header first."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + bytes(array.flatten().to(torch.uint8).tolist())


def write(folder: Path, train: int = 12, test: int = 4, pack: bool = True) -> Path:
    """Small data as Fashion-MNIST is published: four packed files in one folder."""
    folder.mkdir()
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{name}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(content) if pack else content)
    return folder


def load(folder: Path) -> DigitsDataModule:
    data = DigitsDataModule("fashion-mnist", folder, batch_size=2, train_pairs=8, eval_pairs=4)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("pack", [True, False])
def test_images_are_read_and_divided(tmp_path, pack):
    data = load(write(tmp_path / "images", pack=pack))
    sizes = {name: len(part.labels) for name, part in data.digits.items()}
    assert sizes == {"train": 10, "val": 2, "test": 4}
    assert data.digits["val"].labels.tolist() == [0, 1]  # the last of the training images
    assert data.digits["test"].images.shape == (4, 1, 28, 28)


def test_bytes_come_back(tmp_path):
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(images)))
    assert torch.equal(read_idx(path, 28, 28), images)


def test_two_steps_on_published_format(tmp_path):
    data = load(write(tmp_path / "images"))
    run = trainer(tmp_path, limit_train_batches=2)
    run.fit(TwoDigits("sgd", width=2, hidden=8, batch_norm=False, max_pool=True), datamodule=data)
    assert run.global_step == 2
    assert run.callback_metrics["val/reconstruct/MeanSquaredError"] > 0


# -------------------------------------------------------------------- bad input


def test_a_missing_folder_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*dataset-fashion-mnist"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [IMAGES, LABELS, "t10k-images-idx3-ubyte"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path / "images")
    (folder / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} or {name}.gz in .*images.*Debian"):
        load(folder)


ZEROS = torch.zeros(12, 28, 28, dtype=torch.uint8)
BAD = {
    "truncated": (IMAGES, idx(ZEROS)[:-1], r"9408 bytes after its header of 16.*found 9407"),
    "too long": (IMAGES, idx(ZEROS) + b"x", "found 9409"),
    "empty": (IMAGES, b"", "found nothing and 0 bytes"),
    "half a header": (IMAGES, idx(ZEROS)[:9], "and 9 bytes"),
    "another size": (IMAGES, idx(ZEROS[:, :27]), r"shape \(28, 28\), found \(27, 28\)"),
    "labels for images": (IMAGES, idx(torch.zeros(12)), "begin with 00000803"),
    "another type": (IMAGES, b"\0\0\x0d\3" + idx(ZEROS)[4:], "found 00000d03"),
    "none": (IMAGES, idx(ZEROS[:0]), "at least one item, found none"),
    "fewer labels": (LABELS, idx(torch.zeros(11)), "as many labels in .* 12, found 11"),
    "labels out of range": (LABELS, idx(torch.arange(12)), "from 0 to 9 in .* found 11 at pos"),
}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_named(tmp_path, name, pack):
    file, content, message = BAD[name]
    folder = write(tmp_path / "images", pack=pack)
    path = folder / f"{file}{'.gz' if pack else ''}"
    path.write_bytes(gzip.compress(content) if pack else content)
    with pytest.raises(ValueError, match=f"{message}") as found:
        load(folder)
    assert str(path) in str(found.value)


@pytest.mark.parametrize("cut", [slice(None, 40), slice(0), slice(1, None)])
def test_a_torn_gzip_file_is_named(tmp_path, cut):
    path = write(tmp_path / "images") / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(tmp_path / "images")


def test_one_image_is_too_few(tmp_path):
    with pytest.raises(ValueError, match=r"at least two training images in .* found 1"):
        load(write(tmp_path / "images", train=1))


# -------------------------------------------------------- configs and footprint


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("images", ["in the folder", "nowhere"])
def test_the_config_takes_a_folder(tmp_path, images):
    from lightning_mtl.cli import main

    folder = write(tmp_path / "images", train=200, test=20)
    root = folder if images == "in the folder" else tmp_path / "nowhere"
    arguments = ["fit", "--config", str(FOLDER / "fashion.yaml")]
    arguments += ["--data.init_args.root", str(root), "--data.init_args.eval_pairs", "250"]
    arguments += ["--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path)]
    arguments += ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.callbacks+=MinNorm"]
    if images == "nowhere":
        with pytest.raises(FileNotFoundError, match="no folder"):
            main(arguments)
    else:
        assert main(arguments) in (0, None)


def test_one_model_costs_less_than_two():
    model, inputs = TwoDigits(), torch.rand(1, 1, 28, 28)
    singles = separate(model)
    assert [list(single.heads) for single in singles] == [["classify"], ["reconstruct"]]
    assert set(model.heads) == {"classify", "reconstruct"}  # untouched
    one, two = footprint([model], inputs, 3), footprint(singles, inputs, 3)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert two.parameters - one.parameters == encoder
    assert two.memory - one.memory >= 4 * encoder
    assert one.seconds > 0
    assert f"| one model | {one.parameters:,} |" in footprint_table(model, inputs)


@pytest.mark.slow  # two comparisons, each in processes of its own
def test_the_grid_runs_on_a_folder_and_prints_both_tables(tmp_path, capsys):
    folder = write(tmp_path / "images", train=200, test=20)
    options = ["--config", str(FOLDER / "fashion.yaml"), "--root", str(folder)]
    options += ["--balancers", str(FOLDER / "table5.yaml"), "--only", "MinNorm"]
    options += ["--rates", "0.01", "0.001", "--pairs", "128", "50", "--max-epochs", "1"]
    grid.main([*options, "--seeds", "1", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert re.search(r"^MinNorm +0\.0", text, re.MULTILINE)
    assert "| 2 models |" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "lr0.01", "lr0.01.yaml", "lr0.001", "lr0.001.yaml"
    }  # fmt: skip
