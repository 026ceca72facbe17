"""Which device an encoder takes, and which number formats it multiplies in there."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from talk_dist.errors import ConfigError


def pick_device(name: str) -> str:
    """The torch device that the setting ``name`` means here. Raises ConfigError for a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = name
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"encoder.device = {name!r}: must be auto, cpu or cuda (cuda:1 for the second of several)")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"encoder.device = {name!r}, but torch sees no GPU here; use auto or cpu")
    return name


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can.

    Batches of many shapes leave glibc's heap in pieces: an encoding of 1,200 texts kept half a gigabyte of them.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def bfloat16(precision: str, device: torch.device) -> bool:
    """Whether encoder passes run under bfloat16 autocast on ``device``."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


class SingleAttention(TorchFunctionMode):
    """Inside, attention runs in float32, whatever autocast says of the products around it.

    For CPUs: there torch's bfloat16 attention is no faster forward and takes 2.5 to 8 times as long backward.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)

        def single(value: Any) -> Any:
            return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        first = args[0] if args else kwargs["query"]
        with torch.autocast(first.device.type, enabled=False):
            heads = func(*map(single, args), **{name: single(value) for name, value in kwargs.items()})
        return heads.to(first.dtype)


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return (
        next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""
    )
