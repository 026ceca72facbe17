"""What workers that share a language model ask of the cluster, and what each of them and DeepSpeed is told."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from talk_dist.config import EncoderConfig
from talk_dist.data.given import given_width
from talk_dist.errors import ConfigError
from talk_dist.resources import DeepSpeedConfig


@dataclass(frozen=True)
class Place:
    """Where a worker lives, and a port that is free there."""

    node: str
    address: str
    port: int
    gpus: tuple[str, ...]


def engine_config(settings: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration. Raises ConfigError if nothing can be offloaded at this stage.

    The optimizer is torch's AdamW, given by the worker: DeepSpeed's own are compiled for minutes at the first use.
    Batches are accumulated by hand, so their sizes say nothing here.
    """
    # The default bucket takes 2 GB of a device; the adapters' gradients are a few megabytes.
    zero: dict[str, Any] = {"stage": settings.stage, "reduce_bucket_size": 5_000_000}
    if settings.offload:
        if settings.stage == 0:
            raise ConfigError("deepspeed.offload: stage 0 splits nothing that could be offloaded; take stage 1, 2 or 3")
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default clips at a norm of 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def check_settings(config: EncoderConfig, settings: DeepSpeedConfig) -> None:
    """Raises ConfigError for what cannot work, before anything is started."""
    if given_width(config.name) is not None:
        raise ConfigError(f"deepspeed.workers: encoder {config.name!r} is no model to be split; set it to 0")
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError('deepspeed.workers needs DeepSpeed; run `pip install "talk-dist[deepspeed]"`')
    if settings.workers < 1:
        raise ConfigError("deepspeed.workers = 0: a group needs at least 1")
    engine_config(settings)
    if settings.gpus and config.device == "cpu":
        raise ConfigError(f"encoder.device = 'cpu' and deepspeed.gpus = {settings.gpus:g} contradict each other")
    if not settings.gpus and config.device.startswith("cuda"):
        raise ConfigError(f"encoder.device = {config.device!r} needs deepspeed.gpus = 1")
    if not ray.is_initialized():
        raise ConfigError("deepspeed.workers needs a Ray cluster; set runtime.kind: ray")


def check_devices(places: Sequence[Place], gpus: bool) -> None:
    """Raises ConfigError if two ranks were given one GPU, or a rank none (``places`` in the order of ranks)."""
    owner: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places if gpus else ()):
        if not place.gpus:
            raise ConfigError(f"encoder worker {rank} was given no GPU on node {place.node}")
        for gpu in place.gpus:
            other = owner.setdefault((place.node, gpu), rank)
            if other != rank:
                raise ConfigError(f"encoder workers {other} and {rank} share GPU {gpu} of node {place.node}")


def environments(places: Sequence[Place]) -> list[dict[str, str]]:
    """The environment of every rank. LOCAL_RANK counts within a node and is the index of the rank's own GPU, because
    all ranks of a node see the GPUs of all of them (NCCL is slow between processes that hide theirs)."""
    seats, found = Counter(place.node for place in places), Counter[str]()
    result = []
    for rank, place in enumerate(places):
        visible = [other.gpus[0] for other in places if other.node == place.node and other.gpus]
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(found[place.node]),
            "LOCAL_WORLD_SIZE": str(seats[place.node]),
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": str(places[0].port),
        }
        found[place.node] += 1
        result.append(environment | {"CUDA_VISIBLE_DEVICES": ",".join(visible)})  # of a node's GPUs those reserved
    return result
