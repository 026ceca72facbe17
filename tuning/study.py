"""The study behind a sweep: what was asked, what came of it, on storage, so that any process may be killed.

What the next trial tries depends on the seed, its number and the finished trials alone: a sweep that goes on after
a kill asks what it would have asked. Trials stop early by asynchronous successive halving (Li et al., MLSys 2020).
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from talk_dist.config import DistillConfig
from talk_dist.data.storage import without_secrets
from talk_dist.errors import ConfigError
from talk_dist.runtime.checkpoint import differences
from tuning.space import Nearby, Parameter, Value, drawn, suggest

IDENTITY, PINNED, CONFIRMS = "identity", "pinned", "confirms"
OBJECTIVES = {"accuracy": StudyDirection.MAXIMIZE, "seconds": StudyDirection.MINIMIZE, "bytes": StudyDirection.MINIMIZE}
DRAWS = 200  # of a new point, until one is a configuration
START_UP = 10  # trials before the model of the space says anything
HALVING = 2  # at a rung, the best of so many goes on
OTHER_SEEDS = 2  # from which the best trials are repeated


@dataclass(frozen=True)
class Strategy:
    """How a study searches. ``objectives``, of `OBJECTIVES`; with several of them no trial is stopped early."""

    sampler: str = "tpe"
    seed: int = 0
    objectives: tuple[str, ...] = ("accuracy",)
    halving: bool = True


def accuracy(trial: FrozenTrial) -> float:
    """Validation accuracy of the trial."""
    return float(trial.user_attrs["accuracy"])


class Study:
    """Ask, report, tell; every answer is on storage before the method returns."""

    def __init__(self, study: optuna.Study, space: Sequence[Parameter], base: DistillConfig, strategy: Strategy):
        self._study, self._space, self._base, self._strategy = study, list(space), base, strategy
        self._near: Mapping[str, Value] = {}
        self._orphans = [trial.number for trial in self.trials(TrialState.RUNNING)]  # of a sweep that was killed

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in these states, by number."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    @property
    def raw(self) -> optuna.Study:
        """What Optuna's own tools take."""
        return self._study

    @property
    def ended(self) -> list[FrozenTrial]:
        """The trials that were told of, whatever came of them."""
        return self.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

    @property
    def searched(self) -> list[FrozenTrial]:
        """The ended trials but for those that repeat others."""
        return [trial for trial in self.ended if CONFIRMS not in trial.user_attrs]

    @property
    def completed(self) -> list[FrozenTrial]:
        """Those of them that came to their end."""
        return [trial for trial in self.searched if trial.state is TrialState.COMPLETE]

    @property
    def best(self) -> FrozenTrial | None:
        """The completed trial of the highest accuracy, the first of equals: in repetitions, if there are any, because
        the highest of many numbers flatters."""
        done = self.completed
        repeated = [trial for trial in done if self.repeats(trial.number)]

        def worth(trial: FrozenTrial) -> tuple[float, int]:
            values = self.repeats(trial.number) or [accuracy(trial)]
            return sum(values) / len(values), -trial.number

        return max(repeated or done, key=worth, default=None)

    def repeats(self, number: int) -> list[float]:
        """Accuracies of the trial's repetitions from other seeds; empty unless all of them were completed."""
        mine = [t for t in self.trials(TrialState.COMPLETE) if t.user_attrs.get(CONFIRMS) == number]
        return [accuracy(trial) for trial in mine] if len(mine) == OTHER_SEEDS else []

    @property
    def repetitions_left(self) -> int:
        """Repetitions that wait, or were cut off."""
        unfinished = self.trials(TrialState.WAITING, TrialState.RUNNING)
        return sum(CONFIRMS in trial.user_attrs for trial in unfinished)

    def confirm(self, count: int) -> None:
        """Repeat the ``count`` best completed trials, and the first, from other seeds: they are asked next."""
        done = self.completed
        best = sorted(done, key=lambda trial: (-accuracy(trial), trial.number))[:count]
        begun = {(t.user_attrs.get(CONFIRMS), t.user_attrs.get(PINNED, {}).get("seed")) for t in self.trials()}
        for trial in [*(t for t in done if t.number == 0 and t not in best), *best]:
            for seed in range(self._base.seed + 1, self._base.seed + 1 + OTHER_SEEDS):
                if (trial.number, seed) not in begun:
                    own = trial.user_attrs.get(PINNED, {})
                    pinned = {**own, "kernel.ridge": trial.user_attrs["ridge"], "seed": seed}
                    self._study.enqueue_trial(trial.params, user_attrs={PINNED: pinned, CONFIRMS: trial.number})

    def enqueue(self, starts: Sequence[Mapping[str, Value]]) -> None:
        """Try these points first; nothing if the study has begun. They are never stopped early, and what is not in the
        space is pinned to them. The search begins around the first."""
        self._near = starts[0]
        waiting = self.trials(TrialState.WAITING)
        if len(waiting) < len(self.trials()):
            return
        searched = {parameter.key for parameter in self._space}
        for point in starts[len(waiting) :]:
            inside = {key: value for key, value in point.items() if key in searched}
            pinned = {key: value for key, value in point.items() if key not in searched}
            self._study.enqueue_trial(inside, user_attrs={PINNED: pinned})

    def ask(self, total: int) -> tuple[int, dict[str, Value]] | None:
        """(number, point) of a trial to run: first those that were cut off, then those that wait, then new ones, until
        there are ``total`` beside the repetitions; None if there are."""
        if self._orphans:
            number = self._orphans.pop(0)
            return number, self._point(self._trial(number))
        waiting = self.trials(TrialState.WAITING)
        asked = [t for t in self.trials() if t.state is not TrialState.WAITING and CONFIRMS not in t.user_attrs]
        if len(asked) >= total and not any(CONFIRMS in trial.user_attrs for trial in waiting):
            return None
        if not waiting:
            self._study.enqueue_trial(self._drawn(len(asked)))
        trial = self._study.ask()
        return trial.number, self._point(trial)

    def report(self, number: int, step: int, value: float) -> bool:
        """A trial's value after a step, higher is better; True if it is not worth going on.

        The rungs are step 0 and the powers of two from 2; values are compared with those of the same step alone. What
        was enqueued is never stopped: a sweep must not end below it.
        """
        if len(self._strategy.objectives) > 1:  # Optuna takes no values on the way of such trials
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial that goes on reports its last step again
            self._trial(number).report(value, step)
        rung = step == 0 or (step > 1 and step & (step - 1) == 0)
        if not self._strategy.halving or not rung or PINNED in self._frozen(number).user_attrs:
            return False
        peers = [trial.intermediate_values[step] for trial in self.trials() if step in trial.intermediate_values]
        return value < sorted(peers, reverse=True)[max(1, len(peers) // HALVING) - 1]

    def tell(self, number: int, state: str, **facts: Any) -> None:
        """How a trial ended: `complete` with its objectives among the facts, `pruned`, or `failed` with its reason."""
        known = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        trial = self._trial(number)
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        values = [facts[name] for name in self._strategy.objectives] if state == "complete" else None
        self._study.tell(number, values, known[state], skip_if_finished=True)

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._frozen(number)._trial_id)

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _point(self, trial: Trial) -> dict[str, Value]:
        return suggest(self._space, trial, self._base) | trial.user_attrs.get(PINNED, {})

    def _drawn(self, number: int) -> dict[str, Value]:
        """A new point, drawn on a copy in memory and stored in one go: a kill half way through it loses nothing."""
        if self._near and self._strategy.sampler == "tpe" and number < START_UP:
            rng = np.random.default_rng([self._strategy.seed, number])
            return drawn(self._space, itertools.repeat(Nearby(self._near, rng), DRAWS), self._base)
        copy = optuna.create_study(directions=self._study.directions, sampler=self._sampler_of(number))
        copy.add_trials(self.searched)
        return drawn(self._space, (copy.ask() for _ in range(DRAWS)), self._base)

    def _sampler_of(self, number: int) -> optuna.samplers.BaseSampler:
        """A sampler for one trial: its draws depend on seed and number, not on what this process drew before."""
        seed = (self._strategy.seed + 1) * 1_000_003 + number
        if self._strategy.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=START_UP)


def open_study(
    storage: str,
    name: str,
    identity: Mapping[str, Any],
    space: Sequence[Parameter],
    base: DistillConfig,
    strategy: Strategy | None = None,
) -> Study:
    """The study of that name, made if there is none. ``storage``: a journal file, or the URL of a data base.

    Raises ConfigError if it is a study of something else, or the storage cannot be written.
    """
    shown = without_secrets(storage)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    strategy = strategy or Strategy()
    told = json.loads(json.dumps({**identity, **asdict(strategy)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            directions = [OBJECTIVES[objective] for objective in strategy.objectives]
            study = optuna.create_study(
                storage=_storage(storage), study_name=name, directions=directions, load_if_exists=True
            )
            saved = study.user_attrs.get(IDENTITY)
            if saved is None:
                study.set_user_attr(IDENTITY, told)
        except (OSError, ImportError) as error:
            raise ConfigError(f"--storage {shown}: cannot be opened ({error})") from error
        except Exception as error:  # each data base has its own
            if type(error).__module__.split(".")[0] not in ("sqlalchemy", "optuna"):
                raise
            raise ConfigError(f"--storage {shown}: cannot be opened ({str(error).splitlines()[0]})") from error
    if saved is not None and saved != told:
        changed = "; ".join(differences(saved, told))
        raise ConfigError(f"study {name!r} in {shown} belongs to another sweep ({changed}); choose another --name")
    return Study(study, space, base, strategy)


def _storage(storage: str) -> BaseStorage:
    if "://" in storage:
        return RDBStorage(storage)
    path = Path(storage).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        _cut_torn_line(path)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _cut_torn_line(path: Path) -> None:
    """What a full disk or a power cut left of a line: the next would be glued to it, and no one could read the two."""
    journal = path.read_bytes() if path.exists() else b""
    if len(journal) > (whole := journal.rfind(b"\n") + 1):
        os.truncate(path, whole)
