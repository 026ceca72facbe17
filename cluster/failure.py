"""What to do after a failure: one table, apart from the pool that acts on it."""

from __future__ import annotations

from enum import Enum, auto

from ray import exceptions


class Event(Enum):
    """What befell a call to a process."""

    DIED = auto()
    """The process or its node is gone."""
    UNREACHABLE = auto()
    """It does not answer for now; it may be alive."""
    PEER_LOST = auto()
    """It is well, but could not get something from another process."""
    OUT_OF_MEMORY = auto()
    """It was killed, or refused an allocation, because memory ran out."""
    UNPLACEABLE = auto()
    """There is no room for it in the cluster."""
    OWN_ERROR = auto()
    """Our code, or a setting, is wrong: it would fail again."""


class Action(Enum):
    REPLACE = auto()
    """Start another process, bring it to the current encoding, ask again."""
    RETRY = auto()
    """Ask the same process again, after the dead among the others were replaced."""
    FAIL = auto()


def classify(error: BaseException) -> Event:
    """The event behind what Ray raised for a call.

    An error inside the call arrives as a RayTaskError that is also of the error's own type, so that comes first:
    an ActorDiedError in there is a peer's death.
    """
    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, exceptions.RayActorError | exceptions.ObjectLostError | exceptions.GetTimeoutError):
            return Event.PEER_LOST
        if isinstance(cause, exceptions.OutOfMemoryError):
            return Event.PEER_LOST  # the peer's own call will say so
        if isinstance(cause, MemoryError) or "out of memory" in str(cause) or "can't allocate memory" in str(cause):
            return Event.OUT_OF_MEMORY
        return Event.OWN_ERROR
    if isinstance(error, exceptions.OutOfMemoryError):
        return Event.OUT_OF_MEMORY
    if isinstance(error, exceptions.ActorUnavailableError):
        return Event.UNREACHABLE
    if isinstance(
        error,
        exceptions.ActorUnschedulableError
        | exceptions.TaskUnschedulableError
        | exceptions.ActorPlacementGroupRemoved
        | exceptions.TaskPlacementGroupRemoved,
    ):
        return Event.UNPLACEABLE
    if isinstance(error, exceptions.RayActorError | exceptions.WorkerCrashedError | exceptions.NodeDiedError):
        return Event.DIED
    if isinstance(error, exceptions.ObjectLostError | exceptions.GetTimeoutError):
        return Event.PEER_LOST
    return Event.OWN_ERROR


def decide(event: Event, times: int, attempts: int) -> Action:
    """What to do about an event that came the ``times``-th time in the same call, of ``attempts`` allowed."""
    if event in (Event.OWN_ERROR, Event.OUT_OF_MEMORY, Event.UNPLACEABLE) or times >= attempts:
        return Action.FAIL
    if event is Event.DIED:
        return Action.REPLACE
    return Action.RETRY
