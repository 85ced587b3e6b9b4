"""What has to be said of how settings were chosen, beside the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_mtl.compare.grid import SINGLE
from lightning_mtl.compare.selection import BEST
from lightning_mtl.compare.texts import name
from lightning_mtl.compare.tuning.choose import Choice


def fairness(
    kinds: Mapping[str, str],
    choices: Mapping[str, Choice],
    missing: Sequence[str],
    unjudged: Sequence[str],
    split: str,
    same_data: bool,
    select: str,
) -> list[str]:
    """Sentences for the answer; none where there is nothing to say.

    Args:
        kinds: of the rows that were run, by name.
        choices: what was chosen, by row.
        missing: why rivals are not there.
        unjudged: tasks that trials could not be compared with single-task training on.
        split: ``val`` or ``test``.
        same_data: whether test data seem to be the validation data.
        select: which weights of a training count.
    """
    found = _budgets(kinds, choices)
    single = any(row.startswith(f"{SINGLE} ") for row in choices)
    own = [row for row in choices if kinds.get(row) == "balancer"]
    if own and not single:
        found.append(
            "The single-task runs were not tuned, so Δp, and what is said about a model per task, "
            f"flatter the rows that were: give `{SINGLE}` a grid or search of the same size."
        )
    if (choices or select == BEST) and split == "val":
        what = "Settings" if select != BEST else "Weights" if not choices else "Settings, weights"
        found.append(
            f"{what} were chosen on the validation data that the table is about, so rows with "
            f"trials look better than they are: use --split test."
        )
    elif (choices or select == BEST) and same_data:
        found.append(
            "Test data begin with the same batch as validation data and are as long: if they are "
            "the same, what was chosen on them looks better than it is."
        )
    for row, choice in choices.items():
        if choice.settings is None:
            found.append(f"{name(row)} has no row: all of its {choice.trials} trials failed.")
        elif choice.failed:
            found.append(
                f"{choice.failed} of {choice.trials} trials of {name(row)} failed; they count as "
                f"worse than the others."
            )
    if unjudged:
        found.append(
            f"No single-task trial of {', '.join(map(name, unjudged))} finished: there, trials are "
            f"relative to the median of their own row."
        )
    if missing:
        found.append(f"Rivals: {'; '.join(missing)}.")
    return found


def _budgets(kinds: Mapping[str, str], choices: Mapping[str, Choice]) -> list[str]:
    """How many trials each row had; as a warning, where that helped a balancer."""
    if not choices:
        return []
    trials = {row: choices[row].trials if row in choices else 1 for row in kinds}
    groups: dict[int, list[str]] = {}
    for row, count in sorted(trials.items(), key=lambda item: -item[1]):
        groups.setdefault(count, []).append(row)
    if len(groups) == 1:
        return []
    listed = "; ".join(f"{count} for {_list(rows)}" for count, rows in groups.items())
    balancers = [n for row, n in trials.items() if kinds[row] == "balancer"]
    rivals = [n for row, n in trials.items() if kinds[row] != "balancer"]
    if balancers and max(balancers) > max(rivals, default=0):
        what = "so a balancer may be ahead for having been tuned more"
    elif balancers and max(balancers) < max(rivals, default=0):
        what = "so rivals were tuned more: a yes is the stronger for it, a no may be due to it"
    elif len(set(balancers)) > 1:
        what = "so a balancer may be ahead of another for having been tuned more"
    else:
        what = "the most for balancers and rivals alike"
    return [f"Budgets differ, {what}. Trials of settings: {listed}."]


def _list(rows: Sequence[str], most: int = 4) -> str:
    shown = [name(row) for row in rows[:most]]
    more = [f"{len(rows) - most} more"] if len(rows) > most else []
    *head, last = [*shown, *more]
    return f"{', '.join(head)} and {last}" if head else last
