"""What every command gets to know of its call, and what they share."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from talk_dist.data.storage import without_secrets
from talk_dist.errors import ConfigError
from talk_dist.runtime.callbacks import Stop

EMBEDDED = "python-api"


@dataclass
class Call:
    """What a command knows of its call, and the seconds of its phases."""

    arguments: list[str]
    stop: Stop
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)

    @property
    def command(self) -> str:
        """The call as it may be written down."""
        return shlex.join(["talk-dist", *map(without_secrets, self.arguments)])

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.last = round(now - self.last, 1), now


def api_name(packages: Sequence[str] = ()) -> str:
    """The embedded graph's name says what it depends on: the version of Python, or those of the packages."""
    if not packages:
        return f"{EMBEDDED}-{platform.python_version()}"
    return "-".join([EMBEDDED, *sorted(packages)])


def given(path: str, what: str) -> str:
    if not path:
        raise ConfigError(f"give the folder of {what}")
    return path


def without(words: Sequence[str], *names: str) -> list[str]:
    """A command line without these settings, however they are written (`--name value`, `--name=value`)."""
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, _ = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and name in names):
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept
