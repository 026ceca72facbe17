"""One cell of the laboratory: one training set, made by one method on one split of one graph."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from talk_dist.compare.plan import Method, file_name
from talk_dist.config import BITS, DistillConfig, InnerConfig
from talk_dist.data.tag import PreparedTag
from talk_dist.distill import describe, distill
from talk_dist.models.inner import smoothed
from talk_dist.models.protocol import Encoder
from talk_dist.runtime.callbacks import Callback
from talk_dist.runtime.checkpoint import Checkpoint
from talk_dist.runtime.pool import ShardPool
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.baselines import FEATURE_LEVEL
from talk_dist.synthetic.coresets import sample_for
from talk_dist.synthetic.decode import exact_tokens
from talk_dist.synthetic.init import check_texts, choose, class_counts, fit_texts
from talk_dist.synthetic.settle import settle
from talk_dist.training_sets import TrainingSet, coreset_tag, tag_set


@dataclass(frozen=True)
class Cell:
    """``size`` and ``adapters`` as in the plan, ``seed`` of the split and of the method."""

    data: str
    seed: int
    method: Method
    size: float
    adapters: bool

    @property
    def name(self) -> str:
        """Its folder's name."""
        kind = "adapters" if self.adapters else "frozen"
        words = [self.data, f"split {self.seed}", self.method.name, f"{self.size:g}", kind]
        return "-".join(map(file_name, words))

    @property
    def possible(self) -> bool:
        """Encodings without texts train no encoder."""
        return not (self.adapters and self.method.kind == "features" and not self.method.invert)

    def config(self, classes: int) -> DistillConfig:
        """The method's settings on this split; size 0 is one node a class."""
        base = self.method.config
        return dataclasses.replace(
            base,
            seed=self.seed,
            encoder=dataclasses.replace(base.encoder, adapters=self.adapters),
            synthetic=dataclasses.replace(base.synthetic, size=self.size or classes),
        )

    def check(self, tag: PreparedTag) -> None:
        """Raises ConfigError if this needs texts and ``tag`` has none."""
        if self.method.invert:
            check_texts(tag)

    def make(
        self, tag: PreparedTag, pool: ShardPool, encoder: Encoder, tell: Callback, checkpoint: Checkpoint
    ) -> SyntheticTAG:
        """The set, with the seconds it took. The pool holds the encodings of a fresh encoder."""
        config, started = self.config(len(tag.classes)), time.monotonic()
        if self.method.kind == "distill":
            made = distill(pool, encoder, config, [tell], checkpoint)
            seconds = sum(made.metrics["seconds"].values())  # of all the processes that it was resumed in
        else:
            made = self._baseline(tag, pool, encoder, config, tell)
            seconds = time.monotonic() - started
        return dataclasses.replace(made, metrics=made.metrics | {"made": {"seconds": seconds}})

    def _baseline(
        self, tag: PreparedTag, pool: ShardPool, encoder: Encoder, config: DistillConfig, tell: Callback
    ) -> SyntheticTAG:
        counts, about = class_counts(tag, config), describe(pool, encoder, config)
        if self.method.kind == "coreset":
            made, size = coreset_tag(pool, encoder, counts, self.method.source, config)
            return dataclasses.replace(made, config=about | {"storage": "float32", "token_ids_bytes": size})

        sample = sample_for(pool, counts, self.seed)
        h_s, classes = FEATURE_LEVEL[self.method.source](sample, counts, self.seed)
        y_s = smoothed(classes, config.synthetic.label_smoothing)  # what serves one method serves all
        if not self.method.invert:
            storage = "int8" if config.storage in BITS else config.storage  # encodings have no numbers to spare
            return SyntheticTAG(h_s[:, None], y_s, config=about | {"level": "features", "storage": storage}).as_stored()
        x_s = fit_texts(encoder, choose(pool, sample, counts, "medoid", config), h_s, config, tell.progress)
        x_s = settle(encoder, x_s, config, tell.progress)
        ids = exact_tokens(x_s, encoder.token_table) if config.synthetic.discrete else None
        return SyntheticTAG(x_s, y_s, config=about, token_ids=ids).as_stored()


def training_set(
    cell: Cell, made: SyntheticTAG, pool: ShardPool, encoder: Encoder, config: DistillConfig, recipe: InnerConfig
) -> TrainingSet:
    """What students are trained on."""
    trained = tag_set(cell.method.name, made, pool, encoder, config, recipe)
    return dataclasses.replace(trained, bytes=int(made.config.get("token_ids_bytes", trained.bytes)))
