"""Number formats of 1, 2 or 4 bits: every number of a token is one of 2^b levels, evenly spaced around zero.

A token has a step s (float16), and its numbers are s (k - top), k = 0 .. 2^b - 1, top = (2^b - 1) / 2. The largest
number of a token always has an outermost level: so the step can be read off the numbers, and what is on a grid stays
as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from talk_dist.errors import ConfigError

_RATIOS = torch.logspace(0, -1.7, 40)  # of the range that is kept; what lies outside takes the outermost level


def top(bits: int) -> float:
    """The outermost level in steps."""
    return (2**bits - 1) / 2


def steps(x: Tensor, bits: int) -> Tensor:
    """The step of each token (M, T, 1), float32 with a float16's values: the one with the least squared error.

    ``x`` (M, T, d) that is on a grid keeps its own.
    """
    largest = x.abs().amax(-1, keepdim=True) / top(bits)
    best = _as_half(largest)
    least = (on_grid(x, best, bits) - x).square().sum(-1, keepdim=True)
    for ratio in _RATIOS[1:]:
        step = torch.minimum(_as_half(ratio * largest), best)
        error = (on_grid(x, step, bits) - x).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def levels(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest level k of each number, uint8."""
    return (x / step + top(bits)).round().clamp(0, 2**bits - 1).to(torch.uint8)


def on_grid(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """``x`` (M, T, d) rounded to the grid of ``step`` (M, T, 1)."""
    return (levels(x, step, bits).float() - top(bits)) * step


def pack(x: Tensor, bits: int) -> dict[str, Tensor]:
    """``token_embeds`` (M, T, d b / 8) uint8, the first number in the lowest bits, and ``token_scales`` (M, T) float16.

    Raises ConfigError if a token does not fill whole bytes.
    """
    each = 8 // bits
    if x.shape[-1] % each:
        raise ConfigError(f"synthetic.storage: int{bits} needs a width that {each} divides, not {x.shape[-1]}")
    step = steps(x, bits)
    codes = levels(x, step, bits).view(*x.shape[:-1], -1, each)
    packed = sum(codes[..., i] << (bits * i) for i in range(each))
    assert isinstance(packed, Tensor)
    return {"token_embeds": packed.contiguous(), "token_scales": step.squeeze(-1).half().contiguous()}


def unpack(packed: Tensor, step: Tensor, bits: int) -> Tensor:
    """What `pack` was given, on the grid: (M, T, d) float32."""
    codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
    return (codes.flatten(-2).float() - top(bits)) * step.float().unsqueeze(-1)


def _as_half(step: Tensor) -> Tensor:
    finite = torch.finfo(torch.float16)
    return step.float().clamp(finite.tiny, finite.max).half().float()
