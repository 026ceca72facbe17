"""PREPARED ENCODER OUT: distil on three simulated nodes, one of which goes without a word after the first epoch.

Until Ray misses its heartbeats, every call to its actor fails: more often than a call may be repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from types import SimpleNamespace

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "12"}

import ray
from ray.cluster_utils import Cluster
from test_pool import SMALL

from cluster.session import open_session
from talk_dist.config import EncoderConfig
from talk_dist.data.tag import PreparedTag
from talk_dist.distill import distill
from talk_dist.resources import ClusterConfig, RuntimeConfig
from talk_dist.runtime.callbacks import Callback

PLAN = SimpleNamespace(actor=lambda parts, borrows: SimpleNamespace(host=100 << 20))
prepared, encoder_folder, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
workers = [cluster.add_node(num_cpus=2) for _ in range(2)]
cluster.wait_for_nodes()
lost = workers[0]


class LoseANode(Callback):
    def epoch(self, record):
        if record["epoch"] == 0:
            actors = [each["pid"] for each in pool._crew.look().values() if each["node"] == lost.node_id]
            for pid in [*actors, *(info.process.pid for group in lost.all_processes.values() for info in group)]:
                os.kill(pid, signal.SIGKILL)


config = dataclasses.replace(
    SMALL,
    encoder=EncoderConfig(name=encoder_folder, pooling="mean", precision="float32", device="cpu", adapters=True),
    runtime=RuntimeConfig(kind="ray", threads=1, cache=False),
    cluster=ClusterConfig(address=cluster.address, actors=3, attempts=2),
)
with open_session(config) as session:
    alive = sum(node["Alive"] for node in ray.nodes())
    encoder = session.encoder()
    pool = session.pool(PreparedTag(prepared), encoder, PLAN)
    synthetic = distill(pool, encoder, config, [LoseANode()])
    synthetic.save_pretrained(out)
    report = {"nodes before": alive, "restarts": pool.vitals().restarts}
cluster.shutdown()
print(json.dumps(report))
