"""Actors that die when told to. Ray ships this module by value: workers cannot import it."""

from __future__ import annotations

import os
import signal

from cluster.actors import ShardActor


class Trap:
    """Makes the first process that starts a phase of a part die of SIGKILL, once: a file is the fuse."""

    def __init__(self, folder):
        self.folder = str(folder)

    def set(self, phase, part):
        open(self._fuse(phase, part), "w").close()

    def sprung(self):
        return not os.listdir(self.folder)

    def _fuse(self, phase, part):
        return os.path.join(self.folder, f"{phase}-{part}")

    def step_on(self, phase, part):
        try:
            os.unlink(self._fuse(phase, part))
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def trapped(trap):
    """A ShardActor that steps on ``trap`` in every call. A local class, so that Ray ships it by value."""

    class Trapped(ShardActor):
        def call(self, part, method, *args):
            trap.step_on(method, part)
            return super().call(part, method, *args)

        def encode(self, part, adapters, workers=()):
            trap.step_on("encode", part)
            return super().encode(part, adapters, workers)

        def exchange(self, part, name, depth, peers):
            trap.step_on(f"exchange-{name}", part)
            return super().exchange(part, name, depth, peers)

    return Trapped
