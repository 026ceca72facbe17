"""Whatever dies, and whenever: the same x_s to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_pool import SMALL, answers, local_pool, same

from talk_dist.config import SyntheticConfig, TwoStageConfig
from talk_dist.distill import distill
from talk_dist.errors import ShardError
from talk_dist.runtime.callbacks import Callback

BOTH = replace(
    SMALL,
    synthetic=SyntheticConfig(size=6, tokens=4, init="two-stage"),
    two_stage=TwoStageConfig(2, student_steps=2, student_passes=5, judges=1, token_steps=2, validate_every=1),
)
TRAPS = [
    ("encode", 1),
    ("student_grads", 2),
    ("exchange-H", 0),
    ("propagate", 3),
    ("exchange-Z", 2),
    ("measure_norms", 0),
    ("learn", 2),
    ("loss_and_grads", 3),
    ("krr_scores", 1),
    ("student_stage", 2),
    ("exchange-X", 1),
]


class Setting(Callback):
    """Sets some traps after each epoch, so that they spring one after another."""

    def __init__(self, trap):
        self.trap, self.left = trap, [TRAPS[:4], TRAPS[4:8], TRAPS[8:]]  # four in one call would be too many
        self.epoch({})

    def epoch(self, record):
        for phase, part in self.left.pop(0) if self.left else ():
            self.trap.set(phase, part)


def test_actors_killed_in_every_phase_change_nothing(four, make_encoder, make_ray_pool, trap):
    encoder = make_encoder(adapters=True)
    expected = distill(local_pool(four, encoder), encoder, BOTH)
    pool = make_ray_pool(four, encoder, actors=2)
    try:
        found = distill(pool, encoder, BOTH, [Setting(trap)])
        restarts = pool.vitals().restarts
    finally:
        pool.close()
    assert trap.sprung()
    assert restarts == len(TRAPS)
    assert found.token_embeds.equal(expected.token_embeds)
    assert [r.get("loss") for r in found.metrics["history"]] == [r.get("loss") for r in expected.metrics["history"]]


def test_an_actor_that_always_dies_is_given_up_but_not_one_that_dies_now_and_then(
    tags, make_encoder, make_ray_pool, trap
):
    encoder = make_encoder()
    pool = make_ray_pool(tags[2], encoder, attempts=2)
    try:
        pool.encode({})
        for _ in range(2):
            trap.set("sample", 1)
            assert len(pool.sample(2, 0).label)
        trap.set("sample", 1)
        trap.set("propagate", 1)
        with pytest.raises(ShardError, match=r"shard 1 of .* \d+ halo rows\) was lost 2 times in one call"):
            pool.sample(2, 0)
        assert same(answers(pool, {}), answers(local_pool(tags[2], encoder), {}))  # it can still be asked
    finally:
        pool.close()
