"""The next settings of a search, by Optuna, as a function of what was found so far and no more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mtl.compare.tuning.space import ROUND, Settings, Space


def suggest(
    space: Space, history: Sequence[tuple[Settings, float | None]], number: int
) -> list[Settings]:
    """The settings of round ``number``, :data:`ROUND` of them or what is left of the trials.

    Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) as ``optuna`` has it, after
    half of the trials at random. The study is built anew from ``history`` and its sampler seeded by
    the round, so the same records give the same settings, whether the search was stopped in between
    or not, and with any number of workers. Entries with the same ranges begin with the same
    settings.

    Args:
        space: what is searched.
        history: settings and score, higher is better, of all trials of earlier rounds; a score of
            ``None`` is a failed trial and counts as the worst of the others.
        number: of the round, from 0.
    """
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    def distribution(content: Any) -> BaseDistribution:
        if not isinstance(content, Mapping):
            return CategoricalDistribution(content)
        kind = IntDistribution if content["int"] else FloatDistribution
        return kind(content["low"], content["high"], log=content["log"])

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces = {key: distribution(content) for key, content in space.ranges.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options of the sampler that are called experimental
        sampler = optuna.samplers.TPESampler(
            seed=number,
            n_startup_trials=max(ROUND, space.trials // 2),
            constant_liar=True,  # the trials of one round keep apart
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        scores = [score for _, score in history if score is not None]
        for settings, score in history if scores else ():
            value = min(scores) if score is None else score
            trial = optuna.trial.create_trial(
                params=dict(settings), distributions=spaces, value=value
            )
            study.add_trial(trial)
        count = min(ROUND, space.trials - number * ROUND)
        return [study.ask(spaces).params for _ in range(count)]
