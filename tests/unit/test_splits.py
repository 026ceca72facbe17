"""Random splits: exact, and a function of seed and id alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from talk_dist.data.splits import hash_ids, random_split

Tables = tuple[pa.Table, pa.Table]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(0, 2**64 - 1), st.booleans(), st.randoms(use_true_random=False))
def test_random_split_is_exact_and_follows_the_node(size: int, seed: int, strings: bool, random: Any) -> None:
    ids = np.array(random.sample(range(10**6), size))
    label = np.array([random.randrange(-1, 3) for _ in range(size)], dtype=np.int32)
    node_id = pa.array([f"n{i}" for i in ids]) if strings else pa.array(ids)
    split = random_split(node_id, label, (0.5, 0.3, 0.1), seed)
    labelled = int((label >= 0).sum())
    assert (split[label < 0] == -1).all()
    for index, share in enumerate((0.5, 0.3, 0.1)):
        assert abs((split == index).sum() - share * labelled) <= 1
    order = np.array(random.sample(range(size), size))
    assert (random_split(node_id.take(pa.array(order)), label[order], (0.5, 0.3, 0.1), seed) == split[order]).all()


def test_hashes_of_ids() -> None:
    first = hash_ids(np.array([1234567 ^ 16294208416658607535], dtype=np.uint64).view(np.int64), 0)  # key of seed 0
    assert first.tolist() == [6457827717110365317]  # the first number of splitmix64 seeded with 1234567
    ids = np.arange(-50_000, 50_000)
    assert len(np.unique(hash_ids(ids, 3))) == len(ids)
    assert (hash_ids(ids, 3) != hash_ids(ids, 4)).all()
    assert hash_ids(pa.chunked_array([ids[:7], ids[7:]]), 3).tolist() == hash_ids(ids, 3).tolist()
    high = hash_ids(ids, 3) >> np.uint64(60)
    assert np.bincount(high.astype(int), minlength=16).min() > 0.9 * len(ids) / 16  # evenly spread
    words = pa.array(["a", "b", "ß"])
    assert hash_ids(words, 1).tolist() == hash_ids(np.array(words.to_pylist()), 1).tolist()
    assert len({*hash_ids(words, 1).tolist(), *hash_ids(words, 2).tolist()}) == 6
    assert hash_ids(words, 1).dtype == np.uint64
