"""Settling: on the grid to the bit, nearer than rounding, each node by itself, and only where a format asks for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from talk_dist.config import DistillConfig, EncoderConfig, SyntheticConfig
from talk_dist.errors import ConfigError
from talk_dist.runtime.outer import Objective
from talk_dist.synthetic import grid
from talk_dist.synthetic import settle as module
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.settle import Settling, settle


def linear(bits, nodes=4, wanted=4, unknown=96, seed=0):
    """x -> A_i x_i, few equations and many unknowns: (a settling whose targets a random x reaches, that x)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(nodes, wanted, unknown, generator=generator)
    x = torch.randn(nodes, unknown, generator=generator)
    target = (a @ x[..., None])[..., 0]

    def residual(x):
        error = (a[: len(x)] @ x[..., None])[..., 0] - target[: len(x)]
        return error.square().sum(1), 2 * (a[: len(x)].mT @ error[..., None])[..., 0]

    step = grid.steps(x[:, None], bits)[:, 0].expand_as(x)
    anchors = torch.zeros_like(x).scatter_(1, x.abs().argmax(1, keepdim=True), 1.0).bool()
    return Settling(residual, step, bits, target.square().sum(1), anchors), x


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_it_ends_on_the_grid_and_nearer_than_rounding(bits):
    settling, x = linear(bits)
    told = []
    found = settling.run(x, 120, lambda step, distances: told.append((step, distances)))
    assert settling.rounded(found).equal(found)
    assert found[settling.anchors].equal(settling.rounded(x)[settling.anchors])
    assert settling.residual(found)[0].sum() < 0.1 * settling.residual(settling.rounded(x))[0].sum()
    assert told[-1][0] == 120
    torch.testing.assert_close(told[-1][1], settling.residual(found)[0])


def test_what_a_node_becomes_does_not_depend_on_the_others():
    settling, x = linear(2)
    first = Settling(settling.residual, settling.step[:2], settling.bits, settling.size[:2], settling.anchors[:2])
    together, alone = settling.run(x, 60, lambda *_: None), first.run(x[:2], 60, lambda *_: None)
    torch.testing.assert_close(together[:2], alone)


def with_storage(**fields):
    return dataclasses.replace(DistillConfig(), synthetic=SyntheticConfig(tokens=6, **fields))


@pytest.mark.parametrize("gain", [1.0, 1.2])
@pytest.mark.parametrize("storage", ["int4", "int2", "int1"])
def test_a_settled_set_is_stored_as_it_is_and_encodes_to_what_it_did(make_encoder, storage, gain):
    encoder, x = make_encoder(), torch.randn(5, 6, 32, generator=torch.Generator().manual_seed(3))
    config = with_storage(storage=storage, gain=gain, settle_passes=120)
    settled = settle(encoder, x, config, lambda *_: None)
    about = {"storage": storage, "classes": ["a", "b"]}
    labels = torch.eye(2)[[0, 0, 1, 1, 1]]
    assert SyntheticTAG(settled, labels, config=about).as_stored().token_embeds.equal(settled)
    rounded = SyntheticTAG(x, labels, config=about).as_stored().token_embeds
    wanted = gain * encoder.encode_embeds(x)
    assert distance(encoder, settled, wanted) < 0.3 * distance(encoder, rounded, wanted)


def distance(encoder, x, wanted):
    return float((encoder.encode_embeds(x) - wanted).square().sum())


def test_groups_are_settled_as_they_are_by_themselves(make_encoder, monkeypatch):
    """What is held in memory at once does not change the result, and the report goes on from group to group."""
    encoder, x = make_encoder(), torch.randn(6, 6, 32, generator=torch.Generator().manual_seed(3))
    config, told = with_storage(settle_passes=20), []
    monkeypatch.setattr(module, "TOGETHER", 2)
    found = settle(encoder, x, config, lambda stage, step, total, facts: told.append((step, total)))
    alone = [settle(encoder, some, config, lambda *_: None) for some in x.split(2)]
    assert torch.equal(found, torch.cat(alone))
    assert [step for step, _ in told] == sorted(step for step, _ in told)
    assert told[-1] == (60, 60)


def test_auto_is_four_bits_and_eight_for_encodings():
    assert DistillConfig().storage == "int4"
    given = dataclasses.replace(DistillConfig(), encoder=EncoderConfig("given:8"))
    assert given.storage == "int8"
    assert with_storage(storage="int2").storage == "int2"


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_finer_formats_are_left_alone(make_encoder, storage):
    x = torch.randn(2, 6, 32)
    assert settle(make_encoder(), x, with_storage(storage=storage), lambda *_: None) is x


def test_it_starts_from_an_encoder_that_nothing_has_adapted(make_encoder):
    encoder, x = make_encoder(adapters=True), torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))
    config = with_storage(storage="int2", settle_passes=20)
    first = settle(encoder, x, config, lambda *_: None)
    encoder.load_adapters({name: value + 0.3 for name, value in encoder.adapters().items()})
    assert settle(encoder, x, config, lambda *_: None).equal(first)


def test_the_kernel_predictor_does_not_see_a_gain(make_encoder, make_pool):
    encoder = make_encoder()
    pool = make_pool(encoder, 1, precision="float64")
    pool.encode(encoder.adapters())
    h = torch.randn(6, encoder.width, generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.one_hot(torch.arange(6) % len(pool.tag.classes), len(pool.tag.classes)).float()
    short, long = (Objective(pool, DistillConfig()).krr_counts(gain * h, labels, "val") for gain in (1.0, 2.0))
    assert (short == long).all()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="settle_passes"):
        SyntheticConfig(settle_passes=0)
    with pytest.raises(ConfigError, match="gain"):
        SyntheticConfig(gain=0.0)


def test_numbers_are_rounded_little_by_little(monkeypatch):
    settling, x = linear(2)
    free, fit = [], Settling.fit

    def counted(self, x, still, *rest):
        free.append(int(still.sum()))
        return fit(self, x, still, *rest)

    monkeypatch.setattr(Settling, "fit", counted)
    settling.run(x, 60, lambda *_: None)
    assert free == sorted(free, reverse=True)
    assert len(set(free)) >= 5
