"""What the tests share: a tiny graph of texts, a tiny language model on disk, and the graph prepared in parts."""

from __future__ import annotations

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  by Ray's own 15 actors wait for the other tests
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may wait for a network

import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import reference
import torch

from talk_dist.cli import main
from talk_dist.config import EncoderConfig, KernelConfig
from talk_dist.data.prepare import prepare
from talk_dist.data.tables import from_arrow
from talk_dist.data.tokenizer import load_tokenizer
from talk_dist.models.encoder import TextEncoder
from talk_dist.resources import RuntimeConfig
from talk_dist.runtime.pool import LocalPool

WORDS = [f"{stem}{number}" for stem in ("ash", "birch", "cedar") for number in range(14)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLASSES = ("ash", "birch", "cedar")
WARM_START = Path(__file__).with_name("warm_start")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors: threads cost more than they bring, and shared cores are left to others."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class ToyGraph:
    """A text-attributed graph and its dense truth. Rows of all arrays are in the order of the node table."""

    nodes: pa.Table
    edges: pa.Table
    label: np.ndarray  # (N,) index into CLASSES, -1 = unlabelled
    split: np.ndarray  # (N,) str
    adjacency: torch.Tensor  # (N, N) float64, with self-loops

    def rows(self, split):
        return np.flatnonzero((self.split == split) & (self.label >= 0))

    def csr(self):
        """indptr, indices and degree of the adjacency."""
        rows, columns = np.nonzero(self.adjacency.numpy())
        degree = np.bincount(rows)
        return np.concatenate([[0], np.cumsum(degree)]), columns, degree

    def encodings(self, width=6, synthetic=5, seed=0):
        """Random h_t (N, width) and h_s (synthetic, width), float64."""
        rng = np.random.default_rng(seed)
        h_t, h_s = rng.normal(size=(len(self.label), width)), rng.normal(size=(synthetic, width)) + 0.3
        return torch.from_numpy(h_t), torch.from_numpy(h_s)

    def with_encodings(self, width):
        """The same graph, but its nodes bring encodings, by class, in place of texts: no process loads transformers."""
        x = np.random.default_rng(0).normal(size=(len(self.label), width)) + self.label[:, None]
        column = pa.array(x.tolist(), pa.list_(pa.float32(), width))
        return replace(self, nodes=self.nodes.drop_columns(["text"]).append_column("encoding", column))

    def permuted(self, seed):
        """The same graph: node rows and edges in another order, edges also turned round and repeated."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.label))
        edges = self.edges.take(rng.permutation(len(self.edges)))
        turned = pa.table({"src": edges["dst"], "dst": edges["src"]})
        a = self.adjacency[order][:, order]
        edges = pa.concat_tables([turned, edges.slice(0, 9)])
        return ToyGraph(self.nodes.take(order), edges, self.label[order], self.split[order], a)


def make_graph(num_nodes=60, num_edges=110, seed=0):
    """A hub (node 0), an isolated node (the last), unlabelled nodes, nodes without a split, texts that repeat."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, num_nodes)
    texts = []
    for row in range(num_nodes):
        own = rng.choice(14, rng.integers(2, 12)) + 14 * label[row]
        other = rng.choice(len(WORDS), rng.integers(1, 5))
        texts.append(" ".join(WORDS[i] for i in rng.permutation(np.concatenate([own, other]))))
    for row in range(5, num_nodes, 12):
        texts[row] = texts[row - 1]
    ends = rng.integers(1, num_nodes - 1, (num_edges, 2))
    ends = ends[(label[ends[:, 0]] == label[ends[:, 1]]) | (rng.random(num_edges) < 0.3)]
    hub = np.stack([np.zeros(14, np.int64), rng.choice(num_nodes - 2, 14, replace=False) + 1], 1)
    ends = np.concatenate([ends, hub])
    split = rng.choice(["train", "val", "test", ""], num_nodes, p=[0.5, 0.25, 0.2, 0.05])
    names = [CLASSES[c] for c in label]
    for row in range(7, num_nodes, 13):
        label[row], names[row] = -1, ""
    node_id = 1000 + 7 * np.arange(num_nodes)
    nodes = pa.table({"node_id": node_id, "text": texts, "label": names, "split": split})
    edges = pa.table({"src": node_id[ends[:, 0]], "dst": node_id[ends[:, 1]]})
    return ToyGraph(nodes, edges, label, split, reference.adjacency(num_nodes, ends))


def save_encoder(folder, words=WORDS, seed=0):
    """A random BERT (2 layers, width 32, 64 positions) and its WordPiece tokenizer, as a checkpoint in ``folder``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        BertModel(config).save_pretrained(folder)
    return str(folder)


@dataclass
class TableEncoder:
    """Stands in for a TextEncoder where the mathematics is checked: encodings of any precision, without a model.

    The encoding of a text is the mean of one fixed random row per token, whatever else is encoded with it.
    """

    name: str
    dtype: type = np.float64
    width: int = 8
    encoded: int = 0  # texts so far
    frozen_layers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self):
        self.config, self.tokenizer = SimpleNamespace(name=self.name), load_tokenizer(self.name)
        self.table = np.random.default_rng(1).normal(size=(self.tokenizer.vocab_size, self.width))

    def load_adapters(self, adapters):
        assert not adapters

    def encode_tokens(self, tokens, progress=None, lower=None):
        self.encoded += len(tokens)
        return np.stack([self.table[tokens[i]].mean(0) for i in range(len(tokens))]).astype(self.dtype)


@pytest.fixture(scope="session")
def graph():
    return make_graph()


@pytest.fixture(scope="session")
def graph_of_size():
    """graph_of_size(num_nodes, num_edges, seed) -> a ToyGraph."""
    return make_graph


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A tiny random BERT checkpoint."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def other_encoder_folder(tmp_path_factory):
    """The same with the words in another order: another tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("other"), words=WORDS[::-1])


@pytest.fixture(scope="session")
def make_encoder(encoder_folder):
    """make_encoder(**settings) -> a TextEncoder of the tiny checkpoint in float32 on the CPU, mean pooling."""

    def make(**settings):
        settings = {"name": encoder_folder, "pooling": "mean", "precision": "float32", "device": "cpu", **settings}
        return TextEncoder(EncoderConfig(**settings))

    return make


@pytest.fixture(scope="session")
def table_encoder(encoder_folder):
    """table_encoder(**fields) -> a TableEncoder with the tokenizer of the tiny checkpoint."""
    return lambda **fields: TableEncoder(**{"name": encoder_folder, **fields})


@pytest.fixture(scope="session")
def prepare_graph(encoder_folder, tmp_path_factory):
    """prepare_graph(graph, **settings) -> a PreparedTag of its own folder."""

    def make(graph, **settings):
        out = tmp_path_factory.mktemp("tag") / "prepared"
        settings = {"encoder": encoder_folder, "max_tokens": 24, "method": "hash", "halo_hops": 2, **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return prepare(from_arrow(graph.nodes, graph.edges), out, **settings)

    return make


@pytest.fixture(scope="session")
def tags(graph, prepare_graph):
    """parts -> the toy graph prepared in so many parts (scattered: the halo is as large as it gets)."""
    return {parts: prepare_graph(graph, parts=parts) for parts in (1, 2, 7, 20)}


@pytest.fixture(scope="session")
def make_pool(tags):
    """make_pool(encoder, parts or tag, **kernel settings) -> an encoded LocalPool, float64 and gcn unless told."""

    def make(encoder, parts, cache=False, **kernel):
        tag = tags[parts] if isinstance(parts, int) else parts
        kernel = KernelConfig(**{"precision": "float64", "architecture": "gcn", **kernel})
        pool = LocalPool(tag, encoder, kernel, RuntimeConfig(cache=cache))
        pool.encode(encoder.adapters() if isinstance(encoder, TextEncoder) else {})
        return pool

    return make


@pytest.fixture
def told(capsys):
    """told(*arguments, code=0) -> (stdout, stderr) of the command line."""

    def run(*arguments, code=0):
        capsys.readouterr()
        result = main([str(word) for word in arguments])
        out, err = capsys.readouterr()
        assert result == code, err
        assert "Traceback" not in err
        return out, err

    return run


@pytest.fixture(scope="session")
def forking():
    """From here on Ray's workers, whichever process starts them, are forks of one that has imported everything."""
    with tempfile.TemporaryDirectory(prefix="tf") as folder, pytest.MonkeyPatch.context() as patched:
        address = f"{folder}/forks"  # short: a socket's path has at most 107 bytes
        python = [sys.executable, WARM_START / "sitecustomize.py", address]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # it ends where its input does
        with subprocess.Popen(python, env=environment, text=True, **pipes) as parent:
            assert any(line == "ready\n" for line in parent.stdout)
            patched.setenv("TALK_DIST_TESTS_FORKS", address)
            patched.setenv("PYTHONPATH", str(WARM_START), prepend=os.pathsep)
            yield


@pytest.fixture(scope="session")
def one_ray(forking):
    """Ray on this machine, for every test that needs no nodes of its own."""
    import ray

    # local: another Ray may be running on this machine
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items):
    """The longest file first: begun last, one worker would be at it alone while the other has nothing left."""
    items.sort(key=lambda item: "test_sweep.py" not in item.nodeid)
