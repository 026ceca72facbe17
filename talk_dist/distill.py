"""The page: TaLK's bi-level loop (arXiv 2606.22975), over a pool of shards and an encoder.

Inner loop: train adapters and a student on the synthetic set. Outer loop: encode the real texts with these
adapters, validate, and inject the gradient of a kernel ridge regression loss into the token embeddings.
Nothing here knows whether the shards live in this process or on a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from talk_dist.config import DistillConfig
from talk_dist.models.gnn import Student
from talk_dist.models.protocol import Encoder
from talk_dist.runtime.callbacks import Callback, Callbacks
from talk_dist.runtime.checkpoint import Checkpoint, DistillState, OuterOptimizer, Starting
from talk_dist.runtime.outer import Objective, accuracy, student_accuracy
from talk_dist.runtime.pool import ShardPool
from talk_dist.runtime.teacher import RealSide
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.decode import exact_tokens
from talk_dist.synthetic.init import initialise
from talk_dist.synthetic.settle import settle


def distill(
    pool: ShardPool,
    encoder: Encoder,
    config: DistillConfig,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
) -> SyntheticTAG:
    """Distil the graph behind ``pool`` into a synthetic TAG: the one that validated best.

    With ``checkpoint`` every outer epoch is saved, and the start as it comes along; a run that was cut off
    goes on from there to the same result. No label of a test node is read. Raises ConfigError, NotPSDError, and
    DataError for a graph without validation nodes.
    """
    pool.tag.check_split("val")
    tell = Callbacks(callbacks)
    objective, real = Objective(pool, config), RealSide(pool, config)
    saved = checkpoint.load() if checkpoint else None
    if isinstance(saved, DistillState):
        state = saved
    else:
        starting = Starting(checkpoint, saved)
        encoder.reset_adapters(config.seed)
        real.encode(encoder, tell.progress)
        start = initialise(real, encoder, config, tell.progress, starting)
        state = DistillState(start.x_s, start.y_s, torch.tensor(start.log_temperature, dtype=torch.float64))
        state.start_seconds, state.start_history = starting.seconds, start.history
        if checkpoint:
            checkpoint.save(state)

    while state.epoch <= config.outer_epochs and state.epoch - max(state.best_epoch, 0) <= config.outer.patience:
        meter, started = pool.meter, time.monotonic()
        meter.take()
        seed = config.seed + 1000 * (state.epoch + 1)
        encoder.reset_adapters(seed)
        student = Student(config.student, encoder.width, state.y_s.shape[1], seed)
        with meter.time("inner"):
            batch = config.outer.inject_batch
            told = partial(tell.progress, "student", metrics={})
            inner = encoder.fit(student, state.x_s, state.y_s, config.inner, seed=seed, batch=batch, progress=told)
        real.encode(encoder, tell.progress)
        with meter.time("validate"):
            h_s = encoder.encode_embeds(state.x_s, batch=batch)
            record: dict[str, Any] = {
                "epoch": state.epoch,
                "val_accuracy": student_accuracy(pool, student, "val", tell.progress),
                "krr_val_accuracy": accuracy(objective.krr_counts(h_s, state.y_s, "val")),
                "inner_loss": inner.loss,
                "inner_passes": inner.passes,
            }
        record["best"] = state.offer(record["val_accuracy"])
        seconds: dict[str, Any] = meter.take()
        if state.epoch < config.outer_epochs:
            real.teach(tell.progress)
            record["loss"], seconds["steps"] = outer_steps(state, encoder, objective, config, tell)
        record["seconds"] = seconds | {"epoch": round(time.monotonic() - started, 3)}
        record["vitals"] = asdict(pool.vitals())
        state.history.append(record)
        state.epoch += 1
        tell.epoch(record)
        if checkpoint:
            checkpoint.save(state)

    assert state.best is not None
    x_s, y_s = state.best
    x_s = settle(encoder, x_s, config, tell.progress)
    metrics = {
        "val_accuracy": state.best_accuracy,
        "best_epoch": state.best_epoch,
        "seconds": {"start": state.start_seconds, "epochs": sum(r["seconds"]["epoch"] for r in state.history)},
        "start": state.start_history,
        "history": state.history,
    }
    ids = exact_tokens(x_s, encoder.token_table) if config.synthetic.discrete else None
    about = describe(pool, encoder, config)
    return SyntheticTAG(x_s, y_s, config=about, metrics=metrics, token_ids=ids).as_stored()


def outer_steps(
    state: DistillState, encoder: Encoder, objective: Objective, config: DistillConfig, tell: Callback
) -> tuple[list[float], list[dict[str, float]]]:
    """S outer steps on ``state``, in place; the loss before each and its seconds (method, section 2, step 5)."""
    outer, meter, losses, seconds = config.outer, objective.pool.meter, [], []
    optimizer = OuterOptimizer(state, outer.lr, outer.label_lr, outer.temperature_lr, outer.weight_decay)
    for step in range(outer.steps):
        dropout = config.seed + 1_000_003 * (state.epoch + 1) + 4099 * step if outer.dropout else None
        with meter.time("inject"):
            h_s = encoder.encode_embeds(state.x_s, batch=outer.inject_batch, dropout_seed=dropout)
        gradient = objective(h_s, state.y_s, float(state.log_temperature), state.epoch * outer.steps + step)
        with meter.time("inject"):
            d_xs = encoder.inject(state.x_s, gradient.d_hs, batch=outer.inject_batch, dropout_seed=dropout)
        d_ys = gradient.d_ys if config.synthetic.learn_labels else None
        optimizer.step(d_xs, d_ys, gradient.d_log_temperature)
        losses.append(gradient.loss)
        seconds.append(meter.take())
        tell.progress("steps", step + 1, outer.steps, {"loss": gradient.loss})
    return losses, seconds


def describe(pool: ShardPool, encoder: Encoder, config: DistillConfig) -> dict:
    """What an artifact must say of itself to be trained on, checked and made again."""
    return {
        "dataset": pool.tag.meta["name"],
        "dataset_hash": pool.tag.meta["hash"],
        "num_real_nodes": pool.tag.num_nodes,
        "text_bytes": pool.tag.meta["text"],
        "classes": pool.tag.classes,
        "encoder": {"name": config.encoder.name, "pooling": encoder.pooling, "width": encoder.width},
        "tokenizer": encoder.tokenizer.fingerprint,
        "storage": config.storage,
        "label_smoothing": config.synthetic.label_smoothing,
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "distill": config.to_dict(),
    }
