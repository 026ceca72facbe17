"""The encoder of an actor that has none: its texts go to the language model's own workers.

For a model that does not fit one device: its weights are split over the workers, and every pass takes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from talk_dist.config import EncoderConfig
from talk_dist.data.tag import TokenLists
from talk_dist.data.tokenizer import load_tokenizer
from talk_dist.models.device import pick_device
from talk_dist.models.protocol import Adapters, Lower, Progress

ROUND = 8  # batches of real texts that a worker encodes between two reports of progress
Ask = Callable[[Any, Sequence[np.ndarray]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Lender:
    """What an actor must know of the group that encodes for it."""

    config: EncoderConfig
    fingerprint: str
    width: int
    workers: int


def encode_over(ask: Ask, tokens: TokenLists, lender: Lender, progress: Progress | None) -> np.ndarray:
    """Encodings (n, d) float32 of n token lists, in the batches of a single TextEncoder.

    ``ask(reference to the tokens, batches)`` gives the encodings of each batch.
    """
    source, batches = tokens.batches(lender.config.batch_tokens)
    out, done, total = np.zeros((len(tokens), lender.width), dtype=np.float32), 0, sum(map(len, batches))
    texts, size = ray.put(tokens), ROUND * lender.workers
    for start in range(0, len(batches), size):
        some = batches[start : start + size]
        for batch, rows in zip(some, ask(texts, some), strict=True):
            out[batch] = rows
            done += len(batch)
        if progress is not None:
            progress(done, total)
    return out[source]


class BorrowedEncoder:
    """What a `Shard` needs of an encoder, over the workers of a group. Only one actor may ask at a time: the workers
    go through their passes together."""

    frozen_layers = 0  # whatever encoder.adapted_layers is: nothing is kept here of texts that are encoded elsewhere

    def __init__(self, lender: Lender):
        self.lender, self.config = lender, lender.config
        self.fingerprint = lender.fingerprint
        self.tokenizer = load_tokenizer(lender.config.name)
        self.device = torch.device(pick_device(lender.config.device))
        self.workers: Sequence[Any] = ()

    def load_adapters(self, adapters: Adapters) -> None:
        """The group has them."""

    def encode_tokens(
        self, tokens: TokenLists, progress: Progress | None = None, lower: Lower | None = None
    ) -> np.ndarray:
        return encode_over(self._ask, tokens, self.lender, progress)

    def _ask(self, texts: Any, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        pending = [worker.encode_batches.remote(texts, batches) for worker in self.workers]
        parts = [part for reply in _as_they_come(pending) for part in reply]
        return [rows for _, rows in sorted(parts, key=lambda part: part[0])]


def _as_they_come(pending: list[Any]) -> Iterator[Any]:
    """A worker's death is raised at once, though the others wait for it in a collective."""
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        yield ray.get(done[0])
