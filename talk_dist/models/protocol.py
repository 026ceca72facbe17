"""What the method needs of a language model, wherever it lives: one process, or workers that share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from talk_dist.config import EncoderConfig, InnerConfig
from talk_dist.data.tag import TokenLists
from talk_dist.data.tokenizer import Tokenizer
from talk_dist.models.gnn import Student

Adapters = dict[str, np.ndarray]
Progress = Callable[[int, int], None]
Report = Callable[[str, int, int, dict[str, float]], None]  # stage, done, total, facts
Select = Callable[[Student], float]


@dataclass(frozen=True)
class FitResult:
    """How training ended. ``selected`` is the best value of ``select``, or minus the best training loss."""

    passes: int
    loss: float
    selected: float


@dataclass
class Lower:
    """What enters the first layer with adapters, of some texts, token by token: kept by whoever has the texts. Of exact
    duplicates the first alone has values."""

    values: np.ndarray  # (tokens, d)
    filled: bool = False

    def of(self, tokens: TokenLists, rows: np.ndarray) -> np.ndarray:
        """(tokens of these rows, d), row after row."""
        return np.concatenate([self.values[where] for where in _places(tokens, rows)])

    def put(self, tokens: TokenLists, rows: np.ndarray, values: np.ndarray) -> None:
        """The reverse of `of`."""
        start = 0
        for where in _places(tokens, rows):
            length = where.stop - where.start
            self.values[where] = values[start : start + length]
            start += length


def _places(tokens: TokenLists, rows: np.ndarray) -> list[slice]:
    return [slice(int(tokens.offsets[i]), int(tokens.offsets[i + 1])) for i in rows]


class Encoder(Protocol):
    """`TextEncoder` is the tested truth; what spreads the work must agree with it within stated tolerances.

    `GivenEncoder` stands for none at all: the synthetic nodes are encodings themselves.
    """

    config: EncoderConfig
    device: torch.device
    pooling: str
    width: int
    frozen_layers: int  # layers below all adapters; 0 if texts are to be encoded without `lower`

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def token_table(self) -> Tensor:
        """(vocabulary, d_tok) the embedding of every token."""

    @property
    def max_positions(self) -> int:
        """Tokens that a synthetic node can have."""

    @property
    def fingerprint(self) -> str:
        """sha256 hex of the frozen weights and of how they are used."""

    @property
    def adapted(self) -> bool:
        """Whether there are adapters to train."""

    def adapters(self) -> Adapters:
        """A copy of the adapters, to be shipped to shards; empty in the frozen mode."""

    def load_adapters(self, adapters: Adapters) -> None: ...
    def reset_adapters(self, seed: int) -> None: ...

    def encode_tokens(
        self, tokens: TokenLists, progress: Progress | None = None, lower: Lower | None = None
    ) -> np.ndarray:
        """Encodings (n, d) float32 of n texts; from the second time on what ``lower`` holds of them is not computed."""

    def encode_embeds(
        self, x: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Encodings (M, d) of token embeddings (M, T, d_tok), without gradient."""

    def inject(
        self, x: Tensor, d_hs: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Gradient (M, T, d_tok) of <phi(x), d_hs>."""

    def residual(self, x: Tensor, target: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
        """||phi(x) - target||^2 of each node (M,) and their gradients (M, T, d_tok), in one pass."""

    def fit(
        self,
        student: Student,
        x_s: Tensor,
        y_s: Tensor,
        config: InnerConfig,
        *,
        mask: Tensor | None = None,
        seed: int = 0,
        batch: int = 32,
        select: Select | None = None,
        progress: Progress | None = None,
    ) -> FitResult:
        """The inner loop: train student and adapters on the synthetic set; the best of both end up loaded.
        ``progress(passes done, at most)`` before every pass where they are trained in this process."""
