"""A sweep: Ray Tune places and runs the trials, the study says which and remembers what came of them.

Tune keeps nothing that matters: a sweep that goes on is a new Tune run on the same study.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.errors import TalkDistError
from tuning.objective import TrialSpec, run_trial
from tuning.space import Value
from tuning.study import Study

Tell = Callable[[str], None]
RETRIES = 2  # of a trial whose process died; it goes on from its checkpoint


@dataclass(frozen=True)
class SweepSpec:
    """What all trials of a sweep have in common."""

    data: str
    out: str
    base: DistillConfig
    trials: int
    concurrent: int
    cpus: float
    gpus: float
    ladder: tuple[float, ...]

    def of(self, number: int, point: Mapping[str, Value]) -> TrialSpec:
        folder = storage.join(self.out, "trials", f"{number:05d}")
        return TrialSpec(self.data, folder, self.base.to_dict(), point, self.ladder)


def run_sweep(study: Study, spec: SweepSpec, tell: Tell = print) -> None:
    """Run what is missing of ``spec.trials`` trials. Ray must be initialised. Every outcome is in the study."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # tables for TensorBoard of what the study holds
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    searcher = _Searcher(study, spec, tell)
    with tempfile.TemporaryDirectory(prefix="talk-dist-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(_trial, _resources(spec)),
            param_space={},
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_Scheduler(searcher),
                num_samples=-1,  # until the searcher has no more
                max_concurrent_trials=spec.concurrent,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()


def _resources(spec: SweepSpec) -> Any:
    """A trial's own process, and what the actors that it starts reserve."""
    bundles = [{name: value for name, value in (("CPU", spec.cpus), ("GPU", spec.gpus)) if value}]
    if spec.base.runtime.kind == "ray":
        cluster = spec.base.cluster
        one = {"CPU": cluster.cpus or 1.0, "GPU": max(0.0, cluster.gpus)}
        bundles += [{name: value for name, value in one.items() if value}] * max(1, cluster.actors)
    return tune.PlacementGroupFactory(bundles)


def _trial(config: dict[str, Any]) -> None:
    """The function of a Tune trial. An error of ours is a result, with its reason: it would come again."""
    spec = TrialSpec(**config["spec"])
    try:
        facts = run_trial(spec, lambda values: tune.report(values | {"done": False}))
    except TalkDistError as error:
        facts = {"failed": f"{type(error).__name__}: {error}"}
    tune.report(facts | {"done": True})


class _Searcher(Searcher):
    """Tune's view of a study."""

    def __init__(self, study: Study, spec: SweepSpec, tell: Tell):
        super().__init__(metric="accuracy", mode="max")
        self.study, self.spec, self.tell = study, spec, tell
        self.number: dict[str, int] = {}  # Tune's id of a trial -> its number in the study
        self.pruned: dict[str, dict[str, Any]] = {}

    def suggest(self, trial_id: str) -> Any:
        asked = self.study.ask(self.spec.trials)
        if asked is None:
            return Searcher.FINISHED
        number, point = asked
        self.number[trial_id] = number
        return {"spec": dataclasses.asdict(self.spec.of(number, point))}

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """A result in the middle of a trial; True if it is to stop."""
        stop = self.study.report(self.number[trial_id], result["epoch"], result["accuracy"])
        if stop:
            self.pruned[trial_id] = result
        return stop

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number, result = self.number.pop(trial_id), result or {}
        if trial_id in self.pruned:
            last = self.pruned.pop(trial_id)
            self.study.tell(number, None, "pruned", epochs=last["epoch"], krr_accuracy=last["krr_accuracy"])
            self.tell(f"trial {number:<4} {last['accuracy']:.4f}  stopped after epoch {last['epoch']}")
        elif error or "failed" in result:
            reason = result.get("failed", "its process died; see the logs of Ray")
            self.study.tell(number, None, "failed", reason=reason)
            self.tell(f"trial {number:<4} failed: {reason}")
        else:
            names = ("krr_accuracy", "epochs", "seconds", "seconds_with_start", "bytes", "ridge")
            self.study.tell(number, result["accuracy"], "complete", **{name: result[name] for name in names})
            best = self.study.best
            mark = "  best so far" if best is not None and best.number == number else ""
            self.tell(f"trial {number:<4} {result['accuracy']:.4f}  {result['seconds']:.0f} s{mark}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Scheduler(FIFOScheduler):
    """Stops a trial when the study says so."""

    def __init__(self, searcher: _Searcher):
        super().__init__()
        self.searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("epoch") is not None and not result["done"] and self.searcher.report(trial.trial_id, result):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)
