"""A sweep: Ray Tune places and runs the trials, the study says which and remembers what came of them.

Tune keeps nothing that matters: a sweep that goes on is a new Tune run on the same study.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# before Ray Tune is imported, which reads them then: our own lines instead of its tables, and signals are ours
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# Read in the process of a trial: how long it waits for a stopped trial's thread before the next one. After its own 2 s
# Tune drops the next trial without a word to the searcher, and waits for it forever.
os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster.encoder_group import bundles as worker_bundles
from cluster.placement import TOLD_EVERY, equal_share, hide_others_gpus, reserve, shortage
from cluster.session import RaySession, check_nodes
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import CapacityError, TalkDistError
from talk_dist.models.device import give_back_memory
from talk_dist.runtime.estimate import Plan
from tuning.findings import FACTS
from tuning.objective import TrialSpec, run_trial
from tuning.space import Value
from tuning.study import CONFIRMS, Study

RETRIES = 2  # of a trial whose process died; it goes on from its checkpoint


@dataclass(frozen=True)
class SweepSpec:
    """What all trials of a sweep have in common. ``bundles``: of a trial's own process, and of those it starts."""

    data: str
    out: str
    base: DistillConfig
    trials: int
    concurrent: int
    bundles: Sequence[dict[str, float]]
    ladder: tuple[float, ...]
    students: int
    confirm: int
    guard: Callable[[], None] = lambda: None  # raises where this sweep must not go on

    def of(self, number: int, point: Mapping[str, Value]) -> TrialSpec:
        folder = storage.join(self.out, "trials", f"{number:05d}")
        return TrialSpec(self.data, folder, self.base.to_dict(), point, self.ladder, self.students)


def reserved(
    session: RaySession, tag: PreparedTag, base: DistillConfig, plan: Plan, trials: int, cpus: float, gpus: float
) -> tuple[DistillConfig, list[dict[str, float]]]:
    """The configuration with what its actors get where so many ``trials`` share the cluster, and a trial's bundles.

    ``cpus`` and ``gpus`` are of the trial's own process. Raises CapacityError if there is no room for one trial,
    and DataError if a node does not see the graph.
    """
    own = {"CPU": cpus, "GPU": gpus}
    others: list[dict[str, float]] = []
    if base.runtime.kind == "local":
        if not session.own:
            check_nodes(tag, base.cluster.wait_seconds)  # a pool of actors does that itself
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        own |= {"CPU": cpus or float(equal_share(nodes, trials, gpus)), "memory": float(plan.whole().host)}
    else:
        allotment = session.allotment(tag, plan, trials)
        cluster = dataclasses.replace(
            base.cluster,
            actors=len(allotment.parts),
            cpus=allotment.cpus,
            gpus=allotment.gpus,
            memory_gib=allotment.memory / 2**30,
        )
        base = dataclasses.replace(base, cluster=cluster)  # threads are left open: a trial goes on with those it had
        others = [*allotment.bundles, *worker_bundles(base.deepspeed)]
    bundles = [{name: amount for name, amount in own.items() if amount}, *others]
    asked = [bundle for bundle in bundles if bundle]
    remedy = "lower --cpus, --gpus, cluster.actors, cluster.cpus or deepspeed.workers"
    session.refuse_if_hopeless(asked, "a trial", remedy)
    reserve(asked, "PACK", base.cluster.wait_seconds, "a trial", remedy.capitalize()).release()
    return base, bundles


def run_sweep(study: Study, spec: SweepSpec) -> None:
    """Run what is missing of ``spec.trials`` trials, and then of the repetitions of the best. Ray must be initialised.
    Every outcome is in the study."""
    _run(study, spec)
    if spec.confirm:
        study.confirm(spec.confirm)
        if study.repetitions_left:
            _run(study, spec)


def _run(study: Study, spec: SweepSpec) -> None:
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what goes wrong, the study tells
    searcher = _Searcher(study, spec)
    with tempfile.TemporaryDirectory(prefix="talk-dist-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(_trial, tune.PlacementGroupFactory([dict(bundle) for bundle in spec.bundles])),
            param_space={},
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_Scheduler(searcher),
                num_samples=-1,  # until the searcher has no more
                max_concurrent_trials=spec.concurrent,
                reuse_actors=True,  # a new process takes seconds to import torch
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[_Watch([bundle for bundle in spec.bundles if bundle], spec.base.cluster.wait_seconds)],
            ),
        )
        tuner.fit()
    if searcher.error is not None:
        raise searcher.error


def _trial(config: dict[str, Any]) -> None:
    """The function of a Tune trial. An error is a result, with its reason: it would come again."""
    spec = TrialSpec(**config["spec"])
    try:
        hide_others_gpus()
        facts = run_trial(spec, lambda values: tune.report(values | {"done": False}))
    except TalkDistError as error:
        facts = {"failed": str(error)}
    except Exception as error:
        facts = {"failed": f"{type(error).__name__}: {error}"}
    finally:  # of a trial that is stopped too: the next one has this process
        gc.collect()
        give_back_memory()
    tune.report(facts | {"done": True})


class _Searcher(Searcher):
    """Tune's view of a study."""

    def __init__(self, study: Study, spec: SweepSpec):
        super().__init__()
        self.study, self.spec = study, spec
        self.number: dict[str, int] = {}  # Tune's id of a trial -> its number in the study
        self.stopped: dict[str, dict[str, Any]] = {}
        self.ended, self.started = 0, time.monotonic()
        self.error: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        return self._unless_broken(lambda: self._suggest(trial_id), Searcher.FINISHED)

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """A result in the middle of a trial; True if it is to stop."""
        return bool(self._unless_broken(lambda: self._report(trial_id, result), True))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._unless_broken(lambda: self._complete(trial_id, result or {}, error), None)

    def _unless_broken(self, act: Callable[[], Any], otherwise: Any) -> Any:
        """``act()``. Its first error ends the sweep, which raises it then: Tune would keep it to itself, take it for
        the trial's own, and start that again."""
        if self.error is None:
            try:
                return act()
            except Exception as error:
                self.error = error
        return otherwise

    def _suggest(self, trial_id: str) -> Any:
        self.spec.guard()
        asked = self.study.ask(self.spec.trials)
        if asked is None:
            return Searcher.FINISHED
        number, point = asked
        self.number[trial_id] = number
        return {"spec": dataclasses.asdict(self.spec.of(number, point))}

    def _report(self, trial_id: str, result: dict[str, Any]) -> bool:
        stop = self.study.report(self.number[trial_id], result["step"], result["accuracy"])
        if stop:
            self.stopped[trial_id] = result
        return stop

    def _complete(self, trial_id: str, result: dict[str, Any], error: bool) -> None:
        self.spec.guard()
        number, last = self.number.pop(trial_id), self.stopped.pop(trial_id, None)
        if last is not None:
            facts = {name: last[name] for name in ("krr_accuracy", "cpu_seconds")}
            if last["step"]:  # else there was no synthetic set yet
                facts |= {"accuracy": last["accuracy"], "epochs": last["step"] - 1}
            self.study.tell(number, "pruned", **facts)
            after = f"epoch {last['step'] - 1}" if last["step"] else "stage one"
            self._tell(number, f"{last['accuracy']:.4f}  stopped after {after}")
        elif error or "failed" in result:
            reason = result.get("failed", f"its process died {RETRIES + 1} times (out of memory?); see Ray's logs")
            self.study.tell(number, "failed", reason=reason)
            self._tell(number, f"failed: {reason}")
        else:
            self.study.tell(number, "complete", **{name: result[name] for name in FACTS})
            best = self.study.best
            mark = "  best so far" if best is not None and best.number == number else ""
            self._tell(number, f"{result['accuracy']:.4f}  {result['seconds']:.0f} s{mark}")

    def _tell(self, number: int, outcome: str) -> None:
        """One line a trial, and how long the rest will take if it goes on like this."""
        self.ended += 1
        left = max(0, self.spec.trials - len(self.study.searched)) + self.study.repetitions_left
        rate = (time.monotonic() - self.started) / self.ended
        repeated = self.study.trials()[number].user_attrs.get(CONFIRMS)
        outcome += "" if repeated is None else f"  trial {repeated} again from another seed"
        rest = f"  ({left} left, about {left * rate / 60:.0f} min)" if left else ""
        print(f"trial {number:<4} {outcome}{rest}", flush=True)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def __reduce__(self) -> Any:
        """Tune writes down what it was given, for a restore that is never asked for."""
        return Searcher, ()


class _Watch(tune.Callback):
    """While trials wait and none runs (a node is gone): says what is missing, and raises CapacityError in the end, as
    a run does that has lost its actors. Tune itself would wait for ever."""

    QUIET = 30.0  # seconds that a trial's process may take to start

    def __init__(self, bundles: Sequence[dict[str, float]], wait_seconds: float):
        self.bundles, self.wait_seconds = bundles, wait_seconds
        self.since, self.told = math.inf, -math.inf

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        states, now = {trial.status for trial in trials}, time.monotonic()
        if "PENDING" not in states or "RUNNING" in states:
            self.since = math.inf
            return
        self.since = min(self.since, now)
        waited = now - self.since
        if waited >= self.QUIET + self.wait_seconds:
            message = f"{shortage(self.bundles, 'a trial')}; waited {waited:.0f} s"
            raise CapacityError(f"{message}. What is finished is kept: --resume goes on with it")
        if waited >= self.QUIET and now - self.told >= TOLD_EVERY:
            self.told = now
            left = self.QUIET + self.wait_seconds - waited
            print(f"{shortage(self.bundles, 'a trial')}; waiting {left:.0f} s more", file=sys.stderr)


class _Scheduler(FIFOScheduler):
    """Stops a trial when the study says so."""

    def __init__(self, searcher: _Searcher):
        super().__init__()
        self.searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not result["done"] and self.searcher.report(trial.trial_id, result):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)
