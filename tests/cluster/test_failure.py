"""The table of failures: what Ray raises is an event, and an event has an action."""

from __future__ import annotations

import pytest
from ray import exceptions

from cluster.failure import Action, Event, classify, decide
from talk_dist.errors import DataError


def inside(cause):
    """What Ray raises for a call that raised ``cause``."""
    return exceptions.RayTaskError("call", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (exceptions.ActorDiedError(), Event.DIED),
        (exceptions.RayActorError(), Event.DIED),
        (exceptions.NodeDiedError("gone"), Event.DIED),
        (exceptions.WorkerCrashedError(), Event.DIED),
        (exceptions.ActorUnavailableError("slow", None), Event.UNREACHABLE),
        (inside(exceptions.ActorDiedError()), Event.PEER_LOST),
        (inside(exceptions.ActorUnavailableError("slow", None)), Event.PEER_LOST),
        (inside(exceptions.ObjectLostError("0" * 56, "", "")), Event.PEER_LOST),
        (inside(exceptions.OutOfMemoryError("a peer's")), Event.PEER_LOST),
        (exceptions.ObjectLostError("0" * 56, "", ""), Event.PEER_LOST),
        (exceptions.OutOfMemoryError("killed"), Event.OUT_OF_MEMORY),
        (inside(MemoryError("numpy")), Event.OUT_OF_MEMORY),
        (inside(RuntimeError("CUDA out of memory. Tried")), Event.OUT_OF_MEMORY),
        (inside(RuntimeError("DefaultCPUAllocator: can't allocate memory")), Event.OUT_OF_MEMORY),
        (exceptions.ActorUnschedulableError("no"), Event.UNPLACEABLE),
        (exceptions.ActorPlacementGroupRemoved(), Event.UNPLACEABLE),
        (inside(KeyError("Z")), Event.OWN_ERROR),
        (inside(DataError("x.parquet", ["a", "b"])), Event.OWN_ERROR),
        (ValueError("ours"), Event.OWN_ERROR),
    ],
    ids=lambda value: value.name if isinstance(value, Event) else type(value).__name__,
)
def test_an_error_is_an_event(error, event):
    assert classify(error) is event


TABLE = {
    Event.DIED: Action.REPLACE,
    Event.UNREACHABLE: Action.RETRY,
    Event.PEER_LOST: Action.RETRY,
    Event.OUT_OF_MEMORY: Action.FAIL,
    Event.UNPLACEABLE: Action.FAIL,
    Event.OWN_ERROR: Action.FAIL,
}


@pytest.mark.parametrize("event", Event)
def test_an_event_has_an_action_until_it_came_too_often(event):
    assert [decide(event, times, attempts=3) for times in (1, 2, 3, 4)] == [*2 * [TABLE[event]], *2 * [Action.FAIL]]


def test_errors_of_ours_travel():
    import pickle

    error = pickle.loads(pickle.dumps(DataError("x.parquet", ["a", "b"])))
    assert (error.where, error.problems) == ("x.parquet", ["a", "b"])
