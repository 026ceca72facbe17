"""Shards whose texts are encoded by the language model's workers give the local answers."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import ray
from test_pool import answers, local_pool

from cluster.encoder_group import EncoderGroup
from cluster.placement import allot
from cluster.pool import RayPool
from talk_dist.config import KernelConfig
from talk_dist.resources import ClusterConfig, DeepSpeedConfig, RuntimeConfig


@pytest.fixture(scope="module")
def adapted(make_encoder):
    return make_encoder(adapters=True)


@pytest.fixture(scope="module")
def group(one_ray, adapted):
    made = EncoderGroup(adapted.config, DeepSpeedConfig(workers=2, stage=3, encode_texts=True, cpus=0.5))
    yield made
    made.close()


@pytest.fixture(scope="module")
def pool(four, adapted, group):
    runtime, cluster = RuntimeConfig(threads=1, cache=False), ClusterConfig(actors=2, cpus=0.5)
    allotment = allot(4, [{"CPU": 8}], runtime, cluster, lambda parts: 100 << 20)
    made = RayPool(four, adapted.config, KernelConfig(), runtime, cluster, allotment, group)
    yield made
    made.close()


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        if np.issubdtype(np.asarray(a).dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
        else:
            assert np.array_equal(a, b)


def test_split_weights_encode_the_texts_of_every_shard(four, adapted, pool):
    for seed in (3, 4):
        adapted.reset_adapters(seed)
        adapters = {name: value + 0.01 * seed for name, value in adapted.adapters().items()}
        close(answers(pool, adapters), answers(local_pool(four, adapted), adapters))
    assert {"encoder-0", "encoder-1", "shard-0+2"} <= pool.vitals().host_bytes.keys()


def test_a_worker_that_dies_while_it_encodes_is_replaced(four, adapted, group, pool, monkeypatch):
    adapted.reset_adapters(7)
    before = group.workers
    pid = ray.get(before[1].vitals.remote())["pid"]
    original = pool._crew.each

    def each(parts, start, failures, progress=None):  # once, when an actor has just been told to ask the workers
        if progress is not None:
            monkeypatch.setattr(pool._crew, "each", original)

            def ask_and_kill(part):
                ref = start(part)
                os.kill(pid, signal.SIGKILL)
                return ref

            return original(parts, ask_and_kill, failures, progress)
        return original(parts, start, failures, progress)

    monkeypatch.setattr(pool._crew, "each", each)
    pool.encode(adapted.adapters(), lambda done, total: None)
    assert group.workers != before
    close(answers(pool, adapted.adapters()), answers(local_pool(four, adapted), adapted.adapters()))
