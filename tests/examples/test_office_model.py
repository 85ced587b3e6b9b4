"""examples/office: networks, tasks with images of their own, training, configurations."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from torchvision.models import ResNet18_Weights

from examples import office
from examples.office.data import OfficeDataModule
from examples.office.files import DomainImages
from examples.office.model import Office
from lightning_mtl import DualBalance
from tests.common.models import trainer
from tests.examples.configurations import rows_of, two_steps
from tests.examples.office import DOMAINS, module, written

FOLDER = Path(office.__file__).parent
CONFIGS = ("office31.yaml", "office_home.yaml", "standin.yaml")
LARGE = ("office31.yaml", "office_home.yaml")
METHODS = ("balancers.yaml", "components.yaml", "forgetting.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return written(tmp_path_factory.mktemp("office") / "data")


def model(**kwargs) -> Office:
    seed_everything(0, verbose=False)
    given = {"domains": DOMAINS, "classes": 10, "network": "small", "width": 4, "hidden": 0}
    return Office(**{**given, "lr": 0.01, **kwargs})


# -------------------------------------------------------------------- networks


@pytest.mark.parametrize("hidden", [0, 6])
def test_domains_share_the_encoder_and_nothing_else(hidden):
    found = model(hidden=hidden)
    images = {domain: torch.rand(2, 3, 28, 28) for domain in DOMAINS}
    predictions = found(images)
    assert {d: tuple(p.shape) for d, p in predictions.items()} == dict.fromkeys(DOMAINS, (2, 10))
    for domain in DOMAINS:
        found.zero_grad()
        found(images)[domain].square().sum().backward()
        reached = {name for name, p in found.named_parameters() if p.grad is not None}
        encoder = {name for name, _ in found.named_parameters() if name.startswith("encoder.")}
        assert reached == encoder | {f"heads.{domain}.weight", f"heads.{domain}.bias"}


def test_a_domain_s_prediction_depends_on_its_own_images_only():
    found = model(hidden=6, dropout=0.0)  # in training, where batch normalisation sees a batch
    images = {domain: torch.rand(2, 3, 28, 28) for domain in DOMAINS}
    before = found(images)["sketch"]
    images = {d: x if d == "sketch" else torch.rand(2, 3, 28, 28) for d, x in images.items()}
    assert torch.equal(found(images)["sketch"], before)
    assert set(found({"sketch": images["sketch"]})) == {"sketch"}


def test_the_published_network_is_resnet_18_with_a_hidden_layer():
    found = Office()
    assert sum(p.numel() for p in found.encoder[0].parameters()) == 11_176_512
    linear, norm, _, dropout = found.encoder[1]
    assert linear.weight.shape == (512, 512)
    assert linear.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert (linear.bias == 0.1).all()
    assert (norm.num_features, dropout.p) == (512, 0.5)
    assert {d: h.weight.shape for d, h in found.heads.items()} == dict.fromkeys(
        ("amazon", "dslr", "webcam"), (31, 512)
    )


def test_resnet_18_says_so_when_its_weights_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = ResNet18_Weights.IMAGENET1K_V1
    nowhere = dataclasses.replace(weights.value, url=(tmp_path / "nowhere").as_uri())
    monkeypatch.setattr(weights, "_value_", nowhere)
    with pytest.warns(UserWarning, match="RANDOM weights"):
        Office(weights="imagenet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "imagenet"}, "`weights: random` with `network: small`"),
        ({"network": "resnet18"}, "`width` to be at least 4, and none with"),
        ({"width": 2}, "`width` to be at least 4"),
        ({"domains": ["plain", "plain"]}, "`domains` to be different names"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


@pytest.mark.parametrize("options", [{"classes": 11}, {"domains": DOMAINS[::-1]}])
def test_another_model_than_the_data_s_is_refused(root, tmp_path, options):
    with pytest.raises(ValueError, match="`domains` and `classes` to be the data's"):
        trainer(tmp_path).fit(model(**options), datamodule=module(root))


# -------------------------------------------------------------------- training


def test_training_lowers_all_losses_and_measures_every_domain(root, tmp_path):
    found, data = model(width=8), module(root)
    run = trainer(tmp_path, max_epochs=12, callbacks=[DualBalance()], limit_val_batches=0)
    data.setup()
    data.parts["val"] = data.parts["train"]
    before = trainer(tmp_path).validate(found, data, verbose=False)[0]
    run.fit(found, datamodule=data)
    assert run.global_step == 12 * 3
    after = trainer(tmp_path).validate(found, data, verbose=False)[0]
    for domain in DOMAINS:
        assert after[f"val/loss/{domain}"] < 0.9 * before[f"val/loss/{domain}"], domain
    accuracies = {f"val/{domain}/MulticlassAccuracy" for domain in DOMAINS}
    assert set(after) == {f"val/loss/{domain}" for domain in DOMAINS} | accuracies


def test_accuracy_is_over_all_images_of_a_domain(root, tmp_path):
    found, data = model().eval(), module(root)
    measured = trainer(tmp_path).test(found, data, verbose=False)[0]
    for domain in DOMAINS:
        right = []
        for pixels, label in data.parts["test"][domain]:
            batch = ({domain: pixels[None]}, {})
            x, _ = data.on_after_batch_transfer(batch, 0)
            right.append(found(x)[domain].argmax().item() == label)
        expected = sum(right) / len(right)
        assert measured[f"test/{domain}/MulticlassAccuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("preload", [False, True])
def test_a_single_task_run_reads_its_own_images_alone_and_takes_as_many_steps(
    root, tmp_path, monkeypatch, preload
):
    read = set()
    decode = DomainImages._decode

    def noted(self, path):
        read.add(path.relative_to(root).parts[0])
        return decode(self, path)

    monkeypatch.setattr(DomainImages, "_decode", noted)
    found, data = model(), module(root, preload=preload)
    found.active_tasks = ["sketch"]
    run = trainer(tmp_path, max_epochs=1)
    run.fit(found, datamodule=data)
    assert run.global_step == 14 // 4  # as with all domains
    assert read == {"sketch"}
    assert set(run.test(found, data, verbose=False)[0]) == {
        "test/loss/sketch",
        "test/sketch/MulticlassAccuracy",
    }


# --------------------------------------------------------------------- configs


def test_there_are_the_configurations_of_the_paper():
    found = {p.name for p in FOLDER.glob("*.yaml")}
    assert found == {*CONFIGS, *METHODS}


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in CONFIGS],
)
def test_a_configuration_takes_two_steps(name, root, tmp_path):
    sizes = {"domains": list(DOMAINS), "classes": 10}
    data = {**sizes, "root": str(root), "splits": str(root), "batch_size": 2, "workers": 0}
    callbacks = [{"class_path": "DualBalance"}]
    more = {"limit_val_batches": 1, "callbacks": callbacks}
    cli = two_steps(FOLDER / name, tmp_path, model=sizes, data=data, **more)
    assert isinstance(cli.model, Office)
    assert isinstance(cli.datamodule, OfficeDataModule)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_and_data_of_a_configuration_agree(name):
    text = yaml.safe_load((FOLDER / name).read_text())
    of_model, of_data = text["model"]["init_args"], text["data"]["init_args"]
    assert (of_model["domains"], of_model["classes"]) == (of_data["domains"], of_data["classes"])


@pytest.mark.parametrize(("name", "count"), [*zip(METHODS, (21, 6, 19), strict=True)])
def test_rows_are_balancers(name, count):
    rows = rows_of(FOLDER / name)
    assert len(rows) == count
    assert len({json.dumps(row) for row in rows.values()}) == count


def test_rates_of_figure_5_are_those_of_their_names():
    rows = yaml.safe_load((FOLDER / "forgetting.yaml").read_text())
    for name, ((callback),) in rows.items():
        options = callback["init_args"]
        beta = options["beta"]
        fall = options.get("beta_sigma")
        expected = f"β {beta:.1f}/√k" if fall == 0.5 else f"β {beta:.1f}" if beta else "β 0"
        assert name == expected
        assert fall in ((0.0, 0.5) if beta else (None,))
