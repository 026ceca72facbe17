"""RayPool = LocalPool to the bit, and what crosses the driver does not grow with the graph."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray
import torch

from cluster.metrics import GAUGES, Gauges, samples
from talk_dist.config import (
    DistillConfig,
    InnerConfig,
    KernelConfig,
    OuterConfig,
    StudentConfig,
    SyntheticConfig,
)
from talk_dist.distill import distill
from talk_dist.errors import ConfigError
from talk_dist.models.gnn import Student
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.boundary import LossSpec, StudentState
from talk_dist.runtime.pool import LocalPool

WIDTH = 32
SMALL = DistillConfig(
    seed=1,
    synthetic=SyntheticConfig(size=6, tokens=4, init="random"),
    student=StudentConfig(hidden=16),
    inner=InnerConfig(passes=15, adapter_lr=1e-2),
    outer=OuterConfig(epochs=2, steps=2, lr=1e-2, targets="teacher"),
)


@pytest.fixture(scope="module")
def adapted(make_encoder):
    return make_encoder(adapters=True)


@pytest.fixture(scope="module")
def pool(four, adapted, make_ray_pool):
    """Four actors, for the tests that leave them alive."""
    made = make_ray_pool(four, adapted)
    yield made
    made.close()


def local_pool(tag, encoder):
    return LocalPool(tag, encoder, KernelConfig(), RuntimeConfig(threads=1, cache=False))


def answers(pool, adapters, seed=0):
    """Everything that the protocol gives, as one list of arrays."""
    rng = np.random.default_rng(seed)
    h_s, dual = rng.normal(size=(5, WIDTH)).astype(np.float32), rng.normal(size=(5, 3))
    student = StudentState.of(Student(StudentConfig(hidden=16), WIDTH, 3, seed))
    pool.encode(adapters)
    found = [np.asarray(value) for value in vars(pool.loss_and_grads(h_s, dual, LossSpec("ce", 0.5))).values()]
    pool.learn(student)
    taught = LossSpec("mse", targets="teacher")
    found += [np.asarray(value) for value in vars(pool.loss_and_grads(h_s, dual, taught)).values()]
    for targets in ("labels", "teacher"):
        sums = pool.student_grads(student, LossSpec("ce", targets=targets))
        found += [np.asarray(sums.loss), np.asarray(sums.num_rows), *sums.d_weights.values()]
    found.append(pool.krr_scores(h_s, dual, "val"))
    told = set()  # a pass that was lost is told again
    found += [pool.student_scores(student, split, lambda *at: told.add(at)) for split in ("val", "test")]
    found.append(np.array(sorted(told)))
    sample = pool.sample(4, seed)
    found += [sample.label, sample.features, sample.place, pool.tokens(sample.place).values, pool.gather()]
    return found


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_four_parts_in_actors_give_the_local_answers_to_the_bit(four, adapted, pool):
    local = local_pool(four, adapted)
    for seed in (3, 4):  # new adapters: everything is encoded again
        adapted.reset_adapters(seed)
        adapters = {name: value + 0.01 * seed for name, value in adapted.adapters().items()}
        assert same(answers(pool, adapters), answers(local, adapters))


@pytest.mark.parametrize("fields", ["memory", "disk"])
def test_actors_keep_what_is_below_the_adapters(four, make_encoder, make_ray_pool, tmp_path, fields):
    """To the bit what one process keeps, at the first encoding and from it at the second."""
    encoder = make_encoder(adapters=True, adapted_layers=1)
    runtime, kernel = RuntimeConfig(threads=1, cache=False, scratch=str(tmp_path)), KernelConfig(fields=fields)
    local = LocalPool(four, encoder, kernel, runtime)
    pool = make_ray_pool(four, encoder, kernel=kernel, actors=2)
    try:
        for seed in (3, 4):
            encoder.reset_adapters(seed)
            adapters = {name: value + 0.01 * seed for name, value in encoder.adapters().items()}
            assert same(answers(pool, adapters), answers(local, adapters))
    finally:
        pool.close()


def test_one_local_part_gives_the_same_within_rounding(tags, adapted, pool):
    h_s, dual = torch.randn(5, WIDTH).numpy(), torch.randn(5, 3).double().numpy()
    results = []
    for each in (pool, local_pool(tags[1], adapted)):
        each.encode(adapted.adapters())
        results.append(each.loss_and_grads(h_s, dual, LossSpec("mse")))
    np.testing.assert_allclose(results[0].d_hs, results[1].d_hs, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(results[0].loss, results[1].loss, rtol=1e-5)


def test_a_whole_distillation_is_the_same_to_the_bit(four, adapted, pool):
    results = [distill(each, adapted, SMALL) for each in (pool, local_pool(four, adapted))]
    assert results[0].token_embeds.equal(results[1].token_embeds)
    histories = [result.metrics["history"] for result in results]
    for name in ("val_accuracy", "krr_val_accuracy", "inner_loss"):
        assert [r[name] for r in histories[0]] == [r[name] for r in histories[1]]
    assert [r.get("loss") for r in histories[0]] == [r.get("loss") for r in histories[1]]


def test_a_record_says_where_the_time_and_the_memory_went(adapted, pool):
    record = distill(pool, adapted, SMALL).metrics["history"][0]
    assert {"inner", "encode", "exchange", "propagate", "validate"} <= record["seconds"].keys()
    assert all({"kernel", "solve", "inject"} <= step.keys() for step in record["seconds"]["steps"])
    vitals = record["vitals"]
    assert vitals["bytes_moved"] > 0
    assert vitals["restarts"] == 0
    assert vitals["host_bytes"].keys() == {"driver", "shard-0", "shard-1", "shard-2", "shard-3"}
    assert min(vitals["host_bytes"].values()) > 100 << 20
    gauges = {(name, *tags.values()) for name, tags, _ in samples(record)}
    assert {name for name, *_ in gauges} == GAUGES.keys() - {"talk_dist_progress"}
    phases = {"inner", "encode", "exchange", "propagate", "validate", "kernel", "solve", "inject"}
    assert phases <= {phase for name, *phase in gauges if name == "talk_dist_step_seconds" for phase in phase}

    told = Gauges(every_seconds=0.05)
    told.epoch(record)
    told.progress("encode", 3, 4, {})
    time.sleep(0.3)
    assert told._thread.is_alive()  # Ray takes them
    told.close()


def test_gauges_are_set_again_until_the_run_ends(monkeypatch):
    """Ray forgets a gauge that was not set for twenty seconds; the last words of a run may be older."""
    seen = []

    class Recorder:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def set(self, value, tags):
            seen.append((self.name, value, *tags.values()))

    monkeypatch.setattr("cluster.metrics.Gauge", Recorder)
    gauges = Gauges(every_seconds=0.01)
    for done in (1, 3):
        gauges.progress("tokens", done, 4, {})
    end = time.monotonic() + 20
    while seen.count(("talk_dist_progress", 0.75, "tokens")) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    gauges.close()
    assert seen.count(("talk_dist_progress", 0.75, "tokens")) >= 3
    before = len(seen)
    time.sleep(0.05)
    assert len(seen) == before


def test_texts_are_encoded_once(adapted, pool):
    adapted.reset_adapters(9)
    pool.encode(adapted.adapters())
    pool.meter.take()
    pool.encode(adapted.adapters())
    assert pool.meter.take() == {}


def test_an_error_in_a_shard_is_raised_at_once(pool):
    with pytest.raises(KeyError, match="nothing"):
        pool._ask("rows", "nothing", np.arange(2))
    assert pool.vitals().restarts == 0


def test_what_crosses_the_driver_does_not_grow_with_the_graph(
    prepare_graph, graph_of_size, make_encoder, make_ray_pool, monkeypatch
):
    """Everything that the driver gets from actors or gives to them, pickled, on graphs of one and of four sizes."""
    crossed = []
    get = ray.get

    def spy(refs, **settings):
        value = get(refs, **settings)
        crossed.append(len(ray.cloudpickle.dumps(value)))
        return value

    encoder, sizes = make_encoder(), []
    for scale in (1, 6):
        tag = prepare_graph(graph_of_size(60 * scale, 110 * scale, seed=2), parts=2)
        pool = make_ray_pool(tag, encoder, actors=1)
        monkeypatch.setattr(ray, "get", spy)
        crossed.clear()
        pool.encode({})
        h_s = np.zeros((5, WIDTH), np.float32) + 0.1
        pool.loss_and_grads(h_s, np.ones((5, 3)), LossSpec("mse"))
        pool.krr_scores(h_s, np.ones((5, 3)), "val")
        pool.student_scores(StudentState.of(Student(StudentConfig(hidden=16), WIDTH, 3, 0)), "val")
        pool.sample(2, 0)
        monkeypatch.setattr(ray, "get", get)
        sizes.append(sum(crossed))
        pool.close()
    assert sizes[1] < 1.02 * sizes[0]  # the counts have more digits
    assert sizes[0] > 1000


def test_settings_that_the_graph_cannot_serve_arrive_as_they_are(tags, make_encoder, make_ray_pool):
    pool = make_ray_pool(tags[2], make_encoder(), kernel=KernelConfig(architecture="gcn", hops=5), actors=1)
    with pytest.raises(ConfigError, match=r"kernel\.hops = 5.*prepare it again"):
        pool.encode({})
    pool.close()
