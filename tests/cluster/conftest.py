"""A real Ray with actors that die when told to, beside the local pool that nothing befalls."""

from __future__ import annotations

import pytest
import ray
import traps

from cluster import crew
from cluster.placement import allot
from cluster.pool import RayPool
from talk_dist.config import KernelConfig
from talk_dist.resources import ClusterConfig, RuntimeConfig


@pytest.fixture
def trap(one_ray, tmp_path, monkeypatch):
    folder = tmp_path / "fuses"
    folder.mkdir()
    ray.cloudpickle.register_pickle_by_value(traps)
    trap = traps.Trap(folder)
    monkeypatch.setattr(crew, "ShardActor", traps.trapped(trap))
    return trap


@pytest.fixture(scope="session")
def four(graph, prepare_graph):
    """The toy graph in four scattered parts."""
    return prepare_graph(graph, parts=4)


@pytest.fixture(scope="session")
def make_ray_pool(one_ray):
    """make_ray_pool(tag, encoder, actors=…) -> a RayPool with one thread a process, to be closed."""

    def make(tag, encoder, kernel=None, actors=0, **settings):
        runtime, cluster = RuntimeConfig(threads=1, cache=False), ClusterConfig(actors=actors, **settings)
        allotment = allot(tag.num_parts, [{"CPU": 8}], runtime, cluster, lambda parts: 100 << 20)
        return RayPool(tag, encoder.config, kernel or KernelConfig(), runtime, cluster, allotment)

    return make
