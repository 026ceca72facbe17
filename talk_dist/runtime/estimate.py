"""What the processes of a distillation will hold, from META.json and the configuration alone.

Arrays that live through a run are counted, not guessed (a test compares them with a real shard). Working memory is
a model of what was measured; `benchmarks/memory.py` compares the whole with the measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from talk_dist.config import BITS, DistillConfig
from talk_dist.models.shape import ModelShape
from talk_dist.runtime.chunks import HISTORY, LIVE_BUFFERS, TILE_ELEMENTS, TILE_ROWS, TOGETHER
from talk_dist.runtime.fields import READ_ROWS
from talk_dist.runtime.memory import gib
from talk_dist.runtime.pool import sample_size
from talk_dist.runtime.propagate import PROPAGATED_BYTES, PROPAGATED_ENTRIES
from talk_dist.runtime.shard import ENCODED_ROWS
from talk_dist.runtime.speed import STEP_SECONDS, adapted_layers, layers_again, work
from talk_dist.runtime.student_pass import MADE, STAGE_BYTES
from talk_dist.training import EvaluateConfig

BASE_BYTES = 460 << 20  # a process that has used torch and transformers: their code and tables
DRIVER_BYTES = 20 << 20  # what the command line and scikit-learn add
RAY_BYTES = 60 << 20  # what a connection to Ray adds
DEEPSPEED_BYTES = 150 << 20  # what DeepSpeed and its process group add
HEAP = 1.5  # arrays of many sizes leave holes in the heap
HEAP_UNTRIMMED = 2.0  # more of them where nothing gives memory back in between
MAPPED_BYTES = 32 << 20  # glibc maps larger arrays one by one: they leave no holes
SOLVE_BUFFERS = 10  # arrays of the size (M, M) that K_ss with gradient holds at its peak, a hop and layer
PASSING = ("halo", "student")  # of a shard's arrays, those that it does not keep
DRIVER_PHASES = ("inject", "tokens", "start", "solve", "full")  # of a run whose shards are elsewhere
REMEDIES = {
    "start": "lower --synthetic.size",
    "solve": "lower --synthetic.size",
    "encode": "lower --encoder.batch_tokens",
    "inject": "lower --outer.inject_batch or --synthetic.tokens",
    "tokens": "lower --synthetic.tokens or --outer.inject_batch",
    "propagate": "prepare it in more parts, on more machines",
    "students": "lower --student.hidden, or prepare it in more parts, on more machines",
    "kernel": "lower --kernel.chunk_mib",
    "full": "leave `full` out of --evaluation.against",
}


@dataclass(frozen=True)
class Process:
    """Bytes of one process: what it holds throughout, and what each phase adds while it runs.

    With ``device`` the model and the phases live on a GPU, the rest in host memory.
    """

    base: int
    held: dict[str, int]
    model: int
    working: dict[str, int]
    device: bool = False

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.working, key=lambda name: self.working[name])

    @property
    def on_device(self) -> int:
        return self.model + self.working[self.largest] if self.device else 0

    @property
    def host(self) -> int:
        return self.base + sum(self.held.values()) + (0 if self.device else self.model + self.working[self.largest])

    def refusal(self, who: str, available: int) -> str:
        """Why ``who`` cannot run in ``available`` bytes, and what to change."""
        held, phase = sum(self.held.values()), self.largest
        return (
            f"{who} needs about {gib(self.host)} and {gib(available)} are free: {gib(held)} for the graph and its "
            f"encodings, {gib(self.working[phase])} while it does its largest step ({phase}). To fit, "
            f"{REMEDIES[phase]}; keep encodings on disk (--kernel.fields disk); or use a machine with more memory"
        )


@dataclass(frozen=True)
class Plan:
    """Bytes and FLOP by what needs them."""

    nodes: int
    artifact_bytes: int
    shards: list[dict[str, int]]  # of each shard, by array: held to the end, but for those PASSING
    model: int  # the language model
    adapters: int
    driver_arrays: int  # token embeddings and their optimizer
    token_table: int  # of the language model, which a group of workers sends to the driver
    working: dict[str, int]  # of each phase, while it runs
    broadcast: int  # bytes of what a step sends to every shard
    reply: int  # bytes of what a shard answers to a step
    sample: int  # of training rows, which the start needs in the driver
    student: int  # a student's weights, on their way to the shards
    flop: dict[str, float]
    steps: dict[str, int]  # training steps, each with a least duration
    device: bool
    disk: int  # below runtime.scratch, of all shards together

    def whole(self) -> Process:
        """The one process of a local run."""
        held = {"shards": sum(map(_total, self.shards)), "driver": self.driver_arrays}
        return Process(BASE_BYTES + DRIVER_BYTES, held, self.model, self._working(self.shards), self.device)

    def actor(self, parts: Sequence[int], borrows: bool = False) -> Process:
        """A process that holds these parts and an encoder of its own, or ``borrows`` that of the workers."""
        shards = [self.shards[part] for part in parts]
        phases = ("propagate", "students", "kernel") if borrows else ("encode", "propagate", "students", "kernel")
        working = {name: size for name, size in self._working(shards).items() if name in phases}
        held = {"shards": sum(map(_total, shards))}
        return Process(BASE_BYTES + RAY_BYTES, held, 0 if borrows else self.model, working, self.device)

    def _working(self, shards: list[dict[str, int]]) -> dict[str, int]:
        """With a student's rows, which all shards of a process hold together."""
        return self.working | {"students": self.working["students"] + sum(shard["student"] for shard in shards)}

    def driver(self, group: bool) -> Process:
        """The driver of a run on a cluster; with a ``group`` the language model is not in it."""
        working = {name: self.working[name] for name in DRIVER_PHASES if name in self.working}
        if group:  # the workers hold what they encode and inject
            working["tokens"] -= working.pop("inject")
        held = {"driver": self.driver_arrays} | ({"token table": self.token_table} if group else {})
        own = 0 if group else self.model
        return Process(BASE_BYTES + DRIVER_BYTES + RAY_BYTES, held, own, working, self.device and not group)

    def worker(self, workers: int, stage: int, lends: bool = False) -> Process:
        """One of the language model's workers under ZeRO ``stage``; ``lends``: it encodes the real texts too."""
        split = {"parameters": stage >= 3, "gradients": stage >= 2, "optimizer": stage >= 1}
        share = {name: 1 / workers if divided else 1.0 for name, divided in split.items()}
        model = self.model * share["parameters"]
        trained = self.adapters * (2 * share["optimizer"] + share["gradients"] + share["optimizer"])
        working = {name: self.working[name] for name in (("inject", "encode") if lends else ("inject",))}
        return Process(BASE_BYTES + RAY_BYTES + DEEPSPEED_BYTES, {}, int(model + trained), working, self.device)

    def object_store(self, actors: int, nodes: int = 0, group: bool = False) -> int:
        """Of the whole cluster, by default with a node for each actor: what is on its way at most. Ray frees with a
        delay, in which the halo rows of H and of Z meet."""
        parts = len(self.shards)
        away = (parts - parts / actors) / (parts - 1) if parts > 1 else 0.0  # of the neighbours, in other actors
        halo = int(2 * away * sum(shard["halo"] for shard in self.shards))
        step = self.broadcast * (nodes or actors) + self.reply * parts
        start = self.sample + self.student * (1 + parts)  # a teacher is trained as soon as the sample is there
        return self.adapters + max(halo, step, start, self.token_table if group else 0)

    def seconds(self, rate: float) -> dict[str, float]:
        """By phase, for a machine whose matrix product runs at ``rate`` FLOP/s."""
        return {name: flop / rate + self.steps.get(name, 0) * STEP_SECONDS for name, flop in self.flop.items()}


def plan(
    meta: dict[str, Any],
    config: DistillConfig,
    model: ModelShape,
    num_synthetic: int,
    evaluation: EvaluateConfig | None,
    device: bool = False,
) -> Plan:
    """Of a prepared graph with this ``meta``; without ``evaluation`` of the distillation alone."""
    m, t, classes = num_synthetic, config.synthetic.tokens, len(meta["classes"])
    tokens_bytes = m * t * model.width * 4
    stored = 2 if config.synthetic.discrete else token_bytes(config.storage, model.width)
    label = 4 * classes if config.synthetic.learn_labels else 1 if classes <= 256 else 2 if classes <= 2**15 else 4
    driver = 7 * tokens_bytes + 8 * m * model.width * 8  # Adam, gradient, best; encodings and their gradients
    adapters = 3 * 2 * 4 * config.encoder.rank * model.width * adapted_layers(config, model)
    flop, steps = work(meta, config, model, m, evaluation)
    return Plan(
        nodes=m,
        artifact_bytes=m * (t * stored + label),
        shards=[_shard(part, meta, config, model) for part in meta["parts"]],
        model=model.bytes,
        adapters=adapters,
        driver_arrays=driver,
        token_table=4 * model.vocabulary * model.width,
        working=_working(meta, config, model, m, evaluation),
        broadcast=m * (4 * model.width + 8 * classes),
        reply=8 * m * (model.width + classes),
        sample=_sample(meta, m, model.width),
        student=4 * config.student.hidden * (model.width + classes),
        flop=flop,
        steps=steps,
        device=device,
        disk=sum(_on_disk(part, config, model) for part in meta["parts"]),
    )


def token_bytes(storage: str, width: int) -> int:
    """Of one stored token embedding, its scale included."""
    if storage in BITS:
        return width * BITS[storage] // 8 + 2
    return {"float32": 4 * width, "bfloat16": 2 * width, "int8": width + 4}[storage]


def _sample(meta: dict[str, Any], m: int, width: int) -> int:
    """Bytes of the training rows that the start chooses from, see `coresets.sample_for`."""
    counts = meta["class_counts"]["train"]
    per_class = sample_size(-(-m * max(counts) // max(1, sum(counts))), len(counts))
    return 4 * width * sum(min(count, per_class) for count in counts)


def _total(shard: dict[str, int]) -> int:
    return sum(size for name, size in shard.items() if name not in PASSING)


def _lower(part: dict[str, Any], config: DistillConfig, model: ModelShape) -> int:
    """Bytes of what is kept of every token below the adapters."""
    return 2 * part["tokens"] * model.width if layers_again(config, model) < model.layers else 0


def _on_disk(part: dict[str, Any], config: DistillConfig, model: ModelShape) -> int:
    """Bytes of a shard's fields in half precision, where they are files."""
    if config.kernel.fields == "memory":
        return 0
    local, kernel = part["nodes"] + part["halo"], config.kernel
    columns = (2 + kernel.hops - kernel.rounds) * model.width + 2 * max(config.student.hidden, model.width)
    return 2 * local * columns + _lower(part, config, model)


def _shard(part: dict[str, Any], meta: dict[str, Any], config: DistillConfig, model: ModelShape) -> dict[str, int]:
    own, local, entries = part["nodes"], part["nodes"] + part["halo"], part["entries"]
    kernel, width, item = config.kernel, model.width, 8 if config.kernel.precision == "float64" else 4
    alone, here = kernel.rounds == 1, local if kernel.fields == "memory" else 0
    column = 4 if local < 1 << 31 else 8
    given = {"encodings": 2 * own * width if here else 0} if meta.get("encodings") else {}
    return given | {
        "tokens": 4 * part["tokens"] + 8 * (own + 1),
        "graph": column * entries + 8 * (local + 1) + 8 * local + 21 * part["halo"] + 21 * own,
        "propagation": 0 if alone else 8 * entries + 4 * (local + 1),  # its columns are those of the graph
        "H": 4 * here * width,
        "Z": item * here * width,
        "hops before": item * here * width * (kernel.hops - kernel.rounds),
        "lower layers": _lower(part, config, model) if kernel.fields == "memory" else 0,
        "norms": item * local * kernel.rounds,
        "student": 4 * here * 3 * max(config.student.hidden, width),
        "chunks": 16 * own if alone else 2 * (kernel.rounds - 1) * entries * (8 + item),
        "halo": 4 * part["halo"] * width,
    }


def _working(
    meta: dict[str, Any], config: DistillConfig, model: ModelShape, m: int, evaluation: EvaluateConfig | None
) -> dict[str, int]:
    longest = min(meta["tokenizer"]["max_tokens"], model.positions)
    kernel, item = config.kernel, 8 if config.kernel.precision == "float64" else 4
    biggest = max(part["nodes"] + part["halo"] for part in meta["parts"])
    densest = max(part["entries"] for part in meta["parts"])
    m_block = -(-m // kernel.blocks(m))
    rows = max(TILE_ROWS, TILE_ELEMENTS // m_block) if kernel.rounds == 1 else biggest
    block = min(kernel.chunk_mib << 20, min(rows, biggest) * m_block * item * LIVE_BUFFERS)
    classes, taught = len(meta["classes"]), config.outer.targets == "teacher"
    square, sample = 8 * m_block * m_block, _sample(meta, m, model.width)
    solve = (2 + SOLVE_BUFFERS * kernel.rounds * kernel.layers) * square
    wide = max(config.student.hidden, model.width)
    through = config.synthetic.init == "two-stage" and config.two_stage.student_steps > 0
    unrolled = through * 12 * config.two_stage.student_passes * config.student.hidden * (model.width + classes)
    made = 4 * 4 * min(biggest, READ_ROWS) * wide  # a student's rows, before and after a hop
    if config.student.kind == "gat":
        made = min(4 * MADE * biggest * wide, STAGE_BYTES)
    inject = HEAP * model.activations(min(m, config.outer.inject_batch), config.synthetic.tokens, kept=True)
    sought = not meta.get("encodings") and (config.synthetic.init == "two-stage" or config.settles)
    moves = sought * (2 * HISTORY + 6) * 4 * min(m, TOGETHER) * config.synthetic.tokens * model.width
    working = {
        "encode": HEAP * model.activations(config.encoder.batch_tokens / longest, longest, kept=False)
        + 2 * 4 * min(biggest, ENCODED_ROWS) * model.width,
        "propagate": min(item * biggest * model.width, PROPAGATED_BYTES) + 60 * min(densest, PROPAGATED_ENTRIES),
        "students": made + min(4 * biggest * wide, PROPAGATED_BYTES) + 60 * min(densest, PROPAGATED_ENTRIES),
        "inject": inject,
        "tokens": moves + inject,
        "kernel": HEAP_UNTRIMMED * block + 4 * 8 * m * (model.width + classes),
        # as it comes, joined, sorted; a class of it in float64; a teacher's layers and their gradients; or the passes
        # of a student that are gone through again
        "start": max(4 * sample + (sample // model.width * config.student.hidden * 4 if taught else 0), unrolled),
        "solve": solve * (HEAP_UNTRIMMED if square < MAPPED_BYTES else 1.0) + sample,
    }
    if evaluation is not None and "full" in evaluation.against:
        nodes, entries = meta["num_nodes"], 2 * meta["num_edges"] + meta["num_nodes"]
        hidden = evaluation.student.hidden
        working["full"] = nodes * (4 * 3 * model.width + 4 * 8 * hidden) + 60 * entries + 4 * meta["text"]["tokens"]
        if config.encoder.adapters:
            working["full"] += model.activations(32, longest, kept=True)
    return {name: int(size) for name, size in working.items()}
