"""From the measured steps to the numbers of a diagnosis, plain ones, as ``diagnose.json`` has."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from lightning_mtl.diagnose import noise
from lightning_mtl.diagnose.families import (
    FAMILIES,
    best_fixed_weights,
    decreases,
    family_weights,
    shares,
)
from lightning_mtl.diagnose.noise import Array, as_list
from lightning_mtl.diagnose.study import Study

EQUAL, FIXED = "equal weighting", "best fixed weight"
# A task starves that ends where it was, alone, after less than this share of the steps. Half is a
# convention: docs/diagnose.md says what it predicts.
STARVED = 0.5
FEWEST = 20  # steps below which nothing is said of that


def summarise(found: Study) -> dict[str, Any]:
    """The diagnosis in numbers.

    Args:
        found: the measurements.
    """
    tasks = found.tasks
    gramians = np.stack([point.gramian for point in found.points])
    losses = np.stack([point.losses for point in found.points])
    pairs = [point.pairs for point in found.points if point.pairs is not None]
    halves = np.stack(pairs) if pairs else None
    whole = None if halves is None else halves.sum(axis=1)
    squares = np.diagonal(gramians, axis1=1, axis2=2)
    norms = np.sqrt(np.where(squares > 0, squares, np.nan))
    norm, loss = _median(norms), _median(np.abs(losses))
    sizes = [point.size for point in found.points if point.pairs is not None]
    return {
        "format": 1,
        "tasks": tasks,
        "steps": len(found.curve),
        "measured": [point.step for point in found.points],
        "shared_parameters": found.shared,
        "halves": {
            "unit": "batches" if found.unsplittable else "samples",
            "size": float(np.mean(sizes)) if sizes else None,
            "unsplittable": found.unsplittable,
        },
        "loss": {
            "first": as_list([found.curve[0].get(t, np.nan) for t in tasks]),
            "median": as_list(loss),
            "spread": as_list(_spread(loss)),
        },
        "norm": {
            "median": as_list(norm),
            "low": as_list(_quantile(norms, 0.1)),
            "high": as_list(_quantile(norms, 0.9)),
            "spread": as_list(_spread(norm)),
        },
        "noise": _noise(found, whole, float(np.mean(sizes)) if sizes else np.nan),
        "pairs": _pairs(tasks, gramians, whole),
        "groups": {
            "names": found.groups,
            "cosines": as_list(_by_group([point.gramians for point in found.points])),
            "halves": None if halves is None else as_list(_halves_by_group(halves)),
            "norms": as_list(_norms_by_group([point.gramians for point in found.points])),
        },
        "update": {
            # every point has one
            "cosine": as_list(noise.mean_of(np.stack([p.along_update for p in found.points]))),  # type: ignore[misc]
            "sum": as_list(noise.mean_of(np.asarray([p.sum_along_update for p in found.points]))),
            "length": as_list(np.mean([p.update for p in found.points])),
        },
        **_families(found, gramians, losses),
        "alone": {task: _alone(found, task) for task in found.alone},
    }


def _noise(found: Study, whole: Array | None, size: float) -> dict[str, Any]:
    masks = [point.dropout for point in found.points if point.dropout is not None]
    nothing = [None] * len(found.tasks)
    result: dict[str, Any] = {
        "dropout": as_list(noise.mean_of(np.stack(masks))) if masks else None,
        "floor": nothing,
        "floor_below_zero": nothing,
        "scale": nothing,
    }
    if whole is not None:
        own = np.diagonal(noise.half_cosines(whole), axis1=1, axis2=2)
        result["floor"] = as_list(noise.mean_of(own))
        result["floor_below_zero"] = as_list([noise.share_below_zero(t) for t in own.T])
        result["scale"] = as_list(noise.noise_scale(whole, size))
    return result


def _pairs(tasks: list[str], gramians: Array, whole: Array | None) -> list[dict[str, Any]]:
    together = noise.cosines(gramians)
    halves = None if whole is None else noise.half_cosines(whole)
    corrected = None if halves is None else noise.corrected_cosines(halves)
    floors = None if halves is None else np.diagonal(noise.mean_of(halves))
    result = []
    for i, j in combinations(range(len(tasks)), 2):
        pair: dict[str, Any] = {
            "tasks": [tasks[i], tasks[j]],
            "cosine": as_list(noise.mean_interval(together[:, i, j])),
            "below_zero": as_list(noise.share_below_zero(together[:, i, j])),
            "halves": [None] * 3,
            "corrected": None,
            "verdict": "unsure",
        }
        if halves is not None and corrected is not None and floors is not None:
            trusted = bool(floors[i] > 0 and floors[j] > 0)
            pair["halves"] = as_list(noise.mean_interval(halves[:, i, j]))
            pair["corrected"] = as_list(corrected[i, j])
            pair["verdict"] = noise.verdict_of(halves[:, i, j], trusted)
        result.append(pair)
    return result


def _families(found: Study, gramians: Array, losses: Array) -> dict[str, Any]:
    """What every family would do, in the steps with all tasks."""
    complete = np.isfinite(losses).all(axis=1) & np.isfinite(gramians).all(axis=(1, 2))
    gramians, losses = gramians[complete], losses[complete]
    length = np.asarray([point.update for point in found.points])[complete]
    ones = np.ones(len(found.tasks))
    rows: list[tuple[str, str, tuple[str, ...], str, Array]] = []
    if len(gramians):
        best = best_fixed_weights(gramians)
        same = np.ones_like(losses)
        rows = [
            (EQUAL, "EqualWeighting", (), "methods/equal_weighting.html", same),
            (FIXED, "Scalarization", (), "methods/scalarization.html", same * best),
            *(
                (f.name, f.example, f.members, f.page, family_weights(f, gramians, losses))
                for f in FAMILIES
            ),
        ]
        ones = best
    return {
        "complete_steps": int(complete.sum()),
        "fixed_weights": as_list(ones),
        "families": [
            {
                "name": name,
                "example": example,
                "members": list(members),
                "page": page,
                "share": as_list(noise.mean_of(shares(gramians, weights))),
                "worst": as_list(_worst(shares(gramians, weights))),
                "against": as_list(_against(shares(gramians, weights))),
                "decrease": as_list(noise.mean_of(decreases(gramians, weights, losses, length))),
            }
            for name, example, members, page, weights in rows
        ],
    }


def _worst(found: Array) -> float:
    """The share of the task that is worst off, averaged over steps; NaN where it is not defined."""
    there = np.isfinite(found).any(axis=1)
    if not there.any() or there.mean() < 0.5:
        return float("nan")
    return float(np.nanmin(found[there], axis=1).mean())


def _against(found: Array) -> float:
    """In what share of the steps some task goes up, to first order."""
    there = np.isfinite(found).any(axis=1)
    return (
        float((np.nan_to_num(found[there], nan=1.0) < 0).any(axis=1).mean()) if there.any() else 0
    )


def _alone(found: Study, task: str) -> dict[str, Any]:
    """How fast a task's loss falls with the others, beside how fast it falls alone."""
    joint = np.asarray([losses[task] for losses in found.curve if task in losses])
    alone = np.asarray(found.alone[task])
    count = min(len(joint), len(alone))
    result: dict[str, Any] = {"joint": None, "alone": None, "pace": None, "starves": None}
    if count < FEWEST or not (np.isfinite(joint).all() and np.isfinite(alone).all()):
        return result
    joint, alone = joint[:count], alone[:count]
    last = count // 4
    worse = noise.mean_interval(_blocks(joint[-last:] - alone[-last:]))
    ends = float(joint[-last:].mean()), float(alone[-last:].mean())
    fell = _blocks(alone[:last]).mean() - _blocks(alone[-last:])
    result.update(joint=ends[0], alone=ends[1])
    if noise.mean_interval(fell)[1] > 0:  # else it does not learn alone either, in these steps
        result["pace"] = pace(joint, alone) if worse[1] > 0 else 1.0
        result["starves"] = bool(result["pace"] < STARVED)
    return result


def pace(joint: Array, alone: Array) -> float:
    """The share of the steps after which a task alone was where it ends with the others, at most 1.

    Args:
        joint: its losses with the others, shape ``(S,)``; the end is the mean of the last tenth.
        alone: its losses alone, as many; smoothed over as many steps.
    """
    width = max(1, len(joint) // 10)
    smooth = np.convolve(alone, np.ones(width) / width, mode="valid")
    there = np.flatnonzero(smooth <= joint[-width:].mean())
    centre = width / 2  # of the steps that one smoothed loss is of
    return float((there[0] + centre) / (len(alone) - centre)) if len(there) else 1.0


def _blocks(values: Array, blocks: int = 8) -> Array:
    """Means of neighbours, since losses of one step and the next go together."""
    parts = np.array_split(values, min(blocks, len(values)))
    return np.asarray([part.mean() for part in parts])


def _by_group(gramians: list[Array]) -> Array:
    """Mean cosine of every two tasks on every group, shape ``(G, T, T)``."""
    return noise.mean_of(noise.cosines(np.stack(gramians)))


def _halves_by_group(halves: Array) -> Array:
    """Mean cosine on different halves, shape ``(G, T, T)``: its diagonal is the floor."""
    return noise.mean_of(noise.half_cosines(halves))


def _norms_by_group(gramians: list[Array]) -> Array:
    """What part of each task's squared gradient lies in each group, shape ``(G, T)``."""
    squares = np.diagonal(np.stack(gramians), axis1=2, axis2=3)
    total = squares.sum(axis=1, keepdims=True)
    return noise.mean_of(squares / np.where(total > 0, total, np.nan))


def _median(values: Array) -> Array:
    return _quantile(values, 0.5)


def _quantile(values: Array, q: float) -> Array:
    """Quantile over steps of what is a number; NaN where nothing is."""
    there = [column[np.isfinite(column)] for column in values.T]
    return np.asarray([np.quantile(v, q) if len(v) else np.nan for v in there])


def _spread(values: Array) -> float:
    """The largest over the smallest of numbers above 0; NaN with fewer than two."""
    there = values[np.isfinite(values) & (values > 0)]
    return float(there.max() / there.min()) if len(there) > 1 else float("nan")
