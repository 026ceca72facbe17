"""Texts as synthetic nodes: the search for tokens, what is stored of them, and how they leave as text."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cosine_similarity, one_hot

from talk_dist.config import DistillConfig
from talk_dist.data.tag import PreparedTag, TokenLists
from talk_dist.data.tokenizer import load_tokenizer
from talk_dist.distill import distill
from talk_dist.errors import ConfigError, DataError
from talk_dist.runtime.callbacks import Callback
from talk_dist.synthetic import init
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.decode import exact_tokens, nearest_texts, readings
from talk_dist.synthetic.discrete import MERGED, distance, draw, framed, invert_tokens, linear_gains, merge


def token_lists(rows):
    return TokenLists(np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(np.int32))


def random_ids(tokenizer, nodes, length, seed=0):
    words = torch.randint(len(tokenizer.words), (nodes, length), generator=torch.Generator().manual_seed(seed))
    return framed(token_lists(tokenizer.words[words.numpy()]), length, tokenizer)[0]


def search(encoder, ids, target, steps=6, seed=0, batch=32, nodes=None, tell=lambda *_: None):
    words, free = torch.from_numpy(encoder.tokenizer.words), slice(1, ids.shape[1] - 1)
    generators = [torch.Generator().manual_seed(seed + node) for node in nodes or range(len(ids))]
    return invert_tokens(encoder, ids, target, words, free, steps, generators, batch, tell)


@pytest.fixture
def problem(make_encoder):
    """(encoder, ids to start from, encodings of other texts)"""
    encoder = make_encoder()
    start, other = (random_ids(encoder.tokenizer, 5, 9, seed) for seed in (0, 1))
    return encoder, start, encoder.encode_embeds(encoder.token_table[other])


# -- the search -------------------------------------------------------------------------------------------


def test_gains_are_the_gradient_of_one_hot_tokens():
    generator = torch.Generator().manual_seed(0)
    table, ids, words = torch.randn(11, 4, generator=generator).double(), torch.tensor([3, 7, 3]), torch.arange(2, 11)

    def loss(embeds):
        return torch.tanh(embeds.cumsum(0) @ table[0]).sum() ** 2 + embeds.prod(0).sin().sum()

    onehot = one_hot(ids, 11).double().requires_grad_()
    (by_token,) = torch.autograd.grad(loss(onehot @ table), onehot)
    embeds = table[ids].requires_grad_()
    (by_embed,) = torch.autograd.grad(loss(embeds), embeds)
    gains = linear_gains(by_embed, ids, table, words)
    torch.testing.assert_close(gains, by_token.gather(1, ids[:, None]) - by_token[:, words])
    assert bool((gains[torch.arange(3), ids - 2].abs() < 1e-12).all())  # a token in its own place
    a_bit, moved = 1e-6, table[ids].clone()
    moved[1] += a_bit * (table[words[5]] - table[ids[1]])
    change = (loss(moved) - loss(table[ids])) / a_bit
    torch.testing.assert_close(change, -gains[1, 5], rtol=1e-4, atol=1e-6)


def test_only_directions_count():
    h, target = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(distance(3 * h, 0.1 * target), distance(h, target))
    torch.testing.assert_close(distance(h, target), 2 - 2 * cosine_similarity(h, target))


def test_no_node_ends_farther_than_it_began(problem):
    encoder, start, target = problem
    told = []
    found = search(encoder, start, target, tell=lambda step, distances: told.append(distances))

    def distances(ids):
        return distance(torch.from_numpy(encoder.encode_tokens(token_lists(ids.numpy()))), target)

    steps = [distances(start), *told]
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(steps))
    torch.testing.assert_close(distances(found), told[-1])
    assert float(told[-1].mean()) < 0.5 * float(steps[0].mean())
    assert found[:, 0].eq(2).all()  # [CLS]
    assert found[:, -1].eq(3).all()  # [SEP]
    assert np.isin(found[:, 1:-1], encoder.tokenizer.words).all()


def test_a_text_that_is_there_stays(make_encoder):
    encoder = make_encoder()
    ids = random_ids(encoder.tokenizer, 3, 7)
    assert search(encoder, ids, encoder.encode_embeds(encoder.token_table[ids]), steps=2).equal(ids)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_the_seed_fixes_the_tokens_and_batches_do_not_matter(problem, make_encoder, batch):
    encoder, start, target = problem
    found = search(encoder, start, target)
    assert search(make_encoder(batch_tokens=40 * batch), start, target, batch=batch).equal(found)
    assert not search(encoder, start, target, seed=50).equal(found)


def test_what_a_node_becomes_does_not_depend_on_the_others(problem):
    encoder, start, target = problem
    assert search(encoder, start[2:3], target[2:3], nodes=[2]).equal(search(encoder, start, target)[2:3])


def test_draws_and_merges():
    gains = torch.full((4, 6), -1.0)
    gains[1, 2], gains[3, 0] = 0.5, 2.0
    position, column = draw(gains, torch.Generator().manual_seed(0))
    assert {(1, 2), (3, 0)} == set(list(zip(position.tolist(), column.tolist(), strict=True))[:2])
    ids, position, token = torch.zeros(6).long(), torch.tensor([4, 2, 4, 0, 5]), torch.tensor([40, 20, 41, 10, 50])
    merged = merge(ids, position, token, torch.tensor([0.3, 0.1, 0.9, -0.1, 0.2]))
    assert merged.shape == (MERGED, 6)
    assert merged[0].tolist() == [0, 0, 0, 0, 41, 50]  # the best two, the better of two for one place
    assert merged[1:].tolist() == [[0, 0, 20, 0, 41, 50]] * (MERGED - 1)  # the fourth brought nothing


def test_framed_texts():
    tokenizer = load_tokenizer("minilm")
    assert tokenizer.frame == ([101], [102])
    read = tokenizer.encode(["graphs of tokenization", "##"], 16)
    ids, free = framed(read, 7, tokenizer)
    assert (free.start, free.stop) == (1, 6)
    assert [tokenizer.decode_token(i) for i in ids[0]] == ["[CLS]", "graphs", "of", "token", "graphs", "of", "[SEP]"]
    with pytest.raises(ConfigError, match=r"synthetic\.tokens = 2: 2 are special"):
        framed(read, 2, tokenizer)


def test_words_are_read_as_they_were_written():
    tokenizer = load_tokenizer("minilm")
    assert 20_000 < len(tokenizer.words) < tokenizer.vocab_size
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert tokenizer.parses_back([101, *rng.choice(tokenizer.words, 60).tolist(), 102])
    pieces = tokenizer.encode(["tokenization"], 8)[0].tolist()
    assert tokenizer.parses_back(pieces)
    assert not tokenizer.parses_back([101, *pieces[2:]])  # a piece that stands for no word
    assert not np.isin(pieces, tokenizer.words).all()


# -- the set ----------------------------------------------------------------------------------------------


SETTINGS = {
    "synthetic": {"size": 6, "tokens": 7, "discrete": True},
    "two_stage": {"feature_steps": 10, "student_steps": 0, "discrete_steps": 3},
    "inner": {"passes": 10},
    "outer": {"epochs": 0},
}


@pytest.mark.parametrize("together", [2, 512])
def test_stage_two_takes_real_tokens(make_encoder, make_pool, monkeypatch, together):
    encoder, reports = make_encoder(), []
    monkeypatch.setattr(init, "TOGETHER", together)

    class Reports(Callback):
        def progress(self, stage, done, total, metrics):
            reports.append((stage, done, total))

    made = distill(make_pool(encoder, 2), encoder, DistillConfig.from_dict(SETTINGS), [Reports()])
    assert made.token_embeds.equal(encoder.token_table[made.token_ids])
    steps = [report for report in reports if report[0] == "words"]
    assert steps[-1][1] == steps[-1][2] == len(steps)
    monkeypatch.setattr(init, "TOGETHER", 4)
    again = distill(make_pool(encoder, 1), encoder, DistillConfig.from_dict(SETTINGS))
    assert again.token_ids.equal(made.token_ids)


def test_outer_steps_are_refused():
    for section, fields in (("outer", {"epochs": 2}), ("synthetic", {"discrete": True, "init": "medoid"})):
        with pytest.raises(ConfigError, match=r"synthetic\.init must be two-stage .* and outer\.epochs 0"):
            DistillConfig.from_dict({**SETTINGS, section: fields})


def tag_of_ids(ids, table, **config):
    labels = one_hot(torch.arange(len(ids)) % 2, 2).float()
    return SyntheticTAG(table[ids], labels, config={"classes": ["ash", "birch"], **config}, token_ids=ids)


@pytest.mark.parametrize(("last", "size"), [(60_000, 2), (70_000, 4)])
def test_ids_give_the_same_embeddings_to_the_bit(tmp_path, last, size):
    table = torch.randn(70_001, 3, generator=torch.Generator().manual_seed(0))
    tag = tag_of_ids(torch.tensor([[5, last], [0, 5], [7, 8]]), table)
    tag.save_pretrained(tmp_path / "a")
    read = SyntheticTAG.from_pretrained(tmp_path / "a")
    assert read.num_bytes() == tag.num_bytes() == 3 * 2 * size + 3  # and a class each
    assert read.token_ids.equal(tag.token_ids)
    assert read.token_embeds.shape == (3, 2, 0)
    assert read.embedded(table).token_embeds.equal(tag.token_embeds)
    assert tag.as_stored().token_embeds.equal(tag.token_embeds)
    assert exact_tokens(tag.token_embeds, table).equal(tag.token_ids)
    assert "token_embeds" not in read.to_pyg()
    assert read.to_pyg().token_ids.equal(tag.token_ids)
    with pytest.raises(DataError, match=f"go up to {last}, the encoder has 100 tokens"):
        read.embedded(table[:100])
    with pytest.raises(ValueError, match="no rows"):
        exact_tokens(tag.token_embeds + 1e-3, table)


def test_texts_leave_as_a_table(tmp_path, make_encoder):
    encoder = make_encoder()
    tag = tag_of_ids(random_ids(encoder.tokenizer, 4, 6), encoder.token_table)
    for name in ("a.jsonl", "a.parquet"):
        tag.export_text(tmp_path / name, encoder.tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["label"] for row in rows] == ["ash", "birch", "ash", "birch"]
    read = encoder.tokenizer.encode([row["text"] for row in rows], 64)
    assert all(read[i].tolist() == ids for i, ids in enumerate(tag.token_ids.tolist()))
    with pytest.raises(DataError, match="are no texts"):
        SyntheticTAG(tag.token_embeds, tag.labels).export_text(tmp_path / "b.jsonl", encoder.tokenizer)


def test_the_nearest_texts_are_those_of_the_dense_reference(graph, make_encoder, make_pool):
    encoder = make_encoder()
    pool = make_pool(encoder, 7)
    tag = tag_of_ids(random_ids(encoder.tokenizer, 4, 6), encoder.token_table)
    labels = one_hot(torch.tensor([0, 0, 1, 2]), 3).float()
    tag = SyntheticTAG(tag.token_embeds, labels, token_ids=tag.token_ids)
    texts = graph.nodes["text"].to_pylist()
    h = torch.from_numpy(encoder.encode_tokens(encoder.tokenizer.encode(texts, 24))).double()
    mean = graph.adjacency / graph.adjacency.sum(1, keepdim=True)
    cosine = cosine_similarity(
        encoder.encode_embeds(tag.token_embeds).double()[:, None], (mean @ mean @ h)[None, graph.rows("train")], dim=2
    )
    found = nearest_texts(tag, pool, encoder, 3, seed=0)
    expected = cosine.topk(3, dim=1)
    torch.testing.assert_close(
        torch.tensor([[n.cosine for n in near] for near in found]).double(), expected.values, rtol=1e-4, atol=1e-4
    )
    best = graph.rows("train")[expected.indices[:, 0]]
    assert [near[0].text for near in found] == [texts[row] for row in best]
    assert [near[0].label for near in found] == [PreparedTag(pool.tag.path).classes[graph.label[row]] for row in best]


def test_from_the_command_line(tags, encoder_folder, told, tmp_path):
    encoder = ["--encoder.name", encoder_folder, "--encoder.precision", "float32", "--runtime.threads", "1"]
    small = [
        "--synthetic.size",
        "6",
        "--synthetic.tokens",
        "7",
        "--two_stage.feature_steps",
        "5",
        "--two_stage.student_steps",
        "0",
        "--inner.passes",
        "5",
    ]
    small += ["--two_stage.discrete_steps", "2", "--synthetic.discrete", "true"]
    run = ["distill", "--data", tags[2].path, "--out", tmp_path / "run", *encoder, *small]
    refused = told(*run, "--outer.epochs", "4", code=2)[1]
    assert "outer.epochs 0 (it is 4): outer steps move tokens off the vocabulary" in refused
    evaluation = ["--evaluate", "true", "--evaluation.seeds", "1", "--evaluation.against", "random"]
    table = told(*run, *evaluation, "--evaluation.recipe.passes", "5")[0]
    assert "| synthetic | 6 | 90 |" in table  # 6 * 7 ids of two bytes, 6 labels of one
    against = ["--seeds", 1, "--against", "random", "--recipe.passes", 5]
    again = told("evaluate", tmp_path / "run", "--data", tags[2].path, *against)[0]
    assert next(line for line in again.splitlines() if "| synthetic |" in line) in table
    seen = told("inspect", tmp_path / "run", "--data", tags[2].path, "--nearest", 2)[0]
    for word in ("6 nodes of 7 token ids", "90 as token ids", "nearest real training texts"):
        assert word in seen
    assert len(seen.split("nearest real training texts")[1].splitlines()) == 1 + 6 * 3
    assert "nearest real" not in told("inspect", tmp_path / "run")[0]
    out = told("export", tmp_path / "run", "--format", "text", "--out", tmp_path / "a.jsonl")[0]
    assert "6 texts; 6 of them are read as the very tokens" in out
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 6
    told("export", tmp_path / "run", "--out", tmp_path / "a.pt", "--encodings", "true")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].shape == (6, 32)


def test_readings_are_tokens_of_the_tokenizer(make_encoder):
    """Some token tables go on beyond the vocabulary, to a round number of rows."""
    encoder = make_encoder()
    table = torch.cat([encoder.token_table, torch.full((3, encoder.width), 9.0)])
    longer = SimpleNamespace(token_table=table, tokenizer=encoder.tokenizer)
    tag = SyntheticTAG(torch.full((1, 2, encoder.width), 9.0), torch.ones(1, 1))
    assert readings(tag, longer) == readings(tag, encoder)
