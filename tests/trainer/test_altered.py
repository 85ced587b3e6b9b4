"""Checkpoints that somebody altered or another version wrote: one message, nothing changed."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import Balancer, DualBalance, GradientBalancer, LogLoss, MinNorm
from lightning_mtl.gradient_balancers import Every, PCGrad, Smooth
from lightning_mtl.monitor import GradientMonitor
from tests.common.methods import METHODS, direction, fixture
from tests.common.models import Balanced, Batched, loader, sgd, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:Resuming with a training loader that cannot save")

FLAGS = ("callbacks", "TrainerFlags")
DUAL = ("callbacks", "DualBalance")
EVERY = ("callbacks", "Every(Smooth(PCGrad))")


def make(kind: Any) -> list[Balancer]:
    return [Every(3, Smooth(PCGrad(seed=1)))] if kind is Every else [kind()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    found = {}
    for kind in (DualBalance, Every):
        found[kind] = tmp_path_factory.mktemp("saved") / "run.ckpt"
        run = trainer(callbacks=make(kind))
        run.fit(Balanced(), loader(16))
        run.save_checkpoint(found[kind])
    return found


def changed(path: Path, place: tuple[str, ...], value: Any) -> Path:
    """A checkpoint with one entry replaced, or taken out if ``value`` is an ellipsis."""
    checkpoint = torch.load(path, weights_only=True)
    inside = checkpoint
    for name in place[:-1]:
        inside = inside[name]
    if value is ...:
        del inside[place[-1]]
    else:
        old = inside[place[-1]]
        inside[place[-1]] = value(old) if callable(value) else value
    other = path.with_name("other.ckpt")
    torch.save(checkpoint, other)
    return other


def spoilt(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = torch.nan
    return tensor


MISSING = [
    *((DualBalance, (*FLAGS, name), name) for name in ("flow", "rng")),
    *(
        (DualBalance, (*FLAGS, "flow", name), name)
        for name in ("declared", "tasks", "shared", "trainable", "first_done", "uneven")
    ),
    *(
        (DualBalance, (*DUAL, name), name)
        for name in ("hyperparameters", "state", "generator", "nested")
    ),
    (Every, (*EVERY, "nested", "base"), "base"),
    (Every, (*EVERY, "nested", "base", "nested"), "nested"),
    (Every, (*EVERY, "nested", "base", "nested", "base", "state"), "state"),
]
WRONG = [
    (DualBalance, FLAGS, [1], "a list in place of a dict|a list as 'TrainerFlags'"),
    (DualBalance, (*FLAGS, "flow"), 3, "a int as 'flow'"),
    (DualBalance, (*FLAGS, "rng"), {}, "a dict as 'rng'"),
    (DualBalance, (*FLAGS, "rng"), [{"torch": 1}], "no random state as 'rng'"),
    (DualBalance, (*FLAGS, "flow", "tasks"), [1, 2], "other things than names in 'tasks'"),
    (DualBalance, (*FLAGS, "flow", "shared"), "net", "a str as 'shared'"),
    (DualBalance, (*FLAGS, "flow", "reached"), ["a"], "other things than numbers in 'reached'"),
    (DualBalance, (*FLAGS, "flow", "outside"), None, "a NoneType as 'outside'"),
    (DualBalance, DUAL, [1], "a list in place of a dict"),
    (DualBalance, (*DUAL, "hyperparameters"), 3, "a int as 'hyperparameters'"),
    (DualBalance, (*DUAL, "state", "average"), "text", "a str as state `average`"),
    (DualBalance, (*DUAL, "state", "step"), torch.ones(3), r"a tensor of shape \(3,\) as state"),
    (Every, (*EVERY, "nested", "base", "nested", "base", "generator"), torch.ones(3), "generator"),
]


def refused(kind: Any, path: Path, message: str) -> None:
    module = Balanced()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=make(kind), max_epochs=2).fit(module, loader(16), ckpt_path=path)
    if not torch.equal(weights(module), before):  # the weights of the file, before any step
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("kind", "place", "name"), MISSING)
def test_a_missing_entry(saved: Any, kind: Any, place: Any, name: str) -> None:
    message = (
        rf"^Expected a checkpoint of this version of lightning_mtl but found no entry '{name}' in "
        r"what it holds for (the run|DualBalance|Every|Smooth|PCGrad): .*`load_from_checkpoint`"
    )
    refused(kind, changed(saved[kind], place, ...), message)


@pytest.mark.parametrize(("kind", "place", "value", "found"), WRONG)
def test_an_entry_of_another_type(
    saved: Any, kind: Any, place: Any, value: Any, found: str
) -> None:
    message = rf"^Expected a checkpoint of this version .* but found .*({found})"
    refused(kind, changed(saved[kind], place, value), message)


def test_every_entry_of_ours_in_turn(saved: Any) -> None:
    """Whatever entry is taken out or replaced: one of our messages, or it does not matter."""
    for kind, root in ((DualBalance, FLAGS), (DualBalance, DUAL), (Every, EVERY)):
        checkpoint = torch.load(saved[kind], weights_only=True)
        for place in _places(checkpoint[root[0]][root[1]], root):
            for value in (..., -1, "text", [1], {"a": 1}):
                path = changed(saved[kind], place, value)
                module = Balanced()
                run = trainer(callbacks=make(kind), max_epochs=2, limit_train_batches=1)
                message = ""
                try:
                    run.fit(module, loader(16), ckpt_path=path)
                except ValueError as error:
                    message = str(error)
                assert not message or message.startswith("Expected") or "the states" in message


def _places(value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name in value if isinstance(value, dict) else ():
        yield (*place, name)
        if name != "hyperparameters":
            yield from _places(value[name], (*place, name))


# ------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_every_state_of_every_method_is_looked_at(bad: float) -> None:
    jacobian, losses = fixture("E3", torch.float32)
    looked = set()
    for method in METHODS:
        balancer = method.make()
        try:
            with balancer.only("abc"[: len(losses)]):
                for _ in range(2):
                    rows = jacobian
                    if getattr(balancer, "batches", 1) > 1:
                        rows = jacobian.expand(balancer.batches, *jacobian.shape)
                    direction(balancer, rows, losses)
        except (RuntimeError, ValueError):  # by hand some want more than that
            continue
        for name, value in balancer.state_dict()["state"].items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            state = copy.deepcopy(balancer.state_dict())
            state["state"][name].view(-1)[-1] = bad
            other = method.make()
            with pytest.raises(ValueError, match=rf"state of {type(other).__name__} but \['{name}"):
                other.load_state_dict(state)
            assert _same(other.state_dict()["state"], method.make().state_dict()["state"])
            looked.add(type(other).__name__)
    assert len(looked) > 20


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    pairs = [(a[name], b[name]) for name in a]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def test_a_number_that_is_none_in_a_wrapped_balancer(saved: Any) -> None:
    place = (*EVERY, "nested", "base", "state", "average")
    path = changed(saved[Every], place, spoilt)
    refused(Every, path, r"^Expected finite numbers in the saved state of Smooth but \['average'\]")


class Best(GradientBalancer):
    """Infinity for "none yet"."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("best", math.inf)
        self.add_state("lowest", math.inf, per_task=True)
        self.add_state("seen", {"last": 0.0})

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.per_task_state("lowest", losses)
        return torch.ones_like(losses)


def test_infinity_as_first_value() -> None:
    balancer, other = Best(), Best()
    balancer.weights(torch.eye(2), torch.ones(2))
    other.load_state_dict(balancer.state_dict())
    assert other.best == math.inf
    assert other.lowest.tolist() == [math.inf, math.inf]
    for name, value in (("best", math.nan), ("lowest", torch.full((2,), torch.nan))):
        state = {**balancer.state_dict()["state"], name: value}
        with pytest.raises(ValueError, match=rf"finite numbers .* of Best but \['{name}'\]"):
            other.load_state_dict({**balancer.state_dict(), "state": state})
    state = {**balancer.state_dict()["state"], "seen": {"last": math.inf}}
    with pytest.raises(ValueError, match=r"finite numbers .* of Best but \['seen'\]"):
        other.load_state_dict({**balancer.state_dict(), "state": state})


# ------------------------------------------------------------------------------ copies and pickles


class Generated(Batched):
    """Batches that come out of a generator, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__(loader(16))
        self.running: Any = None

    def __iter__(self) -> Iterator[Any]:
        self.running = (batch for batch in list(super().__iter__()))
        return self.running


def by_sgd(module: Any) -> Any:
    return sgd(module.net.parameters())


class Copies(Balanced):
    """Copies itself and its callbacks in the middle of a fit."""

    def __init__(self, how: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(by_sgd, **kwargs)
        self.how = [how]
        self.copies: list[Any] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            kept, self.copies = self.copies, []
            how, self.how = self.how[0], []
            found = how(self), [how(c) for c in self.trainer.callbacks], how(self.trainer.callbacks)
            self.copies, self.how = [*kept, *found], [how]


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # what was written here


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize(
    "callbacks",
    [
        list,
        lambda: [LogLoss(), MinNorm(), GradientMonitor()],
        lambda: [DualBalance()],
        lambda: [Every(2, MinNorm(gradients="last_layer"))],
    ],
)
@pytest.mark.filterwarnings("ignore:GradientMonitor expected a logger")
def test_copies_in_a_fit(how: Any, callbacks: Any) -> None:
    module = Copies(how)
    run = trainer(callbacks=callbacks())
    run.fit(module, Generated())
    reference = Balanced()
    trainer(callbacks=callbacks()).fit(reference, loader(16))
    assert torch.equal(weights(module), weights(reference))
    copied, each, together = module.copies
    assert copied._flow is None
    assert (
        [type(c) for c in each] == [type(c) for c in together] == [type(c) for c in run.callbacks]
    )
    for original, found in zip(callbacks(), each, strict=False):
        if isinstance(original, Balancer):
            found.load_state_dict(found.state_dict())
    how(module)
    how(run.callbacks)
    fresh = Balanced()
    balancers = [c for c in each if isinstance(c, Balancer)]
    trainer(callbacks=balancers).fit(fresh, loader(16))  # a copy is a balancer like any other
