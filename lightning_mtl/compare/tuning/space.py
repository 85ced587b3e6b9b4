"""What an entry of the file of balancers may try: a grid, or ranges to search."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lightning_utilities.core.imports import RequirementCache

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.texts import shortened

Settings = Mapping[str, Any]

KEYS = ("callbacks", "grid", "search", "trials")
ROUND = 4  # trials that are asked for at once, however many workers there are
_RANGE = ("low", "high", "log", "int")
_SEARCH_EXTRA = RequirementCache("optuna")
# What makes runs comparable is not a setting of one of them.
_FORBIDDEN = ("seed_everything", "ckpt_path", "trainer.devices", "trainer.num_nodes")


@dataclass(frozen=True)
class Space:
    """Settings to try, a trial each.

    Attributes:
        points: those of a grid, ``{key: value}`` each; empty for a search.
        ranges: those of a search, ``{key: {low, high, log, int}}`` or ``{key: [choices]}``.
        trials: how many there are.
    """

    points: Sequence[Settings] = ()
    ranges: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0

    @property
    def keys(self) -> list[str]:
        """Every key that a trial sets."""
        return list(dict.fromkeys([*self.ranges, *(key for p in self.points for key in p)]))

    def first(self) -> Settings:
        """One whole set of settings: the first point, or the low ends."""
        if self.points:
            return self.points[0]
        return {
            key: ends["low"] if isinstance(ends, Mapping) else ends[0]
            for key, ends in self.ranges.items()
        }

    def extremes(self) -> Iterator[Settings]:
        """Settings of one key each that show whether all values are taken: ends and choices."""
        seen = set()
        for key in self.keys:
            ends = self.ranges.get(key, [p[key] for p in self.points if key in p])
            if isinstance(ends, Mapping):
                ends = [ends["low"], ends["high"]]
            for value in ends:
                if (key, repr(value)) not in seen:
                    seen.add((key, repr(value)))
                    yield {key: value}


def grid(points: Sequence[Settings]) -> Space:
    """A grid of the given points."""
    return Space(points=list(points), trials=len(points))


def read_space(name: str, entry: Mapping[str, Any]) -> Space | None:
    """The space of an entry that is a mapping, ``None`` where it tries nothing.

    Args:
        name: of the entry.
        entry: with ``grid``, or with ``search`` and ``trials``.

    Raises:
        CompareError: what is wrong with it, and how it is written.
    """
    unknown = [str(key) for key in entry if key not in KEYS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], KEYS, 1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise CompareError(
            f"Expected `{name}` to hold some of {', '.join(KEYS)} but found `{unknown[0]}`.{hint}"
        )
    if "grid" in entry and "search" in entry:
        raise CompareError(
            f"Expected `{name}` to hold `grid` or `search` but found both. Keep one of them."
        )
    if "search" in entry:
        return _search(name, entry["search"], entry.get("trials"))
    if "trials" in entry:
        raise CompareError(
            f"Expected `trials` of `{name}` beside a `search` but found none. A grid has as many "
            f"trials as points: remove `trials`, or replace `grid` by `search`."
        )
    return _grid(name, entry["grid"]) if "grid" in entry else None


def _grid(name: str, content: Any) -> Space:
    """As scikit-learn's ``ParameterGrid``: a list of mappings is the union of their grids."""
    points: list[Settings] = []
    for part in content if isinstance(content, list) else [content]:
        lists = isinstance(part, dict) and all(isinstance(v, list) and v for v in part.values())
        if not lists or not part:
            raise CompareError(
                f"Expected the `grid` of `{name}` to map keys to lists of values, such as "
                f"`{{model.lr: [0.01, 0.1]}}`, but found {shortened(repr(part), 200)}."
            )
        _check_keys(name, part)
        points += [dict(zip(part, values, strict=True)) for values in product(*part.values())]
    if not points:
        raise CompareError(f"Expected the `grid` of `{name}` to hold a point but found none.")
    return grid(points)


def _search(name: str, content: Any, trials: Any) -> Space:
    if not _SEARCH_EXTRA:
        raise CompareError(
            f"Expected optuna for the `search` of `{name}` but found none. Install it with: "
            f'pip install "lightning-mtl[tune]", or write a `grid`.'
        )
    if not isinstance(content, dict) or not content:
        raise CompareError(
            f"Expected the `search` of `{name}` to map keys to ranges, such as `{{model.lr: {{low: "
            f"0.001, high: 0.1, log: true}}}}`, but found {shortened(repr(content), 200)}."
        )
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise CompareError(
            f"Expected `trials` of `{name}` to be a number from 1 on, since a search has no end of "
            f"its own, but found {trials!r}."
        )
    _check_keys(name, content)
    ranges = {key: _range(name, key, value) for key, value in content.items()}
    return Space(ranges=ranges, trials=trials)


def _range(name: str, key: str, content: Any) -> Any:
    if isinstance(content, list) and content:
        if not all(isinstance(v, str | int | float | None) for v in content):
            raise CompareError(
                f"Expected the choices of `{key}` in `{name}` to be numbers, words, true, false or "
                f"null, but found {shortened(repr(content), 200)}. Lists and mappings go into a "
                f"`grid`."
            )
        return content
    example = "`{low: 0.001, high: 0.1, log: true}` or a list of choices"
    where = f"Expected `{key}` in the `search` of `{name}` to be {example}, but found"
    if not isinstance(content, dict) or not {"low", "high"} <= content.keys() <= set(_RANGE):
        raise CompareError(f"{where} {shortened(repr(content), 200)}.")
    found = {"log": False, "int": False, **content}
    try:
        found["low"], found["high"] = (
            int(found[end]) if found["int"] else float(found[end]) for end in ("low", "high")
        )  # YAML reads `1e-3` as a word
    except (TypeError, ValueError) as error:
        raise CompareError(f"{where} {shortened(repr(content), 200)}: {error}.") from error
    low, high = found["low"], found["high"]
    if not low < high < math.inf or low == -math.inf or (found["log"] and low <= 0):
        above = ", above 0 as `log` needs it" if found["log"] else ""
        raise CompareError(f"{where} low {low!r} and high {high!r}. Give low < high{above}.")
    return found


def _check_keys(name: str, content: Mapping[Any, Any]) -> None:
    for key in content:
        if not isinstance(key, str) or key in _FORBIDDEN:
            raise CompareError(
                f"Expected `{name}` to try settings of a method but found `{key}`, which has to be "
                f"the same for all rows. Remove it."
            )
