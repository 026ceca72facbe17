"""Whatever dies, and whenever: the same x_s to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_pool import SMALL, WIDTH, answers, local_pool, same

from talk_dist.config import EncoderConfig, SyntheticConfig, TwoStageConfig
from talk_dist.distill import distill
from talk_dist.errors import ShardError
from talk_dist.models.encoder import load_encoder

GIVEN = replace(
    SMALL,
    encoder=EncoderConfig(name=f"given:{WIDTH}", device="cpu"),
    synthetic=SyntheticConfig(size=6, tokens=1, init="two-stage"),
    two_stage=TwoStageConfig(2, student_steps=2, student_passes=5, judges=1, token_steps=2, validate_every=1),
)
TRAPS = [
    ("encode", 1),
    ("exchange-H", 0),
    ("propagate", 3),
    ("exchange-Z", 2),
    ("measure_norms", 0),
    ("learn", 2),
    ("loss_and_grads", 3),
    ("student_grads", 2),
    ("krr_scores", 1),
    ("student_stage", 2),
    ("student_scores", 1),
    ("exchange-X", 1),
]


def test_actors_killed_in_every_phase_change_nothing(graph, prepare_graph, make_ray_pool, trap):
    """Of a graph that brings its encodings: an actor is there again in a third of the time."""
    four = prepare_graph(graph.with_encodings(WIDTH), parts=4, encoder=GIVEN.encoder.name)
    encoder = load_encoder(GIVEN.encoder)
    expected = distill(local_pool(four, encoder), encoder, GIVEN)
    for phase, part in TRAPS:
        trap.set(phase, part)
    pool = make_ray_pool(four, encoder, actors=2, attempts=len(TRAPS))
    try:
        found = distill(pool, encoder, GIVEN)
        restarts = pool.vitals().restarts
    finally:
        pool.close()
    assert trap.sprung()
    assert restarts == len(TRAPS)
    assert found.token_embeds.equal(expected.token_embeds)
    assert [r.get("loss") for r in found.metrics["history"]] == [r.get("loss") for r in expected.metrics["history"]]
    for name in ("start", "val_accuracy"):
        assert found.metrics[name] == expected.metrics[name]


def test_an_actor_that_always_dies_is_given_up_but_not_one_that_dies_now_and_then(
    tags, make_encoder, make_ray_pool, trap
):
    encoder = make_encoder(adapters=True)
    adapters = {name: value + 0.01 for name, value in encoder.adapters().items()}
    pool = make_ray_pool(tags[2], encoder, attempts=2)
    try:
        trap.set("encode", 1)
        pool.encode(adapters)
        trap.set("sample", 1)
        assert len(pool.sample(2, 0).label)
        trap.set("sample", 1)
        trap.set("propagate", 1)
        with pytest.raises(ShardError, match=r"shard 1 of .* \d+ halo rows\) was lost 2 times in one call"):
            pool.sample(2, 0)
        assert same(answers(pool, adapters), answers(local_pool(tags[2], encoder), adapters))  # it can still be asked
    finally:
        pool.close()
