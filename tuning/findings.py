"""What the trials of a study say: the best settings, which settings mattered, and what nothing beats."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from talk_dist.config import DistillConfig
from tuning.space import configured
from tuning.study import Study

LEAST_TRIALS = 8  # for importances: fewer say nothing


@dataclass(frozen=True)
class Findings:
    """The best trial, how much each setting mattered (shares of the variance), and the Pareto front by number."""

    best: FrozenTrial | None
    config: DistillConfig | None
    importances: dict[str, float]
    front: list[int]


def findings(study: Study, base: DistillConfig) -> Findings:
    """Raises nothing for a sweep without a complete trial: ``best`` is None."""
    best = study.best
    done = study.trials(TrialState.COMPLETE)
    point = dict(best.params) if best else {}
    if best and "kernel.ridge" not in point and "ridge" in best.user_attrs:
        point["kernel.ridge"] = best.user_attrs["ridge"]
    return Findings(
        best,
        configured(base, point) if best else None,
        _importances(study),
        front([_objectives(t) for t in done], done),
    )


def front(objectives: Sequence[tuple[float, ...]], trials: Sequence[FrozenTrial]) -> list[int]:
    """Numbers of the trials that no other is better than in everything; all objectives are minimised."""
    kept = []
    for mine, trial in zip(objectives, trials, strict=True):
        if not any(all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine for other in objectives):
            kept.append(trial.number)
    return kept


def _objectives(trial: FrozenTrial) -> tuple[float, ...]:
    return (-float(trial.values[0]), float(trial.user_attrs["seconds"]), float(trial.user_attrs["bytes"]))


def _importances(study: Study) -> dict[str, float]:
    """By fANOVA over the completed trials; empty where there are too few, or they are all alike."""
    done = study.trials(TrialState.COMPLETE)
    if len(done) < LEAST_TRIALS or len({trial.values[0] for trial in done}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = set.intersection(*(set(trial.params) for trial in done))
        varied = [name for name in sorted(shared) if len({trial.params[name] for trial in done}) > 1]
        if not varied:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(evaluator.evaluate(study.raw, params=varied))
