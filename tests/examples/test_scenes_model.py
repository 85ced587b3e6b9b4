"""examples/scenes: networks, what tasks share in them, training, configurations, the command."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader
from torchvision.models import ResNet50_Weights

from examples import scenes
from examples.scenes import cost
from examples.scenes.backbones import dilated_resnet50
from examples.scenes.data import TASKS, ScenesDataModule
from examples.scenes.model import Scenes
from lightning_mtl import DualBalance, GradientMonitor
from lightning_mtl.compare.request import Request
from tests.common.models import trainer
from tests.examples.configurations import rows_of, trained_by_the_command, two_steps
from tests.examples.scenes import HEIGHT, WIDTH, module, written

FOLDER = Path(scenes.__file__).parent
CONFIGS = sorted(
    path.name for path in FOLDER.glob("*.yaml") if "model" in yaml.safe_load(path.read_text())
)
LARGE = ("cityscapes.yaml", "nyuv2.yaml", "nyuv2_segnet.yaml")
NETWORKS = [
    {"network": "small", "width": 4},
    {"network": "small", "width": 4, "sharing": "cross_stitch"},
    {"network": "small", "width": 4, "sharing": "mtan"},
    {"network": "segnet", "width": 4},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return written(tmp_path_factory.mktemp("scenes") / "data")


def model(**kwargs) -> Scenes:
    seed_everything(0, verbose=False)
    return Scenes(**{"classes": 4, "network": "small", "width": 4, "lr": 0.003, **kwargs})


def reached(found: Scenes, task: str) -> set[str]:
    """Names of the parameters that a task's prediction depends on, all tasks being wanted."""
    found.zero_grad()
    found(torch.rand(2, 3, HEIGHT, WIDTH))[task].square().mean().backward()
    return {name for name, p in found.named_parameters() if p.grad is not None}


# -------------------------------------------------------------------- networks


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_predictions_have_the_size_of_the_image(options):
    found = model(**options)(torch.rand(2, 3, 33, 50))  # no multiple of anything
    assert {task: tuple(p.shape) for task, p in found.items()} == {
        "segment": (2, 4, 33, 50),
        "depth": (2, 1, 33, 50),
        "normal": (2, 3, 33, 50),
    }


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_tasks_share_what_they_should(options):
    found = model(**options)
    names = {name for name, _ in found.named_parameters()}
    of_task = {task: reached(found, task) for task in TASKS}
    shared = set.intersection(*of_task.values())
    assert not [name for name in shared if name.startswith("heads.")]
    sharing = options.get("sharing", "hard")
    own = {
        t: {n for n in seen - shared if not n.startswith("heads.")} for t, seen in of_task.items()
    }
    if sharing == "hard":
        assert not any(own.values())
    elif sharing == "mtan":
        assert all(n.startswith(f"encoder.masks.{t}.") for t, seen in own.items() for n in seen)
        assert all(own.values())
    else:  # nothing is stitched after the last stage
        assert all(n.startswith(f"encoder.columns.{t}.stages.2.") for t in own for n in own[t])
        assert {n for n in shared if "columns" not in n} == {
            "encoder.stitches.0",
            "encoder.stitches.1",
        }
    assert set.union(*of_task.values()) == names


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_a_single_task_runs_the_plain_network(options):
    found, plain = model(**options), model(network=options["network"])
    found.active_tasks = plain.active_tasks = ["depth"]
    column = found.encoder.columns["depth"] if hasattr(found.encoder, "columns") else None
    plain.encoder.encoder.load_state_dict((column or found.encoder.encoder).state_dict())
    plain.heads.load_state_dict(found.heads.state_dict())
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    one, other = found.eval()(images), plain.eval()(images)
    assert one.keys() == {"depth"}
    assert torch.equal(one["depth"], other["depth"])


def test_stitches_mix_the_columns():
    found = model(sharing="cross_stitch").eval()
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    expected = {}
    features = {t: c.stem(images) for t, c in found.encoder.columns.items()}
    for stage in range(3):
        features = {t: c.stages[stage](features[t]) for t, c in found.encoder.columns.items()}
        if stage < 2:
            features = {
                t: 0.9 * features[t] + sum(0.05 * features[u] for u in TASKS if u != t)
                for t in TASKS
            }
    for task in TASKS:
        expected[task] = found.predict(task, features[task], images.shape[-2:])
    torch.testing.assert_close(found(images), expected)


def test_masks_pick_from_the_shared_features():
    found = model(sharing="mtan").eval()
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    whole = found.encoder.encoder(images)
    picked = found.encoder(images, TASKS)
    for task in TASKS:
        share = picked[task][whole != 0] / whole[whole != 0]
        assert 0 < share.min() < share.max() < 1
    assert not torch.equal(picked["depth"], picked["normal"])  # a mask of its own each


def test_weights_that_cannot_be_had_are_said(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = ResNet50_Weights.IMAGENET1K_V1
    nowhere = dataclasses.replace(weights.value, url=(tmp_path / "nowhere").as_uri())
    monkeypatch.setattr(weights, "_value_", nowhere)
    with pytest.warns(UserWarning, match="RANDOM weights"):
        found = dilated_resnet50("imagenet")
    with torch.no_grad():
        assert found(torch.rand(1, 3, 64, 64)).shape == (1, 2048, 8, 8)  # an eighth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "segnet", "sharing": "mtan"}, "`sharing: hard` with `network: segnet`"),
        ({"weights": "imagenet"}, "`weights: random` with `network: small`"),
        ({"network": "resnet50"}, "`width` to be at least 4, and none with"),
        ({"width": 2}, "`width` to be at least 4"),
        ({"tasks": ["colour"]}, "`tasks` to be some of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


# -------------------------------------------------------------------- training


def test_thirty_steps_lower_all_losses(root, tmp_path):
    found, data = model(), module(root, batch_size=3)
    run = trainer(tmp_path, max_epochs=15, callbacks=[DualBalance()], limit_val_batches=0)
    data.setup()
    same = DataLoader(data.parts["train"], batch_size=3)
    before = trainer(tmp_path).validate(found, same, verbose=False)[0]
    run.fit(found, datamodule=data)
    assert run.global_step == 30
    after = trainer(tmp_path).validate(found, same, verbose=False)[0]
    for task in TASKS:
        assert after[f"val/loss/{task}"] < 0.9 * before[f"val/loss/{task}"], task
    assert set(after) == {f"val/loss/{task}" for task in TASKS} | set().union(
        *found.metric_directions().values()
    )


@pytest.mark.parametrize("options", NETWORKS[1:], ids=str)
def test_every_network_trains_under_a_balancer(root, tmp_path, options):
    found = model(**options)
    run = trainer(tmp_path, max_steps=2, callbacks=[DualBalance(), GradientMonitor()], logger=True)
    run.fit(found, datamodule=module(root))
    assert run.global_step == 2
    assert found.last_step.losses.isfinite().all()


def test_a_batch_without_depth_trains_the_other_tasks(root, tmp_path):
    found, data = model(), module(root)
    data.setup()
    image, targets = next(iter(data.val_dataloader()))
    targets["depth"] = torch.zeros_like(targets["depth"])
    losses = found.task_losses((image, targets), 0)
    assert losses.keys() == {"segment", "normal"}


def test_other_classes_than_those_of_the_data_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="`classes` to be the data's 4 but found 13"):
        trainer(tmp_path).fit(model(classes=13), datamodule=module(root))


def test_the_learning_rate_is_halved(root, tmp_path):
    run = trainer(tmp_path, max_epochs=3, limit_train_batches=1, limit_val_batches=0)
    run.fit(model(halve_every=2), datamodule=module(root))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0015)


# --------------------------------------------------------------------- configs


def test_there_are_the_configurations_of_the_paper():
    assert CONFIGS == [
        "cityscapes.yaml",
        "compare.yaml",
        "nyuv2.yaml",
        "nyuv2_segnet.yaml",
        "smoke.yaml",
    ]


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in CONFIGS],
)
def test_a_configuration_takes_two_steps(name, root, tmp_path):
    data = {"root": str(root), "classes": 4, "batch_size": 2, "workers": 0, "held_out": 0}
    path = FOLDER / name
    cli = two_steps(path, tmp_path, model={"classes": 4}, data=data, limit_val_batches=1)
    assert isinstance(cli.model, Scenes)
    assert isinstance(cli.datamodule, ScenesDataModule)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_and_data_of_a_configuration_agree(name):
    text = yaml.safe_load((FOLDER / name).read_text())
    of_model, of_data = text["model"]["init_args"], text["data"]["init_args"]
    assert of_model["classes"] == of_data["classes"]
    assert of_model.get("tasks") == of_data.get("tasks")


def test_balancers_are_the_methods_of_the_paper():
    *paper, fixed = rows_of(FOLDER / "balancers.yaml")
    assert (len(paper), fixed) == (21, "normal x3")


@pytest.mark.parametrize("path", sorted((FOLDER / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_study_is_one_command(path, root, tmp_path, monkeypatch):
    """Every row, setting and name is read as `compare` reads it before it trains."""
    text = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    text["data"]["init_args"]["root"] = str(root)
    (tmp_path / "smoke.yaml").write_text(yaml.safe_dump(text))
    monkeypatch.chdir(FOLDER.parents[1])
    options = {"config": str(tmp_path / "smoke.yaml"), "balancers": str(path), "only": None}
    flags = {"seeds": 1, "workers": 1, "split": "val", "rivals": "none"}
    request = Request(Namespace(**options, **flags, select="last", last_k=1))
    assert list(request.methods) == list(yaml.safe_load(path.read_text()))
    assert path.name in (FOLDER / "README.md").read_text()


@pytest.mark.slow  # a process of its own, with all that it imports
def test_the_command_trains_from_the_files(root, tmp_path):
    trained_by_the_command(FOLDER / "smoke.yaml", tmp_path, {"root": str(root)}, max_steps=1)


# ------------------------------------------------------------------------ cost


def test_one_model_is_set_against_one_for_each_task(capsys):
    arguments = {"tasks": ["segment", "normal"], "classes": 4, "network": "small", "width": 4}
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    costs = cost.compare({**arguments, "sharing": "mtan"}, images, repeats=1)
    assert list(costs) == ["one model", "2 single-task models"]
    encoder = sum(p.numel() for p in model().encoder.parameters())
    heads = {t: sum(p.numel() for p in model().heads[t].parameters()) for t in TASKS}
    expected = 2 * encoder + heads["segment"] + heads["normal"]
    assert costs["2 single-task models"].parameters == expected
    assert costs["one model"].weights_mb > 4 * costs["one model"].parameters / 2**20
    assert all(found.ms > 0 for found in costs.values())
    size = ["--height", str(HEIGHT), "--width", str(WIDTH), "--images", "1", "--repeats", "1"]
    cost.main(["--config", str(FOLDER / "smoke.yaml"), *size])
    assert "| 3 single-task models | 0.0" in capsys.readouterr().out
