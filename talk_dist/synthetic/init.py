"""How a synthetic set starts: random real texts, medoid texts, or two stages (method, sections 7 and 8).

Two stages: the M encodings are optimised first (`encodings`); then the few tokens that produce them are found by a
least-squares fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talk_dist.config import DistillConfig
from talk_dist.data.tag import PreparedTag, TokenLists
from talk_dist.errors import ConfigError
from talk_dist.models.inner import one_hot, smoothed
from talk_dist.models.protocol import Encoder, Report
from talk_dist.runtime.checkpoint import Starting
from talk_dist.runtime.chunks import TOGETHER
from talk_dist.runtime.outer import Objective
from talk_dist.runtime.pool import ShardPool, TrainSample
from talk_dist.runtime.teacher import RealSide
from talk_dist.synthetic.coresets import allocate, class_centres, sample_for, select
from talk_dist.synthetic.discrete import framed, invert_tokens
from talk_dist.synthetic.encodings import Optimised, optimise_encodings
from talk_dist.synthetic.invert import invert

Told = Callable[[str, int, dict[str, float]], None]
"""(stage, step, metrics) of a group of nodes."""


@dataclass(frozen=True)
class Start:
    """Token embeddings (M, T, d_tok), labels (M, C), the log temperature the loss begins with, and the validations of
    stage one (`Optimised.history`)."""

    x_s: Tensor
    y_s: Tensor
    log_temperature: float
    history: list[dict[str, Any]] = field(default_factory=list)


def num_synthetic(size: float, num_nodes: int) -> int:
    """M: ``size`` itself, or that fraction of the real nodes, rounded."""
    return round(size * num_nodes) if size < 1 else int(size)


def class_counts(tag: PreparedTag, config: DistillConfig) -> np.ndarray:
    """Synthetic nodes of each class (C,). Raises ConfigError if a class would get none, or none in some block."""
    m = num_synthetic(config.synthetic.size, tag.num_nodes)
    blocks, counts = config.kernel.blocks(m), tag.train_class_counts
    found = allocate(m, counts, blocks)
    if found.min() < blocks:
        raise ConfigError(
            f"kernel.block = {config.kernel.block}: {m} synthetic nodes of {len(counts)} classes would be {blocks} "
            f"blocks, some of which lack a class; set {-(-m // (m // len(counts)))} or more, or 0"
        )
    return found


def one_hot_labels(counts: np.ndarray) -> Tensor:
    """Labels (M, C) of ``counts`` (C,) synthetic nodes, class by class."""
    return one_hot(np.repeat(np.arange(len(counts)), counts), len(counts))


def initialise(
    real: RealSide, encoder: Encoder, config: DistillConfig, report: Report, starting: Starting | None = None
) -> Start:
    """Start as `config.synthetic.init` says; the real side must be encoded. Goes on from what ``starting`` has saved.

    A graph that brings encodings has no texts to choose: two stages end with the first, and the others start from the
    propagated encodings P^2 H of the chosen rows.
    """
    pool, starting = real.pool, starting or Starting()
    counts = class_counts(pool.tag, config)
    classes, blocks = one_hot_labels(counts), config.kernel.blocks(int(counts.sum()))
    y_s = smoothed(classes, config.synthetic.label_smoothing)
    sample = sample_for(pool, counts, config.seed)
    given, how = pool.tag.encoding_width is not None, "random" if config.synthetic.init == "random" else "medoid"
    if config.synthetic.init != "two-stage":
        if given:
            x_s = torch.from_numpy(sample.features[select(sample, counts, how, config.seed, blocks)])[:, None]
        else:
            x_s = embed(encoder, choose(pool, sample, counts, how, config), config.synthetic.tokens)
        return Start(x_s, y_s, Objective.initial_log_temperature)
    cut_off = starting.at("tokens")
    if cut_off:
        found = Optimised(cut_off.tensors["h_s"], **cut_off.facts)
    else:

        def told(done: int) -> None:
            report("centres", done, int(counts.sum()), {})

        start = torch.from_numpy(class_centres(sample, counts, config.seed, blocks, told))
        real.teach(report)
        found = optimise_encodings(pool, start, classes, config, report, starting)
    if given:
        return Start(found.h_s[:, None], y_s, found.log_temperature, found.history)

    def save(**fitted: Tensor) -> None:
        facts = {"log_temperature": found.log_temperature, "history": found.history}
        starting.save("tokens", {"h_s": found.h_s, **fitted}, **facts)

    done = cut_off.tensors.get("x_s") if cut_off else None
    if cut_off is None:
        save()
    texts = choose(pool, sample, counts, how, config)
    x_s = fit_texts(encoder, texts, found.h_s, config, report, done, lambda x_s: save(x_s=x_s))
    return Start(x_s, y_s, found.log_temperature, found.history)


def check_texts(tag: PreparedTag) -> None:
    """Raises ConfigError if ``tag`` brings encodings."""
    if tag.encoding_width is not None:
        reason = "brings encodings in place of texts: there are none to choose, and no tokens to invert anything into"
        raise ConfigError(f"{tag.path} {reason}; leave `invert` out")


def choose(pool: ShardPool, sample: TrainSample, counts: np.ndarray, how: str, config: DistillConfig) -> TokenLists:
    """The M texts that the coreset ``how`` chooses. Raises ConfigError if the graph has none."""
    check_texts(pool.tag)
    blocks = config.kernel.blocks(int(counts.sum()))
    return pool.tokens(sample.place[select(sample, counts, how, config.seed, blocks)])


def embed(encoder: Encoder, tokens: TokenLists, length: int) -> Tensor:
    """The tokens of each text, cut to ``length`` or repeated up to it, as embeddings (M, T, d_tok)."""
    ids = np.stack([np.resize(tokens[i], length) for i in range(len(tokens))])
    return encoder.token_table[torch.from_numpy(ids).long().to(encoder.device)].cpu().clone()


def fit_texts(
    encoder: Encoder,
    texts: TokenLists,
    h_s: Tensor,
    config: DistillConfig,
    report: Report,
    done: Tensor | None = None,
    save: Callable[[Tensor], None] = lambda x_s: None,
) -> Tensor:
    """Stage two: token embeddings (M, T, d_tok), from M texts, whose encodings are ``h_s`` (M, d), or, of real tokens,
    point where they do. The first (m, T, d_tok) may be ``done``; ``save`` gets what is, now and then."""
    length = config.synthetic.tokens
    if config.synthetic.discrete:
        ids, free = framed(texts, length, encoder.tokenizer)
        words, table = torch.from_numpy(encoder.tokenizer.words), encoder.token_table.cpu()
        steps, at_once = config.two_stage.discrete_steps, config.outer.inject_batch

        def fit(rows: slice, told: Told) -> Tensor:
            def tell(step: int, distances: Tensor) -> None:
                told("words", step, {"cosine": 1 - float(distances.mean()) / 2})

            own = [torch.Generator().manual_seed(config.seed * len(ids) + node) for node in range(len(ids))[rows]]
            return table[invert_tokens(encoder, ids[rows], h_s[rows], words, free, steps, own, at_once, tell)]
    else:
        x_s, steps = embed(encoder, texts, length), config.two_stage.token_steps

        def fit(rows: slice, told: Told) -> Tensor:
            return fit_tokens(encoder, x_s[rows], h_s[rows], config, told)

    found = [] if done is None else [done]
    groups = -(-len(h_s) // TOGETHER)
    for group in range(-(-sum(map(len, found)) // TOGETHER), groups):

        def told(stage: str, step: int, facts: dict[str, float], before: int = group * steps) -> None:
            report(stage, before + step, groups * steps, facts)

        found.append(fit(slice(group * TOGETHER, (group + 1) * TOGETHER), told))
        save(torch.cat(found))
    return torch.cat(found)


def fit_tokens(encoder: Encoder, x_s: Tensor, h_s: Tensor, config: DistillConfig, told: Told) -> Tensor:
    """The token embeddings (m, T, d_tok), from ``x_s``, whose encodings are ``h_s`` (m, d): `invert`."""
    settings, shape, size = config.two_stage, x_s.shape[1:], h_s.double().pow(2).sum(1)

    def residual(x: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        distances, gradients = encoder.residual(x.view(-1, *shape), h_s[nodes], config.outer.inject_batch)
        return distances, gradients.flatten(1)

    def tell(step: int, distances: Tensor) -> None:
        told("tokens", step, {"relative_error": float(distances.double().sum() / size.sum())})

    goal = settings.token_error * size.float()
    return invert(residual, x_s.flatten(1), settings.token_steps, goal, tell).view(-1, *shape)
