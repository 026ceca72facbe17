"""What a group of encoder workers asks of the cluster, and what its workers and DeepSpeed are told."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from cluster import encoder_group
from cluster.encoder_group import EncoderGroup
from cluster.encoder_places import Place, check_devices, engine_config, environments
from talk_dist.config import EncoderConfig
from talk_dist.errors import CapacityError, ConfigError
from talk_dist.resources import DeepSpeedConfig


def test_settings_that_cannot_work(one_ray, encoder_folder, monkeypatch):
    """Each is told at once, before a process is started."""
    monkeypatch.setattr(encoder_group, "reserve", None)
    config = EncoderConfig(encoder_folder)
    for encoder, settings, message in (
        ({}, {"workers": 0}, "deepspeed.workers = 0"),
        ({}, {"workers": 1, "stage": 0, "offload": True}, "stage 0 splits nothing"),
        ({"device": "cpu"}, {"workers": 1, "gpus": 1}, "contradict each other"),
        ({"device": "cuda"}, {"workers": 1}, "needs deepspeed.gpus = 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            EncoderGroup(replace(config, **encoder), DeepSpeedConfig(**settings))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(ConfigError, match=r'pip install "talk-dist\[deepspeed\]"'):
        EncoderGroup(config, DeepSpeedConfig(workers=1))


def test_no_room(one_ray, encoder_folder):
    with pytest.raises(
        CapacityError, match=r"no room for the encoder workers: 2 × \(500 CPU\).*fewer deepspeed.workers"
    ):
        EncoderGroup(EncoderConfig(encoder_folder), DeepSpeedConfig(workers=2, cpus=500), wait_seconds=0.5)


def test_no_two_ranks_share_a_gpu():
    def places(*seats):
        return [Place(node, "10.0.0.1", 1, gpus) for node, gpus in seats]

    check_devices(places(("a", ("0",)), ("a", ("1",)), ("b", ("0",))), gpus=True)
    check_devices(places(("a", ()), ("a", ())), gpus=False)
    with pytest.raises(ConfigError, match="encoder workers 0 and 2 share GPU 0 of node a"):
        check_devices(places(("a", ("0",)), ("a", ("1",)), ("a", ("2", "0"))), gpus=True)
    with pytest.raises(ConfigError, match="worker 1 was given no GPU on node b"):
        check_devices(places(("a", ("0",)), ("b", ())), gpus=True)


def test_ranks_count_within_their_node():
    """LOCAL_RANK is the place of a rank's own GPU among those that are visible to it."""
    seats = (("a", "3"), ("b", "0"), ("a", "1"), ("b", "2"), ("a", "0"))
    places = [Place(node, f"10.0.0.{node}", 7000 + i, (gpu,)) for i, (node, gpu) in enumerate(seats)]
    told = environments(places)
    assert [e["RANK"] for e in told] == list("01234")
    assert [e["LOCAL_RANK"] for e in told] == list("00112")
    assert [e["LOCAL_WORLD_SIZE"] for e in told] == list("32323")
    assert {(e["WORLD_SIZE"], e["MASTER_ADDR"], e["MASTER_PORT"]) for e in told} == {("5", "10.0.0.a", "7000")}
    for (_, gpu), e in zip(seats, told, strict=True):
        assert e["CUDA_VISIBLE_DEVICES"].split(",")[int(e["LOCAL_RANK"])] == gpu
    assert environments([replace(places[0], gpus=())])[0]["CUDA_VISIBLE_DEVICES"] == ""  # it reserved none


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_deepspeed_is_told(stage):
    zero = engine_config(DeepSpeedConfig(workers=2, stage=stage))["zero_optimization"]
    assert zero["stage"] == stage
    assert not {"offload_optimizer", "offload_param"} & zero.keys()
    if stage:
        config = engine_config(DeepSpeedConfig(workers=2, stage=stage, offload=True))
        assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
        assert ("offload_param" in config["zero_optimization"]) == (stage == 3)
        assert json.loads(json.dumps(config)) == config
