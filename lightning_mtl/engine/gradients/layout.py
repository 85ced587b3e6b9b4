"""Which parameters are shared, by name: given by the user, restored, or found from the graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.gradients.fsdp2 import ShardedParameters, check_sharded
from lightning_mtl.engine.gradients.reach import Reach
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.sharded import ShardedGradients
from lightning_mtl.numerics.flat import real
from lightning_mtl.ranks import OneProcess
from lightning_mtl.saved import entry, names_in, unreadable


class Layout:
    """The shared parameters of a fit: found once, saved with it, and the buffers laid out by them.

    Args:
        module: whose parameters they are.
        ranks: the processes of the run.
    """

    def __init__(self, module: TaskModule, ranks: OneProcess) -> None:
        self.module = module
        self.ranks = ranks
        self.saved: list[str] | None = None  # names of the shared parameters in a checkpoint
        self._saved_trainable: list[str] | None = None
        self._gradients: TaskGradients | None = None
        self._summed: TaskGradients | None = None
        self._captured: dict[str, nn.Parameter] = {}
        self._held: list[Tensor] = []  # what optimizers trained when the buffers were made
        self._summed_held: list[Tensor] = []
        self._reach: Reach | None = None  # of the tasks, kept when the buffers are made anew
        self._restored: dict[str, Any] | None = None  # what a checkpoint says of it
        self._before: list[str] = []  # shared in the buffers before
        self._given: bool | None = None
        self._warned: set[str] = set()
        self.probing = False  # whether J is never whole

    @property
    def known(self) -> bool:
        """Whether the shared parameters have been found."""
        return self._gradients is not None and self._gradients.known

    @property
    def given(self) -> bool:
        """Whether nothing has to be found: the user, or an old checkpoint, names what is shared."""
        if self._given is None:
            self._given = self.module.shared_parameters() is not None
        return self._given

    @property
    def complete(self) -> bool:
        """Whether every task has been met, so that none can bring shared parameters later."""
        return self._reach is not None and self._reach.complete

    @property
    def outside(self) -> set[int]:
        """Tasks that reach no shared parameter."""
        return set() if self._reach is None else self._reach.apart

    def gradients(self, optimizers: Sequence[Any]) -> TaskGradients:
        """Buffers for the task gradients, made on first use."""
        if self._gradients is None:
            self._held = held(optimizers)
            parameters = self._trainable(optimizers)
            shared = shared_names(self.module, parameters, self.saved, self._saved_trainable)
            num_tasks = len(self.module.training_tasks)
            memory = self.module.gradient_memory
            self._gradients = self._make(
                parameters, num_tasks, shared, self.ranks, memory=memory, in_place=self.probing
            )
            self._gradients.before = self._before
            if self._reach is None:
                self._reach = self._gradients.reach
                if self._restored is not None:
                    self._reach.restore(self._restored, list(parameters))
            else:
                self._gradients.reach = self._reach
                if shared is not None:
                    self._gradients.note_outside()
        return self._gradients

    def summed(self, optimizers: Sequence[Any], *, first: bool) -> TaskGradients:
        """A buffer for one gradient of all trainable parameters, which ranks add up.

        Args:
            optimizers: of the fit.
            first: whether a new gradient begins.

        Raises:
            ValueError: a parameter was frozen or unfrozen between micro-batches of one step.
        """
        now = held(optimizers)
        if self._summed is None or not _the_same(now, self._summed_held):
            if self._summed is not None and not first:
                raise self._changed(optimizers, list(self._summed.parameters))
            self._summed_held = now
            parameters = self._trainable(optimizers)
            names = list(parameters)
            make = ShardedParameters if self.ranks.sharded_parameters else TaskGradients
            self._summed = make(parameters, 1, names, self.ranks, in_place=True)
        return self._summed

    def capture(self, optimizers: Sequence[Any]) -> None:
        """Note names before the first forward pass, after which FSDP2 shows other tensors.

        What optimizers train outside the module starts on every rank as on the first: DDP sees to
        that for the module's parameters only.
        """
        self._captured = trainable(self.module, optimizers)
        if self.ranks.sharded_parameters:
            check_sharded(self._captured)
        own = {id(p) for p in self.module.parameters()}
        for p in self._captured.values():
            if id(p) not in own:
                self.ranks.copy_first(p)

    def _trainable(self, optimizers: Sequence[Any]) -> dict[str, nn.Parameter]:
        if self.ranks.sharded_parameters:
            return self._captured
        return trainable(self.module, optimizers)

    @property
    def _make(self) -> type[TaskGradients]:
        if self.ranks.sharded_parameters:
            return ShardedParameters
        sharded = self.module.shard_gradients and not self.ranks.alone
        return ShardedGradients if sharded else TaskGradients

    def forget(self) -> None:
        """Look for the shared parameters again; what tasks reach stays known."""
        shared = self.saved if self._gradients is None else self._gradients.shared
        self._before, self.saved, self._gradients = list(shared or self._before), None, None

    def settle(self, balancer: GradientBalancer | None) -> None:
        """Make room in the state of the balancer for what was found beyond the layout before."""
        if self._gradients is not None and self._before and balancer is not None:
            self._widen(balancer, (self._gradients.shared or [])[len(self._before) :])
        self._before = []

    def extend(self, balancer: GradientBalancer | None, optimizers: Sequence[Any]) -> bool:
        """Balance what tasks that were just met share with others; whether there is any."""
        gradients = self._gradients
        if gradients is None or gradients.shared is None or self._reach is None or self.given:
            return False
        known = set(gradients.shared)
        more = [n for n in self._reach.shared(gradients.parameters) if n not in known]
        if more:
            self._lengthen(gradients, more, balancer, optimizers)
        return bool(more)

    def release(self) -> None:
        """Free the buffers; what is shared stays known."""
        if self._gradients is not None and self._gradients.known:
            self._keep(self._gradients, self._gradients.shared)
        self._gradients = self._summed = None

    def state_dict(self) -> dict[str, Any]:
        """Names of the shared and of all trainable parameters."""
        names, shared = self._saved_trainable, self.saved
        if self._gradients is not None:
            names, shared = list(self._gradients.parameters), self._gradients.shared
        shared = self._before or None if shared is None else shared
        if self._reach is None or names is None:
            return {"trainable": names, "shared": shared, **(self._restored or {})}
        return {"trainable": names, "shared": shared, **self._reach.state(names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the saved names."""
        for name in ("shared", "trainable"):
            if entry(state, name, (list, type(None)), "the run") is not None:
                names_in(state, name, "the run")
        self.saved, self._saved_trainable = state["shared"], state["trainable"]
        keys = ("reached", "met", "layer", "outside")
        if all(key in state for key in keys):  # else it is one of an older version
            for name, kind in (("reached", int), ("met", bool), ("outside", int)):
                if not all(type(value) is kind for value in entry(state, name, list, "the run")):
                    words = "numbers" if kind is int else "yes or no"
                    raise unreadable("the run", f"other things than {words} in '{name}'")
            if entry(state, "layer", (list, type(None)), "the run") is not None:
                names_in(state, "layer", "the run")
            self._restored = {key: state[key] for key in keys}
        elif self.saved is not None:
            self._given = True

    def check_frozen(self, optimizers: Sequence[Any], *, first: bool, balanced: bool) -> None:
        """Refuse parameters that were frozen or unfrozen since the layout was begun.

        Asked in every step: one comparison of identities a parameter.

        Args:
            optimizers: of the fit.
            first: whether a step begins, so that a layout of which nothing depends can be left.
            balanced: whether a gradient balancer's state depends on it.

        Raises:
            ValueError: some were.
        """
        if self._gradients is None or _the_same(held(optimizers), self._held):
            return
        if not first or (balanced and self._gradients.known):
            raise self._changed(optimizers, list(self._gradients.parameters))
        self._gradients = self.saved = self._saved_trainable = self._reach = self._restored = None
        self._before, self._given = [], None

    def _changed(self, optimizers: Sequence[Any], before: Sequence[str]) -> ValueError:
        changed = sorted(set(trainable(self.module, optimizers)) ^ set(before))
        return ValueError(
            f"Expected the trainable parameters of the first step but {changed[:4]} "
            f"{'were' if len(changed) > 1 else 'was'} frozen or unfrozen since, or replaced. "
            f"Balancing keeps one layout a fit: freeze before `fit`, where layers are replaced too,"
            f" and unfreeze in a new `fit` with `ckpt_path=None`."
        )

    def grow(self, balancer: GradientBalancer | None, optimizers: Sequence[Any]) -> None:
        """Balance parameters that turned out to be shared, from the next step on.

        They come behind the others, and state that follows the columns begins there as if they
        had been shared from the start and no task had reached them. What a representation does
        not stand for stays a sum, which is said once.
        """
        gradients = self._gradients
        if gradients is None or not gradients.reach.late or self.given:
            return
        late, gradients.reach.late = gradients.reach.late, []
        if balancer is not None and balancer.gradients.startswith("representation"):
            self._warn_late(balancer, [name for name in late if name not in self._warned])
            return
        self._lengthen(gradients, late, balancer, optimizers)

    def _lengthen(
        self,
        gradients: TaskGradients,
        more: list[str],
        balancer: GradientBalancer | None,
        optimizers: Sequence[Any],
    ) -> None:
        """Buffers with columns for more parameters, behind the others."""
        if balancer is not None:
            self._widen(balancer, more)
        self._keep(gradients, [*(gradients.shared or ()), *more])
        del gradients
        self.gradients(optimizers)

    def _widen(self, balancer: GradientBalancer, names: Sequence[str]) -> None:
        assert self._gradients is not None
        balancer.unshard()
        found = [real(self._gradients.parameters[name].detach()) for name in names]
        balancer.widen(names, [p.numel() for p in found])

    def _keep(self, gradients: TaskGradients, shared: list[str] | None) -> None:
        """Note what is shared, and let the buffers go."""
        self.saved, self._saved_trainable = shared, list(gradients.parameters)
        self._before = []
        self._gradients = None

    def _warn_late(self, balancer: GradientBalancer, late: list[str]) -> None:
        if late:
            self._warned.update(late)
            rank_zero_warn(
                f"{late[:4]}{' and more' * (len(late) > 4)} turned out to be shared after the "
                f"first step, and get the sum of the weighted task gradients: with "
                f"`gradients='{balancer.gradients}'` of {type(balancer).__name__}, shared "
                f"parameters have to be known before. Name them in `shared_parameters()`, or use "
                f"`gradients='parameters'`."
            )


def trainable(module: nn.Module, optimizers: Sequence[Any]) -> dict[str, nn.Parameter]:
    """Parameters that an optimizer trains, by name, each once: the module's, then others."""
    owned = {id(p) for p in held(optimizers)}
    found = {name: p for name, p in module.named_parameters() if id(p) in owned}
    known = {id(p) for p in found.values()}
    for j, optimizer in enumerate(optimizers):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if p.requires_grad and id(p) not in known:
                known.add(id(p))
                found[f"parameter {i} of optimizer {j}"] = p
    return found


def held(optimizers: Sequence[Any]) -> list[Tensor]:
    """What optimizers train now, in their order."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [p for group in groups for p in group["params"] if p.requires_grad]


def _the_same(now: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def shared_names(
    module: TaskModule,
    parameters: dict[str, nn.Parameter],
    saved: list[str] | None,
    saved_trainable: list[str] | None = None,
) -> list[str] | None:
    """Names of the shared parameters where they are known before the first step, else ``None``.

    Args:
        module: whose tasks are trained.
        parameters: its trainable parameters by name.
        saved: names of the shared parameters in a checkpoint.
        saved_trainable: names of the parameters that were trainable then.

    Raises:
        ValueError: ``shared_parameters()`` returns what is no trainable parameter of the module;
            a checkpoint's shared parameters are not this module's.
    """
    given = module.shared_parameters()
    chosen = None if given is None else _names(module, parameters, given)
    if saved is not None:
        other = sorted(set(saved_trainable or saved) - set(parameters))
        if saved_trainable is not None:
            other += sorted(set(parameters) - set(saved_trainable))
        if other:
            raise ValueError(
                f"Expected the trainable parameters of the checkpoint in {type(module).__name__} "
                f"but {other[:4]} {'are' if len(other) > 1 else 'is'} missing, frozen or unfrozen "
                f"now. Resume with the model and the frozen parameters of the saved run, or start "
                f"from its weights with `load_from_checkpoint` and `fit` without `ckpt_path`."
            )
        if chosen is not None and set(chosen) != set(saved):
            changed = sorted(set(chosen) ^ set(saved))
            raise ValueError(
                f"Expected the {len(saved)} shared parameters of the checkpoint but "
                f"`shared_parameters()` returns {len(chosen)}; they differ in {changed[:4]}. "
                f"Resume with those of the saved run, or start from its weights with "
                f"`load_from_checkpoint` and `fit` without `ckpt_path`."
            )
        return saved
    return chosen


def _names(
    module: TaskModule, parameters: dict[str, nn.Parameter], given: Iterable[nn.Parameter]
) -> list[str]:
    by_id = {id(p): name for name, p in parameters.items()}
    chosen = list(dict.fromkeys(id(p) for p in given))
    foreign = [i for i in chosen if i not in by_id]
    if foreign or not chosen:
        raise ValueError(
            f"Expected `shared_parameters()` to return trainable parameters of "
            f"{type(module).__name__} but {len(foreign)} of {len(chosen)} are not. Return for "
            f"example `self.encoder.parameters()`, without frozen ones."
        )
    return [by_id[i] for i in chosen]


def no_shared(module: TaskModule, balancer: str) -> str:
    """Why a gradient balancer has nothing to work on, and what to do."""
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    found = f"; frozen are {frozen[:4]}{' and more' * (len(frozen) > 4)}" if frozen else ""
    optimizers = module.trainer.optimizers
    owned = trainable(module, optimizers)
    left = [n for n, p in module.named_parameters() if p.requires_grad and n not in owned]
    if left and not owned:  # where it returned None, Lightning has put one of its own in place
        found += (
            "; no optimizer of `configure_optimizers` holds a trainable parameter. Return one, "
            "`SGD(self.parameters(), ...)`"
        )
    elif left:
        names = " and ".join(type(getattr(o, "optimizer", o)).__name__ for o in optimizers)
        found += (
            f"; {names} of `configure_optimizers` does not hold {left[:4]}"
            f"{' and more' * (len(left) > 4)}. Give it all parameters, "
            f"`{names.split()[0]}(self.parameters(), ...)`"
        )
    return (
        f"Expected parameters that two or more of the tasks {list(module.training_tasks)} share "
        f"but found none, so {balancer} has no gradients to balance{found}. Unfreeze the trunk, "
        f"check that every task's loss goes through it, name the parameters in "
        f"`shared_parameters()`, or train without a gradient balancer."
    )
