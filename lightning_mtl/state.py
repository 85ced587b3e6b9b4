"""Declared state: saved, restored, reset, and narrowed to the tasks of a step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.changed import arguments, change, look, note
from lightning_mtl.saved import alike, described, entry, finite, generator_of, unreadable

_NONE: dict[str, Any] = {}
_OF_A_RUN = ("sum_shards", "_told_by")  # they hold its buffers


class Shards(Protocol):
    """How columns are divided over processes."""

    @property
    def total(self) -> int:
        """How many columns all processes have together."""

    def local(self, tensor: Tensor) -> Tensor:
        """This process's columns of a tensor that has all in its last dimension, or just those."""

    def whole(self, tensor: Tensor) -> Tensor:
        """All columns, from every process's own; a collective."""


class Stateful(Callback):
    """A callback with declared state.

    Attributes:
        tasks: names of the tasks of the current call, in the order of its rows; empty when used by
            hand.
        shards: how the columns of the Jacobian are divided over processes; ``None`` when each has
            all of them.
        fixed_with_state: arguments that shape its state, so that they cannot change once it has
            begun.
    """

    fixed_with_state: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._settled = False  # whether it is in use, so that `changed.py` minds its arguments
        self._given: dict[str, Any] = {}  # lists and dicts among them, as they were
        self._fitting = ""  # whether a fit is on: "alone", or "inside" of another balancer
        self._known_tasks: tuple[str, ...] = ()  # all tasks of the run
        self.tasks: tuple[str, ...] = ()
        self.shards: Shards | None = None
        self._defaults: dict[str, Any] = {}
        self._per_task: set[str] = set()
        self._columns: set[str] = set()
        self._tensors: set[str] = set()
        self._divided: set[str] = set()  # column states of which this process has a part only
        self._seed: int | None = None
        self._initial_seed: int | None = None
        self._generator: torch.Generator | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep count of nested balancers, asked for many times a step; mind changed arguments."""
        if name in arguments(type(self)) and vars(self).get("_settled"):
            change(self, name, value)
        else:
            super().__setattr__(name, value)
        if isinstance(value, Stateful):
            vars(self)["_nested"] = {**self.nested(), name: value}
        elif name in self.nested():
            vars(self)["_nested"] = {k: b for k, b in self.nested().items() if k != name}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the buffers of a running fit behind."""
        kept = {name: value for name, value in vars(self).items() if name not in _OF_A_RUN}
        return {**kept, "representation": None} if "representation" in kept else kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give each process tensors of its own: ``ddp_spawn`` sends them in shared memory."""
        for name, value in state.items():
            shared = isinstance(value, Tensor) and value.is_shared()
            vars(self)[name] = value.clone() if shared else value

    def add_state(
        self,
        name: str,
        default: Any,
        *,
        per_task: bool = False,
        columns: bool = False,
        tensors: bool = False,
    ) -> None:
        """Declare state: that alone makes it saved, restored and reset.

        Args:
            name: the attribute that holds it.
            default: its first value, a tensor, a number or a plain container. With ``per_task`` a
                number: what the entries of a task hold before the task has been seen; the
                attribute stays ``None`` until :meth:`per_task_state` creates it.
            per_task: the first dimension is the task. Entries of a task that is absent from a step
                stay as they are.
            columns: the last dimension are the columns of the Jacobian. Where each process has
                only some of them, it keeps its part, and checkpoints hold the whole.
            tensors: the last dimension are the shared parameters.
        """
        self._defaults[name] = default
        if columns:
            self._columns.add(name)
        if tensors:
            self._tensors.add(name)
        if per_task:
            self._per_task.add(name)
        setattr(self, name, None if per_task else _copy(default))

    def per_task_state(self, name: str, like: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """The per-task state ``name``, shape ``(len(like), *shape)``, created on first use.

        Update it in place.

        Args:
            name: a name given to :meth:`add_state` with ``per_task=True``.
            like: a tensor whose first dimension is the task; gives device and dtype.
            shape: the dimensions after the task.

        Raises:
            ValueError: restored from a run with other tasks or other shared parameters.
        """
        expected = (len(like), *shape)
        state = self.column_state(name) if name in self._columns else getattr(self, name)
        if state is None:
            state = like.new_full(expected, self._defaults[name])
        elif tuple(state.shape) != expected:
            raise self._other_run(name, expected, state)
        else:
            state = state.to(device=like.device, dtype=like.dtype)
        setattr(self, name, state)
        return state

    def column_state(self, name: str) -> Tensor | None:
        """A state declared with ``columns=True``: this process's columns of it.

        Raises:
            ValueError: restored from a run with other shared parameters.
        """
        state: Tensor | None = getattr(self, name)
        if self.shards is not None and name not in self._divided:
            if state is not None:
                if state.shape[-1] != self.shards.total:
                    raise self._other_run(name, (*state.shape[:-1], self.shards.total), state)
                state = self.shards.local(state)
                setattr(self, name, state)
            self._divided.add(name)
        return state

    def add_generator(self, seed: int | None) -> None:
        """Declare that the method draws random numbers, from :attr:`generator`.

        Args:
            seed: where they start; ``None`` takes PyTorch's initial seed, which
                ``seed_everything`` sets.
        """
        if seed is not None and (type(seed) is not int or seed < 0):
            raise ValueError(
                f"Expected `seed` of {type(self).__name__} to be an integer of at least 0 or "
                f"None, found {seed!r}."
            )
        self._seed = seed

    def share_seed(self, seed: int) -> None:
        """Take ``seed`` where none was given; the flow calls it, so that all ranks draw alike."""
        if self._seed is None:
            self._initial_seed = seed
        for nested in self.nested().values():
            nested.share_seed(seed)

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of its own, on the CPU: saved with its state, the same on every rank."""
        if self._generator is None:
            seed = self._initial_seed if self._seed is None else self._seed
            seed = torch.initial_seed() if seed is None else seed
            self._generator = torch.Generator().manual_seed(seed)
        return self._generator

    def _other_run(self, name: str, expected: tuple[int, ...], state: Tensor) -> ValueError:
        return ValueError(
            f"{type(self).__name__} expected its state `{name}` in shape {expected} but found "
            f"{tuple(state.shape)}: it belongs to a run with other tasks or other shared "
            f"parameters. Resume with the same model, or call `reset()` on the balancer to start "
            f"its state afresh. In a run whose first steps lack a task, name what the tasks share "
            f"in `shared_parameters()`."
        )

    def reset(self) -> None:
        """Put every state, nested balancers included, back to its default."""
        for name, default in self._defaults.items():
            setattr(self, name, None if name in self._per_task else _copy(default))
        self._divided.clear()
        self._generator = None
        for nested in self.nested().values():
            nested.reset()

    def nested(self) -> dict[str, Any]:
        """Balancers this one wraps, by attribute name; their state travels with this one's."""
        found: dict[str, Any] = vars(self).get("_nested", _NONE)
        return found

    def only(
        self, tasks: Sequence[str], present: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Narrow per-task state to the rows ``present`` for one call, and write them back after it.

        Args:
            tasks: every active task of the run.
            present: indices of the tasks of this step, ascending; ``None`` when all are there.
        """
        if not self._settled:
            note(self)
        elif self._given:
            look(self)
        if present is not None:
            return self._narrowed(tasks, present)
        self.tasks = tuple(tasks)
        for nested in self.nested().values():
            nested.only(tasks)
        return nullcontext()

    @contextmanager
    def _narrowed(self, tasks: Sequence[str], present: Sequence[int]) -> Iterator[None]:
        self.tasks = tuple(tasks[i] for i in present)
        index = list(present)
        for name in self._columns:
            self.column_state(name)
        whole = {name: getattr(self, name) for name in self._per_task}
        for name, state in whole.items():
            if state is not None and len(state) != len(tasks):
                raise self._other_run(name, (len(tasks), *state.shape[1:]), state)
        for name, state in whole.items():
            setattr(self, name, None if state is None else state[index])
        try:
            with ExitStack() as stack:
                for nested in self.nested().values():
                    stack.enter_context(nested.only(tasks, present))
                yield
        finally:
            for name, state in whole.items():
                rows = getattr(self, name)
                if rows is not None:
                    if state is None:
                        state = rows.new_full((len(tasks), *rows.shape[1:]), self._defaults[name])
                    state = state.to(rows)
                    state[index] = rows
                setattr(self, name, state)

    # ----------------------------------------------------------- checkpoint

    @property
    def state_key(self) -> str:
        """The class and the classes it wraps; a changed hyperparameter keeps the state."""
        name, nested = type(self).__qualname__, self.nested()
        if not nested:  # asked for at every hook of every step
            return name
        return f"{name}({', '.join(b.state_key for b in nested.values())})"

    def hyperparameters(self) -> dict[str, Any]:
        """The plain constructor arguments, as stored in checkpoints."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {n: getattr(self, n) for n in names if _plain(getattr(self, n, ...))}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers only: checkpoints load with ``weights_only=True``."""
        return {
            "hyperparameters": self.hyperparameters(),
            "state": {name: self._whole(name) for name in self._defaults},
            "generator": None if self._generator is None else self._generator.get_state(),
            "nested": {name: b.state_dict() for name, b in self.nested().items()},
        }

    def unshard(self) -> None:
        """Leave the division of columns: states are whole again; a collective."""
        if self.shards is not None:
            for name in sorted(self._columns):
                setattr(self, name, self._whole(name))
            self._divided.clear()
        self.shards = None
        for name in _OF_A_RUN:
            vars(self).pop(name, None)
        for nested in self.nested().values():
            nested.unshard()

    def widen(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Make room for shared parameters that were found late, behind the others.

        Args:
            names: of these parameters.
            sizes: how many columns each has.
        """
        for states, more in ((self._columns, sum(sizes)), (self._tensors, len(names))):
            for name in states:
                state, default = getattr(self, name), self._defaults[name]
                if state is not None:
                    state = torch.nn.functional.pad(state, (0, more), value=default or 0.0)
                    setattr(self, name, state)
        for nested in self.nested().values():
            nested.widen(names, sizes)

    def _whole(self, name: str) -> Any:
        value = getattr(self, name)
        if name in self._divided and self.shards is not None and value is not None:
            value = self.shards.whole(value)
        return _copy(value)

    def not_finite(self) -> list[str]:
        """Names of the states, nested balancers included, that hold a number that is not finite."""
        defaults = self._defaults.items()
        own = [name for name, default in defaults if not finite(getattr(self, name), default)]
        return own + [found for b in self.nested().values() for found in b.not_finite()]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was saved; a changed hyperparameter is reported, its new value kept.

        Raises:
            ValueError: the checkpoint was altered, is of another version, or holds numbers that
                are not finite; nothing was changed.
        """
        self._check_saved(state_dict)
        for name, now in self.hyperparameters().items():
            before = state_dict["hyperparameters"].get(name, now)
            if before != now:
                rank_zero_warn(
                    f"{type(self).__name__} was saved with `{name}={before}` and continues with "
                    f"`{name}={now}`; its state is kept. Pass `{name}={before}` to continue the "
                    f"saved run."
                )
        for name, value in state_dict["state"].items():
            setattr(self, name, _copy(value))
        self._divided.clear()
        self._generator = None
        if state_dict["generator"] is not None:
            self._generator = generator_of(state_dict["generator"], type(self).__name__)
        for name, nested in self.nested().items():
            nested.load_state_dict(state_dict["nested"][name])

    def _check_saved(self, saved: Any) -> None:
        """Refuse a state that was altered or is not finite, wrapped balancers included."""
        owner = type(self).__name__
        entry(saved, "hyperparameters", Mapping, owner)
        state = entry(saved, "state", Mapping, owner)
        if set(state) != set(self._defaults):
            raise ValueError(
                f"{owner} expected the states {sorted(self._defaults)} but the checkpoint holds "
                f"{sorted(map(str, state))}. It was written by another version: resume with that "
                f"one."
            )
        for name, value in state.items():
            default = self._defaults[name]
            if not alike(value, default, name in self._per_task):
                raise unreadable(owner, f"{described(value)} as state `{name}`")
        spoilt = [n for n, v in state.items() if not finite(v, self._defaults[n])]
        if spoilt:
            raise ValueError(
                f"Expected finite numbers in the saved state of {owner} but {spoilt} holds some "
                f"that are not: every step from here on would too. Resume from an earlier "
                f"checkpoint, or load the weights alone, with `load_from_checkpoint`."
            )
        seeded = entry(saved, "generator", (Tensor, type(None)), owner)
        if seeded is not None:
            generator_of(seeded, owner)
        inside = entry(saved, "nested", Mapping, owner)
        for name, nested in self.nested().items():
            nested._check_saved(entry(inside, name, Mapping, owner))


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return isinstance(value, (bool, int, float, str, type(None)))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
