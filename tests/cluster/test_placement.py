"""Who gets what of a cluster."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from cluster import placement
from cluster.placement import allot, fits, reserve
from talk_dist.errors import CapacityError
from talk_dist.resources import ClusterConfig, RuntimeConfig


@pytest.mark.parametrize(
    ("parts", "nodes", "threads", "cluster", "actors", "cpus", "gpus", "used"),
    [
        (4, [{"CPU": 2}], 0, {}, 2, 1, 0, 1),  # no more actors than cores
        (4, [{"CPU": 8}], 0, {}, 4, 2, 0, 2),  # an equal share each
        (4, [{"CPU": 8}], 3, {}, 2, 3, 0, 3),  # threads are cores
        (1, [{"CPU": 8}, {"CPU": 8}], 0, {}, 1, 8, 0, 8),  # an actor lives on one node
        (8, [{"CPU": 16, "GPU": 4}], 0, {}, 4, 4, 1, 4),  # GPUs are taken where there are any
        (8, [{"CPU": 16, "GPU": 4}], 0, {"gpus": 0.5}, 8, 2, 0.5, 2),
        (8, [{"CPU": 16, "GPU": 4}], 0, {"gpus": 0}, 8, 2, 0, 2),
        (3, [{"CPU": 4}], 0, {"actors": 9, "cpus": 0.5}, 3, 0.5, 0, 1),  # never more than parts
        (6, [{}], 0, {}, 6, 1, 0, 1),  # workers that start when asked
        (3, [{"CPU": 8}, {"CPU": 8}], 0, {}, 3, 4, 0, 4),  # 16 cores, but on no node three times five
        (5, [{"CPU": 8}] * 4, 0, {}, 5, 4, 0, 4),
        (2, [{"CPU": 8}, {"CPU": 4}], 0, {}, 2, 4, 0, 4),
        (3, [{"CPU": 8}, {"CPU": 8}], 5, {}, 2, 5, 0, 5),  # nor a third actor of five threads
        (4, [{"CPU": 8, "GPU": 1}, {"CPU": 8}], 0, {}, 1, 8, 1, 8),  # nor cores on the node with the GPU
    ],
)
def test_allotment(parts, nodes, threads, cluster, actors, cpus, gpus, used):
    found = allot(parts, nodes, RuntimeConfig(threads=threads), ClusterConfig(**cluster), lambda mine: 1000 * len(mine))
    assert (len(found.parts), found.cpus, found.gpus, found.threads) == (actors, cpus, gpus, used)
    assert sorted(part for mine in found.parts for part in mine) == list(range(parts))
    assert found.memory == 1000 * -(-parts // actors)
    if nodes[0]:
        assert fits([bundle | {"memory": 0} for bundle in found.bundles], nodes)


def test_memory_can_be_set():
    found = allot(2, [{"CPU": 2}], RuntimeConfig(), ClusterConfig(memory_gib=1.5), lambda mine: 7)
    assert found.bundles == [{"CPU": 1.0, "memory": 1.5 * 2**30}] * 2


def test_no_room_is_said_in_time(one_ray, capsys):
    started = time.monotonic()
    with pytest.raises(CapacityError, match=r"no room for the shards: 2 × \(5 CPU and 3 GPU\) .* 6 GPU \(it has 0 GPU"):
        reserve([{"CPU": 5.0, "GPU": 3.0}] * 2, "SPREAD", 1.0, "the shards", "Add nodes")
    assert time.monotonic() - started < 20


def test_who_waits_is_told_at_once_what_for(one_ray, capsys):
    with pytest.raises(CapacityError, match=r"waited 3 s\. Add nodes"):
        reserve([{"GPU": 1.0}], "SPREAD", 3.0, "the shards", "Add nodes")
    first = capsys.readouterr().err.splitlines()[0]
    assert "ask the cluster of 1 node(s) for 1 GPU (it has 0 GPU, 0 GPU free); waiting 1 s more" in first


def test_a_trial_takes_of_what_its_sweep_reserved(monkeypatch):
    own, shard, worker = {"CPU": 1.0}, {"CPU": 2.0, "memory": 1e9}, {"CPU": 1.0}
    group = SimpleNamespace(bundle_specs=[own, shard, shard, worker, worker])
    monkeypatch.setattr(placement, "get_current_placement_group", lambda: group)
    monkeypatch.setattr(placement, "remove_placement_group", None)  # it is not the trial's to give back
    for asked, first in (([shard] * 2, 1), ([worker] * 2, 3), ([{"CPU": 2.0, "memory": 1.0001e9}], 2)):
        room = reserve(asked, "SPREAD", 1.0, "the shards", "Add nodes")
        assert (room.group, room.first) == (group, first)
        room.release()
    with pytest.raises(CapacityError, match=r"the shards need .* what was reserved for this trial is"):
        reserve([shard] * 3, "SPREAD", 1.0, "the shards", "Add nodes")


@pytest.mark.parametrize(
    ("bundles", "nodes", "expected"),
    [
        ([], [], True),
        ([{"CPU": 1}], [], False),
        ([{"CPU": 2}] * 2, [{"CPU": 4}], True),
        ([{"CPU": 2}] * 3, [{"CPU": 4}], False),
        ([{"CPU": 3}] * 2, [{"CPU": 4}, {"CPU": 2}], False),  # enough in sum, but a bundle lives on one node
        ([{"CPU": 1}, {"CPU": 4}], [{"CPU": 4}, {"CPU": 1}], True),  # the large one first
        ([{"CPU": 1, "GPU": 1}], [{"CPU": 8}], False),
        ([{"CPU": 1}] * 4 + [{"CPU": 4, "GPU": 1}], [{"CPU": 4, "GPU": 1}, {"CPU": 4}], True),  # GPUs first
        ([{"GPU": 0.1}] * 10, [{"GPU": 1}], True),  # whatever the sum of ten tenths is
        ([{"GPU": 0.1}] * 11, [{"GPU": 1}], False),
        ([{"CPU": 1, "memory": 3e9}] * 2, [{"CPU": 8, "memory": 5e9}], False),
        ([{"CPU": 1, "memory": 3e9}] * 2, [{"CPU": 8, "memory": 5e9}, {"CPU": 1, "memory": 3e9}], True),
    ],
)
def test_what_fits(bundles, nodes, expected):
    before = [dict(node) for node in nodes]
    assert fits(bundles, nodes) is expected
    assert nodes == before
