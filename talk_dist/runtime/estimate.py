"""What a distillation will hold and compute, from META.json and the configuration alone.

Bytes of the arrays that live through a run are counted, not guessed (a test compares them with a real
shard); working memory and seconds are models, checked against runs to within a factor of about two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from talk_dist.config import DistillConfig, InnerConfig, StudentConfig
from talk_dist.runtime.shard import LIVE_BUFFERS

BASE_BYTES = 700 << 20  # the process with torch, transformers and torch-geometric imported
ENCODER_SHARE = 0.6  # of the matrix product's rate that an encoder pass reaches, all else included
BFLOAT16_GAIN = 1.3  # on a CPU, of a whole encoder pass
SMALL_SHARE = 0.4  # the same for students: narrow matrices, sparse products
ELEMENT_FLOP = 250  # what an element of a kernel block costs a hop and layer beside the product: arc cosine, roots
STEP_SECONDS = 2e-3  # a training step cannot be shorter
SAFETY = 1.1


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer that decide its memory and time."""

    width: int
    layers: int
    inner: int
    heads: int
    vocabulary: int
    positions: int

    @staticmethod
    def of(config: Any) -> ModelShape:
        """From the configuration of a transformers model."""
        width = int(config.hidden_size)
        return ModelShape(
            width,
            int(config.num_hidden_layers),
            int(getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width),
            int(getattr(config, "num_attention_heads", 1)),
            int(config.vocab_size),
            int(getattr(config, "max_position_embeddings", 512)),
        )

    @property
    def block_parameters(self) -> int:
        return self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    @property
    def bytes(self) -> int:
        return 4 * (self.block_parameters + (self.vocabulary + self.positions) * self.width)

    def token_flop(self, length: float) -> float:
        """Of one token of a text of ``length`` tokens, forward."""
        return 2.0 * self.block_parameters + 4.0 * length * self.width * self.layers

    def activations(self, texts: float, length: float, kept: bool) -> int:
        """Bytes that live while so many texts pass; ``kept`` for a backward pass, of all layers."""
        per_layer = texts * length * (10 * self.width + 2 * self.inner + self.heads * length) * 4
        return int(per_layer * (self.layers if kept else 1))


class Evaluation(Protocol):
    """What of an EvaluateConfig matters here (that room is above this one)."""

    @property
    def against(self) -> tuple[Any, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def student(self) -> StudentConfig: ...
    @property
    def recipe(self) -> InnerConfig: ...
    @property
    def full_epochs(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """Bytes and FLOP by what needs them."""

    nodes: int
    artifact_bytes: int
    shards: list[dict[str, int]]  # of each shard, by array: held from the first encoding to the end
    held: dict[str, int]  # encoder and driver: the same
    working: dict[str, int]  # of each phase, while it runs
    flop: dict[str, float]
    steps: dict[str, int]  # training steps, each with a least duration

    @property
    def peak(self) -> int:
        resident = sum(sum(shard.values()) for shard in self.shards) + sum(self.held.values())
        return int(BASE_BYTES + SAFETY * (resident + max(self.working.values())))

    def process(self, parts: Sequence[int]) -> int:
        """Bytes of a process that holds these parts and an encoder, without the driver's."""
        resident = sum(sum(self.shards[part].values()) for part in parts) + self.held["encoder"]
        return int(BASE_BYTES + SAFETY * (resident + max(self.working["encode"], self.working["kernel"])))

    def seconds(self, rate: float) -> dict[str, float]:
        """By phase, for a machine whose matrix product runs at ``rate`` FLOP/s."""
        return {name: flop / rate + self.steps.get(name, 0) * STEP_SECONDS for name, flop in self.flop.items()}

    def refusal(self, available: int) -> str:
        """Why this cannot run in ``available`` bytes, and what to change."""
        shards = sum(sum(shard.values()) for shard in self.shards)
        phase = max(self.working, key=lambda name: self.working[name])
        remedy = {
            "encode": "lower --encoder.batch_tokens",
            "inject": "lower --outer.inject_batch or --synthetic.tokens",
            "kernel": "lower --kernel.chunk_mib",
            "full": "leave `full` out of --evaluation.against",
        }[phase]
        return (
            f"this needs about {gib(self.peak)} and {gib(available)} are free: {gib(shards)} for the graph and its "
            f"encodings, {gib(self.working[phase])} while it does its largest step ({phase}). To fit, {remedy}; "
            "take an encoder of smaller width; or use a machine with more memory"
        )


def plan(
    meta: dict[str, Any],
    config: DistillConfig,
    model: ModelShape,
    num_synthetic: int,
    evaluation: Evaluation | None,
) -> Plan:
    """Of a prepared graph with this ``meta``; without ``evaluation`` of the distillation alone."""
    m, t, classes = num_synthetic, config.synthetic.tokens, len(meta["classes"])
    tokens_bytes = m * t * model.width * 4
    stored = {"float32": 4 * model.width, "bfloat16": 2 * model.width, "int8": model.width + 4}[
        config.synthetic.storage
    ]
    driver = 7 * tokens_bytes + 12 * m * m * 8 + 8 * m * model.width * 8  # Adam, gradient, best; K_ss and its like
    working = _working(meta, config, model, m, evaluation)
    flop, steps = _flop(meta, config, model, m, evaluation)
    return Plan(
        nodes=m,
        artifact_bytes=m * t * stored + m * classes * 4,
        shards=[_shard(part, meta, config, model.width) for part in meta["parts"]],
        held={"encoder": model.bytes, "driver": driver},
        working=working,
        flop=flop,
        steps=steps,
    )


def _shard(part: dict[str, Any], meta: dict[str, Any], config: DistillConfig, width: int) -> dict[str, int]:
    own, local, entries = part["nodes"], part["nodes"] + part["halo"], part["entries"]
    item = 8 if config.kernel.precision == "float64" else 4
    deeper = max(0, config.kernel.hops - 1)
    return {
        "tokens": 4 * part["tokens"] + 8 * (own + 1),
        "graph": 8 * entries + 8 * (local + 1) + 8 * local + 21 * part["halo"] + 29 * own,
        "propagation": 12 * entries + 4 * (local + 1),
        "H": 4 * local * width,
        "Z": item * local * width,
        "norms": item * local * config.kernel.hops,
        "student": 4 * local * max(config.student.hidden, width) * 2 + 12 * entries,
        "chunks": deeper * entries * (8 + item),
    }


def _working(
    meta: dict[str, Any], config: DistillConfig, model: ModelShape, m: int, evaluation: Evaluation | None
) -> dict[str, int]:
    longest = min(meta["tokenizer"]["max_tokens"], model.positions)
    kernel = config.kernel
    item = 8 if kernel.precision == "float64" else 4
    biggest = max(part["nodes"] + part["halo"] for part in meta["parts"])
    working = {
        "encode": model.activations(config.encoder.batch_tokens / longest, longest, kept=False),
        "inject": model.activations(min(m, config.outer.inject_batch), config.synthetic.tokens, kept=True),
        "kernel": min(kernel.chunk_mib << 20, biggest * m * item * LIVE_BUFFERS) + item * biggest * model.width,
    }
    if evaluation is not None and "full" in evaluation.against:
        nodes, entries = meta["num_nodes"], 2 * meta["num_edges"] + meta["num_nodes"]
        hidden = evaluation.student.hidden
        working["full"] = nodes * (4 * 3 * model.width + 4 * 8 * hidden) + 60 * entries + 4 * meta["text"]["tokens"]
        if config.encoder.adapters:
            working["full"] += model.activations(32, longest, kept=True)
    return working


def _flop(
    meta: dict[str, Any], config: DistillConfig, model: ModelShape, m: int, evaluation: Evaluation | None
) -> tuple[dict[str, float], dict[str, int]]:
    """FLOP by phase as a matrix product would count them: slower kinds of work count more."""
    nodes, entries = meta["num_nodes"], 2 * meta["num_edges"] + meta["num_nodes"]
    train, classes = meta["split_sizes"]["train"], len(meta["classes"])
    text_tokens, t = meta["text"]["tokens"], config.synthetic.tokens
    outer, inner, adapters = config.outer, config.inner, config.encoder.adapters
    encoding = text_tokens * model.token_flop(text_tokens / max(1, nodes)) / ENCODER_SHARE
    forward = m * t * model.token_flop(t) / ENCODER_SHARE
    inject = 3 * forward  # once without gradient, once with, and back
    rows = min(nodes, train * max(1.0, entries / nodes) ** (config.kernel.hops - 1))  # the receptive field
    elements = rows * m * config.kernel.hops * config.kernel.layers
    block = 3 * (2.0 * rows * m * model.width + elements * ELEMENT_FLOP)
    scores = (2.0 * nodes * model.width * config.student.hidden + 2.0 * entries * config.student.hidden) / SMALL_SHARE
    student = 6.0 * m * config.student.hidden * (model.width + classes) / SMALL_SHARE
    fit = inner.passes * ((3 * forward if adapters else 0.0) + student)
    epochs = outer.epochs + 1
    flop = {"encode": encoding * (1 + epochs if adapters else 1), "initialise": 0.0}
    steps = {"outer epochs": epochs * inner.passes}
    if config.synthetic.init == "two-stage":
        two = config.two_stage
        checks = two.feature_steps // two.validate_every + 1
        flop["initialise"] = two.feature_steps * block + checks * (inner.passes * student + scores)
        flop["initialise"] += two.token_steps * 2 * forward
        steps["initialise"] = two.feature_steps + checks * inner.passes + two.token_steps
    flop["outer epochs"] = epochs * (fit + scores + block / 3) + outer.epochs * outer.steps * (inject + block)
    if evaluation is not None:
        small = 1 + sum(name != "full" for name in evaluation.against)
        checks = evaluation.recipe.passes // evaluation.recipe.select_every + 1
        one = evaluation.recipe.passes * ((3 * forward if adapters else 0.0) + student) + checks * scores
        whole = 3 * evaluation.recipe.passes * scores + checks * scores
        if adapters:
            one += 2 * encoding - checks * scores
            whole = evaluation.full_epochs * (3 * train / nodes + 1) * encoding + 2 * encoding
        full = "full" in evaluation.against
        flop["evaluate"] = evaluation.seeds * (small * one + full * whole)
        steps["evaluate"] = evaluation.seeds * evaluation.recipe.passes * (small + full)
    return flop, steps


def available_memory() -> int | None:
    """Bytes this process can still take: what the kernel says, or the container's limit; None if unknown."""
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free.append(int(line.split()[1]) << 10)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        anonymous = next(line for line in used.read_text().splitlines() if line.startswith("anon "))
        free.append(int(limit.read_text()) - int(anonymous.split()[1]))
    return min(free, default=None)


def measured_rate(device: torch.device, bfloat16: bool, seconds: float = 1.0) -> float:
    """FLOP/s of a matrix product on ``device``, measured for about so many seconds.

    On a CPU bfloat16 multiplies many times faster, but what stands between the products does not.
    """
    gpu = device.type != "cpu"
    size = 8192 if gpu else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16 if bfloat16 and gpu else torch.float32, device=device)
    with torch.inference_mode():
        float((a @ a)[0, 0])
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            float((a @ a)[0, 0])  # waits for the device
            count += 1
        rate = 2.0 * size**3 * count / (time.perf_counter() - started)
    return rate * BFLOAT16_GAIN if bfloat16 and not gpu else rate


def gib(count: float) -> str:
    """Bytes in a unit that people read."""
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / (1 << 20):.0f} MiB" if count < 1 << 30 else f"{count / (1 << 30):.1f} GiB"
