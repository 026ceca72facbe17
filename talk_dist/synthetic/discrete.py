"""Discrete inversion: real tokens whose encoding points where a given one does, so that a synthetic node is a text.

Greedy coordinate descent in the manner of HotFlip (Ebrahimi et al., ACL 2018) and GCG (Zou et al., arXiv 2307.15043):
the gradient with respect to one-hot tokens proposes substitutions, real encodings choose among them, and then among the
best of them taken together. Only directions are compared. An optimised encoding stands for the average of many texts
and is a quarter as long as that of any one of them (MiniLM on cora_cane); students do as well on four times its length,
while the plain distance is about little but the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from talk_dist.data.tag import TokenLists
from talk_dist.data.tokenizer import Tokenizer
from talk_dist.errors import ConfigError
from talk_dist.models.protocol import Encoder

CANDIDATES = 32  # single substitutions that are encoded, a node and step
MERGED = 8  # and then the best 2, 3, ..., 9 of them at once
PER_POSITION = 16  # tokens a position that candidates are drawn from


def distance(h: Tensor, target: Tensor) -> Tensor:
    """||h/|h| - t/|t|||^2 of encodings ``h`` and ``target`` (..., d): two minus twice their cosine."""
    return (normalize(h, dim=-1) - normalize(target, dim=-1)).square().sum(-1)


def linear_gains(gradient: Tensor, ids: Tensor, table: Tensor, words: Tensor) -> Tensor:
    """How far each substitution lowers a loss to first order, (F, V): minus the gradient with respect to one-hot
    tokens, relative to the current ones.

    ``gradient`` (F, d_tok) is that with respect to the embeddings of the tokens ``ids`` (F,), rows of ``table``;
    ``words`` (V,) are the ids that may take their places.
    """
    return (gradient * table[ids]).sum(-1, keepdim=True) - gradient @ table[words].T


def draw(gains: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Substitutions to try for one node, at most CANDIDATES: positions and columns of ``gains`` (F, V).

    Of each position's best they are drawn without replacement in proportion to their gain (by the Gumbel-top-k trick),
    so that what did not work is not tried for ever.
    """
    top = gains.topk(min(PER_POSITION, gains.shape[1]), dim=1)
    weight = top.values.clamp_min(0).flatten()
    noise = torch.rand(len(weight), generator=generator).to(weight)
    drawn = (weight.log() - (-noise.log()).log()).topk(min(CANDIDATES, len(weight))).indices
    return drawn // top.indices.shape[1], top.indices.flatten()[drawn]


def merge(ids: Tensor, position: Tensor, token: Tensor, gain: Tensor) -> Tensor:
    """``ids`` (T,) of one node with its best 2, 3, ... substitutions at once, (MERGED, T): one a position, gains first.

    ``position``, ``token`` and ``gain`` (K,) are what was tried and what it brought; what brought nothing is left out.
    """
    best: dict[int, int] = {}
    for k in gain.argsort(descending=True, stable=True).tolist():
        if gain[k] > 0:
            best.setdefault(int(position[k]), int(token[k]))
    merged = ids.repeat(MERGED, 1)
    for row in range(MERGED):
        for place, chosen in list(best.items())[: row + 2]:
            merged[row, place] = chosen
    return merged


def invert_tokens(
    encoder: Encoder,
    ids: Tensor,
    target: Tensor,
    words: Tensor,
    free: slice,
    steps: int,
    generators: Sequence[torch.Generator],
    batch: int = 32,
    tell: Callable[[int, Tensor], None] = lambda *_: None,
) -> Tensor:
    """Token ids (m, T) from ``ids``, with any of ``words`` (V,) in the positions ``free``, that are near ``target``
    (m, d) by `distance`. ``tell(step, distances)`` hears of each step; no node ends farther than it began.

    Each node has a generator of its own: what it becomes does not depend on the others. ``batch`` nodes are held at
    once for the gradient.
    """
    table, target, nodes = encoder.token_table.cpu(), target.cpu().float(), torch.arange(len(ids))

    def encode(some: Tensor) -> Tensor:  # (m, K, T) -> (m, K, d)
        lists = TokenLists(np.arange(0, some.numel() + 1, some.shape[-1]), some.flatten().int().numpy())
        return torch.from_numpy(encoder.encode_tokens(lists)).view(*some.shape[:-1], -1)

    best, h = ids, encode(ids[:, None])[:, 0]
    for step in range(steps):
        ids, leaf = best, h.clone().requires_grad_()
        before = distance(leaf, target)
        (d_hs,) = torch.autograd.grad(before.sum(), leaf)
        gradient = encoder.inject(table[ids], d_hs, batch=batch).cpu()[:, free]
        drawn = [
            draw(linear_gains(g, row, table, words), generator)
            for g, row, generator in zip(gradient, ids[:, free], generators, strict=True)
        ]
        position = torch.stack([p for p, _ in drawn]) + free.start
        token = words[torch.stack([t for _, t in drawn])]
        tried = ids[:, None].repeat(1, position.shape[1], 1).scatter(2, position[..., None], token[..., None])
        h_tried = encode(tried)
        gain = before.detach()[:, None] - distance(h_tried, target[:, None])
        merged = torch.stack([merge(*node) for node in zip(ids, position, token, gain, strict=True)])
        rows, h_rows = torch.cat([ids[:, None], tried, merged], 1), torch.cat([h[:, None], h_tried, encode(merged)], 1)
        nearest = distance(h_rows, target[:, None]).argmin(1)  # the first of equals: staying comes first
        best, h = rows[nodes, nearest], h_rows[nodes, nearest]
        tell(step + 1, distance(h, target))
    return best


def framed(tokens: TokenLists, length: int, tokenizer: Tokenizer) -> tuple[Tensor, slice]:
    """Texts of ``length`` tokens, the tokenizer's special ones around them: ids (n, length), and the free positions.

    Of each of the n ``tokens`` the words that stand by themselves are taken, cut or repeated to fit. Raises ConfigError
    if there is no room for any.
    """
    before, after = tokenizer.frame
    if length <= len(before) + len(after):
        raise ConfigError(f"synthetic.tokens = {length}: {len(before) + len(after)} are special, take more")
    free, words = slice(len(before), length - len(after)), tokenizer.words
    rows = []
    for i in range(len(tokens)):
        own = tokens[i][np.isin(tokens[i], words)]
        rows.append([*before, *np.resize(own if len(own) else words, free.stop - free.start), *after])
    return torch.tensor(np.array(rows, dtype=np.int64)), free
