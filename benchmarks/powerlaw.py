"""A graph of any size, with encodings in place of texts: power-law degrees, planted classes, homophily.

    python benchmarks/powerlaw.py OUT --nodes 10000000 --edges 100000000 --classes 10 --width 128 --seed 0

writes OUT/nodes.parquet (node_id, encoding, label) and OUT/edges.parquet (src, dst), a block at a time: memory does not
depend on the size, and the same arguments give the same bytes. Nothing is drawn from tables: what a node is follows
from its rank (0 has the highest expected degree) by arithmetic, and its id from its rank by an affine permutation.

Nodes come in circles, a circle for each class, and most edges stay in one. A stray keeps the company of a circle whose
class it has not: that is what a GNN gets wrong. An encoding is the centre of its class, one of the class's sub-centres
and noise, so that it says less by itself than together with its neighbours.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NODES_AT_ONCE = 1 << 16
EDGES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class PowerLaw:
    """The graph; raises ValueError where there is none such.

    The degrees' tail falls as k^-exponent up to about sqrt(2 edges), beyond which a hub would meet itself: expected
    degrees are those of Chung & Lu (2002). ``homophily``: share of the edges whose ends have one class.
    """

    nodes: int
    edges: int
    classes: int = 10
    width: int = 128
    seed: int = 0
    exponent: float = 2.5
    homophily: float = 0.6
    strays: float = 0.1
    subcentres: int = 4
    centre: float = 1.85  # norm of a class's centre, where the noise has standard deviation 1
    subcentre: float = 1.5

    def __post_init__(self) -> None:
        if self.nodes < 2 * self.classes or self.classes < 2 or self.edges < 1 or self.width < 1:
            raise ValueError("at least two classes, two nodes a class, an edge, and a width of one")
        if self.exponent <= 2 or not 1 / self.classes <= self.homophily <= self._kept:
            raise ValueError(f"exponent above 2, homophily from 1 / classes to {self._kept:.3f} with so many strays")

    # -- degrees ------------------------------------------------------------------------------------------

    @property
    def decay(self) -> float:
        """Expected degrees fall with the rank to this power."""
        return 1 / (self.exponent - 1)

    @cached_property
    def offset(self) -> float:
        """Added to ranks, so that the largest expected degree is about sqrt(2 edges)."""
        steep = math.sqrt(2 * self.edges) * (1 - self.decay) / self.nodes ** (1 - self.decay)
        return max(1.0, steep ** (1 / self.decay))

    def places(self, uniform: np.ndarray) -> np.ndarray:
        """Numbers in [0, nodes) whose density is that of degrees by rank, from uniform ones: the inverse of the CDF."""
        power = 1 - self.decay
        low, high = self.offset**power, (self.nodes + self.offset) ** power
        return np.minimum((low + uniform * (high - low)) ** (1 / power) - self.offset, np.nextafter(self.nodes, 0))

    # -- what a rank is -------------------------------------------------------------------------------------

    def circle(self, rank: np.ndarray) -> np.ndarray:
        """Each block of as many ranks as classes has a node of each circle, in an order of its own."""
        block = rank // self.classes
        return (rank - block * self.classes + self._turn(block)) % self.classes

    def member(self, block: np.ndarray, circle: np.ndarray) -> np.ndarray:
        """The rank in ``block`` that is of ``circle``."""
        return block * self.classes + (circle - self._turn(block)) % self.classes

    def label(self, rank: np.ndarray) -> np.ndarray:
        """The class: the circle, but for strays."""
        lot = self._lot(rank, 1)
        other = 1 + (lot >> np.uint64(33)).astype(np.int64) % (self.classes - 1)
        stray = (lot & np.uint64(0xFFFFFFFF)).astype(np.float64) < self.strays * 2.0**32
        return (self.circle(rank) + other * stray) % self.classes

    def _turn(self, block: np.ndarray) -> np.ndarray:
        return (self._lot(block, 0) >> np.uint64(33)).astype(np.int64) % self.classes

    def _lot(self, number: np.ndarray, kind: int) -> np.ndarray:
        """A uint64 hash of each number (splitmix64), another for each ``kind`` and seed."""
        x = number.astype(np.uint64) * np.uint64(4) + np.uint64(kind)
        x += np.uint64((0x9E3779B97F4A7C15 * (2 * self.seed + 1)) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    # -- ids ------------------------------------------------------------------------------------------------

    @cached_property
    def _affine(self) -> tuple[int, int]:
        """Factor and summand modulo ``nodes``; near the golden section neighbouring ranks are far apart."""
        factor = int(self.nodes * 0.6180339887) + 2 * self.seed + 1
        while math.gcd(factor, self.nodes) > 1:
            factor += 1
        return factor % self.nodes, (self.nodes // 3 + self.seed) % self.nodes

    def id_of(self, rank: np.ndarray) -> np.ndarray:
        factor, summand = self._affine
        return (rank * factor + summand) % self.nodes

    def rank_of(self, node_id: np.ndarray) -> np.ndarray:
        factor, summand = self._affine
        return (node_id - summand) % self.nodes * pow(factor, -1, self.nodes) % self.nodes

    # -- tables ---------------------------------------------------------------------------------------------

    @property
    def _kept(self) -> float:
        """Share of the edges inside a circle whose ends have one class."""
        return (1 - self.strays) ** 2 + self.strays**2 / (self.classes - 1)

    @cached_property
    def centres(self) -> np.ndarray:
        """(classes, subcentres, width) float32: where encodings lie but for their noise."""
        rng = np.random.default_rng([self.seed, 0])
        of_class = rng.standard_normal((self.classes, 1, self.width))
        inside = rng.standard_normal((self.classes, self.subcentres, self.width))
        unit = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (of_class, inside))
        return sum(size * x for size, x in zip((self.centre, self.subcentre), unit, strict=True)).astype(np.float32)

    def node_batches(self) -> Iterator[pa.RecordBatch]:
        """node_id int64, encoding fixed_size_list<float16>[width], label int32; rows in the order of the ids."""
        flat = self.centres.reshape(-1, self.width)
        for block, begin in enumerate(range(0, self.nodes, NODES_AT_ONCE)):
            node_id = np.arange(begin, min(begin + NODES_AT_ONCE, self.nodes))
            rank = self.rank_of(node_id)
            label = self.label(rank)
            inside = (self._lot(rank, 2) >> np.uint64(33)).astype(np.int64) % self.subcentres
            rng = np.random.default_rng([self.seed, 1, block])
            x = rng.standard_normal((len(rank), self.width), dtype=np.float32)
            x += flat[label * self.subcentres + inside]
            values = pa.array(x.astype(np.float16).reshape(-1))
            encoding = pa.FixedSizeListArray.from_arrays(values, self.width)
            columns = {"node_id": pa.array(node_id), "encoding": encoding, "label": pa.array(label.astype(np.int32))}
            yield pa.record_batch(columns)

    def edge_batches(self) -> Iterator[pa.RecordBatch]:
        """src and dst int64; a pair may come twice and a node may meet itself, seldom."""
        blocks = self.nodes // self.classes  # what is left over meets others by chance alone
        within = (self.homophily - 1 / self.classes) / (self._kept - 1 / self.classes)
        for block, begin in enumerate(range(0, self.edges, EDGES_AT_ONCE)):
            rng = np.random.default_rng([self.seed, 2, block])
            count = min(EDGES_AT_ONCE, self.edges - begin)
            src = self.places(rng.random(count)).astype(np.int64)
            place, inside = self.places(rng.random(count)).astype(np.int64), rng.random(count) < within
            companion = self.member(np.minimum(place[inside] // self.classes, blocks - 1), self.circle(src[inside]))
            place[inside] = companion
            yield pa.record_batch({"src": pa.array(self.id_of(src)), "dst": pa.array(self.id_of(place))})


def write(graph: PowerLaw, out: str | Path) -> dict[str, float]:
    """Write both tables into the folder ``out``; seconds by table."""
    folder, seconds = Path(out), {}
    folder.mkdir(parents=True, exist_ok=True)
    tables: list[tuple[str, Iterator[pa.RecordBatch], dict[str, Any]]] = [
        ("nodes", graph.node_batches(), {"compression": "none"}),  # noise does not shrink
        ("edges", graph.edge_batches(), {"compression": "snappy"}),
    ]
    for name, batches, settings in tables:
        began, first = time.monotonic(), next(batches)
        with pq.ParquetWriter(folder / f"{name}.parquet", first.schema, use_dictionary=False, **settings) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        seconds[name] = round(time.monotonic() - began, 1)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("nodes", "edges", "classes", "width", "seed"):
        default = getattr(PowerLaw, name, None)
        parser.add_argument(f"--{name}", type=int, default=default, required=default is None)
    for name in ("exponent", "homophily", "strays"):
        parser.add_argument(f"--{name}", type=float, default=getattr(PowerLaw, name))
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    graph = PowerLaw(**arguments)
    print(f"{out}: {graph}, seconds {write(graph, out)}")


if __name__ == "__main__":
    main()
