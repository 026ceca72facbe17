"""Which real training nodes stand for a class: random, herding, k-center, medoids; and k-means centres.

All work class by class on the propagated encodings P^2 H of a bounded sample of training rows
(`ShardPool.sample`), which on a small graph is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from talk_dist.errors import ConfigError
from talk_dist.runtime.pool import ShardPool, TrainSample, sample_size


def allocate(num_synthetic: int, class_counts: np.ndarray, blocks: int = 1) -> np.ndarray:
    """Synthetic nodes per class (C,): proportional to the class, at least one each (one a block, as far as M allows),
    summing to M.

    Raises ConfigError if there are fewer synthetic nodes than classes.
    """
    if num_synthetic < len(class_counts):
        raise ConfigError(
            f"synthetic.size gives {num_synthetic} nodes for {len(class_counts)} classes; "
            f"every class needs one: set --synthetic.size {len(class_counts)} or more"
        )
    share = class_counts / class_counts.sum() * num_synthetic
    least = min(blocks, num_synthetic // len(class_counts))
    counts = np.maximum(least, np.floor(share)).astype(np.int64)
    while counts.sum() > num_synthetic:  # the ones given for free are taken from the largest surplus
        counts[np.argmax(np.where(counts > least, counts - share, -np.inf))] -= 1
    while counts.sum() < num_synthetic:
        counts[np.argmax(share - counts)] += 1
    return counts


def sample_for(pool: ShardPool, counts: np.ndarray, seed: int) -> TrainSample:
    """The training rows to choose ``counts`` (C,) nodes from: on a small graph all of them."""
    return pool.sample(sample_size(int(counts.max()), len(counts)), seed)


def random(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The first rows: a sample comes in the order of the hash of its ids and the seed."""
    return np.arange(min(count, len(features)))


def herding(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Greedy rows whose running mean follows the class mean (Welling 2009)."""
    mean, total, chosen = features.mean(0), np.zeros(features.shape[1]), []
    free = np.ones(len(features), dtype=bool)
    for step in range(1, min(count, len(features)) + 1):
        distance = np.linalg.norm((total + features) / step - mean, axis=1)
        best = int(np.argmin(np.where(free, distance, np.inf)))
        free[best] = False
        total += features[best]
        chosen.append(best)
    return np.array(chosen)


def kcenter(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Greedy farthest rows, from the one nearest to the class mean (Sener & Savarese 2018)."""
    chosen = [int(np.argmin(np.linalg.norm(features - features.mean(0), axis=1)))]
    distance = np.linalg.norm(features - features[chosen[0]], axis=1)
    while len(chosen) < min(count, len(features)):
        distance[chosen] = -1.0  # not again, even if every other row repeats a chosen one
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(features - features[chosen[-1]], axis=1))
    return np.array(chosen)


def centres(features: np.ndarray, count: int, seed: int, tries: int = 4) -> np.ndarray:
    """k-means centres (count, d), the best of some tries; on one thread: several add in the order they come."""
    from sklearn.cluster import KMeans  # slow to import, seldom needed
    from threadpoolctl import threadpool_limits

    count = min(count, len(features))
    with threadpool_limits(1, user_api="openmp"):
        return np.asarray(KMeans(count, n_init=tries, random_state=seed).fit(features).cluster_centers_)


def medoid(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The distinct rows nearest to the k-means centres."""
    chosen: list[int] = []
    for centre in centres(features, count, seed):
        distance = np.linalg.norm(features - centre, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(np.argmin(distance)))
    return np.array(chosen)


METHODS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "random": random,
    "herding": herding,
    "kcenter": kcenter,
    "medoid": medoid,
}


def select(sample: TrainSample, counts: np.ndarray, method: str, seed: int, blocks: int = 1) -> np.ndarray:
    """Rows of ``sample`` (M,), class by class. A class with fewer rows than asked repeats them.

    With ``blocks`` (`KernelConfig.blocks`) each chooses its nodes from its share of the rows.
    """
    chosen = np.empty(counts.sum(), np.int64)
    for places, rows in _shares(sample, counts, blocks):
        picked = METHODS[method](sample.features[rows].astype(np.float64), len(places), seed)
        chosen[places] = rows[np.resize(picked, len(places))]
    return chosen


def class_centres(
    sample: TrainSample,
    counts: np.ndarray,
    seed: int,
    blocks: int = 1,
    tell: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Class-wise k-means centres of the sampled features (M, d), in the order and with the ``blocks`` of `select`;
    ``tell`` hears how many there are.

    Several blocks, which together are less a matter of luck, have one try each, in single precision.
    """
    found, done = np.empty((counts.sum(), sample.features.shape[1]), np.float32), 0
    for places, rows in _shares(sample, counts, blocks):
        features = sample.features[rows].astype(np.float64 if blocks == 1 else np.float32)
        own = centres(features, len(places), seed, 4 if blocks == 1 else 1)
        found[places] = own[np.resize(np.arange(len(own)), len(places))]
        done += len(places)
        tell(done)
    return found


def _shares(sample: TrainSample, counts: np.ndarray, blocks: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each class and block: places among the M nodes, and rows of the sample, whose order is random."""
    first = 0
    for label, count in enumerate(counts):
        rows, places = np.flatnonzero(sample.label == label), np.arange(first, first + count)
        first += count
        for block in range(blocks):
            mine = places[places % blocks == block]
            if len(mine):
                yield mine, rows[block % len(rows) :: blocks]
