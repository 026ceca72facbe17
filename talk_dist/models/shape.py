"""The sizes of a transformer that decide its memory and its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer that decide its memory and time."""

    width: int
    layers: int
    inner: int
    heads: int
    vocabulary: int
    positions: int

    @staticmethod
    def of(config: Any) -> ModelShape:
        """From the configuration of a transformers model."""
        width = int(config.hidden_size)
        return ModelShape(
            width,
            int(config.num_hidden_layers),
            int(getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width),
            int(getattr(config, "num_attention_heads", 1)),
            int(config.vocab_size),
            int(getattr(config, "max_position_embeddings", 512)),
        )

    @staticmethod
    def given(width: int) -> ModelShape:
        """Of no model at all: encodings so wide are given."""
        return ModelShape(width, layers=0, inner=0, heads=0, vocabulary=0, positions=1)

    @property
    def block_parameters(self) -> int:
        return self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    @property
    def bytes(self) -> int:
        return 4 * (self.block_parameters + (self.vocabulary + self.positions) * self.width)

    def token_flop(self, length: float) -> float:
        """Of one token of a text of ``length`` tokens, forward."""
        return 2.0 * self.block_parameters + 4.0 * length * self.width * self.layers

    def activations(self, texts: float, length: float, kept: bool) -> int:
        """Bytes that live while so many texts pass; ``kept`` for a backward pass, of all layers."""
        per_layer = texts * length * (10 * self.width + 2 * self.inner + self.heads * length) * 4
        return int(per_layer * (self.layers if kept else min(1, self.layers)))
