"""What the trials of a study say: the best settings, which settings mattered, and what nothing beats."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from talk_dist.config import DistillConfig
from tuning.space import configured
from tuning.study import PINNED, Study

FACTS = (
    "accuracy",
    "spread",
    "krr_accuracy",
    "epochs",
    "seconds",
    "seconds_with_start",
    "bytes",
    "ridge",
    "host_bytes",
)
"""What is known of a completed trial."""
LEAST_TRIALS = 8  # for importances: fewer say nothing


@dataclass(frozen=True)
class Findings:
    """The best trial, how much each setting mattered (shares of the variance), and the Pareto front by number."""

    best: FrozenTrial | None
    importances: dict[str, float]
    front: list[int]


def findings(study: Study) -> Findings:
    """Raises nothing for a sweep without a complete trial: ``best`` is None."""
    done = study.trials(TrialState.COMPLETE)
    return Findings(
        study.best,
        _importances(study),
        front([_objectives(t) for t in done], done),
    )


def accuracy(trial: FrozenTrial) -> float:
    """Validation accuracy of the trial."""
    return float(trial.user_attrs["accuracy"])


def config_of(trial: FrozenTrial, base: DistillConfig) -> DistillConfig:
    """What a completed trial ran with, the ridge that it chose included."""
    pinned = trial.user_attrs.get(PINNED, {})
    return configured(base, {**trial.params, **pinned, "kernel.ridge": trial.user_attrs["ridge"]})


def front(objectives: Sequence[tuple[float, ...]], trials: Sequence[FrozenTrial]) -> list[int]:
    """Numbers of the trials that no other is better than in everything; all objectives are minimised."""
    kept = []
    for mine, trial in zip(objectives, trials, strict=True):
        if not any(all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine for other in objectives):
            kept.append(trial.number)
    return kept


def _objectives(trial: FrozenTrial) -> tuple[float, ...]:
    return (-accuracy(trial), float(trial.user_attrs["seconds"]), float(trial.user_attrs["bytes"]))


def _importances(study: Study) -> dict[str, float]:
    """By fANOVA over the completed trials; empty where there are too few, or they are all alike."""
    done = study.trials(TrialState.COMPLETE)
    if len(done) < LEAST_TRIALS or len({accuracy(trial) for trial in done}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = set.intersection(*(set(trial.params) for trial in done))
        varied = [name for name in sorted(shared) if len({trial.params[name] for trial in done}) > 1]
        if not varied:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(evaluator.evaluate(study.raw, params=varied, target=accuracy))
