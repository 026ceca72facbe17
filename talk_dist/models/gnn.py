"""The student: a small message-passing network that works layer by layer, so that shards can run it with
one halo exchange a layer.

A student is a list of *stages*. A stage reads the current features of own and halo nodes and returns those
of all local nodes, of which only the own ones are right; the pool exchanges halos between stages. On a whole
graph there is no halo, and `forward` is the stages in a row. Edge weights are from global degrees. Attention is
torch-geometric's, which is imported for it alone: it takes two seconds and 40 MiB of every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from talk_dist.config import StudentConfig
from talk_dist.kernel.sntk import propagation, to_torch

APPNP_STEPS, APPNP_TELEPORT = 10, 0.1


def propagation_kind(config: StudentConfig) -> str:
    """`mean` or `sym`, whichever this student has (GAT ignores the weights)."""
    published = "mean" if config.kind == "sage" else "sym"
    return published if config.propagation == "auto" else config.propagation


def local_graph(config: StudentConfig, indptr: np.ndarray, indices: np.ndarray, degree: np.ndarray) -> Tensor:
    """The sparse CSR matrix (local, local) that this student multiplies with.

    Rows are given for own nodes, columns are own and halo nodes; halo rows stay empty. Weights come from
    global degrees.
    """
    matrix = propagation(indptr, indices, degree, propagation_kind(config))
    matrix.resize(len(degree), len(degree))
    return to_torch(matrix, torch.float32)


class Student(nn.Module):
    """GCN, SAGE, SGC, APPNP or GAT over encodings of width ``in_dim`` with ``num_classes`` outputs."""

    def __init__(self, config: StudentConfig, in_dim: int, num_classes: int, seed: int):
        super().__init__()
        self.config, self.in_dim, self.num_classes = config, in_dim, num_classes
        kind, width, depth = config.kind, config.hidden, config.depth
        dims = [in_dim] + [width] * (depth - 1) + [num_classes]
        pairs = list(pairwise(dims))
        with drawing(seed):
            layers: list[nn.Module]
            if kind == "gcn":
                layers = [glorot(a, b) for a, b in pairs]
            elif kind == "sage":  # for the mean of the neighbours, and for the node itself
                layers = [nn.ModuleList([nn.Linear(a, b), nn.Linear(a, b, bias=False)]) for a, b in pairs]
            elif kind == "gat":
                from torch_geometric.nn import GATConv

                heads = 8 if width % 8 == 0 else 1
                layers = [GATConv(a, b // heads, heads=heads, add_self_loops=False) for a, b in pairs[:-1]]
                layers.append(GATConv(*pairs[-1], add_self_loops=False))
            elif kind == "sgc":
                layers = [nn.Linear(in_dim, num_classes)]
            else:  # appnp: a two-layer perceptron, then personalised PageRank
                layers = [nn.Linear(in_dim, width), nn.Linear(width, num_classes)]
        self.layers = nn.ModuleList(layers)

    @property
    def num_stages(self) -> int:
        return {"appnp": APPNP_STEPS}.get(self.config.kind, self.config.depth)

    @property
    def linear(self) -> bool:
        """Whether a stage is `after` of the propagated `before`: all but GAT, whose weights depend on the features."""
        return self.config.kind != "gat"

    def before(self, index: int, x: Tensor) -> Tensor:
        """What stage ``index`` makes of every row (nodes, width) by itself before it is propagated."""
        kind = self.config.kind
        if kind == "appnp" and index == 0:
            return self.layers[1](self._drop(self.layers[0](self._drop(x)).relu()))
        if kind == "gcn":
            x = self._drop(x)
            return nn.functional.linear(x, self.layers[index].weight) if self._narrows(index) else x  # type: ignore[arg-type]
        return self._drop(x) if kind == "sage" else x

    def after(self, index: int, gathered: Tensor, before: Tensor, root: Tensor) -> Tensor:
        """What it makes of every row of P `before`, with that row of `before`, and of the first stage's, beside it."""
        kind, last = self.config.kind, index == self.num_stages - 1
        if kind == "appnp":
            return (1 - APPNP_TELEPORT) * gathered + APPNP_TELEPORT * root
        if kind == "sgc":
            return self.layers[0](self._drop(gathered)) if last else gathered
        layer: Any = self.layers[index]
        if kind == "gcn":
            x = gathered + layer.bias if self._narrows(index) else layer(gathered)
        else:
            x = layer[0](gathered) + layer[1](before)
        return x if last else x.relu()

    def _narrows(self, index: int) -> bool:
        """A layer of a GCN is propagated where it is narrower: the order makes no difference but in cost."""
        layer: Any = self.layers[index]
        return bool(layer.out_features <= layer.in_features)

    def stage(self, index: int, x: Tensor, graph: Tensor | None, root: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One stage: ``x`` (local nodes, width), and `before` of the first stage -> the same for the next."""
        if self.linear:
            before = self.before(index, x)
            root = before if root is None else root
            return self.after(index, before if graph is None else graph @ before, before, root), root
        layer: Any = self.layers[index]
        x = self._drop(x)
        x = layer.lin(x) + layer.bias if graph is None else layer(x, graph)  # its own is all of a lone node's attention
        return (x if index == self.num_stages - 1 else nn.functional.elu(x)), None

    def forward(self, x: Tensor, graph: Tensor | None = None) -> Tensor:
        """Logits (nodes, C) on a whole graph; without one, as in a synthetic set, every node only sees itself."""
        root: Tensor | None = None
        for index in range(self.num_stages):
            x, root = self.stage(index, x, graph, root)
        return x

    def _drop(self, x: Tensor) -> Tensor:
        return dropped(x, self.config.dropout) if self.training and self.config.dropout else x


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """What is drawn on the CPU in this block starts from ``seed``; what follows it, as if the block had not been.

    Not by `torch.manual_seed`, which formats the stack of every call for a GPU that may be initialised later: half a
    millisecond, a fifth of a pass over a small set.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def glorot(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with weights as in Glorot & Bengio 2010, as in the GCN's own code, and a bias of zero."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


def dropped(x: Tensor, share: float) -> Tensor:
    """Dropout from 16 random bits a number, so that ``share`` is rounded to a multiple of 2^-16. On a CPU torch's own
    draws, a uniform number for each, are a third of a student's training, and filling by a mask, forward and backward,
    takes four times as long as a product."""
    share = min(round(share * 65536), 65535) / 65536
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= share * 65536 - 32768
    return x * kept.to(x.dtype).mul_(1.0 / (1.0 - share))
