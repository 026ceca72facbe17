"""The processes that hold the shards: placed, asked, and replaced when they die.

What to do about a failure, `failure.decide` says; this file does it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from cluster.actors import SERVE, ShardActor
from cluster.failure import Action, Event, classify, decide
from cluster.placement import Allotment, reserve, shortage
from talk_dist.errors import CapacityError
from talk_dist.models.protocol import Progress
from talk_dist.resources import ClusterConfig

Start = Callable[[int], Any]  # part -> reference to the reply
Failures = Counter[int]  # part -> times it failed in the same call of the pool
POLL = 1.0  # seconds between looks at the progress of what is under way


class Crew:
    """Actors by index, each with some parts. ``on_loss(parts)`` is called when an actor was replaced: its parts are
    empty. ``explain(part, event, error, times)`` words the error that ends a run.
    """

    def __init__(
        self,
        allotment: Allotment,
        settings: ClusterConfig,
        on_loss: Callable[[Sequence[int]], None],
        explain: Callable[[int, Event, Exception, int], Exception],
    ):
        self.allotment, self.settings, self.on_loss, self.explain = allotment, settings, on_loss, explain
        self.home = {part: index for index, parts in enumerate(allotment.parts) for part in parts}
        self.restarts = 0
        self.vitals: dict[int, dict[str, Any]] = {}
        remedy = "Lower cluster.actors, cluster.cpus, cluster.gpus or cluster.memory_gib, or add nodes"
        self._room = reserve(allotment.bundles, "SPREAD", settings.wait_seconds, "the shards", remedy)
        self.actors = [self._place(index) for index in range(len(allotment.parts))]
        self._await(self.actors)

    def close(self) -> None:
        """Give the cluster its resources back."""
        for actor in self.actors:
            ray.kill(actor)
        self._room.release()

    def of(self, part: int) -> Any:
        """The actor that holds a part now."""
        return self.actors[self.home[part]]

    def look(self) -> dict[int, dict[str, Any]]:
        """Where the actors live and their peak memory; the last known of one that does not answer."""
        refs = [actor.vitals.remote() for actor in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=5 * POLL)
        for index, ref in enumerate(refs):
            try:
                self.vitals[index] = ray.get(ref, timeout=0)
            except Exception:  # dead or busy starting; the next call will find out
                continue
        return self.vitals

    def each(
        self, parts: Sequence[int], start: Start, failures: Failures, progress: Progress | None = None
    ) -> dict[int, Any]:
        """One call for each part; the replies of those whose actors live on. The others' have been seen to."""
        asked = {part: self.of(part) for part in parts}
        replies: dict[int, Any] = {}
        for part, outcome in self._outcomes({part: start(part) for part in parts}, progress):
            if not isinstance(outcome, Exception):
                replies[part] = outcome
            elif self.of(part) is asked[part]:  # else it was replaced on behalf of another part it holds
                self._see_to(part, outcome, failures)
        return {part: reply for part, reply in replies.items() if self.of(part) is asked[part]}

    def _outcomes(self, refs: dict[int, Any], progress: Progress | None) -> Iterator[tuple[int, Any]]:
        """(part, reply or error) as they come."""
        part_of = {ref: part for part, ref in refs.items()}
        waiting = list(part_of)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL)
            for ref in done:
                try:
                    yield part_of[ref], ray.get(ref)
                except Exception as error:
                    yield part_of[ref], error
            if progress is not None and waiting:
                self._report({part_of[ref] for ref in waiting}, progress)

    def _report(self, parts: set[int], progress: Progress) -> None:
        refs = [self.actors[index].progress.remote() for index in {self.home[part] for part in parts}]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL)
        try:
            known = [count for reply in ray.get(ready) for count in reply.values()]
        except Exception:  # whoever died, the call under way will say so
            return
        if known:
            progress(sum(done for done, _ in known), sum(total for _, total in known))

    def _see_to(self, part: int, error: Exception, failures: Failures) -> None:
        """Act on a failed call as `failure.decide` says."""
        failures[part] += 1
        event = classify(error)
        action = decide(event, failures[part], self.settings.attempts)
        if action is Action.FAIL:
            raise self.explain(part, event, error, failures[part]) from error
        if action is Action.REPLACE:
            self._replace(self.home[part])
            return
        time.sleep(0.1 * 2 ** failures[part])
        for index, actor in enumerate(self.actors):
            if self._is_dead(actor):
                self._replace(index)

    def _is_dead(self, actor: Any) -> bool:
        """Asked until that is known: of a machine that went without a word, Ray says so after some 15 seconds."""
        end = time.monotonic() + self.settings.wait_seconds
        while True:
            try:
                ray.get(actor.vitals.remote(), timeout=10)
                return False
            except Exception as silence:
                event = classify(silence)
            if event is Event.DIED or event is Event.OWN_ERROR or time.monotonic() > end:
                return event is Event.DIED
            time.sleep(POLL)

    def _replace(self, index: int) -> None:
        ray.kill(self.actors[index])
        self.restarts += 1
        self.actors[index] = self._place(index)
        self.on_loss(self.allotment.parts[index])
        self._await([self.actors[index]])

    def _place(self, index: int) -> Any:
        bundle = self.allotment.bundles[index]
        return (
            ray.remote(concurrency_groups={SERVE: 1})(ShardActor)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                memory=bundle.get("memory"),
                max_restarts=0,  # a restart by Ray would come back empty without our knowing
                scheduling_strategy=self._room.strategy(index),
            )
            .remote()
        )

    def _await(self, actors: Sequence[Any]) -> None:
        """Until the actors are alive or dead. Raises CapacityError if the cluster has no room for them any more."""
        refs = [actor.vitals.remote() for actor in actors]
        wait = self.settings.wait_seconds
        if len(ray.wait(refs, num_returns=len(refs), timeout=wait)[0]) < len(refs):
            lost = shortage(self.allotment.bundles, "the shards")
            raise CapacityError(f"{lost}; waited {wait:.0f} s for a lost actor's place. Add a node, and run again")
