"""Adapters on the last layers: encodings from what is kept below them are those of a whole pass. CLS pooling."""

import dataclasses
import gc
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import transformers
from torch import nn

from talk_dist.config import EncoderConfig, InnerConfig, KernelConfig, StudentConfig
from talk_dist.data.tag import TokenLists
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import TextEncoder
from talk_dist.models.gnn import Student
from talk_dist.models.layers import Split
from talk_dist.models.protocol import Lower
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.lower import LowerStates
from talk_dist.runtime.pool import LocalPool


@pytest.fixture(scope="module")
def tokens(tags):
    """The texts of the toy graph; some repeat."""
    return tags[1].partition(0).tokens


@pytest.fixture
def upper(make_encoder):
    """upper(**settings) -> an encoder of two layers with adapters on the second that have moved."""

    def make(seed=0, **settings):
        return moved(make_encoder(**{"adapters": True, "adapted_layers": 1, **settings}), seed)

    return make


def moved(encoder, seed=0):
    rng = np.random.default_rng(seed)
    encoder.load_adapters({name: rng.normal(0, 0.5, value.shape) for name, value in encoder.adapters().items()})
    return encoder


def kept(encoder, tokens, dtype=np.float32):
    """What is kept of these texts: nothing yet. Whatever of it is used without having been written shows."""
    return Lower(np.full((len(tokens.values), encoder.width), 1e4, dtype))


@contextmanager
def runs(encoder):
    """How many texts go through each layer."""
    counts = [0] * len(encoder.model.encoder.layer)
    handles = [
        layer.attention.self.key.register_forward_hook(lambda _, inputs, __, i=i: add(counts, i, len(inputs[0])))
        for i, layer in enumerate(encoder.model.encoder.layer)
    ]
    yield counts
    for handle in handles:
        handle.remove()


def add(counts, index, some):
    counts[index] += some


# -- adapters on the last layers ----------------------------------------------------------------------------


def test_only_the_last_layers_have_adapters(make_encoder):
    encoder = make_encoder(adapters=True, adapted_layers=1)
    names = list(encoder.adapter_parameters())
    assert len(names) == 2 * 3
    assert all(name.startswith("encoder.layer.1.") for name in names)
    assert encoder.frozen_layers == 1
    chosen = make_encoder(adapters=True, adapted_layers=1, targets=("dense",)).adapter_parameters()
    assert len(chosen) == 2 * 3  # attention's output, and both of the feed-forward; not the pooler
    assert make_encoder(adapted_layers=1).frozen_layers == 0  # without adapters


def test_all_layers_are_the_same_as_none_said(make_encoder, tokens):
    """To the bit: names, a fresh start, encodings; nothing is kept."""
    some, all_of_them = (make_encoder(adapters=True, adapted_layers=k, dropout=0.5) for k in (0, 2))
    assert some.frozen_layers == all_of_them.frozen_layers == 0
    for name, value in all_of_them.adapters().items():
        np.testing.assert_array_equal(value, some.adapters()[name])
    np.testing.assert_array_equal(moved(some).encode_tokens(tokens), moved(all_of_them).encode_tokens(tokens))


def test_injection_reaches_the_tokens_through_the_frozen_layers(upper):
    """Like the gradient of a whole pass, by finite differences."""
    encoder, generator = upper(), torch.Generator().manual_seed(0)
    x, d_hs, v = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 32), (3, 32), (3, 5, 32)))
    x *= 0.3
    slope = reference.directional_difference(
        lambda x: float((encoder.encode_embeds(x, batch=2).double() * d_hs).sum()), x, v, step=1e-4
    )
    assert float((encoder.inject(x, d_hs, batch=2) * v).sum()) == pytest.approx(slope, rel=3e-2)  # single precision


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapted_layers": 3}, r"encoder\.adapted_layers = 3: .* has 2 layers; set that or fewer"),
        ({"adapted_layers": -1}, r"encoder\.adapted_layers = -1.*not negative"),
        ({"adapted_layers": 1, "targets": ("word_embeddings",)}, r"encoder\.targets: .* not in the last 1 layers of"),
    ],
)
def test_what_cannot_be_adapted_is_refused(make_encoder, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_encoder(adapters=True, **settings)


def test_models_without_a_list_of_layers_are_refused(tmp_path):
    """ALBERT runs one layer again and again. Without adapted_layers it can be had."""
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AlbertConfig(vocab_size=20, num_hidden_layers=3, **sizes)
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    settings = EncoderConfig(name=str(tmp_path), adapters=True, device="cpu", precision="float32", pooling="mean")
    TextEncoder(settings)
    with pytest.raises(ConfigError, match=r"encoder\.adapted_layers: '.*' has no list of 3 layers; set it to 0"):
        TextEncoder(dataclasses.replace(settings, adapted_layers=1))


class Bias(nn.Module):
    """A layer that works with what the first one made, as T5's."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, hidden_states, bias):
        bias = hidden_states.mean() if self.first else bias
        return hidden_states + (0.0 if bias is None else bias), bias


class Biased(nn.Module):
    config = SimpleNamespace(num_hidden_layers=2)

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList([Bias(True), Bias(False)])

    def forward(self, input_ids, attention_mask):
        x, bias = input_ids[..., None].float(), None
        for layer in self.block:
            x, bias = layer(x, bias)
        return SimpleNamespace(last_hidden_state=x)


class Skipping(Biased):
    """A model that takes its last layer apart."""

    def forward(self, input_ids, attention_mask):
        x, _ = self.block[0](input_ids[..., None].float(), None)
        return SimpleNamespace(last_hidden_state=x)


@pytest.mark.parametrize(
    ("model", "why"), [(Biased, "hand on more than hidden states"), (Skipping, "are not called one after the other")]
)
def test_layers_between_which_encodings_cannot_start_are_refused(model, why):
    with pytest.raises(ConfigError, match=rf"layers of 'odd' {why}.*set it to 0"):
        Split(model(), "odd", 1, torch.device("cpu"))


# -- encodings from what is kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_encodings_from_what_is_kept_are_those_of_a_whole_pass(upper, tokens, batch_tokens, pooling):
    """To the bit if it is kept in single precision, else within half; after other adapters were loaded too."""
    encoder = upper(batch_tokens=batch_tokens, pooling=pooling)
    exact, half = (kept(encoder, tokens, dtype) for dtype in (np.float32, np.float16))
    before = None
    for change in (lambda: None, lambda: moved(encoder, 1), lambda: encoder.reset_adapters(2)):
        change()
        whole = encoder.encode_tokens(tokens)
        np.testing.assert_array_equal(encoder.encode_tokens(tokens, None, exact), whole)
        near = encoder.encode_tokens(tokens, None, half)
        assert 0 < np.abs(near - whole).max() < 0.02
        assert before is None or np.abs(whole - before).max() > 0.1  # adapters moved: equality says something
        before = whole


def test_the_lower_layers_run_once(upper, tokens):
    """Over two encodings each distinct text is once in the layer below and twice in that with adapters."""
    encoder = upper(batch_tokens=40)
    lower, reports = kept(encoder, tokens), []
    distinct = len({tuple(tokens[i]) for i in range(len(tokens))})
    with runs(encoder) as counts:
        encoder.encode_tokens(tokens, None, lower)
        assert lower.filled
        moved(encoder, 1).encode_tokens(tokens, lambda *report: reports.append(report), lower)
    assert counts == [distinct, 2 * distinct]
    assert reports[-1] == (distinct, distinct)


def test_an_encoding_that_was_cut_off_begins_again(upper, tokens):
    """What was kept of some batches is not taken for all."""
    encoder = upper(batch_tokens=40)
    lower = kept(encoder, tokens)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder.encode_tokens(tokens, stop, lower)
    np.testing.assert_array_equal(encoder.encode_tokens(tokens, None, lower), encoder.encode_tokens(tokens))


def test_values_beyond_half_precision_are_refused(upper, tokens):
    encoder = upper()
    with torch.no_grad():
        encoder.model.encoder.layer[0].output.LayerNorm.bias[0] = 1e6
    with pytest.raises(ConfigError, match=r"adapted_layers: layer 1 of .* the value 1e\+06, beyond half .*set it to 0"):
        encoder.encode_tokens(tokens, None, kept(encoder, tokens, np.float16))


def test_a_stretch_is_the_same_whenever_it_is_asked_for(tokens, tmp_path):
    for disk in (False, True):
        states = LowerStates(tokens, 4, disk, str(tmp_path))
        first, second = states.stretch(0, 50), states.stretch(50, 100)
        second.values[:] = 3
        assert len(first.values) + len(second.values) == len(tokens.values)
        assert states.stretch(50, 100) is second
        assert first.values.dtype == np.float16
        assert not first.values.any()


@pytest.mark.parametrize("fields", ["memory", "disk"])
def test_shards_encode_from_what_they_keep(upper, tags, tmp_path, monkeypatch, fields):
    """Encodings near those of whole passes, and the same from one part or seven; stretches of texts and all."""
    monkeypatch.setattr("talk_dist.runtime.shard.ENCODED_ROWS", 7)
    encoder = upper()
    gathered = {}
    for parts in (1, 7):
        pool = LocalPool(tags[parts], encoder, KernelConfig(fields=fields), RuntimeConfig(scratch=str(tmp_path)))
        with runs(encoder) as counts:
            for seed in (3, 4):
                pool.encode(moved(encoder, seed).adapters())
        assert counts[1] == 2 * counts[0]
        order = np.argsort(np.concatenate([shard.part.node for shard in pool.shards]))
        gathered[parts] = pool.gather()[order].astype(np.float32)
    whole = encoder.encode_tokens(tags[1].partition(0).tokens)
    np.testing.assert_allclose(gathered[1], whole, rtol=0, atol=5e-3)
    np.testing.assert_allclose(gathered[7], gathered[1], rtol=0, atol=2e-3)

    def mapped():
        return Path("/proc/self/maps").read_text().count(f" {tmp_path}/")

    assert (mapped() >= 28) == (fields == "disk")  # of seven shards: H, P1, Z, and what is kept
    del pool
    gc.collect()
    assert not mapped()
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_built_anew_gives_the_same_encodings(upper, tags):
    """To the bit: the first encoding too starts from what is kept, as one goes on after an interrupt."""
    encoder = upper()
    pools = [LocalPool(tags[2], encoder, KernelConfig(), RuntimeConfig()) for _ in range(2)]
    pools[0].encode(moved(encoder, 3).adapters())
    for pool in pools:
        pool.encode(moved(encoder, 4).adapters())
    np.testing.assert_array_equal(pools[0].gather(), pools[1].gather())


# model type -> modules with adapters in one layer
ARCHITECTURES = dict.fromkeys(("bert", "roberta", "distilbert", "mpnet", "deberta-v2", "llama", "qwen2"), 3)
ARCHITECTURES |= {"modernbert": 1, "gpt2": 1}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's transposed matrices
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_usual_architectures_are_split(kind, tmp_path):
    """Their lists of layers are found, and a pass that begins between them is the whole one."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 16}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2}
    if kind == "deberta-v2":  # a convolution after the first layer, which the others do not have
        sizes |= {"conv_kernel_size": 3, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c"]}
    if kind == "qwen2":
        sizes |= {"num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    sizes |= {"vocab_size": 20, "max_position_embeddings": 24, "initializer_range": 0.3}
    transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes, **special)).save_pretrained(
        tmp_path
    )
    lists = [[5, 3, 9], [4, 4, 7, 8, 9, 3, 5], [11, 6]]
    texts = TokenLists(np.cumsum([0, *map(len, lists)]), np.concatenate(lists).astype(np.int32))
    for layers in (1, 2):
        settings = {"adapters": True, "adapted_layers": layers, "device": "cpu", "precision": "float32"}
        encoder = moved(TextEncoder(EncoderConfig(name=str(tmp_path), pooling="mean", **settings)))
        assert len(encoder.adapter_parameters()) == 2 * layers * ARCHITECTURES[kind]
        lower = kept(encoder, texts)
        whole = encoder.encode_tokens(texts)
        for _ in range(2):
            np.testing.assert_array_equal(encoder.encode_tokens(texts, None, lower), whole)
        x = torch.randn(2, 3, 16)
        assert encoder.inject(x, torch.randn(2, 16)).abs().sum() > 0
        assert encoder.forward_embeds(torch.zeros_like(x), below=encoder.states_below(x)).equal(
            encoder.encode_embeds(x)
        )


# -- training from what is below the adapters ---------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_training_from_the_states_below_is_training_from_the_tokens(upper, monkeypatch, pooling):
    """To the bit, dropout and padding included; the layer below sees each synthetic node once."""
    generator = torch.Generator().manual_seed(0)
    x, y = 0.3 * torch.randn(5, 4, 32, generator=generator), torch.eye(3)[[0, 1, 2, 0, 1]]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    config, results = InnerConfig(passes=6, adapter_lr=1e-2), []
    for spared in (True, False):
        encoder = upper(dropout=0.5, pooling=pooling)
        if not spared:
            monkeypatch.setattr(encoder, "states_below", lambda *_: None)
        student, start = Student(StudentConfig(hidden=8), 32, 3, seed=1), encoder.adapters()
        with runs(encoder) as counts:
            encoder.fit(student, x, y, config, mask=mask, seed=3, batch=2)
        assert counts == ([5, 30] if spared else [30, 30])
        assert any((value != start[name]).any() for name, value in encoder.adapters().items())
        results.append([*encoder.adapters().values(), *(p.detach().numpy() for p in student.parameters())])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


# -- the last layer for one position ------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cls_pooling_runs_the_last_layer_for_one_position(make_encoder, tokens, attention):
    """Encodings and gradients are those of the model's own layer, padded or not."""
    mine, own = (moved(make_encoder(adapters=True, pooling="cls")) for _ in range(2))
    for encoder in (mine, own):
        encoder.model.set_attn_implementation(attention)
    del own.model.encoder.layer[-1].forward  # the model's own
    lengths = []
    for encoder in (mine, own):
        dense = encoder.model.encoder.layer[-1].intermediate
        handle = dense.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
        encoder.encode_batch(tokens, np.arange(9))
        handle.remove()
    assert lengths == [1, np.diff(tokens.offsets)[:9].max()]
    np.testing.assert_allclose(mine.encode_tokens(tokens), own.encode_tokens(tokens), rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    x, d_hs = 0.3 * torch.randn(4, 6, 32, generator=generator), torch.randn(4, 32, generator=generator)
    mask = torch.ones(4, 6)
    mask[1, 4:] = 0
    for some in (None, mask):
        expected = own.inject(x, d_hs, some)
        torch.testing.assert_close(
            mine.inject(x, d_hs, some), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_other_pooling_leaves_the_last_layer_alone(make_encoder):
    assert "forward" not in make_encoder(pooling="mean").model.encoder.layer[-1].__dict__


def test_alpha_scales_what_adapters_add(make_encoder, tokens):
    """In first order: twice the alpha, twice the change."""
    plain, changes = make_encoder().encode_tokens(tokens), []
    for alpha in (4, 8):
        encoder = make_encoder(adapters=True, alpha=alpha)
        little = {name: value + 1e-2 * ("lora_B" in name) for name, value in encoder.adapters().items()}
        encoder.load_adapters(little)
        changes.append(encoder.encode_tokens(tokens) - plain)
    assert np.linalg.norm(changes[1] - 2 * changes[0]) < 0.1 * np.linalg.norm(changes[1])
