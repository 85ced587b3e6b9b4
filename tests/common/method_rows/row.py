"""One row of the table of methods: a variant, with the traits that the tests by property check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_mtl.balancer import Balancer


@dataclass(frozen=True)
class Method:
    """One variant of a method.

    Attributes:
        name: the class, and what differs from its defaults.
        make: a fresh balancer.
        golden: (fixture, key of the direction or None, key of the weights or None) in vectors.json.
        weighted: the direction is a combination of the rows with weights from the Gramian.
        nonconflicting: no task increases to first order: always (True), or for linearly
            independent gradients ("independent").
        scale: the direction is multiplied by ``s**scale`` when all losses are multiplied by s;
            None where no such law exists.
        equivariant: neither the order nor the names of the tasks matter.
        unique: linearly dependent gradients, whose weights are not unique, have one direction.
        has_state: later calls depend on earlier ones.
        stationary_fixed_point: the direction is zero for two opposite gradients.
        warm_up: calls before the one in which the method does what its name says.
    """

    name: str
    make: Callable[[], Balancer]
    golden: tuple[tuple[str, str | None, str | None], ...] = ()
    weighted: bool = False
    nonconflicting: bool | str = False
    scale: float | None = 1.0
    equivariant: bool = True
    unique: bool = True
    has_state: bool = False
    stationary_fixed_point: bool = False
    warm_up: int = 0

    @property
    def flags(self) -> dict[str, Any]:
        """What the Trainer has to be told."""
        batches = getattr(self.make(), "batches", 1)
        return {} if batches == 1 else {"accumulate_grad_batches": batches}

    @property
    def cls(self) -> type[Balancer]:
        """The class of the balancer."""
        return type(self.make())


def both(direction: str | None, weights: str | None = None) -> tuple[Any, ...]:
    """Golden vectors of the fixtures E2 and E3, by the last parts of their keys."""
    return tuple(
        (f, direction and f"{f}.{direction}", weights and f"{f}.{weights}") for f in ("E2", "E3")
    )
