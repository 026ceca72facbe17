"""Encodings of the frozen encoder, kept on storage: computed once, whoever runs next."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property

import numpy as np

from talk_dist.data import storage
from talk_dist.data.tag import TokenLists
from talk_dist.models.protocol import Adapters, Encoder


class EncodingCache:
    """A file for each stretch of a partition's texts in the folder ``path``, so that whoever is cut off goes on where
    it was. The name holds what the numbers depend on: the weights and the tokens, so that several splits of a graph,
    prepared each in its folder, can share one cache."""

    def __init__(self, path: str, part: int, tokens: TokenLists):
        self.path, self.part, self.tokens = path, part, tokens

    @cached_property
    def texts(self) -> str:
        """sha256 hex of the tokens; a shard whose encoder has adapters never asks for it."""
        digest = hashlib.sha256(self.tokens.offsets.tobytes())
        digest.update(self.tokens.values.tobytes())
        return digest.hexdigest()

    @staticmethod
    def version(adapters: Adapters) -> str:
        """A name for what these adapters make of texts: the same for all that do nothing yet, their product being
        zero."""
        if not any(value.any() for name, value in adapters.items() if "lora_B" in name):
            return "fresh"
        digest = hashlib.sha256()
        for name, value in sorted(adapters.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def get(self, encoder: Encoder, start: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The cached encodings (n, d) float32 of the stretch that begins with text ``start``, or computed now and
        kept where that is possible."""
        name = f"encodings/{encoder.fingerprint[:16]}-{self.texts[:16]}-part-{self.part:05d}-from-{start:09d}.npy"
        uri = storage.join(self.path, name)
        if storage.exists(uri):
            with suppress(ValueError, EOFError):  # damaged: as if it were not there
                return np.asarray(np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False))
        encodings = compute()
        buffer = io.BytesIO()
        np.save(buffer, encodings)
        try:
            storage.write_atomic(uri, buffer.getvalue())
        except OSError as error:
            remedy = "name one that can be written with --runtime.cache_folder, or every run computes them again"
            warnings.warn(f"{self.path}: encodings cannot be kept there ({error}); {remedy}", stacklevel=2)
        return encodings
