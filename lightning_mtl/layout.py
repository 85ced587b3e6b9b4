"""Which parameters are shared, by name: given by the user, restored, or found from the graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mtl.jacobian import TaskGradients
from lightning_mtl.strategies import OneProcess
from lightning_mtl.strategies.fsdp2 import ShardedParameters, check_sharded
from lightning_mtl.strategies.sharded import ShardedGradients

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


class Layout:
    """The shared parameters of a fit: found once, saved with it, and the buffers laid out by them.

    Args:
        module: whose parameters they are.
        ranks: the processes of the run.
    """

    def __init__(self, module: MultiTaskModule, ranks: OneProcess) -> None:
        self.module = module
        self.ranks = ranks
        self.saved: list[str] | None = None  # names of the shared parameters in a checkpoint
        self._saved_trainable: list[str] | None = None
        self._gradients: TaskGradients | None = None
        self._summed: TaskGradients | None = None
        self._captured: dict[str, nn.Parameter] = {}
        self.probing = False  # whether J is never whole

    @property
    def known(self) -> bool:
        """Whether the shared parameters have been found."""
        return self._gradients is not None and self._gradients.known

    def gradients(self, optimizers: Sequence[Any]) -> TaskGradients:
        """Buffers for the task gradients, made on first use."""
        if self._gradients is None:
            parameters = self._trainable(optimizers)
            shared = shared_names(self.module, parameters, self.saved, self._saved_trainable)
            num_tasks = len(self.module.training_tasks)
            memory = self.module.gradient_memory
            self._gradients = self._make(
                parameters, num_tasks, shared, self.ranks, memory=memory, in_place=self.probing
            )
        return self._gradients

    def summed(self, optimizers: Sequence[Any]) -> TaskGradients:
        """A buffer for one gradient of all trainable parameters, which ranks add up."""
        if self._summed is None:
            parameters = self._trainable(optimizers)
            names = list(parameters)
            make = ShardedParameters if self.ranks.sharded_parameters else TaskGradients
            self._summed = make(parameters, 1, names, self.ranks, in_place=True)
        return self._summed

    def capture(self, optimizers: Sequence[Any]) -> None:
        """Note names before the first forward pass, after which FSDP2 shows other tensors."""
        self._captured = trainable(self.module, optimizers)
        if self.ranks.sharded_parameters:
            check_sharded(self._captured)

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
        """Look for the shared parameters again."""
        self._gradients = None

    def release(self) -> None:
        """Free the buffers; what is shared stays known."""
        if self._gradients is not None:
            self.saved = self._gradients.shared
            self._saved_trainable = list(self._gradients.parameters)
            self._gradients = None
        self._summed = None

    def state_dict(self) -> dict[str, Any]:
        """Names of the shared and of all trainable parameters."""
        if self._gradients is not None and self._gradients.known:
            names = list(self._gradients.parameters)
            return {"trainable": names, "shared": self._gradients.shared}
        return {"trainable": self._saved_trainable, "shared": self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the saved names."""
        self.saved, self._saved_trainable = state["shared"], state["trainable"]

    def check_frozen(self, optimizers: Sequence[Any]) -> None:
        """Refuse parameters that were frozen or unfrozen since the shared ones were found."""
        if self._gradients is None or not self._gradients.known:
            return
        if self.ranks.sharded_parameters:
            return
        now, before = set(trainable(self.module, optimizers)), set(self._gradients.parameters)
        if now != before:
            changed = sorted(now ^ before)
            raise ValueError(
                f"Expected the trainable parameters of the first step but {changed[:4]} "
                f"{'were' if len(changed) > 1 else 'was'} frozen or unfrozen since. Balancing "
                f"keeps one layout a fit: freeze before `fit`, and unfreeze in a new `fit` with "
                f"`ckpt_path=None`."
            )


def trainable(module: nn.Module, optimizers: Sequence[Any]) -> dict[str, nn.Parameter]:
    """Parameters that an optimizer trains, by name, each once."""
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in owned}


def shared_names(
    module: MultiTaskModule,
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
    module: MultiTaskModule, parameters: dict[str, nn.Parameter], given: Iterable[nn.Parameter]
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


def no_shared(module: MultiTaskModule, balancer: str) -> str:
    """Why a gradient balancer has nothing to work on, and what to do."""
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    found = f"; frozen are {frozen[:4]}{' and more' * (len(frozen) > 4)}" if frozen else ""
    optimizers = module.trainer.optimizers
    owned = trainable(module, optimizers)
    left = [n for n, p in module.named_parameters() if p.requires_grad and n not in owned]
    if left:
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
