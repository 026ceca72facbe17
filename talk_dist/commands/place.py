"""Where a command's run lives: this process, or a Ray cluster. The only door from here to `cluster`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from talk_dist.config import DistillConfig
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import load_encoder
from talk_dist.models.protocol import Encoder
from talk_dist.runtime.callbacks import Callback
from talk_dist.runtime.estimate import Plan
from talk_dist.runtime.pool import LocalPool, ShardPool


class Place(Protocol):
    """Makes what a run needs, where it is needed."""

    @property
    def callbacks(self) -> Sequence[Callback]:
        """Who else wants to hear of the run."""

    def encoder(self) -> Encoder: ...
    def pool(self, tag: PreparedTag, encoder: Encoder, plan: Plan, threads: int = 0) -> ShardPool:
        """``plan``: what a process with some parts needs; ``threads``: of every process, where the settings
        leave them open (a run that goes on has as many as before; 0: as the machine has)."""


class Here:
    """This process."""

    callbacks: Sequence[Callback] = ()

    def __init__(self, config: DistillConfig):
        self.config = config

    def encoder(self) -> Encoder:
        return load_encoder(self.config.encoder)

    def pool(self, tag: PreparedTag, encoder: Encoder, plan: Plan, threads: int = 0) -> ShardPool:
        runtime = self.config.runtime
        return LocalPool(tag, encoder, self.config.kernel, replace(runtime, threads=runtime.threads or threads))


def refuse_workers_here(config: DistillConfig) -> None:
    """Raises ConfigError if the language model's workers are wanted without a cluster."""
    if config.deepspeed.workers and config.runtime.kind == "local":
        raise ConfigError("deepspeed.workers: the workers live on a cluster; add --runtime ray")


@contextmanager
def place(config: DistillConfig) -> Iterator[Place]:
    """As `runtime.kind` says. Raises ConfigError if Ray is wanted and not installed, or no cluster is there."""
    refuse_workers_here(config)
    if config.runtime.kind == "local":
        threads = torch.get_num_threads()
        try:
            yield Here(config)
        finally:
            torch.set_num_threads(threads)  # a pool has set its own, which are not the next one's
        return
    try:
        from cluster.session import open_session
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("runtime.kind = 'ray': Ray is not installed; pip install \"talk-dist[ray]\"") from error
    with open_session(config) as session:
        yield session
