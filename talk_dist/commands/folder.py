"""The folder of a run, on any storage, which belongs to one run at a time.

A local folder is locked, so a second run on this machine is refused at once. Object stores have no locks, on NFS those
of a folder are known to one machine alone, and a driver that was thought dead may come back: so the run that came last
owns the folder, and an earlier one stops before it writes again.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pyarrow import fs as pafs

from talk_dist.data import storage
from talk_dist.errors import ConfigError, DataError
from talk_dist.synthetic.artifact import CONFIG

ATTEMPT, ARTIFACT, PREPARED = "attempt.json", "synthetic", "prepared"


class RunFolder:
    """``out``, a local path or a URI. Enter `alone`, `check` it, `claim` it, and `guard` whatever is written."""

    def __init__(self, out: str):
        self.out = out if "://" in out else str(Path(out).expanduser())
        self.attempt = uuid.uuid4().hex
        self._claimed = False

    def path(self, *names: str) -> str:
        return storage.join(self.out, *names)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Locks a local folder; the system lets go of it however the process ends.

        Raises ConfigError if another process of this machine holds it. Others are fenced by their attempt.
        """
        with ExitStack() as stack:
            if "://" not in self.out:
                with suppress(OSError):  # what is wrong with the folder, check says
                    os.makedirs(self.out, exist_ok=True)
                    handle = os.open(self.out, os.O_RDONLY)
                    stack.callback(os.close, handle)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError as error:
                        message = f"--out {self.out}: another run is at work there; choose another folder"
                        raise ConfigError(message) from error
            yield

    def check(self) -> None:
        """Raises ConfigError unless the folder can be written, and DataError if something is in the way."""
        filesystem, path = storage.resolve(self.out)
        try:
            storage.check_writable(self.out)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"--out {self.out}: cannot be written ({reason}); choose another folder") from error
        if not isinstance(filesystem, pafs.LocalFileSystem):
            return  # a run that died while it published leaves an artifact without its marker, and is to go on
        artifact = os.path.join(path, ARTIFACT)
        empty = not os.path.exists(artifact) or (os.path.isdir(artifact) and not os.listdir(artifact))
        if not empty and not storage.exists(self.path(ARTIFACT, CONFIG)):
            way = f"is in the way: it has no {CONFIG}, so it is not replaced; choose another --out"
            raise DataError(self.path(ARTIFACT), way)

    def claim(self) -> None:
        """From now on the folder is this run's, and `guard` stops the one that had it. Again: as `guard`."""
        if self._claimed:
            return self.guard()
        about = {
            "id": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        storage.write_atomic(self.path(ATTEMPT), storage.to_json(about))
        self._claimed = True

    def guard(self) -> None:
        """Call it before anything is written. Raises ConfigError if the folder is not, or no longer, this run's.

        A run that takes over between this look and the write loses nothing: one that goes on with the same
        state makes it again to the bit, one that starts over replaces it.
        """
        try:
            holder = json.loads(storage.read_bytes(self.path(ATTEMPT)))
        except (DataError, ValueError) as error:
            raise ConfigError(
                f"{self.path(ATTEMPT)} of this run is gone or damaged; this one stops, and writes nothing more"
            ) from error
        except OSError as error:
            again = "the same command goes on from where it was"
            raise ConfigError(f"{self.path(ATTEMPT)} cannot be read ({error}); {again}") from error
        if holder.get("id") != self.attempt:
            raise ConfigError(
                f"another run (attempt {holder.get('id')}, host {holder.get('host')}) has taken over {self.out}; "
                "this one stops, nothing of its is written"
            )

    def remove(self, *names: str) -> None:
        """Remove these files, if they are there."""
        self.guard()
        for name in names:
            filesystem, path = storage.resolve(self.path(name))
            with suppress(FileNotFoundError):
                filesystem.delete_file(path)


def beside(path: str, name: str) -> str:
    """What lies beside ``path``, a path or a URI."""
    parent, slash, _ = path.rstrip("/").rpartition("/")
    return storage.join(parent if slash else ".", name)
