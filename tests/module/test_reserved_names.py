"""Names of MultiTaskModule in a user's class: refused with another word, never half in use."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.inherit import _BOTH, _INSTEAD
from lightning_mtl.reserved import _ARGUMENTS, _METHODS, RESERVED
from tests.common.models import Balanced, loader, trainer
from tests.common.places import ROOT

DOCS = ROOT / "docs"
# Values that people give to attributes of their own.
VALUES: dict[str, Callable[[], Any]] = {
    "a number": lambda: 0.5,
    "a list": lambda: ["a", "b"],
    "a dict": lambda: {"a": 1.0},
    "a tensor": lambda: torch.ones(2),
    "a parameter": lambda: nn.Parameter(torch.ones(2)),
    "a layer": lambda: nn.Linear(1, 1),
    "losses": lambda: nn.ModuleDict({"a": nn.MSELoss()}),
    "tasks": lambda: nn.ModuleDict({"a": Task(nn.MSELoss())}),
    "a string": lambda: "a",
    "a class": lambda: Task,
}
REFUSED = (AttributeError, TypeError, ValueError)


def test_the_list_holds_what_the_base_class_adds() -> None:
    inherited = {name for base in LightningModule.__mro__ for name in vars(base)}
    own = set(vars(MultiTaskModule)) - inherited - {"__jit_ignored_attributes__"}
    given = vars(MultiTaskModule(["a"])).keys() - vars(LightningModule()).keys()
    assert own | given | {"_tasks"} == RESERVED
    replaced = {n for n in vars(MultiTaskModule) if n in inherited and not n.startswith("__")}
    checks = {"register_buffer", "register_parameter", "add_module", "training_step"}
    checks |= {"manual_backward"}
    assert replaced - {"_abc_impl"} == {*_INSTEAD, *_BOTH} | checks


def test_the_page_has_the_list() -> None:
    page = (DOCS / "lightning.md").read_text()
    section = page.split("## Reserved names")[1].split("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", table)) == RESERVED


@pytest.mark.parametrize("value", VALUES)
def test_an_attribute_of_the_users_own(value: str) -> None:
    module = Balanced()
    before = {**vars(module)}
    for name in RESERVED:
        if (name, value) == ("active_tasks", "a list") or (name in _METHODS and value == "a class"):
            continue  # what the name is for; a callable
        with pytest.raises(REFUSED, match=name):
            setattr(module, name, VALUES[value]())
        assert vars(module) == before


@pytest.mark.parametrize("value", VALUES)
def test_before_the_constructor(value: str) -> None:
    class Early(MultiTaskModule):
        def __init__(self, name: str) -> None:
            setattr(self, name, VALUES[value]())
            super().__init__(["a", "b"])

    for name in RESERVED:
        message = rf"`super\(\).__init__\(\)` before `{name}` of Early"
        with pytest.raises(AttributeError, match=message):
            Early(name)


@pytest.mark.parametrize(
    "add",
    [
        lambda module, name: module.register_buffer(name, torch.ones(1)),
        lambda module, name: module.register_parameter(name, nn.Parameter(torch.ones(1))),
        lambda module, name: module.add_module(name, nn.Linear(1, 1)),
        lambda module, name: module.register_module(name, nn.Linear(1, 1)),
    ],
    ids=["buffer", "parameter", "module", "register_module"],
)
def test_a_buffer_a_parameter_a_layer(add: Any) -> None:
    module = Balanced()
    keys = list(module.state_dict())
    for name in RESERVED:
        with pytest.raises(REFUSED, match=name):
            add(module, name)
        assert list(module.state_dict()) == keys


BODIES: dict[str, Any] = {
    "a class attribute": "raise",
    "a property": property(lambda self: "raise"),
    "a method": lambda self: iter(()),
    "a layer": nn.Linear(1, 1),
    "a class": Task,
}


@pytest.mark.parametrize("body", BODIES)
def test_in_the_class(body: str) -> None:
    for name in RESERVED:
        if name in _METHODS and body in ("a method", "a layer"):
            continue  # meant to be defined; a layer as class attribute is a callable
        mixin = type("Mixin", (), {name: BODIES[body]})
        for bases, found in (
            ((MultiTaskModule,), {name: BODIES[body]}),
            ((MultiTaskModule, mixin), {}),
            ((mixin, MultiTaskModule), {}),
        ):
            with pytest.raises(TypeError, match=rf"`{name}` of \w+ is a name of MultiTaskModule"):
                type("X", bases, found)


WORDS = {
    "tasks": r"declared tasks, which are given to `super\(\).__init__\(tasks=\.\.\.\)`.*`my_tasks`",
    "_flow": r"`_flow` of Balanced is a name of MultiTaskModule .* set to a int.*`my_flow`",
    "shared_parameters": r"to be a method, which returns the parameters .* got int.*`my_shared_par",
    "on_bad_loss": r"`on_bad_loss` to be one of .*'skip_task', 'skip_step', 'ignore'\) but got 1",
    "gradient_memory": r"`gradient_memory` of Balanced to be one of .*'bf16'.* found 1",
    "gradient_blocks": r"`gradient_blocks` of Balanced to be an integer of at least 1, found 0",
    "shard_gradients": r"`shard_gradients` of Balanced to be True or False but got 2",
}


@pytest.mark.parametrize("name", WORDS)
def test_the_message_has_the_word_to_use(name: str) -> None:
    value = {"gradient_blocks": 0, "shard_gradients": 2}.get(name, 1)
    module = Balanced()
    with pytest.raises(REFUSED, match=WORDS[name]):
        setattr(module, name, value)


def test_what_the_names_are_for_works() -> None:
    module = Balanced()
    for name in _ARGUMENTS:
        value = {"on_bad_loss": "skip_step", "gradient_memory": "bf16", "gradient_blocks": 2}
        value["max_skipped_steps"] = 3
        setattr(module, name, value.get(name, ["b"] if name == "active_tasks" else True))
    assert module.active_tasks == ("b",)
    assert (module.on_bad_loss, module.gradient_blocks) == ("skip_step", 2)
    module.task_losses = lambda batch, batch_idx: MultiTaskModule.task_losses(
        module, batch, batch_idx
    )
    run = trainer()
    run.fit(module, loader(8))
    assert run.global_step == 2


def test_names_that_stay_free() -> None:
    arguments = inspect.signature(MultiTaskModule.__init__).parameters
    module = Balanced()
    for name in ("baseline", "delta_p_metrics", "task", "flow", "losses", "heads", "balancer"):
        assert name in arguments or name not in RESERVED
        setattr(module, name, nn.Linear(1, 1))
        assert name in dict(module.named_children())


def test_copies_and_pickles_of_a_module() -> None:
    module = Balanced(on_bad_loss="skip_step", active_tasks=["b"])
    module.configure = None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.on_bad_loss, other.active_tasks) == ("skip_step", ("b",))
        assert other.tasks.keys() == {"a", "b"}


def test_a_training_step_on_an_object() -> None:
    module = Balanced()
    module.training_step = lambda *_: None  # would train nothing, and never end
    with pytest.raises(MisconfigurationException, match=r"on an object of Balanced.*task_losses"):
        trainer(max_steps=1).fit(module, loader(8))


def test_task_losses_without_self() -> None:
    class Static(Balanced):
        @staticmethod
        def task_losses(batch: Any) -> Any:
            return batch

    class OfClass(Balanced):
        @classmethod
        def task_losses(cls, batch: Any) -> Any:
            return batch

    assert Static().task_losses("batch", 0) == OfClass().task_losses("batch", 0) == "batch"
