"""examples/logic_gates: its equations are the library's, and its runs are those of the Trainer."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from examples.logic_gates import tables
from examples.logic_gates.data import INPUTS, LogicGatesDataModule, orders, truth
from examples.logic_gates.directions import Reading, base_weights, factors, tensioned
from examples.logic_gates.engine import Cell, Runs, train
from examples.logic_gates.model import (
    ClampedMinNorm,
    Convergence,
    LogicGates,
    Uniform,
    learned,
)
from examples.logic_gates.published import METHODS, READINGS, SWEEPS, WINDOWS
from lightning_mtl import CentralDirection, GradientBalancer, TaskTensioner
from lightning_mtl.gradient_balancers.central_direction import central_direction_weights
from lightning_mtl.gradient_balancers.min_norm import min_norm_weights
from lightning_mtl.gradient_balancers.task_tensioner import tension_weights
from tests.common.models import trainer

FOLDER = Path(tables.__file__).parent
DOUBLE = torch.float64


def drawn(runs: int) -> torch.Tensor:
    """Task gradients of many runs, from opposite to parallel and of very different length."""
    rows = torch.randn(runs, 2, 6, dtype=DOUBLE)
    rows[::2, 1] = torch.randn(len(rows[::2]), 1, dtype=DOUBLE) * rows[::2, 0] + 0.3 * rows[::2, 1]
    return rows * 10 ** torch.empty(runs, 2, 1, dtype=DOUBLE).uniform_(-2, 2)


# ------------------------------------------------------- the library's equations


def test_bases_are_those_of_the_library():
    rows = drawn(200)
    gramian = rows @ rows.mT
    central, shortest = base_weights(gramian, "central"), base_weights(gramian, "min-norm")
    ends = 0
    for i, matrix in enumerate(gramian):
        torch.testing.assert_close(central[i], central_direction_weights(matrix))
        exact = min_norm_weights(matrix)
        ends += int(exact.max() == 1)
        torch.testing.assert_close(
            shortest[i], exact.clamp(0.001, 0.999) if exact.max() == 1 else exact
        )
    assert 20 < ends < 180  # both kinds are there
    assert base_weights(gramian, "uniform").unique().tolist() == [0.5]


@pytest.mark.parametrize("correction", ["published", "none"])
@pytest.mark.parametrize("divisor", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_tension_is_that_of_the_library(correction, divisor, alpha):
    rows = drawn(100)
    gramian, losses = rows @ rows.mT, torch.rand(100, 2, dtype=DOUBLE) * 50
    ratios = 1 + torch.randn(100, 2, dtype=DOUBLE)
    base = base_weights(gramian, "central")
    reading = Reading(divisor, correction)
    tension = factors(losses, ratios, torch.full((100, 1), alpha, dtype=DOUBLE), reading)
    found = tensioned(rows, (base.unsqueeze(1) @ rows)[:, 0], tension, reading)
    plain = Reading(divisor, "none")
    corrected = (found != tensioned(rows, (base.unsqueeze(1) @ rows)[:, 0], tension, plain)).any(1)
    assert corrected.any() == (correction == "published")
    for i in range(100):
        weights = tension_weights(
            gramian[i], base[i], losses[i] / divisor, ratios[i], alpha, correction
        )
        torch.testing.assert_close(found[i], weights @ rows[i], rtol=1e-7, atol=1e-9)


def test_the_history_is_that_of_the_library():
    cells = [Cell(base, 0.3, window) for base in ("central", "min-norm") for window in (3, 5)]
    runs = Runs(cells, [0], Reading(), limit=1)
    balancers = [TaskTensioner(b(), w) for b in (CentralDirection, ClampedMinNorm) for w in (3, 5)]
    for _ in range(12):
        rows, losses = drawn(1).expand(4, 2, 6), torch.rand(2, dtype=DOUBLE).expand(4, 2)
        found = runs.direction(rows, losses)
        for i, balancer in enumerate(balancers):
            expected = balancer.weights(rows[i] @ rows[i].mT, losses[i]) @ rows[i]
            torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-9)


def test_an_orthogonal_correction_leaves_no_part_against_the_last_task():
    reading, rows = Reading(correction="orthogonal"), drawn(100)
    found = tensioned(rows, rows.mean(1), torch.rand(100, 2, dtype=DOUBLE) * 100, reading)
    assert ((rows[:, 1] * found).sum(1) >= -1e-9 * rows[:, 1].norm(dim=1) * found.norm(dim=1)).all()


def test_unit_vectors_by_tensor_have_length_one_each():
    rows, tension = drawn(9), torch.tensor([1.0, 0.0], dtype=DOUBLE).expand(9, 2)
    reading = Reading(correction="none", by_tensor=True)
    added = tensioned(rows, rows.mean(1), tension, reading) - rows.mean(1)
    ones = torch.ones(9, dtype=DOUBLE)
    torch.testing.assert_close(added[:, :4].norm(dim=1), ones)
    torch.testing.assert_close(added[:, 4:].norm(dim=1), ones)


def test_windows_apart_compare_the_last_window_with_the_one_before():
    runs = Runs([Cell(alpha=1.0, window=2)], [0], Reading(apart=True), limit=1)
    norms = [1.0, 2.0, 4.0, 8.0]
    for norm in norms:
        rows = norm * torch.eye(2, 6, dtype=DOUBLE).unsqueeze(0)
        found = runs.direction(rows, torch.tensor([[1.0, 10.0]], dtype=DOUBLE))
        tense = not torch.allclose(found[0, 0], found[0, 1])
        assert tense == (norm == 8.0)  # four norms make two windows of two
    ratio = torch.full((1, 2), (4 + 8) / (1 + 2), dtype=DOUBLE)
    losses, alpha = torch.tensor([[1.0, 10.0]], dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)
    expected = tensioned(rows, rows.mean(1), factors(losses, ratio, alpha, Reading()), Reading())
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------ the ordinary Trainer


class Parameters(Callback):
    """All parameters after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


def flat(runs):
    """The parameters of the first run, in the order of the module."""
    values = {name: value[0] for name, value in runs.parameters.items()}
    heads = torch.cat([values["head_weight"], values["head_bias"].unsqueeze(1)], dim=1)
    return torch.cat([values["weight"].flatten(), values["bias"], heads.flatten()])


CELLS = {
    "uniform": (Cell("uniform"), Uniform),
    "min-norm": (Cell("min-norm", scale=10.0), ClampedMinNorm),
    "central + tension": (Cell("central", 0.3, scale=10.0), TaskTensioner),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_run_is_step_by_step_that_of_the_trainer(tmp_path, name):
    cell, balancer = CELLS[name]
    whole = name == "central + tension"  # this one to its end, the others for 100 epochs
    limit = 400 if whole else 100
    seen, convergence = Parameters(), Convergence()
    data = LogicGatesDataModule(cell.scale, epochs=limit, seed=3)
    options = {"max_epochs": limit, "limit_val_batches": 0}
    fit = trainer(tmp_path, callbacks=[balancer(), seen, convergence], **options)
    fit.fit(LogicGates(cell.lr), datamodule=data)

    runs = Runs([cell], [3], Reading(), limit)
    assert len(seen.seen) > 150
    with torch.no_grad():
        for step, expected in enumerate(seen.seen):
            runs.step(runs.orders[:, step // 2].split(2, dim=1)[step % 2])  # one run, one seed
            found = flat(runs)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if whole:
        epoch = int(train([cell], [3], limit=limit)[cell])
        assert epoch == max(convergence.epochs.values()) == fit.current_epoch - 1


def test_single_gates_are_initialised_as_if_alone(tmp_path):
    both, alone = LogicGates(), LogicGates(gates=["xor"])
    torch.testing.assert_close(
        alone.network.encoder.state_dict(), both.network.encoder.state_dict()
    )
    torch.testing.assert_close(  # the first head that is drawn
        alone.network.heads["xor"].state_dict(), both.network.heads["and"].state_dict()
    )
    cell = Cell(gates=("xor",))
    seen = Parameters()
    data = LogicGatesDataModule(epochs=5, seed=0)
    trainer(tmp_path, callbacks=[seen], max_epochs=5, limit_val_batches=0).fit(alone, data)
    runs = Runs([cell], [0], Reading(), 5)
    with torch.no_grad():
        for epoch in range(5):
            runs.epoch(epoch)
    found = flat(runs)
    torch.testing.assert_close(found, seen.seen[-1])


def test_runs_that_leave_do_not_change_the_others():
    cells = [Cell(gates=("and",), lr=lr) for lr in (0.3, 0.4)]
    together = train(cells, [0, 1], limit=200)
    assert torch.cat(list(together.values())).unique().numel() > 2  # they leave one by one
    assert torch.equal(together[cells[1]], train(cells[1:], [0, 1], limit=200)[cells[1]])
    assert train(cells, [0], limit=20)[cells[0]].isnan().all()


def test_learned_is_a_mean_loss_below_the_papers_threshold():
    assert learned(torch.tensor([0.00399, 0.00401]), 2).tolist() == [True, False]
    assert [learned(loss, 1) for loss in (0.00199, 0.00201)] == [True, False]


# ------------------------------------------------------------------------- data


def test_gates_and_their_order():
    assert truth("and").tolist() == [0, 0, 0, 1]
    assert truth("xor", 10).tolist() == [0, 10, 10, 0]
    with pytest.raises(ValueError, match=r"Expected a gate of .* found 'or'"):
        truth("or")
    assert torch.equal(orders(1, 5), orders(1, 9)[:5])
    assert not torch.equal(orders(1, 9), orders(2, 9))
    assert (orders(1, 9).sort(dim=1).values == torch.arange(4)).all()


def test_the_loader_goes_on_where_it_was():
    data = LogicGatesDataModule(epochs=3, seed=1)
    loader, other = data.train_dataloader(), data.train_dataloader()
    first = [inputs for _ in range(3) for inputs, _ in loader]
    assert torch.equal(torch.stack(first).view(3, 4, 2), INPUTS[orders(1, 3)])
    other.load_state_dict({"position": 2})
    assert torch.equal(next(iter(other))[0], first[2])


@pytest.mark.parametrize("arguments", [{"scale": 0.0}, {"epochs": 0}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(arguments))}` above zero"):
        LogicGatesDataModule(**arguments)


# ------------------------------------------------------------ tables and configs


def test_printed_tables_agree_with_one_another():
    for scale, rows in METHODS.items():
        assert rows["central + tension"][1] == SWEEPS[scale][0.3][WINDOWS.index(10)]
    assert METHODS[1.0]["single AND"] == METHODS[10.0]["single AND"]


def test_the_command_writes_tables_figures_and_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--out", str(out), "--seeds", "1", "--limit", "5", "--coded-only"]
    tables.main(options)
    first = capsys.readouterr().out
    assert first.startswith("as coded: 72 runs in")
    assert {p.name for p in out.iterdir()} == {
        "tables.md", "runs.jsonl", "figure6.png", "figure7.png"
    }  # fmt: skip
    text = (out / "tables.md").read_text()
    assert "| min-norm + tension | nan ± nan (0 %) | 493.2 ± 27.9 | no |" in text
    assert "| one model | 12 |" in text
    assert "| 2 models | 18 |" in text
    lines = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 72

    stamp = {"reading": "as coded", "seeds": 1, "limit": 5}
    assert set(tables.load(out / "runs.jsonl", stamp)) == set(tables.cells_of("as coded"))
    assert tables.load(out / "runs.jsonl", {**stamp, "seeds": 2}) == {}
    results = tables.run(["as coded"], 1, 5, out / "runs.jsonl")
    assert not capsys.readouterr().out  # nothing is trained again
    assert all(epochs.isnan().all() for epochs in results["as coded"].values())


def test_a_torn_file_of_runs_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"reading": "as co')
    with pytest.raises(ValueError, match=r"line 1 of .*runs.jsonl to be a cell"):
        tables.load(path, {})


def test_means_are_of_the_runs_that_learned():
    epochs = torch.tensor([10.0, 14.0, float("nan"), float("nan")], dtype=DOUBLE)
    mean, deviation, rate = tables.figures_of(epochs)
    assert (mean, rate) == (12.0, 50.0)
    assert deviation == pytest.approx(8**0.5)
    assert tables.text(mean, deviation, rate) == "12.0 ± 2.8 (50 %)"


def test_readings_without_tension_are_trained_once():
    assert all(cell.alpha is not None for cell in tables.cells_of("log10(L/4), as coded"))
    assert {reading.correction for reading in READINGS.values()} == {
        "published", "orthogonal", "none"
    }  # fmt: skip


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_config_builds_the_model_and_takes_two_steps(tmp_path):
    from lightning_mtl.cli import MultiTaskCLI

    seed_everything(0, verbose=False)
    arguments = ["--config", str(FOLDER / "compare.yaml"), "--trainer.max_steps", "2"]
    arguments += ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary"]
    arguments += ["false", "--trainer.callbacks+=TaskTensioner"]
    cli = MultiTaskCLI(["fit", *arguments], save_config_callback=None)
    assert isinstance(cli.model, LogicGates)
    assert cli.trainer.global_step == 2


def build(callback):
    """A balancer from its class path and arguments, as the command line does."""
    path, _, name = f"lightning_mtl.{callback['class_path']}".rpartition(".")
    module = import_module(path.removeprefix("lightning_mtl.") or path)
    arguments = callback.get("init_args", {})
    return getattr(module, name)(**{key: build(value) for key, value in arguments.items()})


def test_every_row_of_the_balancers_can_be_built():
    import yaml

    rows = yaml.safe_load((FOLDER / "balancers.yaml").read_text())
    methods = [name for name in METHODS[1.0] if not name.startswith("single")]
    assert list(rows) == methods
    for callbacks in rows.values():
        assert all(isinstance(build(c), GradientBalancer) for c in callbacks)
