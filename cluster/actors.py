"""A process that holds shards. It adds nothing to `Shard` but the way in, and the way to its peers."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import ray
import torch

from cluster.borrowed import BorrowedEncoder, Lender
from cluster.placement import hide_others_gpus
from talk_dist.config import EncoderConfig
from talk_dist.models.encoder import load_encoder
from talk_dist.runtime.boundary import ShardSpec
from talk_dist.runtime.pool import peak_gpu_memory, peak_memory
from talk_dist.runtime.shard import Shard

SERVE = "serve"  # its own thread: an actor that waits for a peer's rows still serves its own


class ShardActor:
    """Some shards and the encoder they share."""

    def __init__(self) -> None:
        hide_others_gpus()
        self.shards: dict[int, Shard] = {}
        self._encoder: Any = None
        self._progress: dict[int, tuple[int, int]] = {}

    def load(self, spec: ShardSpec, encoder: EncoderConfig | Lender, threads: int) -> None:
        """Build a shard from storage. Not in the constructor, whose errors Ray turns into a death."""
        torch.set_num_threads(threads)
        if self._encoder is None:
            self._encoder = BorrowedEncoder(encoder) if isinstance(encoder, Lender) else load_encoder(encoder)
        self.shards[spec.part] = Shard(spec, self._encoder)

    def call(self, part: int, method: str, *args: Any) -> Any:
        """Any method of a shard."""
        return getattr(self.shards[part], method)(*args)

    def encode(self, part: int, adapters: dict[str, Any], workers: Sequence[Any] = ()) -> None:
        """`Shard.encode`, its progress to be asked for by `progress`; over ``workers`` if the encoder is borrowed."""
        if isinstance(self._encoder, BorrowedEncoder):
            self._encoder.workers = workers
        self.shards[part].encode(adapters, lambda done, total: self._progress.update({part: (done, total)}))
        self._progress.pop(part, None)

    def exchange(self, part: int, name: str, depth: int, peers: dict[int, Any]) -> int:
        """Fetch the halo rows of a field from the actors that own them; bytes that came from other processes.

        ``peers`` are the actors by part. The rows go from process to process: the driver never sees them.
        """
        shard = self.shards[part]
        requests = shard.requests(depth)
        remote = {
            owner: peers[owner].rows.remote(owner, name, rows) for owner, rows in requests if owner not in self.shards
        }
        fetched = dict(zip(remote, ray.get(list(remote.values())), strict=True))
        replies = [
            fetched[owner] if owner in fetched else self.shards[owner].rows(name, rows) for owner, rows in requests
        ]
        shard.receive(name, depth, replies)
        return sum(int(reply.nbytes) for reply in fetched.values())

    @ray.method(concurrency_group=SERVE)
    def rows(self, part: int, name: str, index: Any) -> Any:
        """`Shard.rows`, for a peer."""
        return self.shards[part].rows(name, index)

    @ray.method(concurrency_group=SERVE)
    def progress(self) -> dict[int, tuple[int, int]]:
        """(done, total) of the encodings under way, by part."""
        return dict(self._progress)

    @ray.method(concurrency_group=SERVE)
    def vitals(self) -> dict[str, Any]:
        """Where it lives, and its peak memory in bytes."""
        return {
            "host": socket.gethostname(),
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "host_bytes": peak_memory(),
            "gpu_bytes": peak_gpu_memory(),
        }
