"""Whole configurations to start from."""

from __future__ import annotations

from talk_dist.config import (
    DistillConfig,
    EncoderConfig,
    InnerConfig,
    KernelConfig,
    OuterConfig,
    SyntheticConfig,
)
from talk_dist.errors import ConfigError


def preset(name: str = "default") -> DistillConfig:
    """`default`: best on validation; `paper`: TaLK to the letter. Raises ConfigError for another name."""
    if name == "default":
        return DistillConfig()
    if name == "paper":
        return DistillConfig(
            encoder=EncoderConfig(pooling="cls", adapters=True),
            kernel=KernelConfig(architecture="gcn", norms="linear", ridge=1e-5),
            synthetic=SyntheticConfig(tokens=256, init="random", label_smoothing=0.0, storage="float32"),
            inner=InnerConfig(passes=90, gnn_lr=1e-3, adapter_lr=1e-4),
            outer=OuterConfig(epochs=80, steps=8, rows=0, lr=1e-4, patience=80, targets="labels"),
        )
    raise ConfigError(f"unknown preset {name!r}; one of default, paper")
