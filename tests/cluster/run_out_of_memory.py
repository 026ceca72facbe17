"""PREPARED ENCODER: an actor eats memory until Ray's monitor kills it; prints the error that the pool raises."""

from __future__ import annotations

import sys
import time

import numpy as np
import ray

from cluster import crew
from cluster.actors import ShardActor
from cluster.placement import Allotment
from cluster.pool import RayPool
from talk_dist.config import EncoderConfig, KernelConfig
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ShardError
from talk_dist.resources import ClusterConfig, RuntimeConfig


class Eater(ShardActor):
    def call(self, part, method, *args):
        if method == "sample":
            eaten = []
            while True:
                eaten.append(np.ones(1 << 24))
                time.sleep(0.02)
        return super().call(part, method, *args)


crew.ShardActor = Eater
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
encoder = EncoderConfig(name=sys.argv[2], pooling="mean", precision="float32", device="cpu")
allotment = Allotment(parts=((0,),), cpus=1, gpus=0, memory=100 << 20, threads=1)
pool = RayPool(
    PreparedTag(sys.argv[1]), encoder, KernelConfig(), RuntimeConfig(cache=False), ClusterConfig(), allotment
)
pool.encode({})
pool.vitals()
try:
    pool.sample(2, 0)
except ShardError as error:
    print(error)
