"""What people do in the first hour: a message with the word to use, before anything is changed."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import FAMO, SAMO, DualBalance, LogLoss, MinNorm, MultiTaskModule
from lightning_mtl.cli import main
from tests.common.models import Balanced, Batched, Network, Samples, loader, sgd, trainer, weights

MODEL = "tests.compare.compare_model"


class Own(MultiTaskModule):
    """Returns what a function of the test makes of the two losses."""

    def __init__(self, returned: Any, tasks: Any = ("a", "b"), **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        torch.manual_seed(1)
        self.net = Network()
        self.returned = returned

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        found = self.net(batch[0])
        losses = [nn.functional.mse_loss(found[t], batch[1][t]) for t in ("a", "b")]
        return self.returned(*losses)

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def refused(module: Any, message: str, *callbacks: Any, data: Any = None, **flags: Any) -> None:
    """A fit that ends with the message and changes nothing."""
    before = weights(module)
    with pytest.raises(Exception, match=message):
        trainer(callbacks=list(callbacks), **flags).fit(module, data or loader(8))
    assert torch.equal(weights(module), before)


# ------------------------------------------------------------------- what `task_losses` returns

RETURNS: dict[str, tuple[Any, str]] = {
    "a list": (lambda a, b: [a, b], r"got list. Give every loss its name: {'a': ..., 'b': ...}"),
    "a tuple": (lambda a, b: (a, b), r"got tuple. Give every loss its name: {'a': ..., 'b': ..."),
    "one more": (lambda a, b: [a, b, a], r"got list. Return one scalar loss for each of"),
    "a pair": (
        lambda a, b: (a + b, {"a": a, "b": b}),
        r"got tuple. Return the dict .* alone, with",
    ),
    "a tensor": (lambda a, b: a + b, r"got Tensor. Return one scalar loss for each of"),
    "a number": (lambda a, b: 1.0, r"got float. Return one scalar loss for each of"),
    "logs": (
        lambda a, b: {"a": a, "b": {"b": b}},
        r"loss of task 'b' to be a tensor but got dict.*`self\.log`",
    ),
    "predictions": (
        lambda a, b: {"a": a, "b": b.expand(3)},
        r"'b' to be a scalar but got shape \(3,\).*leave out what is no loss",
    ),
}


@pytest.mark.parametrize(("returned", "message"), RETURNS.values(), ids=RETURNS)
@pytest.mark.parametrize("declared", [True, False])
def test_what_has_no_names(returned: Any, message: str, declared: bool) -> None:
    if not declared and "each of" in message:
        message = "each of your tasks|Give every loss its name"
    refused(Own(returned, ("a", "b") if declared else None), message)


TOTALS: dict[str, Any] = {
    "loss": lambda a, b: {"loss": a + b, "a": a, "b": b},
    "loss of something else": lambda a, b: {"loss": a * 1, "a": b},
    "loss and logs": lambda a, b: {"loss": a + b, "a": a.detach(), "b": b.detach()},
    "total": lambda a, b: {"a": a, "b": b, "total": a + b},
    "weighted": lambda a, b: {"train_loss": 0.3 * a + 2 * b, "a": a, "b": b},
    "mean": lambda a, b: {"a": a, "b": b, "mean": torch.stack([a, b]).mean()},
    "counted": lambda a, b: {"a": (a, 3), "b": b, "all": ((a + b), 3)},
    "twice": lambda a, b: {"a": a, "loss": a},
}


@pytest.mark.parametrize("name", TOTALS)
def test_a_total_among_the_losses(name: str) -> None:
    message = r"one loss a task but '(loss|total|train_loss|mean|all)' .*Leave it out .*`super\(\)"
    refused(Own(TOTALS[name], None), message)
    refused(Own(TOTALS[name], None), message, MinNorm())
    if name not in ("loss of something else", "twice"):
        refused(Own(TOTALS[name], ("a", "b")), message)


@pytest.mark.parametrize(
    ("tasks", "returned"),
    [
        (None, lambda a, b: {"loss": a + b}),
        (None, lambda a, b: {"a": a, "b": b, "c": a * b.detach()}),
        (("loss", "a"), lambda a, b: {"loss": b, "a": a}),
        (("a", "b", "total"), lambda a, b: {"a": a, "b": b, "total": a + b}),
    ],
)
def test_losses_that_are_meant(tasks: Any, returned: Any) -> None:
    run = trainer()
    run.fit(Own(returned, tasks), loader(8))
    assert run.global_step == 2


def test_none_leaves_a_batch_out_with_a_word() -> None:
    seen = []

    def returned(a: Tensor, b: Tensor) -> Any:
        seen.append(a)
        return {"a": a, "b": b} if len(seen) != 2 else None

    run = trainer(callbacks=[MinNorm()])
    with pytest.warns(UserWarning, match="returned None, which leaves the batch out, like {}"):
        run.fit(Own(returned), loader(12))
    assert run.global_step == 2


# -------------------------------------------------------------------------------- its signature


class Batch(Own):
    def task_losses(self, batch: Any) -> Any:
        return super().task_losses(batch, 0)


class Named(Own):
    def task_losses(self, batch: Any, *, batch_idx: int) -> Any:
        return super().task_losses(batch, batch_idx)


class Child(Batch):
    def task_losses(self, batch: Any) -> Any:
        return super().task_losses(batch)


class Variadic(Own):
    def task_losses(self, *args: Any, **kwargs: Any) -> Any:
        return super().task_losses(*args)


class Defaults(Own):
    def task_losses(self, batch: Any, weight: float = 1.0, *, flag: bool = False) -> Any:
        return super().task_losses(batch, 0)


@pytest.mark.parametrize("make", [Batch, Named, Child, Variadic, Defaults])
@pytest.mark.parametrize("callbacks", [[], [FAMO], [SAMO]])
def test_losses_without_an_index(make: Any, callbacks: Any) -> None:
    found, expected = make(lambda a, b: {"a": a, "b": b}), Own(lambda a, b: {"a": a, "b": b})
    for module in (found, expected):
        run = trainer(callbacks=[c() for c in callbacks])
        run.fit(module, loader(8))
    assert torch.equal(weights(found), weights(expected))
    if make is not Variadic:  # a module that calls its own, as it has written it
        assert found.task_losses((torch.zeros(1, 4), {"a": torch.zeros(1), "b": torch.zeros(1)}))


def test_a_function_of_the_batch_set_on_the_module() -> None:
    module = Balanced()
    module.task_losses = lambda batch: {t: y.mean() for t, y in module(batch[0]).items()}
    run = trainer()
    run.fit(module, loader(8))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda self, dataloader_iter: {}, "`dataloader_iter`, which is not supported"),
        (lambda self: {}, r"found the arguments \[\]"),
        (lambda self, batch, batch_idx, optimizer_idx: {}, r"'optimizer_idx'\]. Change its sig"),
        (lambda self, batch, *, epoch: {}, r"found the arguments \['batch', 'epoch'\]"),
    ],
)
def test_other_signatures_are_refused(losses: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        type("Model", (MultiTaskModule,), {"task_losses": losses})
    module = Balanced()
    with pytest.raises(TypeError, match=message):
        module.task_losses = losses.__get__(module)


# ------------------------------------------------------------------------ batches and callbacks


def renamed(**keys: str) -> Batched:
    data = Samples(8)
    return Batched([(data.x, {keys.get(t, t): y for t, y in data.y.items()})] * 2)


def test_misspelled_targets() -> None:
    message = r"under \['a', 'b'\] but the batch has \['one', 'two'\]. Rename.*target='one'"
    refused(Balanced(), message, data=renamed(a="one", b="two"))

    class Depth(Balanced):
        def __init__(self) -> None:
            super().__init__(tasks=("depth", "a"))

    word = r"no target 'depth' for task 'depth'.* it has \['a', 'depht'\]. If 'depht' is meant"
    for balancer in ([], [MinNorm()]):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with contextlib.suppress(ValueError):  # where it has to be in the first step
                trainer(callbacks=balancer).fit(Depth(), renamed(b="depht"))
        found = [str(w.message) for w in seen if "has no target" in str(w.message)]
        assert len(found) == 1
        with pytest.warns(UserWarning, match=word):
            warnings.warn(found[0], stacklevel=1)


def test_other_keys_beside_missing_labels_are_fine() -> None:
    data = Samples(8)
    batches = [(data.x, data.y), (data.x, {"a": data.y["a"], "mask": data.x})]
    run = trainer()
    run.fit(Balanced(), Batched(batches))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ([torch.ones(4, 4), torch.ones(4)], r"a list of 2: a tensor of shape \(4, 4\); a tensor "),
        ({"x": torch.ones(4, 4)}, r"a dict with the keys \['x'\]"),
        ((torch.ones(4, 4), torch.ones(4), 1), r"a tuple of 3: a tensor .*; a int"),
        (torch.ones(4, 4), r"a tensor of shape \(4, 4\)"),
    ],
)
def test_batches_of_another_shape(batch: Any, found: str) -> None:
    message = rf"but got {found}.*return `x, {{'a': \.\.\., 'b': \.\.\.}}`, or override"
    refused(Balanced(), message, data=Batched([batch]))


@pytest.mark.parametrize("callback", [MinNorm, LogLoss, DualBalance])
def test_a_class_among_the_callbacks(callback: Any) -> None:
    message = rf"found the class {callback.__name__}. Write `callbacks=\[{callback.__name__}\(\)\]`"
    if lightning.__version__ == "2.5.0":  # which refuses it by itself, when the Trainer is made
        message = r"^Expected a parent$"
    refused(Balanced(), message, callback)


def test_an_optimizer_without_the_trunk() -> None:
    module = Balanced(lambda m: torch.optim.AdamW(m.net.heads.parameters()))
    message = (
        r"AdamW of `configure_optimizers` does not hold \['net.trunk.0.weight'.*'\]\. Give it "
        r"all parameters, `AdamW\(self.parameters\(\), \.\.\.\)`"
    )
    refused(module, message, MinNorm())


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
@pytest.mark.parametrize("returned", [None, []])
def test_no_optimizer_at_all(returned: Any) -> None:
    message = (
        r"no optimizer of `configure_optimizers` holds a trainable parameter. Return one, `SGD"
    )
    refused(Balanced(lambda m: returned), message, MinNorm())
    if returned is not None:  # of which Lightning tells
        refused(Balanced(lambda m: returned), message)


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.callbacks=MinNrom"], "there is no class `MinNrom`. Did you mean `MinNorm`?"),
        (["--trainer.callbacks=minnorm"], "Did you mean `MinNorm`?"),
        (["--trainer.callbacks+=ModelCheckpiont"], "Did you mean `ModelCheckpoint`?"),
        (["--trainer.callbacks=TaskTensioner", "--trainer.callbacks.base=CAGrd"], "n `CAGrad`?"),
        (["--trainer.callbacks=lightning_mtl.MinNrom"], "has no class `MinNrom`. Did you mean"),
        (["--trainer.callbacks=Xyzzy"], "there is no class `Xyzzy`. Give one of "),
        (
            ['--trainer.callbacks=[{"class_path": "MinNorm", "init_args": {"scaling": "sum"}}]'],
            "`MinNorm` has no argument `scaling`",
        ),
    ],
)
def test_a_misspelled_balancer(options: Any, message: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    model = [
        "--model",
        "tests.compare.compare_model.TwoTasks",
        "--data",
        "tests.compare.compare_model.Points",
    ]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *model, *options])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.startswith("error: `trainer.callbacks`: ")
    assert text.count("\n") == 1


def test_what_is_not_misspelled_keeps_the_words_of_the_parser(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.max_epochs=many"])
    assert "max_epochs" in capsys.readouterr().err
