"""Encodings of the frozen encoder, kept beside the prepared TAG: computed once, whoever runs next."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import numpy as np

from talk_dist.data import storage
from talk_dist.models.protocol import Adapters, Encoder


class EncodingCache:
    """One file a partition and encoder; the name holds what the numbers depend on.

    ``texts`` is the sha256 hex of the partition's nodes.parquet: a store without rename keeps the old encodings
    when the graph is prepared again.
    """

    def __init__(self, path: str, part: int, texts: str):
        self.path, self.part, self.texts = path, part, texts

    @staticmethod
    def version(adapters: Adapters) -> str:
        """A name for these adapter weights; the same weights give the same encodings."""
        digest = hashlib.sha256()
        for name, value in sorted(adapters.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def get(self, encoder: Encoder, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The cached encodings (n, d) float32, or computed now and kept."""
        name = f"encodings/{encoder.fingerprint[:16]}-{self.texts[:16]}-part-{self.part:05d}.npy"
        uri = storage.join(self.path, name)
        if storage.exists(uri):
            return np.asarray(np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False))
        encodings = compute()
        buffer = io.BytesIO()
        np.save(buffer, encodings)
        storage.write_atomic(uri, buffer.getvalue())
        return encodings
