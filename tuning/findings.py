"""What the trials of a study say: the best settings, which settings mattered, and what nothing beats."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from talk_dist.config import DistillConfig
from tuning.space import configured
from tuning.study import PINNED, Study, accuracy

FACTS = (
    "accuracy",
    "spread",
    "krr_accuracy",
    "epochs",
    "seconds",
    "seconds_with_start",
    "cpu_seconds",
    "bytes",
    "ridge",
    "host_bytes",
)
"""What is known of a completed trial."""
CLOCK = ("seconds", "seconds_with_start", "cpu_seconds", "host_bytes")
"""What of it another run of the same trial would not say again."""
LEAST_TRIALS = 8  # for importances: fewer say nothing


@dataclass(frozen=True)
class Findings:
    """The best trial, how much each setting mattered (shares of the variance), and the Pareto front by number."""

    best: FrozenTrial | None
    importances: dict[str, float]
    front: list[int]


def findings(study: Study) -> Findings:
    """Raises nothing for a sweep without a complete trial: ``best`` is None."""
    done = study.completed
    return Findings(study.best, _importances(study), front([_objectives(trial) for trial in done], done))


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


def judged(study: Study) -> list[FrozenTrial]:
    """The trials that validated a student at least once, stopped early or not."""
    kept = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.searched if t.state in kept and t.user_attrs.get("accuracy") is not None]


def _importances(study: Study) -> dict[str, float]:
    """By fANOVA over the judged trials: of the best one's settings, those that most trials had; empty where the trials
    are too few, or all alike."""
    best, everyone = study.best, judged(study)
    if best is None:
        return {}
    names = [name for name in sorted(best.params) if 2 * sum(name in t.params for t in everyone) > len(everyone)]
    trials = [trial for trial in everyone if all(name in trial.params for name in names)]
    varied = [name for name in names if len({trial.params[name] for trial in trials}) > 1]
    if not varied or len(trials) < LEAST_TRIALS or len({accuracy(trial) for trial in trials}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alike = optuna.create_study(direction="maximize")  # Optuna looks at completed trials alone
        for trial in trials:
            params = {name: trial.params[name] for name in names}
            distributions = {name: trial.distributions[name] for name in names}
            made = optuna.trial.create_trial(params=params, distributions=distributions, value=accuracy(trial))
            alike.add_trial(made)
        shares = optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(alike, params=varied)
    return {name: float(share) for name, share in shares.items()}
