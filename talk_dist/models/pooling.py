"""How a checkpoint was trained to make one vector of its token states."""

from __future__ import annotations

import json

from torch import nn

from talk_dist.config import EncoderConfig
from talk_dist.data.tokenizer import checkpoint_file
from talk_dist.errors import ConfigError


def pooling_of(config: EncoderConfig, model: nn.Module) -> str:
    """`auto`: what a sentence-transformers checkpoint says; else CLS, or the mean for causal models.

    Raises ConfigError where the checkpoint says another one.
    """
    if config.pooling != "auto":
        return config.pooling
    path = checkpoint_file(config.name, "1_Pooling/config.json")
    if path is None:
        architectures = getattr(model.config, "architectures", None) or [""]
        return "mean" if architectures[0].endswith(("ForCausalLM", "LMHeadModel")) else "cls"
    said = json.loads(path.read_text())
    older = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}  # a switch for each, not a name
    switched = [older.get(key, key) for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    found = said.get("pooling_mode") or ", ".join(switched)
    if found not in ("mean", "cls"):
        raise ConfigError(f"encoder.pooling = 'auto': {path} says {found!r}; only mean and cls are there, choose one")
    return str(found)
