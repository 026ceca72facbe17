"""The errors that users meet. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class TalkDistError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(TalkDistError, ValueError):
    """A setting that cannot work: unknown key, value out of range, an encoder that does not load."""


class NotPSDError(TalkDistError, ArithmeticError):
    """The regularised kernel of the synthetic nodes is not positive definite, even with the largest jitter."""


class ShardError(TalkDistError, RuntimeError):
    """A shard could not do its part; the message names the shard and its rows."""


class CapacityError(TalkDistError, MemoryError):
    """The plan does not fit the machine; the message says what to change."""


class DataError(TalkDistError, ValueError):
    """The input data, a prepared TAG or an artifact is unusable.

    ``problems`` holds every problem found, not only the first: a user mends a table once.
    """

    def __init__(self, where: str, problems: str | Sequence[str]):
        self.where = where
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            message = f"{where}: {self.problems[0]}"
        else:
            lines = "".join(f"\n  {i}. {p}" for i, p in enumerate(self.problems, 1))
            message = f"{where}: {len(self.problems)} problems{lines}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, list[str]]]:
        """Errors travel between processes; the default would call this class with its message alone."""
        return type(self), (self.where, self.problems)
