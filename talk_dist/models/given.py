"""The encoder of a graph that brings encodings in place of texts: there is no language model.

A synthetic node has one "token", and what a language model would make of its embedding is that embedding itself. So
the method's second stage has nothing to find, injection is the identity, and only the student is trained.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from talk_dist.config import EncoderConfig, InnerConfig
from talk_dist.data.given import given_width
from talk_dist.data.tag import TokenLists
from talk_dist.data.tokenizer import Tokenizer, load_tokenizer
from talk_dist.errors import ConfigError
from talk_dist.models.device import pick_device
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings
from talk_dist.models.protocol import Adapters, FitResult, Lower, Progress, Select


class GivenEncoder:
    """The `Encoder` named ``given:<width>``: phi(x) = x for x (M, 1, d). What it gives is where x is; ``device`` is
    where shards compute. Raises ConfigError for another name, and for adapters: there is nothing to adapt."""

    pooling = "given"
    frozen_layers = 0

    def __init__(self, config: EncoderConfig):
        width = given_width(config.name)
        if width is None:
            raise ConfigError(f"encoder {config.name!r} is a language model; given encodings are named given:<width>")
        if config.adapters:
            raise ConfigError(f"encoder.adapters = true: {config.name!r} has no weights to adapt; set it to false")
        self.config, self.width = config, width
        self.device = torch.device(pick_device(config.device))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.name)

    @property
    def token_table(self) -> Tensor:
        """(0, d): there are no tokens."""
        return torch.zeros(0, self.width)

    @property
    def max_positions(self) -> int:
        return 1

    @property
    def fingerprint(self) -> str:
        """sha256 hex of the name, which holds all that there is."""
        return hashlib.sha256(self.config.name.encode()).hexdigest()

    @property
    def adapted(self) -> bool:
        return False

    def adapters(self) -> Adapters:
        return {}

    def load_adapters(self, adapters: Adapters) -> None:
        """Raises ConfigError if there are any."""
        if adapters:
            raise ConfigError(f"adapters of another encoder: {sorted(adapters)[:4]}; {self.config.name!r} has none")

    def reset_adapters(self, seed: int) -> None:
        """There are none."""

    def encode_tokens(
        self, tokens: TokenLists, progress: Progress | None = None, lower: Lower | None = None
    ) -> np.ndarray:
        """Raises ConfigError: a shard takes the encodings of its partition."""
        raise ConfigError(f"encoder {self.config.name!r} reads no texts; take the one that the graph was prepared for")

    def encode_embeds(
        self, x: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Encodings (M, d) of ``x`` (M, 1, d): its one row a node."""
        return self._encoding(x.detach())

    def inject(
        self, x: Tensor, d_hs: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Gradient (M, 1, d) of <phi(x), d_hs>, which is ``d_hs`` itself."""
        return d_hs.to(self._encoding(x))[:, None]

    def residual(self, x: Tensor, target: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
        """||x - target||^2 of each node (M,) and their gradients (M, 1, d)."""
        off = self._encoding(x.detach()) - target.to(x)
        return off.pow(2).sum(1), 2.0 * off[:, None]

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
        """`fit_encodings`."""
        h_s = self.encode_embeds(x_s)
        return fit_encodings(student, h_s, y_s, config, seed=seed, select=select, progress=progress)

    def _encoding(self, x: Tensor) -> Tensor:
        """(M, d) of (M, 1, d). Raises ConfigError for another shape."""
        if x.shape[1:] != (1, self.width):
            raise ConfigError(
                f"synthetic nodes of {x.shape[1]} embeddings {x.shape[2]} wide: encoder {self.config.name!r} takes "
                f"one of {self.width}; set --synthetic.tokens 1 and --encoder.name given:{x.shape[2]}"
            )
        return x[:, 0]
