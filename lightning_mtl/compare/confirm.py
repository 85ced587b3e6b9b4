"""Screen, then confirm: what is fixed and written down before the fresh seeds are run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.folder import write
from lightning_mtl.compare.grid import FIRST_FRESH, Run, train_runs
from lightning_mtl.compare.texts import shortened

FILE = "confirm.json"
_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What a confirmation decides, and by which rule.

    Attributes:
        balancer: the best mean Δp of the screening seeds.
        rivals: equal weighting and every fixed weighting.
        screening: how many seeds it was picked on, from 0.
        seeds: how many fresh ones it is judged on, from 10000.
        margin: the smallest difference that matters, in points of Δp.
        alpha: the error rate.
        rule: the procedure, in words.
        best: the best row of the screening seeds among balancer and rivals, which is judged against
            a model per task.
    """

    balancer: str
    rivals: list[str]
    screening: int
    seeds: int
    margin: float
    alpha: float
    rule: str
    best: str

    def runs(self, tasks: Sequence[str], methods: Sequence[str]) -> list[Run]:
        """The runs on fresh seeds, in the order they start."""
        fresh = range(FIRST_FRESH, FIRST_FRESH + self.seeds)
        return train_runs(tasks, methods, fresh, [self.balancer, *self.rivals])

    def save(self, folder: Path) -> None:
        """Write it down; on the disk when this returns."""
        content = {"format": _FORMAT, **asdict(self)}
        write(folder / FILE, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of a folder, ``None`` where nothing was confirmed.

        Raises:
            CompareError: the file holds something else.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            content: Any = json.loads(path.read_bytes().decode("utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError("another format")
            plan = cls(**content)
            whole = (
                isinstance(plan.balancer, str)
                and isinstance(plan.rivals, list)
                and all(isinstance(name, str) for name in [*plan.rivals, plan.best, plan.rule])
                and all(isinstance(n, int) and n > 0 for n in (plan.screening, plan.seeds))
                and all(isinstance(x, float | int) and x > 0 for x in (plan.margin, plan.alpha))
            )
            if not whole:
                raise ValueError("a value of another type")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CompareError(
                f"Expected {path} to be the plan of a confirmation, but found another file: "
                f"{shortened(str(error), 200)}. Put it back as it was: what was fixed before the "
                f"confirming runs is in it."
            ) from error
        return plan

    def agree(self, folder: Path, confirm: int | None, seeds: int, margin: float | None) -> None:
        """Refuse to change what was fixed.

        Raises:
            CompareError: the command asks for something else.
        """
        fixed = {"--confirm": self.seeds, "--margin": self.margin}
        asked: dict[str, Any] = {"--confirm": confirm, "--margin": margin}
        if confirm is not None:
            fixed["--seeds"], asked["--seeds"] = self.screening, seeds
        differ = [f"{o} {asked[o]:g}" for o in fixed if asked[o] not in (None, fixed[o])]
        if differ:
            raise CompareError(
                f"Expected {', '.join(f'{o} {v:g}' for o, v in fixed.items())}, as {folder / FILE} "
                f"fixed it before the confirming runs, but found {', '.join(differ)}. A rule that "
                f"is changed once results are seen has no error rate: leave it, or give another "
                f"folder with --out."
            )
