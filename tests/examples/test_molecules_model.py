"""examples/molecules: the published network, errors in units, the schedule, configurations."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from examples import molecules
from examples.molecules import convert
from examples.molecules.data import TARGETS, MoleculesDataModule
from examples.molecules.model import Molecules
from tests.common.models import resume_from, trainer
from tests.examples.configurations import rows_of, trained_by_the_command, two_steps
from tests.examples.molecules import module, package

FOLDER = Path(molecules.__file__).parent
CONFIGS = ("qm9.yaml", "small.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("molecules")
    convert.write(folder / "data", package(folder / "package"))
    module(folder / "data").prepare_data()
    return folder / "data"


def model(**kwargs) -> Molecules:
    seed_everything(0, verbose=False)
    return Molecules(**{"dim": 6, "edge": 4, "lr": 0.01, **kwargs})


def batch(root, **kwargs):
    data = module(root, **kwargs)
    data.setup()
    return data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)


def test_the_published_network_has_its_parameters():
    found = Molecules()
    # Atoms, edges' matrices, NNConv's root and bias, GRU, Set2Set, last layer.
    atoms, edges, root = 11 * 64 + 64, 5 * 128 + 128 + 128 * 64**2 + 64**2, 64**2 + 64
    gru, lstm = 3 * (2 * 64**2 + 2 * 64), 4 * (128 * 64 + 64**2 + 2 * 64)
    expected = atoms + edges + root + gru + lstm + 128 * 64 + 64
    assert sum(p.numel() for p in found.encoder.parameters()) == expected
    assert sum(p.numel() for p in found.heads.parameters()) == 11 * 65


def test_predictions_do_not_depend_on_the_order_of_atoms_or_on_the_place(root):
    found = model().eval()
    (graphs, _) = batch(root)
    before = found(graphs)
    assert {task: tuple(p.shape) for task, p in before.items()} == dict.fromkeys(TARGETS, (5,))
    moved = graphs.clone()
    order = torch.cat([torch.arange(b - 1, a - 1, -1) for a, b in graphs.ptr.unfold(0, 2, 1)])
    place = order.argsort()
    moved.x, moved.pos, moved.edge_index = (
        graphs.x[order],
        graphs.pos[order] + 7,
        place[graphs.edge_index],
    )
    after = found(moved)
    for task in TARGETS:
        torch.testing.assert_close(after[task], before[task], atol=1e-5, rtol=1e-4)


def test_errors_are_in_units_of_the_table(root, tmp_path):
    found, data = model(), module(root)
    measured = trainer(tmp_path).test(found, data, verbose=False)[0]
    graphs = [data.on_after_batch_transfer(b, 0) for b in data.test_dataloader()]
    for task in TARGETS:
        error = torch.cat([(found.eval()(x)[task] - y[task]).abs().detach() for x, y in graphs])
        expected = error.mean().item() * data.deviation[task]
        assert measured[f"test/{task}/MAE"] == pytest.approx(expected, rel=1e-5)


def test_training_lowers_all_losses(root, tmp_path):
    found, data = model(lr=0.02), module(root)
    data.setup()
    data.parts["val"] = data.parts["train"]
    before = trainer(tmp_path).validate(found, data, verbose=False)[0]
    run = trainer(tmp_path, max_epochs=20)
    run.fit(found, datamodule=data)
    after = trainer(tmp_path).validate(found, data, verbose=False)[0]
    for task in TARGETS:
        assert after[f"val/loss/{task}"] < 0.9 * before[f"val/loss/{task}"], task


@pytest.mark.filterwarnings("ignore:Resuming with a training loader that cannot save:UserWarning")
def test_improvement_is_relative_to_the_first_validation_and_outlives_a_checkpoint(root, tmp_path):
    whole, data = model(tasks=["mu", "cv"], lr=0.05), module(root)
    errors = []

    class Kept(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                names = ("val/mu/MAE", "val/cv/MAE", "val/improvement")
                errors.append([trainer.callback_metrics[name].item() for name in names])

    run = trainer(tmp_path, max_epochs=2, callbacks=[Kept()], num_sanity_val_steps=1)
    run.fit(whole, datamodule=data)
    (mu, cv, zero), (mu2, cv2, found) = errors
    assert zero == 0
    assert found == pytest.approx(50 * ((mu - mu2) / mu + (cv - cv2) / cv), rel=1e-4)
    run.save_checkpoint(tmp_path / "two.ckpt")
    more = trainer(tmp_path, max_epochs=3, callbacks=[Kept()])
    again = model(tasks=["mu", "cv"], lr=0.05)
    more.fit(again, datamodule=data, **resume_from(tmp_path / "two.ckpt"))
    mu3, cv3, found = errors[-1]
    assert found == pytest.approx(50 * ((mu - mu3) / mu + (cv - cv3) / cv), rel=1e-4)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_learning_rate_falls_when_delta_p_stops_rising(root, tmp_path, baseline):
    single = {task: {"MAE": 1.0} for task in TARGETS} if baseline else None
    # A rate at which nothing is learned in float32, so that no validation is better than another.
    found = model(lr=1e-30, patience=1, min_lr=0.0, factor=0.5, baseline=single)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(found, datamodule=module(root))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5e-30)


def test_unknown_properties_are_refused():
    with pytest.raises(ValueError, match=r"`tasks` to be some of .* but found .*'gap'"):
        model(tasks=["mu", "gap"])


# --------------------------------------------------------------------- configs


def test_there_are_the_configurations():
    assert {p.name for p in FOLDER.glob("*.yaml")} == {*CONFIGS, "balancers.yaml"}


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_takes_two_steps(name, root, tmp_path):
    data = {"root": str(root), "held_out": 6, "batch_size": 6, "workers": 0}
    callbacks = [{"class_path": "DualBalance"}]
    cli = two_steps(FOLDER / name, tmp_path, model={}, data=data, callbacks=callbacks)
    assert isinstance(cli.model, Molecules)
    assert isinstance(cli.datamodule, MoleculesDataModule)


def test_balancers_are_the_methods_of_the_paper():
    assert len(rows_of(FOLDER / "balancers.yaml")) == 21


@pytest.mark.slow  # a process of its own, with all that it imports
def test_the_command_trains_from_the_files(root, tmp_path):
    data = {"root": str(root), "held_out": 6, "batch_size": 6}
    trained_by_the_command(FOLDER / "small.yaml", tmp_path, data, max_epochs=1)
