"""examples/scenes: files in the published form, bad ones, true targets, augmentation, losses."""

import math
import shutil

import numpy as np
import pytest
import torch

from examples.scenes import augment, generate, losses
from examples.scenes.files import SceneFiles
from tests.examples.scenes import HEIGHT, WIDTH, module, written

TASKS = ("segment", "depth", "normal")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return written(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture
def copy(root, tmp_path):
    """Scenes that a test may spoil."""
    return shutil.copytree(root, tmp_path / "copy")


def files(root, **kwargs) -> SceneFiles:
    return SceneFiles(root, **{"split": "train", "tasks": TASKS, "classes": 4, **kwargs})


# ----------------------------------------------------------------------- files


def test_what_is_read_is_what_was_written(root):
    image, targets = files(root)[4]
    arrays = {k: np.load(root / "train" / k / "4.npy") for k in generate.Scene._fields}
    assert arrays["depth"].shape == (HEIGHT, WIDTH, 1)
    assert image.dtype == torch.float32
    assert targets["segment"].dtype == torch.int64
    np.testing.assert_array_equal(image.permute(1, 2, 0), arrays["image"])
    np.testing.assert_array_equal(targets["segment"], arrays["label"])
    np.testing.assert_array_equal(targets["depth"].permute(1, 2, 0), arrays["depth"])
    np.testing.assert_array_equal(targets["normal"].permute(1, 2, 0), arrays["normal"])


def test_labels_may_be_floating_and_bear_the_name_of_cityscapes(copy):
    before = files(copy)[0][1]["segment"]
    for index in range(6):
        path = copy / "train" / "label" / f"{index}.npy"
        np.save(path, np.load(path).astype(np.float64))
    (copy / "train" / "label").rename(copy / "train" / "label_7")
    shutil.rmtree(copy / "train" / "normal")
    image, targets = files(copy, tasks=("segment", "depth"))[0]
    assert torch.equal(targets["segment"], before)
    assert set(targets) == {"segment", "depth"}
    assert image.shape == (3, HEIGHT, WIDTH)


def spoil(path, change):
    np.save(path, change(np.load(path)))


def put(array, value):
    array = array.copy()
    array.flat[5] = value
    return array


BAD_FILES = {
    "missing folder": (
        lambda split: shutil.rmtree(split / "label"),
        FileNotFoundError,
        r"folder .*train.label or .*train.label_7 but found none.*linked from.*generate",
    ),
    "no scenes": (
        lambda split: [p.unlink() for p in split.rglob("*.npy")],
        FileNotFoundError,
        r"files 0.npy, 1.npy, … in .*train.image but found none.*generate",
    ),
    "missing file": (
        lambda split: (split / "depth" / "2.npy").unlink(),
        FileNotFoundError,
        r"the file .*train.depth.2.npy, one of 6 scenes, but found none",
    ),
    "a file without an image": (
        lambda split: (split / "image" / "5.npy").unlink(),
        FileNotFoundError,
        r"the file .*train.image.5.npy, one of 6 scenes",
    ),
    "wrong shape": (
        lambda split: spoil(split / "normal" / "1.npy", lambda a: a[:, :-1]),
        ValueError,
        r"shape \(32, 48, 3\) in .*normal.1.npy but found \(32, 47, 3\)",
    ),
    "channels first": (
        lambda split: spoil(split / "image" / "0.npy", lambda a: a.transpose(2, 0, 1)),
        ValueError,
        r"in .*image.0.npy but found \(3, 32, 48\).*channels come last",
    ),
    "wrong dimensions": (
        lambda split: spoil(split / "image" / "0.npy", lambda a: a[0, 0]),
        ValueError,
        r"in .*image.0.npy but found \(3,\)",
    ),
    "wrong dtype": (
        lambda split: spoil(split / "image" / "3.npy", lambda a: (255 * a).astype(np.uint8)),
        ValueError,
        r"floating numbers in .*image.3.npy but found uint8",
    ),
    "text for labels": (
        lambda split: spoil(split / "label" / "3.npy", lambda a: a.astype(str)),
        ValueError,
        r"whole or floating numbers in .*label.3.npy but found <U4",
    ),
    "cut off": (
        lambda split: (split / "depth" / "0.npy").write_bytes(
            (split / "depth" / "0.npy").read_bytes()[:-9]
        ),
        ValueError,
        r"complete .npy array in .*depth.0.npy",
    ),
    "not an array": (
        lambda split: (split / "depth" / "0.npy").write_text("oops"),
        ValueError,
        r"complete .npy array in .*depth.0.npy",
    ),
    "empty": (
        lambda split: (split / "depth" / "0.npy").write_bytes(b""),
        ValueError,
        r"complete .npy array in .*depth.0.npy",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_before_training(copy, case):
    change, error, message = BAD_FILES[case]
    change(copy / "train")
    with pytest.raises(error, match=message):
        module(copy).setup()


BAD_NUMBERS = {
    "label too large": ("label", 4, r"labels from -1 to 3 in .*label.0.npy but.*from .* to 4.0"),
    "label below -1": ("label", -2, r"labels from -1 to 3 in .*label.0.npy but.*from -2.0 to"),
    "no whole label": ("label", 0.5, r"whole labels .*label.0.npy"),
    "depth not a number": ("depth", math.nan, r"finite numbers in .*depth.0.npy but found NaN"),
    "infinite image": ("image", math.inf, r"finite numbers in .*image.0.npy"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_a_bad_number_is_named_by_its_file(copy, case):
    kind, value, message = BAD_NUMBERS[case]
    spoil(copy / "train" / kind / "0.npy", lambda a: put(a.astype(np.float64), value))
    with pytest.raises(ValueError, match=message):
        files(copy)[0]


# ----------------------------------------------------------------- data module


def shown(loader):
    return torch.cat([image for image, _ in loader])


def test_published_splits_are_kept_unless_scenes_are_held_out(root):
    plain, held = module(root), module(root, held_out=2)
    for data in (plain, held):
        data.setup()
    assert torch.equal(shown(plain.val_dataloader()), shown(plain.test_dataloader()))
    assert torch.equal(shown(held.test_dataloader()), shown(plain.test_dataloader()))
    train, val = shown(held.train_dataloader()), shown(held.val_dataloader())
    assert (len(train), len(val)) == (4, 2)
    assert len(torch.cat([train, val]).flatten(1).unique(dim=0)) == 6
    again = module(root, held_out=2)
    again.setup()
    assert torch.equal(shown(again.val_dataloader()), val)


def test_only_training_scenes_are_augmented(root):
    torch.manual_seed(0)
    plain, changed = module(root, held_out=2), module(root, held_out=2, augment=True)
    for data in (plain, changed):
        data.setup()
    before = {image.numpy().tobytes() for image in shown(plain.train_dataloader())}
    after = {image.numpy().tobytes() for image in shown(changed.train_dataloader())}
    assert not after <= before
    assert torch.equal(shown(changed.val_dataloader()), shown(plain.val_dataloader()))
    assert torch.equal(shown(changed.test_dataloader()), shown(plain.test_dataloader()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 1}, "`batch_size` to be at least 2"),
        ({"held_out": -1}, "`held_out` to be at least 0"),
        ({"held_out": 5}, "at least one batch of 2 .*found 6, of which 5"),
        ({"tasks": ["depth", "normals"]}, r"some of \['segment', 'depth', 'normal'\]"),
        ({"tasks": []}, "`tasks` to be some of"),
        ({"root": "nowhere"}, "folder nowhere.val.image but found none"),
    ],
)
def test_wrong_arguments_are_refused(root, kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(kwargs.pop("root", root), **kwargs).setup()


# ------------------------------------------------------------ generated scenes


def exact(seed: int) -> generate.Scene:
    return generate.make_scene(np.random.default_rng(seed), 96, 128)


def slopes(scene: generate.Scene) -> np.ndarray:
    """Cosines between the normals and those of the depth's surface; NaN at edges and holes."""
    points = generate.rays(96, 128).reshape(96, 128, 3) * scene.depth.astype(np.float64)
    right = points[1:-1, 2:] - points[1:-1, :-2]
    up = points[:-2, 1:-1] - points[2:, 1:-1]
    cross = np.cross(right, up)
    cross /= np.linalg.norm(cross, axis=-1, keepdims=True) + 1e-12
    normal = scene.normal[1:-1, 1:-1]
    # No edge: all nine pixels were measured, in the same class, with about the same normal.
    smooth = np.ones((94, 126), dtype=bool)
    for i in range(3):
        for j in range(3):
            window = (slice(i, i + 94), slice(j, j + 126))
            smooth &= (scene.normal[window] * normal).sum(axis=-1) > 0.95
            smooth &= scene.label[window] == scene.label[1:-1, 1:-1]
    return np.where(smooth, (cross * normal).sum(axis=-1), np.nan)


def test_normals_are_those_of_the_surface_that_depth_describes():
    scenes = [exact(seed) for seed in range(6)]
    cosines = np.stack([slopes(scene) for scene in scenes])
    labels = np.stack([scene.label[1:-1, 1:-1] for scene in scenes])
    for label, name in enumerate(generate.CLASSES):
        found = cosines[labels == label]
        assert np.isfinite(found).mean() > 0.4, name
        # The rest steps from one surface to a parallel one.
        assert np.nanquantile(found, 0.03) > 0.99, name
    for scene in scenes:
        lengths = np.linalg.norm(scene.normal, axis=-1)
        assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))
        assert np.array_equal(lengths == 0, scene.depth[..., 0] == 0)


def test_scenes_have_every_class_and_what_sensors_miss():
    scenes = [exact(seed) for seed in range(12)]
    labels = np.unique(np.stack([scene.label for scene in scenes]))
    assert labels.tolist() == [-1, *range(len(generate.CLASSES))]
    assert 0.001 < np.mean([scene.depth == 0 for scene in scenes]) < 0.1
    floors = [s.normal[(s.label == generate.FLOOR) & (s.depth[..., 0] > 0)] for s in scenes]
    assert np.concatenate(floors)[:, generate.UP].min() > 0.9  # the camera looks little down
    image = np.stack([scene.image for scene in scenes])
    assert image.min() >= 0
    assert image.max() <= 1


def test_a_sphere_and_a_box_are_hit_where_geometry_says():
    straight = np.array([[0.0, 0.0, -1.0], [0.9, 0.0, -1.0]])
    origin = np.array([0.0, 0.0, 5.0])
    for hits in (
        generate.hit_sphere(origin, straight, 2.0),
        generate.hit_box(origin, straight, np.array([4.0, 4.0, 4.0])),
    ):
        assert hits.t.tolist() == [3.0, math.inf]
        assert hits.normal[0].tolist() == [0.0, 0.0, 1.0]


def test_scenes_follow_the_seed_the_split_and_their_number():
    def first(split=0, seed=0, count=1):
        return list(generate.scenes(split, count, 8, 8, seed))[-1].image

    assert np.array_equal(first(), first())
    for other in (first(split=1), first(seed=1), first(count=2)):
        assert not np.array_equal(first(), other)


def test_the_command_writes_nothing_over_something(root, tmp_path, capsys):
    command = ["--train", "1", "--val", "1", "--height", "8", "--width", "8", "--out"]
    generate.main([*command, str(tmp_path / "new")])
    assert len(list((tmp_path / "new").rglob("*.npy"))) == 8
    before = sorted(root.rglob("*"))
    for arguments, message in (
        ([*command, str(root)], "new or empty folder"),
        (["--train", "0", "--out", str(tmp_path / "none")], "`train` to be at least 1"),
    ):
        with pytest.raises(SystemExit):
            generate.main(arguments)
        assert message in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- augmentation


def test_a_flip_mirrors_and_turns_normals_with_the_scene(root):
    image, targets = files(root)[0]
    mirrored, changed = augment.flip(image, targets)
    assert torch.equal(mirrored[..., 0], image[..., -1])
    assert torch.equal(changed["normal"][0, :, 0], -targets["normal"][0, :, -1])
    assert torch.equal(changed["normal"][1:, :, 0], targets["normal"][1:, :, -1])
    assert torch.equal(changed["segment"][:, 0], targets["segment"][:, -1])
    back, same = augment.flip(mirrored, changed)
    assert torch.equal(back, image)
    assert all(torch.equal(same[task], targets[task]) for task in TASKS)


def test_a_crop_brings_the_scene_nearer(root):
    image, targets = files(root)[0]
    scale, top, left = 2.0, 7, 11
    large, zoomed = augment.crop(image, targets, scale, top, left)
    window = (..., slice(top, top + HEIGHT // 2), slice(left, left + WIDTH // 2))
    assert large.shape == image.shape
    torch.testing.assert_close(large[:, 0, 0], image[:, top, left])
    torch.testing.assert_close(large[:, -1, -1], image[window][:, -1, -1])
    doubled = {
        task: target[window].repeat_interleave(2, -1).repeat_interleave(2, -2)
        for task, target in targets.items()
    }
    assert torch.equal(zoomed["segment"], doubled["segment"])
    assert torch.equal(zoomed["depth"], doubled["depth"] / scale)
    assert torch.equal(zoomed["normal"], doubled["normal"])
    unchanged = augment.crop(image, targets, 1.0, 0, 0)
    torch.testing.assert_close(unchanged[0], image)
    assert all(torch.equal(unchanged[1][task], targets[task]) for task in TASKS)


def test_random_crops_stay_within_the_image_and_all_occur(root):
    torch.manual_seed(0)
    image, targets = files(root)[0]
    known = set(targets["depth"].unique().tolist())
    seen, scales = set(), set()
    for _ in range(40):
        changed, found = augment.CropAndFlip()(image, targets)
        assert changed.shape == image.shape
        seen.add(changed.numpy().tobytes())
        depth = found["depth"].double()
        # Every depth is one of the scene's, divided by one of the scales.
        matching = [
            s
            for s in (1.0, 1.2, 1.5)
            if all(min(abs(s * d - k) for k in known) < 1e-5 for d in depth.flatten()[:40].tolist())
        ]
        scales.update(matching)
    assert scales == {1.0, 1.2, 1.5}
    assert len(seen) > 30
    with pytest.raises(ValueError, match="`scales` of at least 1"):
        augment.CropAndFlip((0.5, 1.0))


# ---------------------------------------------------------------------- losses


def batch(root):
    data = module(root)
    data.setup()
    return next(iter(data.val_dataloader()))[1]


def test_losses_are_means_over_valid_pixels(root):
    targets = batch(root)
    torch.manual_seed(0)
    n, h, w = targets["segment"].shape
    scores, depth, normal = torch.randn(n, 4, h, w), torch.rand(n, 1, h, w), torch.randn(n, 3, h, w)
    sums = dict.fromkeys(TASKS, 0.0)
    counts = dict.fromkeys(TASKS, 0)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                label = targets["segment"][i, y, x].item()
                if label != -1:
                    counts["segment"] += 1
                    sums["segment"] -= scores[i, :, y, x].log_softmax(0)[label].item()
                true = targets["depth"][i, 0, y, x].item()
                if true != 0:
                    counts["depth"] += 1
                    sums["depth"] += abs(depth[i, 0, y, x].item() - true)
                vector = targets["normal"][i, :, y, x]
                if vector.abs().sum() != 0:
                    counts["normal"] += 1
                    p = normal[i, :, y, x]
                    sums["normal"] += 1 - (p @ vector / p.norm() / vector.norm()).item()
    assert 0 < counts["depth"] < n * h * w
    for task, prediction in (("segment", scores), ("depth", depth), ("normal", normal)):
        loss = getattr(losses, f"{task}_loss")(prediction, targets[task])
        count = losses.count_labels if task == "segment" else losses.count_measured
        assert loss.item() == pytest.approx(sums[task] / counts[task], rel=1e-4)
        assert count(targets[task]) == counts[task]


def test_pixels_without_a_target_get_no_gradient(root):
    targets = batch(root)
    n, h, w = targets["segment"].shape
    for task, channels in (("segment", 4), ("depth", 1), ("normal", 3)):
        prediction = torch.randn(n, channels, h, w, requires_grad=True)
        getattr(losses, f"{task}_loss")(prediction, targets[task]).backward()
        target = targets[task]
        valid = target != -1 if task == "segment" else (target != 0).any(dim=1)
        gradient = prediction.grad.abs().sum(dim=1)
        assert (gradient[~valid] == 0).all(), task
        assert (gradient[valid] > 0).float().mean() > 0.99, task
