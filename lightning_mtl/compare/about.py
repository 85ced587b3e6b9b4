"""``about.json``: what the report has to know besides the runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_mtl.compare.confirm import Plan
from lightning_mtl.compare.cost import positive
from lightning_mtl.compare.folder import write
from lightning_mtl.compare.table import Curves, Summary, summarise

FILE = "about.json"
_FORMAT = 1
_KINDS = ("equal", "fixed", "balancer")


@dataclass
class About:
    """What a comparison is about.

    Attributes:
        metrics: ``{task: {metric: higher is better}}``.
        methods: ``{method: equal, fixed or balancer}``, in the order of the table.
        unmeasured: tasks without a metric.
        seeds: how many, from 0; ``None`` for all that there are.
        margin: points of Δp that matter; ``None`` for the default.
        texts: files that the report shows, by path.
        facts: name and value of what it was run with.
        remarks: sentences for the answer, about how settings were chosen.
    """

    metrics: Mapping[str, Mapping[str, bool]]
    methods: Mapping[str, str]
    unmeasured: Sequence[str] = ()
    seeds: int | None = None
    margin: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()

    def save(self, folder: Path) -> None:
        """Write it; on the disk when this returns."""
        content = {"format": _FORMAT, **asdict(self)}
        write(folder / FILE, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def read(cls, content: Any) -> About:
        """From the parsed file, or from a line of ``results.jsonl`` in the documented format.

        Raises:
            ValueError: what is wrong with it.
        """
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of a mapping")
        content = {k: v for k, v in content.items() if k in cls.__dataclass_fields__}
        metrics, methods = content.get("metrics"), content.get("methods")
        if not isinstance(metrics, dict) or not metrics:
            raise ValueError("no `metrics`, such as {task: {metric: true}} with true for higher")
        for task, found in metrics.items():
            if not isinstance(found, dict) or not found or not _all(found.values(), bool):
                raise ValueError(
                    f"`metrics` of task {task!r} that are not {{metric: true or false}}"
                )
        if not isinstance(methods, dict) or not set(map(str, methods.values())) <= set(_KINDS):
            raise ValueError(f"no `methods` that map each name to one of {', '.join(_KINDS)}")
        about = cls(**content)
        about.facts = [(str(k), str(v)) for k, v in about.facts]
        for name in ("unmeasured", "remarks"):
            if not isinstance(content.get(name, []), list) or not _all(content.get(name, ()), str):
                raise ValueError(f"`{name}` that are no list of texts")
        texts = about.texts
        if not isinstance(texts, dict) or not _all([*texts, *texts.values()], str):
            raise ValueError("`texts` that are no mapping of texts")
        for name in ("seeds", "margin"):
            found = content.get(name)
            if found is not None and not positive(found, int if name == "seeds" else float):
                raise ValueError(f"`{name}` {found!r} instead of a number above 0")
        return about

    def summary(
        self,
        records: Sequence[Mapping[str, Any]],
        curves: Mapping[str, Curves],
        plan: Plan | None,
    ) -> Summary:
        """The comparison in numbers."""
        margin = self.margin if plan is None else plan.margin
        found = summarise(
            records, self.metrics, self.methods, curves, self.unmeasured, margin, plan
        )
        found.remarks = self.remarks
        return found


def _all(values: Any, kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)
