"""examples/office: files in the published form, bad ones, a loader a domain, the stand-in."""

import gzip
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from examples.office import standin
from examples.office.data import MEAN, STD
from examples.office.files import DomainImages
from tests.examples.office import DOMAINS, module, written


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return written(tmp_path_factory.mktemp("office") / "data")


@pytest.fixture
def copy(root, tmp_path):
    """Images that a test may spoil."""
    return shutil.copytree(root, tmp_path / "copy")


def images(root, domain="plain", split="train", size=28, **kwargs) -> DomainImages:
    return DomainImages(root, root / f"{domain}_{split}.txt", 10, size, **kwargs)


def lines(root, domain="plain", split="train"):
    return (root / f"{domain}_{split}.txt").read_text().splitlines()


# ----------------------------------------------------------------------- files


@pytest.mark.parametrize("preload", [False, True])
def test_what_is_read_is_what_the_split_file_lists(root, preload):
    found = images(root, "coloured", preload=preload)
    listed = lines(root, "coloured")
    assert len(found) == len(listed) == 7
    for (pixels, label), line in zip(found, listed, strict=True):
        path, expected = line.split()
        assert label == int(expected)
        assert path.startswith(f"coloured/images/{label}/frame_")
        stored = np.asarray(Image.open(root / path)).transpose(2, 0, 1)
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels, stored)


def test_images_of_any_size_mode_and_name_are_read(copy):
    path = copy / "plain" / "an image.jpg"
    Image.new("L", (50, 31), 255).save(path)
    (copy / "plain_train.txt").write_text("plain/an image.jpg 9\n\n")
    (pixels, label), *rest = images(copy, size=16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.min() > 250
    assert (label, rest) == (9, [])


def text(change):
    """Change the split file of ``plain``'s training images."""

    def changed(root):
        path = root / "plain_train.txt"
        path.write_text(change(path.read_text()))

    return changed


def first(root):
    return root / lines(root)[0].split()[0]


BAD_FILES = {
    "missing folder": (
        shutil.rmtree,
        FileNotFoundError,
        r"the folder .*copy, of images or split files, but found none.*authors.*standin",
    ),
    "missing split file": (
        lambda root: (root / "sketch_val.txt").unlink(),
        FileNotFoundError,
        r"the split file .*sketch_val.txt but found none.*LibMTL.*standin",
    ),
    "missing image": (
        lambda root: first(root).unlink(),
        FileNotFoundError,
        r"the image .*frame_00000.png, which line 1 of .*plain_train.txt lists, but found none",
    ),
    "a line without a label": (
        text(lambda t: t.replace("\n", "\nplain/images/0/frame_00000.png\n", 1)),
        ValueError,
        r"`relative/path.jpg LABEL` in line 2 of .*plain_train.txt.* but found 'plain/images",
    ),
    "a label that is no number": (
        text(lambda t: "a.png three\n"),
        ValueError,
        r"in line 1 of .*plain_train.txt.*'a.png three'",
    ),
    "a label below 0": (
        text(lambda t: t.rstrip()[:-1] + "-1"),
        ValueError,
        r"whole label from 0, but found .*-1'",
    ),
    "a label out of range": (
        text(lambda t: t.rstrip()[:-1] + "10"),
        ValueError,
        r"labels from 0 to 9 in .*plain_train.txt but found 10 in line 14.*`classes`",
    ),
    "no lines": (text(lambda t: "\n"), ValueError, r"images in .*plain_train.txt but found no"),
    "no image": (
        lambda root: first(root).write_text("oops"),
        ValueError,
        r"an image in .*frame_00000.png but it cannot be decoded.*download it again",
    ),
    "an empty image": (
        lambda root: first(root).write_bytes(b""),
        ValueError,
        r"an image in .*frame_00000.png but it cannot be decoded",
    ),
}


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_before_training(copy, case, preload):
    change, error, message = BAD_FILES[case]
    change(copy)
    with pytest.raises(error, match=message):
        module(copy, preload=preload).setup()


def test_an_image_that_is_cut_off_is_named_when_it_is_read(copy):
    path = first(copy)
    path.write_bytes(path.read_bytes()[:-40])
    found = images(copy)  # the header is whole
    with pytest.raises(ValueError, match=r"frame_00000.png but it cannot be decoded"):
        found[0]
    with pytest.raises(ValueError, match=r"frame_00000.png but it cannot be decoded"):
        images(copy, preload=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 1}, "`batch_size` to be at least 2 but found 1"),
        ({"batch_size": 8}, "one batch of 8 images in .*inverted_train.txt but found 7"),
        ({"domains": ["plain", "plain"]}, "`domains` to be different names"),
        ({"domains": []}, "`domains` to be different names"),
        ({"domains": ["plain", "photo"]}, "the split file .*photo_train.txt but found none"),
        ({"classes": 1}, "`classes` of at least 2"),
        ({"size": 0}, "`size` of at least 1"),
        ({"splits": "nowhere"}, "the folder nowhere, of images or split files"),
    ],
)
def test_wrong_arguments_are_refused(root, kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(root, **kwargs).setup()


# --------------------------------------------------------------------- loaders


def batches(data, loader):
    """What the module gets."""
    for batch, _, _ in loader:
        yield data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def test_every_training_batch_has_images_of_every_domain(root):
    data = module(root)
    data.setup()
    found = list(batches(data, data.train_dataloader()))
    assert len(found) == 14 // 4  # as long as the largest domain
    for x, y in found:
        assert set(x) == set(y) == set(DOMAINS)
        for domain in DOMAINS:
            assert x[domain].shape == (4, 3, 28, 28)
            assert x[domain].dtype == torch.float32
            assert y[domain].shape == (4,)
            assert y[domain].dtype == torch.int64


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_sees_every_image_once_in_its_order(root, split):
    data = module(root)
    data.setup()
    seen = {domain: [] for domain in DOMAINS}
    last = {}
    for x, y in batches(data, getattr(data, f"{split}_dataloader")()):
        last = x
        for domain, labels in y.items():
            assert len(labels) == len(x[domain])
            seen[domain] += labels.tolist()
    assert list(last) == ["plain"]  # the others are over
    for domain in DOMAINS:
        assert seen[domain] == [int(line.split()[1]) for line in lines(root, domain, split)]


def test_images_are_normalised_as_imagenet(root):
    data = module(root)
    data.setup()
    x, _ = next(batches(data, data.val_dataloader()))
    pixels = data.parts["val"]["inverted"][0][0].double() / 255
    for channel in range(3):
        expected = (pixels[channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(x["inverted"][0, channel].double(), expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- the stand-in

SEEN = ("plain", "inverted")  # the renderings that can be undone


def test_every_source_image_is_in_one_domain_and_one_split(root):
    listed = [lines(root, d, s) for d in DOMAINS for s in standin.SPLITS]
    flat = [line for part in listed for line in part]
    assert len(flat) == len(set(flat)) == 120
    assert {d: len([x for x in flat if x.startswith(d)]) for d in DOMAINS} == {
        "plain": 48,
        "inverted": 24,
        "sketch": 24,
        "coloured": 24,
    }
    source, _ = standin.load_digits()
    number = {np.round(255 * image).astype(np.uint8).tobytes(): i for i, image in enumerate(source)}
    assert len(number) == 1797
    grey = {d: [np.asarray(Image.open(p))[..., 0] for p in (root / d).rglob("*.png")] for d in SEEN}
    as_they_were = [*grey["plain"], *(255 - image for image in grey["inverted"])]
    assert len({number[image.tobytes()] for image in as_they_were}) == 72


def test_renderings_are_what_they_say():
    image = np.zeros((28, 28))
    image[8:20, 8:20] = 1
    rng = np.random.default_rng(0)
    plain, inverted, sketch, coloured = (r(image, rng) for r in standin.RENDERINGS.values())
    np.testing.assert_array_equal(plain + inverted, np.ones((28, 28, 3)))
    assert sketch[14, 14].tolist() == sketch[2, 2].tolist() == [1, 1, 1]  # nothing changes there
    assert sketch[8, 14].max() < 0.1  # the upper edge
    inside, outside = coloured[10:18, 10:18], coloured[:6]
    assert inside.std(axis=(0, 1)).max() < 1e-9
    assert 0.05 < outside.std(axis=(0, 1)).mean() < 0.2
    for rendered in (plain, inverted, sketch, coloured):
        assert rendered.shape == (28, 28, 3)
        assert 0 <= rendered.min() <= rendered.max() <= 1


def test_the_same_seed_writes_the_same_files(root, tmp_path):
    again, other = written(tmp_path / "again"), tmp_path / "other"
    standin.main(["--out", str(other), "--count", "120", "--seed", "1"])
    names = [path.relative_to(root) for path in root.rglob("*.*")]
    assert all((again / n).read_bytes() == (root / n).read_bytes() for n in names)
    assert lines(other) != lines(root)


def test_clothes_are_read_from_the_files_of_mnist_s_format(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 100).astype(np.uint8)
    folder = tmp_path / "clothes"
    folder.mkdir()
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        content = gzip.compress(header + array.tobytes())
        (folder / f"train-{name}-ubyte.gz").write_bytes(content)
    standin.write(tmp_path / "out", images=folder)
    for line in lines(tmp_path / "out"):
        path, label = line.split()
        image = np.asarray(Image.open(tmp_path / "out" / path))[..., 0]
        (index,) = np.flatnonzero((pixels == image).all(axis=(1, 2)))
        assert labels[index] == int(label)
        assert path.split("/")[2] == standin.CLOTHES[int(label)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "99"], "`count` from 100 to 1797 but found 99"),
        (["--count", "1798"], "`count` from 100 to 1797 but found 1798"),
        (["--images", "nowhere"], "found no folder nowhere"),
        ([], "to be a new or empty folder"),
    ],
)
def test_what_cannot_be_written_is_refused(root, tmp_path, arguments, message, capsys):
    out = tmp_path / "out" if arguments else root
    with pytest.raises(SystemExit):
        standin.main(["--out", str(out), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
