"""The language model on workers of its own agrees with the single one, at every stage, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from cluster import encoder_group
from cluster.encoder_group import EncoderGroup, WorkerDiedError
from cluster.encoder_places import engine_config
from talk_dist.config import EncoderConfig, InnerConfig, StudentConfig
from talk_dist.errors import ConfigError, ShardError
from talk_dist.models.gnn import Student
from talk_dist.resources import DeepSpeedConfig

SETTINGS = {"adapters": True, "dropout": 0.3, "batch_tokens": 100}  # adapters' dropout is fixed by batch: it may be on
INNER = InnerConfig(passes=6, adapter_lr=1e-2, gnn_lr=1e-2)
EVERY = [(workers, stage) for workers in (1, 2) for stage in (0, 1, 2, 3)]
BATCH = 2  # 9 nodes are 5 batches: one of two workers has a batch less


def ids(case):
    return f"{case[0]} at stage {case[1]}"


@pytest.fixture(scope="module")
def single(make_encoder):
    return make_encoder(**SETTINGS)


@pytest.fixture(scope="module")
def groups(one_ray, encoder_folder):
    """workers -> a group, started once. At stage 3 the smallest weights are split too: DeepSpeed keeps small ones."""
    started = {}

    def split_all(settings):
        config = engine_config(settings)
        if settings.stage == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    def make(workers):
        if workers not in started:
            config = EncoderConfig(encoder_folder, pooling="mean", precision="float32", device="cpu", **SETTINGS)
            started[workers] = EncoderGroup(config, DeepSpeedConfig(workers=workers, cpus=0.5))
        return started[workers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_group, "engine_config", split_all)
        yield make
        for group in started.values():
            group.close()


def reload(group, **changes):
    """Other settings in the same processes: to start them anew takes ten seconds."""
    group.settings = replace(group.settings, **changes)
    group._call("load", group.config, encoder_group.engine_config(group.settings), group._adapters)
    return group


@pytest.fixture(scope="module")
def group(groups, request):
    workers, stage = request.param
    return reload(groups(workers), stage=stage, offload=False)


@pytest.fixture(scope="module")
def nodes():
    """Token embeddings (9, 5, 32), mask (9, 5), a gradient (9, 32) and labels (9, 3)."""
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 5, 1, 5, 4])[:, None]).float()
    x, d, y = (torch.randn(shape, generator=draw) for shape in ((9, 5, 32), (9, 32), (9, 3)))
    return 0.3 * x, mask, d, y.abs()


def move(*encoders):
    """The same adapters, far from their start, in all of them."""
    rng = np.random.default_rng(0)
    adapters = {name: rng.normal(0, 0.5, value.shape) for name, value in encoders[0].adapters().items()}
    for encoder in encoders:
        encoder.load_adapters(adapters)


def same(mine, truth, exact):
    """To the bit; at stage 3, where DeepSpeed puts its own linear map in place of torch's, to rounding."""
    if exact:
        np.testing.assert_array_equal(mine, truth)
    else:
        np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=1e-5 * float(np.abs(truth).max()))


def fit(encoder, nodes, seed, kind="gcn", inner=INNER, **settings):
    """A fit from the start -> result, student's weights, adapters."""
    x, mask, _, y = nodes
    encoder.reset_adapters(seed)
    student = Student(StudentConfig(kind=kind, hidden=8, dropout=0.0), 32, 3, seed)
    result = encoder.fit(student, x, y, inner, mask=mask, seed=seed, batch=BATCH, **settings)
    assert not student.training
    return result, {name: value.numpy() for name, value in student.state_dict().items()}, encoder.adapters()


def agree(mine, truth):
    """Two fits. The ranks add the gradients of the batches in another order, and Adam turns the rounding of a gradient
    near zero into a part of a step; the bound is a fiftieth of one (learning rate 0.01). Clipped gradients, stale
    moments or a step too many are tens of times beyond it."""
    assert mine[0].passes == truth[0].passes
    assert mine[0].loss == pytest.approx(truth[0].loss, rel=1e-5)
    for my_weights, weights in zip(mine[1:], truth[1:], strict=True):
        assert my_weights.keys() == weights.keys()
        for name in weights:
            np.testing.assert_allclose(my_weights[name], weights[name], rtol=0, atol=2e-4, err_msg=name)


# -- the same as one encoder ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", EVERY, indirect=True, ids=ids)
def test_synthetic_nodes(group, single, nodes):
    """Encodings, injected gradients, residuals: with mask and dropout, and weights that are split indeed."""
    x, mask, d, _ = nodes
    move(single, group)
    exact = group.settings.stage < 3
    for settings in ({"batch": BATCH}, {"batch": 4, "mask": mask, "dropout_seed": 7}):
        same(group.encode_embeds(x, **settings), single.encode_embeds(x, **settings), exact)
        same(group.inject(x, d, **settings), single.inject(x, d, **settings), exact)
    mine, truth = group.residual(x, d, BATCH), single.residual(x, d, BATCH)
    for one, other in zip(mine, truth, strict=True):
        same(one, other, exact)
    held = ray.get(
        group._workers[0].__ray_call__.remote(lambda w: sum(p.numel() for p in w.encoder.model.parameters()))
    )
    assert held == (sum(p.numel() for p in single.model.parameters()) if exact else 0)


@pytest.mark.parametrize("group", EVERY, indirect=True, ids=ids)
def test_real_texts(group, single, tags):
    tokens, reports = tags[1].partition(0).tokens, []
    move(single, group)
    mine = group.encode_tokens(tokens, lambda *report: reports.append(report))
    same(mine, single.encode_tokens(tokens), group.settings.stage < 3)
    assert reports[-1][0] == reports[-1][1]
    assert len(reports) == len(set(reports))


@pytest.mark.parametrize("group", EVERY, indirect=True, ids=ids)
def test_two_fits_in_a_row(group, single, nodes):
    """The second starts afresh: no moments, steps or weights of the first are left; students may differ."""
    for seed, kind in ((6, "gcn"), (7, "sgc")):
        agree(fit(group, nodes, seed, kind), fit(single, nodes, seed, kind))
        same(group.encode_embeds(nodes[0]), single.encode_embeds(nodes[0]), False)  # the adapters are in the workers


@pytest.mark.parametrize("group", [(2, 1), (2, 3)], indirect=True, ids=ids)
def test_fit_ends_as_the_single_one_does(group, single, nodes):
    """Patience, target loss, and a loss that is no number; what follows is as if that had not been."""
    jumpy = replace(INNER, gnn_lr=1.0, passes=30, patience=3)
    agree(fit(group, nodes, 1, "sgc", jumpy), truth := fit(single, nodes, 1, "sgc", jumpy))
    assert truth[0].passes < 30
    short = replace(INNER, adapter_passes=2)
    agree(fit(group, nodes, 1, inner=short), truth := fit(single, nodes, 1, inner=short))
    assert truth[0].passes == 2
    easy = replace(INNER, target_loss=2.0)
    agree(fit(group, nodes, 1, inner=easy), truth := fit(single, nodes, 1, inner=easy))
    assert truth[0].passes == 1
    for encoder in (single, group):
        with pytest.raises(ConfigError, match="training diverged: the loss is nan in pass 2"):
            fit(encoder, nodes, 1, inner=replace(INNER, gnn_lr=1e30, adapter_lr=1e30))
    agree(fit(group, nodes, 2), fit(single, nodes, 2))


@pytest.mark.parametrize("group", [(2, 3)], indirect=True, ids=ids)
def test_adapters(group, single):
    single.reset_adapters(11)
    group.reset_adapters(11)
    assert group.adapted
    for held in (group.adapters(), group._call("adapters")[1]):
        assert held.keys() == single.adapters().keys()
        for name, value in single.adapters().items():
            np.testing.assert_array_equal(held[name], value)
    with pytest.raises(ConfigError, match="adapters of another encoder"):
        group.load_adapters({"lora_of_nobody": np.zeros(1)})


@pytest.mark.parametrize("group", [(1, 0)], indirect=True, ids=ids)
def test_what_the_driver_tells_of_the_model(group, single):
    for name in ("width", "pooling", "max_positions", "fingerprint"):
        assert getattr(group, name) == getattr(single, name)
    assert group.tokenizer.fingerprint == single.tokenizer.fingerprint
    assert torch.equal(group.token_table, single.token_table)


@pytest.mark.parametrize("group", [(2, 1), (2, 3)], indirect=True, ids=ids)
def test_offload(group, single, nodes):
    reload(group, offload=True)
    try:
        agree(fit(group, nodes, 5), fit(single, nodes, 5))
        agree(fit(group, nodes, 6), fit(single, nodes, 6))
    finally:
        reload(group, offload=False)


@pytest.mark.parametrize("group", [(2, 3)], indirect=True, ids=ids)
def test_a_frozen_model(group, make_encoder, nodes, monkeypatch):
    """Split without anything to train; students are trained in the driver, `select` and all."""
    x, mask, d, _ = nodes
    monkeypatch.setattr(group, "config", replace(group.config, adapters=False))
    monkeypatch.setattr(group, "_adapters", {})
    reload(group)
    frozen = make_encoder()
    same(group.encode_embeds(x, mask, BATCH), frozen.encode_embeds(x, mask, BATCH), False)
    same(group.inject(x, d, mask, BATCH), frozen.inject(x, d, mask, BATCH), False)
    agree(fit(group, nodes, 3, select=lambda s: 1.0), fit(frozen, nodes, 3, select=lambda s: 1.0))
    assert not group.adapted
    monkeypatch.undo()
    reload(group)


@pytest.mark.parametrize("group", [(2, 1), (2, 3)], indirect=True, ids=ids)
def test_adapters_on_the_last_layer_and_cls_pooling(group, make_encoder, nodes, tags, monkeypatch):
    """Real texts go through all layers there: what is below the adapters is kept by none of the workers."""
    x, mask, d, _ = nodes
    settings = {"adapted_layers": 1, "pooling": "cls"}
    single, exact = make_encoder(**SETTINGS, **settings), group.settings.stage < 3
    monkeypatch.setattr(group, "config", replace(group.config, **settings))
    monkeypatch.setattr(group, "_adapters", single.adapters())
    reload(group)
    move(single, group)
    assert (group.frozen_layers, single.frozen_layers) == (0, 1)
    same(group.encode_tokens(tags[1].partition(0).tokens), single.encode_tokens(tags[1].partition(0).tokens), exact)
    same(group.inject(x, d, mask, BATCH), single.inject(x, d, mask, BATCH), exact)
    agree(fit(group, nodes, 3), fit(single, nodes, 3))
    monkeypatch.undo()
    reload(group)


# -- when something breaks --------------------------------------------------------------------------------


def wound(group, rank, passes, blow):
    """``blow()`` in the process of a rank as it begins its so-many-th pass through the model."""

    def prepare(worker):
        left, forward = [passes], worker.encoder._forward

        def counted(*arguments, **inputs):
            left[0] -= 1
            if left[0] == 0:
                blow()
            return forward(*arguments, **inputs)

        worker.encoder._forward = counted

    ray.get(group._workers[rank].__ray_call__.remote(prepare))


def killer():
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    return kill  # a nested function travels by value: workers cannot import this file


@pytest.mark.parametrize("group", [(2, 3)], indirect=True, ids=ids)
def test_a_worker_is_killed_while_gradients_are_injected(group, nodes):
    """The other hangs in a collective. A new group has the adapters of before and gives the same bits."""
    x, mask, d, _ = nodes
    move(group)
    undisturbed, before = group.inject(x, d, mask, BATCH), group._workers
    wound(group, 1, 2, killer())
    assert torch.equal(group.inject(x, d, mask, BATCH), undisturbed)
    assert not set(group._workers) & set(before)


@pytest.mark.parametrize("group", [(2, 1)], indirect=True, ids=ids)
def test_a_worker_is_killed_in_training(group, nodes):
    """The second pass is lost; adapters and student begin again."""
    undisturbed = fit(group, nodes, 5)
    wound(group, 0, 6, killer())
    again = fit(group, nodes, 5)
    assert again[0] == undisturbed[0]
    for mine, truth in zip(again[1:], undisturbed[1:], strict=True):
        for name in truth:
            np.testing.assert_array_equal(mine[name], truth[name])


@pytest.mark.parametrize("group", [(1, 1)], indirect=True, ids=ids)
def test_errors_of_our_own_are_raised_at_once(group, nodes):
    with pytest.raises(ConfigError, match=r"synthetic.tokens = 65: .* has 64 positions"):
        group.encode_embeds(torch.zeros(3, 65, 32))
    with pytest.raises(ConfigError, match="without `select`"):
        fit(group, nodes, 1, select=lambda s: 1.0)
    before = group._workers

    def idle(worker):
        worker.engine.step = lambda: None

    ray.get(before[0].__ray_call__.remote(idle))
    with pytest.raises(ConfigError, match="left the adapters where they were"):
        fit(group, nodes, 1)
    assert group._workers is before  # nothing was started again


@pytest.mark.parametrize("group", [(1, 1)], indirect=True, ids=ids)
def test_too_many_deaths_in_one_call_name_the_rank(group, nodes, monkeypatch):
    starts = []

    def start():
        starts.append(1)
        raise WorkerDiedError(0, RuntimeError("killed"))

    monkeypatch.setattr(group, "_start", start)
    monkeypatch.setattr(group, "_workers", [])
    with pytest.raises(ShardError, match=r"encoder worker 0 of 1 died in inject, death 3.*\(killed\)"):
        group.inject(nodes[0], nodes[2])
    assert len(starts) == 3


@pytest.mark.parametrize("group", [(2, 3)], indirect=True, ids=ids)
def test_an_error_on_one_rank_ends_the_wait_of_the_others(group, nodes, monkeypatch):
    def boom():
        raise RuntimeError("boom")

    monkeypatch.setattr(encoder_group, "GRACE_SECONDS", 1.0)
    wound(group, 0, 2, boom)
    with pytest.raises(RuntimeError, match="boom"):
        group.inject(nodes[0], nodes[2], batch=BATCH)
    assert not group._workers  # the next call starts new ones
