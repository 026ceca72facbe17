"""Reading a synthetic node: the vocabulary's nearest token for each of its embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from talk_dist.models.protocol import Encoder
from talk_dist.synthetic.artifact import SyntheticTAG


def nearest_tokens(x_s: Tensor, table: Tensor, chunk: int = 4096) -> Tensor:
    """For token embeddings ``x_s`` (M, T, d) the most similar rows (cosine) of ``table`` (V, d): (M, T) ids."""
    unit = torch.nn.functional.normalize(table.float(), dim=1)
    flat = torch.nn.functional.normalize(x_s.reshape(-1, x_s.shape[-1]).float(), dim=1).to(unit)
    ids = [(flat[start : start + chunk] @ unit.T).argmax(1) for start in range(0, len(flat), chunk)]
    return torch.cat(ids).view(x_s.shape[:2]).cpu()


def readings(tag: SyntheticTAG, encoder: Encoder) -> list[str]:
    """One line a synthetic node: the nearest tokens of its embeddings, in order."""
    ids = nearest_tokens(tag.token_embeds, encoder.token_table)
    mask = torch.ones_like(ids) if tag.mask is None else tag.mask
    return [
        " ".join(encoder.tokenizer.decode_token(int(t)) for t in row[keep.bool()])
        for row, keep in zip(ids, mask, strict=True)
    ]
