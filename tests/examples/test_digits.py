"""examples/digits: the data, exact resume, and a short real training."""

import struct
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_mtl
from examples.digits import grid
from examples.digits.data import DigitsDataModule, FreshPairs, compose, draw_pairs
from examples.digits.model import TwoDigits
from examples.digits.stopping import StopWithoutImprovement
from lightning_mtl import MinNorm, TaskTensioner
from tests.common.models import resume_from, trainer

FOLDER = Path(grid.__file__).parent


@pytest.fixture(scope="module")
def digits() -> dict:
    data = DigitsDataModule()
    data.setup()
    return data.digits


def fresh(digits: dict, **kwargs) -> FreshPairs:
    return FreshPairs(digits["train"], **{"pairs": 24, "batch_size": 8, **kwargs})


def same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and all(
        torch.equal(one[1][t], other[1][t]) for t in one[1]
    )


# ------------------------------------------------------------------------ data


def test_source_digits_are_divided_before_pairing(digits):
    from sklearn.datasets import load_digits

    sizes = {name: len(part.labels) for name, part in digits.items()}
    assert sizes == {"train": 1197, "val": 300, "test": 300}
    together = torch.cat([digits[name].images.flatten(1) for name in sizes])
    # Every source digit is in exactly one part: sums of the whole agree, and no two rows are equal
    # (load_digits has no duplicates).
    assert len(together.unique(dim=0)) == len(together) == len(load_digits().target)
    for part in digits.values():
        assert part.labels.bincount(minlength=10).min() > 0


def test_batches_have_the_expected_shapes_ranges_and_targets(digits):
    loader = fresh(digits, seed=3)
    image, targets = next(iter(loader))
    left, right = draw_pairs(8, digits["train"], 0, 3, 0, 0)
    assert image.shape == targets["reconstruct"].shape == (8, 1, 28, 28)
    assert image.dtype == targets["reconstruct"].dtype == torch.float32
    assert image.min() >= 0
    assert 0.9 < image.max() <= 1
    assert torch.equal(targets["classify"], digits["train"].labels[left].long())
    assert torch.equal(targets["reconstruct"], digits["train"].images[right] / 255)


def test_digits_lie_at_the_upper_left_and_lower_right():
    black, white = (torch.full((1, 1, 28, 28), v, dtype=torch.uint8) for v in (0, 255))
    upper_left, lower_right = compose(white, black)[0, 0], compose(black, white)[0, 0]
    assert upper_left[0, 0] == lower_right[-1, -1] == 1
    assert upper_left[-1].max() == lower_right[0].max() == upper_left[:, -1].max() == 0
    torch.testing.assert_close(upper_left, lower_right.flip(0, 1))
    assert white.min() == 255  # the sources are not written to


def test_pairs_are_new_every_epoch_and_reproducible(digits):
    loader, again, other = (fresh(digits, seed=seed) for seed in (5, 5, 6))
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == 3
    assert not any(same(a, b) for a in first for b in second)
    assert all(same(a, b) for a, b in zip([*first, *second], [*again, *again], strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert not same(first[0], next(iter(fresh(digits, seed=5, rank=1))))


def test_training_pairs_follow_the_seed_and_evaluation_pairs_do_not():
    def batches(seed):
        seed_everything(seed, verbose=False)
        data = DigitsDataModule(eval_pairs=300)
        data.setup()
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        return [next(iter(loader)) for loader in loaders], loaders[1]

    (one, val), (two, _) = batches(1), batches(2)
    assert not same(one[0], two[0])
    assert same(one[1], two[1])
    assert same(one[2], two[2])
    assert same(one[1], next(iter(val)))  # the second epoch of a fixed loader
    assert [len(image) for image, _ in val] == [250, 50]


def test_mean_image_is_what_a_model_has_to_beat(digits):
    data = DigitsDataModule(eval_pairs=500)
    data.setup()
    mean = digits["train"].images.float().mean(0) / 255
    targets = torch.cat([t["reconstruct"] for _, t in data.val_dataloader()])
    assert data.mean_image_mse() == pytest.approx(((targets - mean) ** 2).mean().item(), rel=1e-5)
    assert data.mean_image_mse() != data.mean_image_mse("test")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"source": "fashion"}, "`source` to be one of"), ({"batch_size": 1}, "`batch_size` to be")],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**kwargs)


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [("digits", "sklearn.datasets", "demo"), ("mnist", "torchvision.datasets", "vision")],
)
def test_a_missing_library_names_the_extra(monkeypatch, source, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf'pip install "lightning-mtl\[{extra}\]"'):
        DigitsDataModule(source)


# ----------------------------------------------------------------------- MNIST


def write_mnist(root: Path, train: int = 60, test: int = 12) -> None:
    """Small files in the on-disk format of MNIST: big-endian IDX."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = torch.arange(count).repeat_interleave(28 * 28).to(torch.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + bytes(pixels.tolist()))
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)


def test_mnist_is_read_from_its_own_files(tmp_path):
    write_mnist(tmp_path)
    data = DigitsDataModule("mnist", root=tmp_path, batch_size=4, train_pairs=8, eval_pairs=6)
    data.prepare_data()
    data.setup()
    assert {n: len(d.labels) for n, d in data.digits.items()} == {
        "train": 50,
        "test": 12,
        "val": 10,
    }
    val = data.digits["val"]
    assert val.images[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert val.labels.tolist() == [i % 10 for i in range(50, 60)]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        image, targets = next(iter(loader))
        assert image.shape[1:] == targets["reconstruct"].shape[1:] == (1, 28, 28)
        assert torch.equal(  # a digit's pixels hold its number here
            targets["reconstruct"][:, 0, 0, 0], targets["reconstruct"][:, 0, 27, 27]
        )


def test_mnist_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [f"{(tmp_path / 'nowhere').as_uri()}/"])
    data = DigitsDataModule("mnist", root=tmp_path)
    with pytest.raises(RuntimeError, match=r"train-images-idx3-ubyte.gz.*`source: digits`"):
        data.prepare_data()


# -------------------------------------------------------------------- training


def parameters(module: TwoDigits) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in module.state_dict().values()])


class Losses(Callback):
    """Both losses of every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.seen.append(pl_module.last_step.losses)


def test_thirty_steps_lower_both_losses(tmp_path):
    losses = Losses()
    data = DigitsDataModule(train_pairs=30 * 32, eval_pairs=50)
    trainer(tmp_path, callbacks=[losses, TaskTensioner()]).fit(TwoDigits(), datamodule=data)
    seen = torch.stack(losses.seen)
    assert len(seen) == 30
    assert (seen[-5:].mean(0) < 0.8 * seen[:5].mean(0)).all()


@pytest.mark.parametrize("step", [5, 8])  # mid-epoch, and at the end of the second epoch of 4
def test_resume_gives_the_run_that_never_stopped(tmp_path, step):
    def fit(**kwargs):
        seed_everything(0, verbose=False)
        model = TwoDigits(width=2, hidden=8, decay_steps=12)
        data = DigitsDataModule(batch_size=8, train_pairs=32, eval_pairs=20)
        saver = ModelCheckpoint(
            tmp_path, every_n_train_steps=step, filename="{step}", save_top_k=-1
        )
        options = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [MinNorm(), saver]}
        trainer(tmp_path, **options).fit(model, datamodule=data, **kwargs)
        return model

    whole = parameters(fit())
    seed_everything(1, verbose=False)
    resumed = parameters(fit(**resume_from(tmp_path / f"step={step}.ckpt")))
    assert torch.equal(resumed, whole)


def test_the_stopping_rule_waits_for_every_task(tmp_path):
    rule = StopWithoutImprovement(patience=2)
    data = DigitsDataModule(batch_size=8, train_pairs=16, eval_pairs=20)
    model = TwoDigits("sgd", lr=0.0, width=2, hidden=8, batch_norm=False)
    run = trainer(tmp_path, max_epochs=9, callbacks=[rule])
    run.fit(model, datamodule=data)
    assert run.current_epoch == 3  # the first epoch is the best one, then two without improvement
    accuracy, mse = "val/classify/MulticlassAccuracy", "val/reconstruct/MeanSquaredError"
    assert rule.best.keys() == {accuracy, mse}
    assert rule.state_dict() == {"waited": 2, "best": rule.best}
    for best_mse, waited in ((-1.0, 0), (0.0, 2)):  # one task can improve, or none
        rule.load_state_dict({"waited": 1, "best": {accuracy: 1.0, mse: best_mse}})
        trainer(tmp_path, max_epochs=1, callbacks=[rule]).fit(model, datamodule=data)
        assert rule.waited == waited


def test_the_learning_rate_falls_along_a_cosine(tmp_path):
    data = DigitsDataModule(batch_size=8, train_pairs=32, eval_pairs=20)
    run = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    run.fit(TwoDigits(lr=0.01, decay_steps=6, width=2, hidden=8), datamodule=data)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)  # halfway


# --------------------------------------------------------------------- configs


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["compare.yaml", "paper.yaml"])
def test_configs_build_the_model_and_the_data(name):
    from lightning_mtl.cli import MultiTaskCLI

    cli = MultiTaskCLI(["--config", str(FOLDER / name)], run=False, save_config_callback=None)
    assert isinstance(cli.model, TwoDigits)
    assert isinstance(cli.datamodule, DigitsDataModule)
    epochs, data = cli.trainer.max_epochs, cli.datamodule
    steps = epochs * (data.train_pairs // data.batch_size)
    assert cli.model.hparams.decay_steps == (steps if name == "compare.yaml" else None)
    stops = [c for c in cli.trainer.callbacks if isinstance(c, StopWithoutImprovement)]
    assert len(stops) == (name == "paper.yaml")


def build(callback):
    """A balancer from its class path and arguments, as the command line does."""
    arguments = {
        name: build(value) if isinstance(value, dict) and "class_path" in value else value
        for name, value in callback.get("init_args", {}).items()
    }
    return getattr(lightning_mtl, callback["class_path"])(**arguments)


def classes(callbacks):
    for callback in callbacks:
        yield callback["class_path"]
        yield from classes(
            v for v in callback.get("init_args", {}).values() if "class_path" in str(v)
        )


def test_balancer_files_hold_every_method_that_suits():
    few, every = (
        yaml.safe_load((FOLDER / name).read_text())
        for name in ("balancers.yaml", "all_balancers.yaml")
    )
    assert set(few) <= set(every)
    assert all(every[name] == callbacks for name, callbacks in few.items())
    for name, callbacks in every.items():
        stages = [build(c) for c in callbacks]
        assert all(isinstance(b, lightning_mtl.Balancer) for b in stages), name
    found = {c for callbacks in every.values() for c in classes(callbacks)}
    public = {
        name
        for name in lightning_mtl.__all__
        if isinstance(cls := getattr(lightning_mtl, name), type)
        and issubclass(cls, lightning_mtl.Balancer)
    }
    bases = {"Balancer", "LossBalancer", "GradientBalancer"}
    # EqualWeighting is the row without callbacks; MoDo takes two micro-batches a step.
    assert found == public - bases - {"EqualWeighting", "MoDo"}


def test_the_best_rate_is_chosen_against_the_best_single_tasks():
    def row(accuracy, mse):
        return {
            "classify": {"MulticlassAccuracy": accuracy},
            "reconstruct": {"MeanSquaredError": mse},
        }

    def rate(classify, reconstruct, equal):
        return {
            "single-task classify": {"classify": {"MulticlassAccuracy": classify}},
            "single-task reconstruct": {"reconstruct": {"MeanSquaredError": reconstruct}},
            "equal": row(*equal),
        }

    # Relative to its own single tasks the first rate gains 300 %, and yet it is the worse one.
    results = {0.1: rate(0.1, 0.04, (0.7, 0.04)), 0.01: rate(0.8, 0.01, (0.8, 0.02))}
    chosen, metrics, delta = grid.best(results)["equal"]
    assert (chosen, metrics) == (0.01, row(0.8, 0.02))
    assert delta == pytest.approx(-50.0)
