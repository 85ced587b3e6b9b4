"""Where a probe looks: the last shared layer, and what has to lie behind a representation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.gradients.graph import reachable
from lightning_mtl.engine.gradients.layout import no_shared
from lightning_mtl.engine.gradients.rows import TaskGradients


def check_shared(
    module: TaskModule, balancer: GradientBalancer, gradients: TaskGradients, option: str
) -> None:
    """Refuse shared parameters that are not known, or none.

    Raises:
        ValueError: the first step had not every task, or there are no shared parameters.
    """
    if not gradients.known:
        raise ValueError(
            f"Expected every task in the first optimiser step with {option} but some of "
            f"{list(module.training_tasks)} are missing. Override `shared_parameters()` if a task "
            f"may be missing from it."
        )
    if not gradients.shared:
        raise ValueError(no_shared(module, type(balancer).__name__))


def last_layer(
    module: TaskModule,
    balancer: GradientBalancer,
    gradients: TaskGradients,
) -> list[nn.Parameter]:
    """Parameters of the last shared layer: given, or the last that every task reaches.

    Raises:
        ValueError: ``last_shared_layer()`` returns what is no shared parameter, or there is no
            layer that every task reaches.
    """
    given: Iterable[nn.Parameter] | None = module.last_shared_layer()
    if given is None:
        names = _found_layer(module, balancer, gradients)
        return [gradients.parameters[name] for name in names]
    shared = {name: gradients.parameters[name] for name in gradients.shared or ()}
    chosen = list(given)
    known = {id(p) for p in shared.values()}
    if not chosen or any(id(p) not in known for p in chosen):
        raise ValueError(
            f"Expected `last_shared_layer()` of {type(module).__name__} to return shared "
            f"parameters but found others, or none; shared are {list(shared)[-4:]} and those "
            f"before. Return for example `self.encoder[-1].parameters()`."
        )
    return chosen


def _found_layer(
    module: TaskModule,
    balancer: GradientBalancer,
    gradients: TaskGradients,
) -> list[str]:
    """Names of the parameters that all tasks reach, of the module that owns the last of them.

    In the order of ``named_parameters()``, of which what is outside the module has none.
    """
    if gradients.reach.layer is None:
        shared, own = set(gradients.shared or ()), {id(p) for p in module.parameters()}
        names = [n for n, p in gradients.parameters.items() if n in shared and id(p) in own]
        tasks = enumerate(module.training_tasks)
        without = {t for t, task in tasks if task in module.unbalanced_tasks} | gradients.outside
        common = gradients.reach.common(names, without)
        if not common:
            raise ValueError(
                f"Expected a layer that all of the tasks {list(module.training_tasks)} reach with "
                f"`gradients='last_layer'` of {type(balancer).__name__} but found none. Override "
                f"`last_shared_layer()` to name one, or use `gradients='parameters'`."
            )
        owner = common[-1].rpartition(".")[0]
        gradients.reach.layer = [n for n in common if n.rpartition(".")[0] == owner]
    return gradients.reach.layer


def check_behind(
    marked: Sequence[Tensor], losses: Sequence[Tensor], gradients: TaskGradients
) -> None:
    """Refuse a representation that does not carry every task's way to every shared parameter.

    Raises:
        ValueError: a loss reaches a shared parameter past it.
    """
    names = {id(gradients.parameters[name]): name for name in gradients.shared or ()}
    if len(marked) != 1:
        return  # refused when the gradients are taken
    past = {names[i] for loss in losses for i in reachable(loss, marked[0]) if i in names}
    if past:
        raise ValueError(
            f"Expected every shared parameter behind the shared representation but the losses "
            f"reach {sorted(past)[:4]} past it. Mark the tensor that all heads start from with "
            f"`shared_representation`, or use `gradients='last_layer'` or 'parameters'."
        )
