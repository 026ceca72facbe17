"""The plan of a run: counted bytes are those of a real shard; what cannot fit is refused with what to change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from talk_dist.commands import preflight
from talk_dist.config import DistillConfig
from talk_dist.errors import CapacityError, ConfigError
from talk_dist.evaluate import EvaluateConfig
from talk_dist.models.shape import ModelShape
from talk_dist.runtime import estimate, memory
from talk_dist.runtime.estimate import plan
from talk_dist.runtime.shard import field_names
from talk_dist.runtime.speed import measured_rate
from talk_dist.synthetic import coresets
from talk_dist.synthetic.artifact import SyntheticTAG

MINILM = ModelShape(width=384, layers=6, inner=1536, heads=12, vocabulary=30522, positions=512)


def with_values(config, **sections):
    """config with single fields of its sections changed."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("architecture", ["gcn", "sgc"])
def test_counted_bytes_are_those_of_real_shards(tags, make_encoder, make_pool, parts, precision, architecture):
    encoder = make_encoder()
    kernel = {"precision": precision, "architecture": architecture, "hops": 3}
    pool = make_pool(encoder, parts, **kernel)
    config = with_values(DistillConfig(), kernel=kernel)
    found = plan(tags[parts].meta, config, ModelShape.of(encoder.model.config), 5, None)
    assert len(found.shards) == parts
    for shard, counted in zip(pool.shards, found.shards, strict=True):
        part = shard.part
        assert counted["tokens"] == part.tokens.values.nbytes + part.tokens.offsets.nbytes
        assert counted["H"] == shard._fields["H"].nbytes
        assert counted["Z"] == shard._fields["Z"].nbytes
        before = [name for name in field_names(pool.shards[0].spec.kernel) if name[0] == "P"]
        assert counted["hops before"] == sum(shard._fields[name].nbytes for name in before)
        graph = [
            part.indptr,
            part.indices,
            part.degree,
            part.halo_node,
            part.halo_owner,
            part.halo_row,
            part.halo_depth,
        ]
        ids = [part.node, part.label, part.split, np.zeros(part.num_own, np.int64)]
        assert counted["graph"] == pytest.approx(sum(a.nbytes for a in [*graph, *ids]), rel=0.15)


def test_model_sizes(make_encoder):
    model = make_encoder().model
    real = sum(p.numel() * 4 for p in model.parameters())
    assert ModelShape.of(model.config).bytes == pytest.approx(real, rel=0.1)
    assert MINILM.bytes == pytest.approx(4 * 22.7e6, rel=0.02)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4", "int2", "int1"])
def test_bytes_of_the_artifact(tags, storage, soft):
    synthetic = {"storage": storage, "tokens": 9, "learn_labels": soft}
    found = plan(tags[1].meta, with_values(DistillConfig(), synthetic=synthetic), MINILM, 5, None)
    labels = torch.eye(3)[[0, 1, 1, 2, 2]] * 0.9
    about = {"storage": storage, "classes": tags[1].classes, "label_smoothing": 0.1}
    labels = labels if soft else labels + 0.1 / 3
    assert found.artifact_bytes == SyntheticTAG(torch.randn(5, 9, 384), labels, config=about).num_bytes()


def test_more_work_costs_more(tags):
    meta, config = tags[2].meta, DistillConfig()

    def seconds(changed, evaluation=None):
        return plan(meta, changed, MINILM, 5, evaluation).seconds(1e11)

    base = seconds(config)
    assert set(base) == {"encode", "initialise", "outer epochs", "settle"}
    assert "settle" not in seconds(with_values(config, synthetic={"storage": "int8"}))
    assert all(value > 0 for value in base.values())
    assert seconds(with_values(config, encoder={"adapters": True}))["encode"] > base["encode"]
    assert seconds(with_values(config, outer={"epochs": 50}))["outer epochs"] > base["outer epochs"]
    plain = with_values(config, synthetic={"init": "medoid"}, outer={"targets": "labels"})
    assert seconds(plain)["initialise"] == 0
    assert seconds(with_values(plain, outer={"targets": "teacher"}))["initialise"] > 0
    few, many = (seconds(config, EvaluateConfig(seeds=n))["evaluate"] for n in (1, 4))
    assert many == pytest.approx(4 * few)


def test_memory_grows_with_what_is_held(tags):
    meta, config = tags[2].meta, DistillConfig()
    base = plan(meta, config, MINILM, 5, None)
    assert plan(meta, config, MINILM, 5000, None).whole().host > base.whole().host
    assert (
        plan(meta, with_values(config, kernel={"precision": "float64"}), MINILM, 5, None).whole().host
        >= base.whole().host
    )
    assert base.whole().host > estimate.BASE_BYTES + MINILM.bytes


def test_the_sample_is_counted_as_it_is_drawn(tags, make_encoder, make_pool):
    pool = make_pool(make_encoder(), 2)
    counts = coresets.allocate(5, tags[2].train_class_counts)
    found = plan(tags[2].meta, DistillConfig(), dataclasses.replace(MINILM, width=32), 5, None)
    assert found.sample == coresets.sample_for(pool, counts, 0).features.nbytes


def test_fields_on_disk_are_not_held(tags):
    meta = tags[2].meta
    there = plan(meta, with_values(DistillConfig(), kernel={"fields": "disk"}), MINILM, 5, None)
    for shard, counted in zip(there.shards, plan(meta, DistillConfig(), MINILM, 5, None).shards, strict=True):
        assert [shard[name] for name in ("H", "Z", "hops before", "student")] == [0] * 4
        assert {**counted, **shard} == {**counted, "H": 0, "Z": 0, "hops before": 0, "student": 0}


def test_a_students_rows_are_held_while_it_passes_alone(tags):
    """Of all shards of a process at once, beside what the phase needs anyway."""
    there = plan(tags[2].meta, DistillConfig(), MINILM, 5, None)
    rows = [shard["student"] for shard in there.shards]
    assert min(rows) > 0
    for process, parts in ((there.whole(), [0, 1]), (there.actor([1]), [1]), (there.actor([0, 1]), [0, 1])):
        others = {name: size for name, size in process.working.items() if name != "students"}
        assert others == {name: there.working[name] for name in others}
        assert process.working["students"] - there.working["students"] == sum(rows[part] for part in parts)
        assert process.held["shards"] == sum(
            size for part in parts for name, size in there.shards[part].items() if name not in ("halo", "student")
        )


@pytest.mark.parametrize("parts", [1, 7])
def test_what_is_kept_below_the_adapters_is_counted(tags, make_encoder, make_pool, parts):
    """In memory with the shard, on disk with the rest; not without frozen layers, nor where workers encode."""
    encoder = make_encoder(adapters=True, adapted_layers=1)
    pool, shape = make_pool(encoder, parts), ModelShape.of(encoder.model.config)
    real = [shard._lower.stretch(0, 60).values.nbytes for shard in pool.shards]

    def found(fields="memory", layers=1, lent=False):
        sections = {"kernel": {"fields": fields}, "encoder": {"adapters": True, "adapted_layers": layers}}
        if lent:
            sections |= {"runtime": {"kind": "ray"}, "deepspeed": {"workers": 1, "encode_texts": True}}
        return plan(tags[parts].meta, with_values(DistillConfig(), **sections), shape, 5, None)

    assert [shard["lower layers"] for shard in found().shards] == real
    assert found().disk == 0
    assert found("disk").disk - found("disk", layers=0).disk == sum(real)
    assert [shard["lower layers"] for shard in found("disk").shards] == [0] * parts
    assert found("disk", layers=2).disk == found("disk", lent=True).disk
    for other in (found(layers=2), found(lent=True)):
        assert [shard["lower layers"] for shard in other.shards] == [0] * parts
    assert found().flop["encode"] < found(layers=2).flop["encode"] == found(layers=0).flop["encode"]
    assert 2 * found().adapters == found(layers=2).adapters


@pytest.mark.parametrize(("architecture", "hops"), [("sgc", 2), ("sgc", 3), ("gcn", 2)])
def test_room_on_disk_is_that_of_the_files(tags, make_encoder, make_pool, architecture, hops):
    """Of encodings and what propagation makes of them; a student's come and go."""
    config = with_values(DistillConfig(), kernel={"fields": "disk", "architecture": architecture, "hops": hops})
    encoder = make_encoder()
    pool, shape = make_pool(encoder, 2, architecture=architecture, hops=hops, fields="disk"), encoder.model.config
    files = sum(2 * shard._fields[name].size for shard in pool.shards for name in field_names(config.kernel))
    students = sum(2 * 2 * max(config.student.hidden, 32) * shard._fields.rows for shard in pool.shards)
    assert plan(tags[2].meta, config, ModelShape.of(shape), 5, None).disk == files + students


def test_what_does_not_fit_the_disk_is_refused(tags, tmp_path, monkeypatch):
    """A run in this process; a folder that is not there is named."""
    config = with_values(DistillConfig(), kernel={"fields": "disk"}, runtime={"scratch": str(tmp_path)})
    found = plan(tags[1].meta, config, MINILM, 5, None)
    preflight.refuse_if_too_large(found, config)
    monkeypatch.setattr(preflight, "available_disk", lambda scratch: found.disk - 1)
    with pytest.raises(CapacityError, match=r"KiB on disk and .* are free in .*set --runtime\.scratch to a folder"):
        preflight.refuse_if_too_large(found, config)
    monkeypatch.undo()
    gone = with_values(config, runtime={"scratch": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match=r"runtime\.scratch = '.*gone': No such file or directory"):
        preflight.refuse_if_too_large(found, gone)


def test_object_stores(tags):
    one, two = (plan(tags[parts].meta, DistillConfig(), MINILM, 50, None) for parts in (1, 2))
    halo = sum(shard["halo"] for shard in two.shards)
    assert two.object_store(2) >= 2 * halo  # H and Z
    # neighbours in the same process send nothing
    assert two.object_store(1) <= one.object_store(1) + two.reply + two.student
    many = dataclasses.replace(two, broadcast=1 << 40)
    assert many.object_store(2) > 1.9 * many.object_store(2, nodes=1)
    assert two.object_store(2, group=True) >= two.token_table


def test_the_search_for_tokens_is_the_driver_s(tags):
    """With workers only what it moves: they encode."""
    config = with_values(DistillConfig(), synthetic={"tokens": 64})
    found = plan(tags[1].meta, config, MINILM, 1000, None)
    moved = found.working["tokens"] - found.working["inject"]
    assert moved > 0
    assert found.driver(False).working["tokens"] == found.working["tokens"]
    assert found.driver(True).working["tokens"] == moved


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"encoder": {"batch_tokens": 10**9}}, "--encoder.batch_tokens"),
        ({"outer": {"inject_batch": 10**6}, "synthetic": {"tokens": 512}}, "--outer.inject_batch"),
    ],
)
def test_what_cannot_fit_is_refused_with_a_remedy(tags, config, advice):
    found = plan(tags[1].meta, with_values(DistillConfig(), **config), MINILM, 50_000, None)
    with pytest.raises(CapacityError, match=advice) as error:
        preflight.refuse_if_too_large(found, DistillConfig())
    assert "GiB" in str(error.value)


def test_what_the_machine_says():
    assert 0 < memory.available() < 2**60
    assert measured_rate(torch.device("cpu"), False, seconds=0.05) > 1e6
    assert [memory.gib(n) for n in (512, 3 << 20, 5 << 30)] == ["0.5 KiB", "3 MiB", "5.0 GiB"]
