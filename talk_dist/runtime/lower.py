"""What a shard keeps of its texts below the adapters: written by the first encoding, read by every later one."""

from __future__ import annotations

import numpy as np

from talk_dist.data.tag import TokenLists
from talk_dist.models.protocol import Lower
from talk_dist.runtime.fields import Fields


class LowerStates:
    """A vector of half precision for each token: in memory, or with ``disk`` in a file below ``scratch``.

    Half precision in memory too: a run must not depend on where they are.
    """

    def __init__(self, tokens: TokenLists, width: int, disk: bool, scratch: str):
        self._offsets = tokens.offsets
        self._fields = Fields(len(tokens.values), disk, scratch)
        self._fields.blank("lower", width, np.float16)
        self._stretches: dict[int, Lower] = {}

    def stretch(self, start: int, stop: int) -> Lower:
        """Of texts ``start`` to ``stop``, which is the same whenever it is asked for from this ``start``."""
        if start not in self._stretches:
            first, last = self._offsets[start], self._offsets[min(stop, len(self._offsets) - 1)]
            self._stretches[start] = Lower(self._fields["lower"][first:last])
        return self._stretches[start]
