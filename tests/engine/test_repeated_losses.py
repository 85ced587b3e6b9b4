"""Balancers that ask for the losses of a batch again: whatever `task_losses` does to it."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import warnings
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_mtl import FAMO, SAMO, MinNorm, MultiTaskModule
from lightning_mtl.engine.keep import changed, copied, iterator_in, places, versions
from tests.common.models import Balanced, Batched, Network, Samples, loader, sgd, trainer, weights

BALANCERS: dict[str, Any] = {
    "FAMO": FAMO,
    "SAMO": SAMO,
    "MinNorm": lambda: MinNorm(gradients="representation+1"),
}
by_balancer = pytest.mark.parametrize("balancer", BALANCERS)


class Model(MultiTaskModule):
    """Takes a batch apart by a function of the test."""

    def __init__(self, unpack: Any) -> None:
        super().__init__(["a", "b"])
        torch.manual_seed(1)
        self.net = Network()
        self.unpack = unpack

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, targets = self.unpack(batch)
        z = self.shared_representation(self.net.trunk(x).tanh())
        found = {n[5:]: head(z).squeeze(-1) for n, head in self.net.heads.items()}
        return {task: nn.functional.mse_loss(found[task], targets[task]) for task in found}

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@dataclasses.dataclass
class Record:
    x: Any
    y: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    """As the molecules of chemprop: no `__dict__`."""

    x: Any
    y: Any


class Derived(Slotted):
    """Slots of a base, attributes of its own."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__(x, {})
        self.labels = y


class Private:
    """One slot, whose name Python makes longer."""

    __slots__ = ("__inside",)

    def __init__(self, inside: Any) -> None:
        self.__inside = inside

    def shown(self) -> Any:
        return self.__inside


class Slots:
    """As the batches of graph libraries: attributes, and a way of its own to be copied."""

    def __init__(self, x: Any, y: Any) -> None:
        self._store = {"x": x, "y": y}

    def __copy__(self) -> Slots:
        return Slots(**self._store)

    def pop(self, name: str) -> Any:
        return self._store.pop(name)


class Plain:
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = [x], {"y": y}


Pair = namedtuple("Pair", "x y")  # as users write them


def scaled(batch: Any) -> Any:
    """Takes everything out of a dict, at two levels."""
    y = batch.pop("y")
    return batch.pop("x") * 2, {task: y.pop(task) for task in ("a", "b")}


WAYS: dict[str, tuple[Any, Any]] = {
    "pop": (lambda x, y: {"x": x, "y": y}, scaled),
    "ordered": (lambda x, y: OrderedDict(x=x, y=y), scaled),
    "user dict": (lambda x, y: UserDict(x=x, y=y), scaled),
    "default dict": (lambda x, y: defaultdict(list, x=x, y=y), scaled),
    "list": (lambda x, y: [x, y], lambda b: (b.pop(0) * 2, dict(b.pop()))),
    "nested": (lambda x, y: ([{"x": x}], [y]), lambda b: (b[0].pop()["x"] * 2, b[1].pop())),
    "dataclass": (Record, lambda b: (b.__dict__.pop("x") * 2, {t: b.y.pop(t) for t in "ab"})),
    "slots": (Slotted, lambda b: (_taken(b, "x") * 2, {t: b.y.pop(t) for t in "ab"})),
    "slots of a base": (Derived, lambda b: (_taken(b, "x") * 2, _taken(b, "labels"))),
    "named tuple": (Pair, lambda b: (b.x * 2, {t: b.y.pop(t) for t in "ab"})),
    "own copy": (Slots, lambda b: (b.pop("x") * 2, b.pop("y"))),
    "object": (Plain, lambda b: (b.x.pop() * 2, b.y.pop("y"))),
    "replaced": (lambda x, y: {"x": x, "y": y}, lambda b: (_replace(b), b["y"])),
}


def _taken(batch: Any, name: str) -> Any:
    value = getattr(batch, name)
    delattr(batch, name)
    return value


def _replace(batch: dict[str, Any]) -> Tensor:
    batch["x"] = batch["x"] * 2
    return batch["x"]


def data(make: Any) -> Batched:
    samples = Samples(24)
    return Batched(
        make(samples.x[i : i + 4], {t: y[i : i + 4] for t, y in samples.y.items()})
        for i in range(0, 24, 4)
    )


def fitted(way: str, balancer: str, **flags: Any) -> Tensor:
    make, unpack = WAYS[way]
    module = Model(unpack)
    run = trainer(callbacks=[BALANCERS[balancer]()], **flags)
    run.fit(module, data(make))
    assert run.global_step == 6 // flags.get("accumulate_grad_batches", 1)
    return weights(module)


@by_balancer
def test_containers_are_as_they_were(balancer: str) -> None:
    make, _ = WAYS["pop"]
    module = Model(lambda b: (b["x"] * 2, b["y"]))
    trainer(callbacks=[BALANCERS[balancer]()]).fit(module, data(make))
    for way in WAYS:
        assert torch.equal(fitted(way, balancer), weights(module)), way


def test_containers_of_all_micro_batches() -> None:
    make, _ = WAYS["pop"]
    module = Model(lambda b: (b["x"] * 2, b["y"]))
    trainer(callbacks=[FAMO()], accumulate_grad_batches=2).fit(module, data(make))
    for way in ("pop", "dataclass"):
        assert torch.equal(fitted(way, "FAMO", accumulate_grad_batches=2), weights(module))


def test_the_batch_that_hooks_see_is_the_one_that_the_module_had() -> None:
    """As without us: what `task_losses` does to it is there afterwards."""
    found = []

    class See(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            found.append(args[3])

    make, unpack = WAYS["pop"]
    trainer(callbacks=[FAMO(), See()]).fit(Model(unpack), data(make))
    assert found == [{}] * 6


@by_balancer
@pytest.mark.parametrize("nested", [False, True])
def test_a_tensor_that_is_changed_in_place_is_refused(balancer: str, nested: bool) -> None:
    def unpack(batch: Any) -> Any:
        (batch["y"]["a"] if nested else batch["x"][0]).mul_(2)
        return batch["x"], batch["y"]

    module = Model(unpack)
    before = weights(module)
    where = "batch['y']['a']" if nested else "batch['x']"
    name = type(BALANCERS[balancer]()).__name__
    message = re.escape(f'but ["{where}"] was changed in place, and {name} needs its losses')
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[BALANCERS[balancer]()]).fit(module, data(WAYS["pop"][0]))
    assert torch.equal(weights(module), before)


def test_a_tensor_in_a_slot_that_is_changed_in_place_is_refused() -> None:
    module = Model(lambda b: (b.x.mul_(2), b.y))
    with pytest.raises(ValueError, match=r"but \['batch\.x'\] was changed in place"):
        trainer(callbacks=[FAMO()]).fit(module, data(Slotted))


def test_without_such_a_balancer_it_may_be_changed() -> None:
    run = trainer(callbacks=[MinNorm()])
    run.fit(Model(lambda b: (b["x"].mul_(2), b["y"])), data(WAYS["pop"][0]))
    assert run.global_step == 6


def test_a_loader_that_fills_the_same_tensors_again() -> None:
    class Same(Batched):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                self.x = batch["x"].clone() if not hasattr(self, "x") else self.x.copy_(batch["x"])
                yield {"x": self.x, "y": batch["y"]}

    module, loader = Model(lambda b: (b["x"], b["y"])), Same(data(WAYS["pop"][0]))
    before = weights(module)
    trainer(callbacks=[FAMO()]).fit(module, Same(loader))  # a step is over before the next batch
    assert not torch.equal(weights(module), before)
    module = Model(lambda b: (b["x"], b["y"]))
    with pytest.raises(ValueError, match="fills the same tensors again needs new ones"):
        trainer(callbacks=[FAMO()], accumulate_grad_batches=2).fit(module, Same(loader))
    assert torch.equal(weights(module), before)


@by_balancer
def test_an_iterator_is_refused(balancer: str) -> None:
    module = Model(lambda b: (next(b["x"]), b["y"]))
    before = weights(module)
    name = type(BALANCERS[balancer]()).__name__
    with pytest.raises(TypeError, match=rf"used twice, since {name} .* \(list_iterator\)\. Put"):
        trainer(callbacks=[BALANCERS[balancer]()]).fit(
            module, data(lambda x, y: {"x": iter([x]), "y": y})
        )
    assert torch.equal(weights(module), before)


class Physics(MultiTaskModule):
    """Losses that take gradients themselves, of the inputs."""

    def __init__(self, way: str) -> None:
        super().__init__(["a", "b"])
        torch.manual_seed(1)
        self.net = Network()
        self.way = way

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x = batch[0].clone().requires_grad_()
        found = self.net(x)
        if self.way == "grad":
            (slope,) = torch.autograd.grad(found["a"].sum(), x, create_graph=True)
        elif self.way == "enabled":
            with torch.enable_grad():
                y = self.net(x)["a"]
                (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        else:
            slope = torch.func.vmap(torch.func.grad(lambda row: self.net(row)["a"]))(batch[0])
        return {"a": slope.square().mean(), "b": found["b"].square().mean()}

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize("way", ["grad", "enabled", "func"])
def test_losses_that_take_gradients(way: str) -> None:
    for balancer in ("FAMO", "SAMO"):
        module, run = Physics(way), trainer(callbacks=[BALANCERS[balancer]()])
        run.fit(module, Batched(data(lambda x, y: (x, y))))
        assert run.global_step == 6


@pytest.mark.parametrize("balancer", ["FAMO", "SAMO"])
def test_losses_that_fail_the_second_time_name_the_balancer(balancer: str) -> None:
    queue: list[Any] = []

    def unpack(batch: Any) -> Any:
        if batch["x"].data_ptr() in queue:
            raise KeyError("gone")
        queue.append(batch["x"].data_ptr())
        return batch["x"], batch["y"]

    run = trainer(callbacks=[BALANCERS[balancer]()])
    told = warnings.catch_warnings(record=sys.version_info < (3, 11))  # else a note
    with told as seen, pytest.raises(KeyError, match="gone") as found:
        run.fit(Model(unpack), data(WAYS["pop"][0]))
    notes = [str(w.message) for w in seen or ()] + getattr(found.value, "__notes__", [])
    message = f"{balancer} asked for the losses of the same batch once more"
    assert any(note.startswith(message) for note in notes)


def test_what_is_copied() -> None:
    x, layer = torch.ones(2), nn.Linear(1, 1)
    shared = [x]
    circle: dict[str, Any] = {"shared": shared, "again": shared, "layer": layer, "n": {1, 2}}
    circle["self"] = circle
    new = copied(circle)
    assert new is not circle
    assert new["self"] is new
    assert new["shared"] is new["again"] is not shared
    assert new["shared"][0] is x
    assert new["layer"] is layer
    assert copied((x, 1)) == (x, 1)
    packed = nn.utils.rnn.pack_sequence([torch.ones(2)])
    assert copied(packed).data is packed.data
    assert iterator_in({"a": [1, (x, zip([1], strict=True))]}) == "zip"
    assert iterator_in([range(3), x, "text"]) is None
    assert iterator_in(Slotted(1, iter([x]))) == "list_iterator"
    for kind in (deque, UserList):
        row: Any = kind([x, {"k": [1]}])
        copied(row)[1]["k"].pop()
        copied(row)[0] = 0
        assert list(row) == [x, {"k": [1]}]
        x.add_(0)
        assert places(row, changed(versions_before := versions(row))) == []
        x.add_(0)
        assert places(row, changed(versions_before)) == ["batch[0]"]
    secret = copied(Private(shared))
    assert secret.shown() is not shared
    assert secret.shown()[0] is x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copied(torch.Size([2])) == torch.Size([2])


@pytest.mark.parametrize("given", ["list", "names", "values", "error"])
def test_losses_in_training_mode_only_name_the_cure(given: str) -> None:
    class Detector(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            if self.training:
                return losses
            if given == "error":
                raise AttributeError("items")
            x = batch[0]
            return {"list": [x], "names": {"boxes": x}, "values": dict.fromkeys(losses, x)}[given]

    expected = {"list": TypeError, "error": AttributeError}.get(given, ValueError)
    told = warnings.catch_warnings(record=sys.version_info < (3, 11))  # else a note
    with told as seen, pytest.raises(expected) as found:
        trainer(max_steps=1, callbacks=[SAMO()]).fit(Detector(), loader(8))
    words = [str(w.message) for w in seen or ()] + getattr(found.value, "__notes__", [])
    assert "use `SAMO(local='gradient')`" in " ".join([str(found.value), *words])
    trainer(max_steps=1, callbacks=[SAMO(local="gradient")]).fit(Detector(), loader(8))


@pytest.mark.parametrize("given", [None, {}, "counted"])
@pytest.mark.parametrize("balancer", [SAMO, FAMO])
def test_losses_of_some_tasks_only_the_second_time(balancer: Any, given: Any) -> None:
    """Neither an estimate of nothing nor weights that never learn without a word."""

    class Some(Balanced):
        calls = 0

        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            self.calls += 1
            if self.calls == 1:
                return losses
            del losses["b"]
            return losses | ({"b": (None, 1)} if given else {"b": given} if given is None else {})

    words = r"loss of task 'b' once more for the same batch.* returned \['a'"
    # `FAMO` asks when the step has been taken
    told = pytest.raises(ValueError, match=words) if balancer is SAMO else pytest.warns(match=words)
    with told:
        trainer(max_steps=1, callbacks=[balancer()]).fit(Some(), loader(8))


# ------------------------------------------------------------------------- changed parameters


class Teacher(Balanced):
    """Moves a copy of its weights after them, in one of the ways that people write."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if self.way == "in place":
                own.lerp_(other.detach(), 0.1)
            elif self.way == ".data":
                own.data.mul_(0.9).add_(other.data, alpha=0.1)
            elif self.way == "another .data":
                own.data = own.data * 0.9 + other.data * 0.1
        return super().task_losses(batch, batch_idx)


@pytest.mark.parametrize("balancer", [FAMO, SAMO])
@pytest.mark.parametrize("way", ["in place", ".data", "another .data"])
def test_a_teacher_that_moves_in_task_losses_is_told(way: str, balancer: Any) -> None:
    message = rf"changes \['teacher.trunk.0.weight', .*\], and {balancer.__name__} calls it more"
    with pytest.warns(UserWarning, match=message) as told:
        trainer(callbacks=[balancer()]).fit(Teacher(way), loader(32))
    assert sum("calls it more" in str(one.message) for one in told) == 1


@pytest.mark.parametrize(("way", "callbacks"), [("in place", [MinNorm()]), ("not", [FAMO()])])
def test_who_is_not_told_of_a_teacher(way: str, callbacks: Any) -> None:
    trainer(callbacks=callbacks).fit(Teacher(way), loader(32))
