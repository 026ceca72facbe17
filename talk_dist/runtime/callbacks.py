"""What a run tells the world: progress lines, a JSONL log. A callback never changes the result."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from talk_dist.data import storage


class Callback:
    """Override what you need; both do nothing here."""

    def progress(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        """Within a stage (`encode`, `encodings`, `tokens`, `student`, `steps`, …): may come many times a second."""

    def epoch(self, record: dict[str, Any]) -> None:
        """After an outer epoch: epoch, val accuracy, losses, seconds by phase."""


class Callbacks(Callback):
    """Several as one."""

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = list(callbacks)

    def progress(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.progress(stage, done, total, metrics)

    def epoch(self, record: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.epoch(record)


class ProgressLines(Callback):
    """One line a level: rewritten in place on a terminal, otherwise a plain line now and then."""

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 5.0):
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.interval = 0.1 if self.terminal else every_seconds
        self.stage, self.started, self.shown = "", 0.0, 0.0
        self.done = self.first = 0

    def progress(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if stage != self.stage or done < self.done:
            self.stage, self.started, self.shown = stage, now, now if not self.terminal else 0.0
            self.first = done
        self.done = done
        final = done >= total
        if not final and now - self.shown < self.interval:
            return
        self.shown = now
        elapsed = now - self.started
        rate = (done - self.first) / elapsed if elapsed > 0 else 0.0
        left = f" {(total - done) / rate:.0f} s left" if rate > 0 and not final else f" {elapsed:.0f} s"
        values = "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        line = f"{stage:<10} {done:>7,}/{total:,}{values} {left}"
        self.stream.write(f"\r\033[K{line}" if self.terminal else f"{line}\n")
        if final and self.terminal:
            self.stream.write("\n")
        self.stream.flush()
        if final:
            self.stage = ""

    def epoch(self, record: dict[str, Any]) -> None:
        best = "  best so far" if record["best"] else ""
        self.stream.write("\r\033[K" if self.terminal else "")  # a student that ended early has left a line
        self.stream.write(
            f"epoch {record['epoch']:<4} val {record['val_accuracy']:.4f}  krr val {record['krr_val_accuracy']:.4f}  "
            f"inner loss {record['inner_loss']:.4f} in {record['inner_passes']} passes  "
            f"{record['seconds']['epoch']:.0f} s{best}\n"
        )
        self.stream.flush()


class JsonLines(Callback):
    """The record of every epoch, in a JSONL file on any storage, after those of ``history``.

    The file is small and written whole, because not every storage can append. ``guard`` as in `Checkpoint`.
    """

    def __init__(
        self, path: str | Path, history: Sequence[dict[str, Any]] = (), guard: Callable[[], None] | None = None
    ):
        self.path, self.records, self.guard = path, list(history), guard

    def epoch(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.write()

    def write(self) -> None:
        """Publish all records there are."""
        if self.guard:
            self.guard()
        storage.write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in self.records).encode())


class Stop(Callback):
    """SIGINT and SIGTERM as KeyboardInterrupt: at once, and again at the next report if that one was lost
    (Python drops what is raised in a destructor). ``advice()`` is what to tell the user then.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.advice: Callable[[], str] = lambda: ""

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """While the block runs. Only the main thread can take signals; elsewhere nothing changes."""

        def handle(number: int, frame: object) -> None:
            self.signal = number
            raise KeyboardInterrupt

        def dropped(what: Any) -> None:
            if what.exc_type is not KeyboardInterrupt:  # of that, the next report will say more than a traceback
                shown(what)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        shown, sys.unraisablehook = sys.unraisablehook, dropped
        try:
            yield
        finally:
            sys.unraisablehook = shown
            for number, handler in before.items():
                signal.signal(number, handler)

    def progress(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt

    def epoch(self, record: dict[str, Any]) -> None:
        self.progress("", 0, 0, {})
