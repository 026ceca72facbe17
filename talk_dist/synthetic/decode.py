"""Reading a synthetic node: the nearest token for each of its embeddings, and the nearest real texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from talk_dist.models.protocol import Encoder
from talk_dist.runtime.pool import ShardPool
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.coresets import sample_for

CHUNK_ELEMENTS = 1 << 25  # cosines held at once


def nearest_tokens(x_s: Tensor, table: Tensor) -> Tensor:
    """For token embeddings ``x_s`` (M, T, d) the most similar rows (cosine) of ``table`` (V, d): (M, T) ids."""
    unit = normalize(table.float(), dim=1)
    flat = normalize(x_s.reshape(-1, x_s.shape[-1]).float(), dim=1).to(unit)
    chunk = max(1, CHUNK_ELEMENTS // len(table))
    ids = [(flat[start : start + chunk] @ unit.T).argmax(1) for start in range(0, len(flat), chunk)]
    return torch.cat(ids).view(x_s.shape[:2]).cpu()


def exact_tokens(x_s: Tensor, table: Tensor) -> Tensor:
    """The ids (M, T) of token embeddings ``x_s`` (M, T, d) that are rows of ``table`` (V, d), to the bit.

    Raises ValueError if one is not.
    """
    ids = nearest_tokens(x_s, table)
    if not torch.equal(table.cpu()[ids], x_s):
        raise ValueError("token embeddings that are no rows of the token table")
    return ids


def readings(tag: SyntheticTAG, encoder: Encoder) -> list[str]:
    """One line a synthetic node: the nearest tokens of its embeddings, in order; none if the encoder has no tokens."""
    if not len(encoder.token_table):
        return []
    named = encoder.token_table[: encoder.tokenizer.vocab_size]  # some tables go on, to a round number
    ids = nearest_tokens(tag.token_embeds, named) if tag.token_ids is None else tag.token_ids
    mask = torch.ones_like(ids) if tag.mask is None else tag.mask
    return [
        " ".join(encoder.tokenizer.decode_token(int(t)) for t in row[keep.bool()])
        for row, keep in zip(ids, mask, strict=True)
    ]


@dataclass(frozen=True)
class Neighbour:
    """A real training node beside a synthetic one."""

    cosine: float
    label: str
    text: str  # as the encoder reads it: cut where `prepare` cut it


def nearest_texts(tag: SyntheticTAG, pool: ShardPool, encoder: Encoder, count: int, seed: int) -> list[list[Neighbour]]:
    """The ``count`` training nodes nearest to each synthetic one, from the sample that coresets choose from.

    By the cosine of its encoding with rows of P^2 H, not H: what a synthetic node, which sees only itself, stands in
    for is what a real node is after two hops. The start takes centres of these rows, the kernel compares it with them,
    and a text alone is farther from it than its neighbourhood. The pool must hold encodings of ``encoder`` as it is.
    """
    h_s = tag.encode(encoder)
    sample = sample_for(pool, np.bincount(tag.labels.argmax(1), minlength=tag.labels.shape[1]), seed)
    real, count = normalize(torch.from_numpy(sample.features).float(), dim=1), min(count, len(sample.label))
    near = [(normalize(h, dim=1) @ real.T).topk(count, dim=1) for h in h_s.split(max(1, CHUNK_ELEMENTS // len(real)))]
    cosines, rows = torch.cat([n.values for n in near]), torch.cat([n.indices for n in near]).flatten()
    tokens, names = pool.tokens(sample.place[rows]), pool.tag.classes
    texts = [encoder.tokenizer.decode(tokens[i].tolist()) for i in range(len(tokens))]
    labels = [names[label] for label in sample.label[rows]]
    flat = [Neighbour(*facts) for facts in zip(cosines.flatten().tolist(), labels, texts, strict=True)]
    return [flat[start : start + count] for start in range(0, len(flat), count)]
