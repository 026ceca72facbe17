"""Every setting of a distillation, one frozen dataclass a concern, each checked when it is made.

`presets.preset` gives a whole configuration; a YAML file and command-line options override single fields of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from talk_dist.errors import ConfigError
from talk_dist.resources import ClusterConfig, DeepSpeedConfig, RuntimeConfig
from talk_dist.schema import at_least, build, check, check_types, positive
from talk_dist.training import InnerConfig, StudentConfig

PLACES = ("runtime", "cluster")  # sections that say where a result is computed
BITS = {"int1": 1, "int2": 2, "int4": 4}  # number formats onto whose grid a result is settled
SEEDS = 2**31  # some below are sums with it, and scikit-learn's end at 2^32


@dataclass(frozen=True)
class EncoderConfig:
    """The language model that turns texts, or synthetic token embeddings, into encodings."""

    name: str = "minilm"
    """`minilm` (installed with this package), a folder, or a Hugging Face name; `given:WIDTH` for a graph that brings
    encodings so wide in place of texts."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """How token states become one vector; `auto` does what the checkpoint was trained for."""
    adapters: bool = False
    """Train LoRA adapters in the inner loop. False is the frozen mode: real texts are encoded once."""
    rank: int = 4
    """LoRA rank."""
    alpha: int = 8
    """LoRA alpha."""
    dropout: float = 0.05
    """LoRA dropout in the inner loop."""
    targets: tuple[str, ...] = ()
    """Names of the modules that get adapters; empty takes query, key and value of the architecture."""
    adapted_layers: int = 0
    """Adapters in so many of the last layers (0: in all). The layers below then run once a run for a real text: what
    they return is kept in half precision, one vector a token, where `kernel.fields` says. A second encoding of MiniLM
    costs what its adapted layers cost (benchmarks/results/layers.md). Workers that encode real texts themselves
    (`deepspeed.encode_texts`) keep nothing."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast for encoder passes; `auto` takes bfloat16 where the hardware multiplies it natively."""
    batch_tokens: int = 8192
    """Tokens (padding counted) in one batch of real texts."""
    device: str = "auto"
    """`auto` takes a GPU if there is one, else the CPU."""

    def __post_init__(self) -> None:
        check_types("encoder", self)
        check(
            "encoder",
            dropout=(0 <= self.dropout < 1, self.dropout, "in [0, 1)"),
            **at_least(1, self, "rank", "batch_tokens"),
            **at_least(0, self, "adapted_layers"),
        )


@dataclass(frozen=True)
class KernelConfig:
    """The graph-aware neural tangent kernel and its ridge regression."""

    architecture: Literal["gcn", "sgc"] = "sgc"
    """`gcn`: non-linear layers after every hop (the paper's). `sgc`: all hops first, then the layers: a row needs no
    neighbours, so that a step costs less and its norms are exact."""
    hops: int = 2
    """K: hops of propagation."""
    layers: int = 1
    """L: non-linear layers per hop, or after all of them."""
    propagation: Literal["mean", "sym"] = "mean"
    """`mean` is D^-1 A (the paper's), `sym` is D^-1/2 A D^-1/2 (a GCN's)."""
    norms: Literal["exact", "linear"] = "exact"
    """With gcn the diagonal of the propagated kernel: summed over pairs of neighbours, or the paper's approximation."""
    degree_cap: int = 512
    """Nodes with a larger receptive field take linear norms."""
    ridge: float = 0.1
    """Relative to the mean diagonal of the synthetic kernel."""
    precision: Literal["float32", "float64"] = "float32"
    """Number format of the kernel blocks; the solve is always in float64."""
    block: int = 2048
    """At most so many synthetic nodes in one kernel (0: all). More are dealt out to blocks, each with all classes and a
    share of the real rows (divide and conquer: Zhang, Duchi & Wainwright 2013): cost is linear in N if M is a share."""
    fields: Literal["memory", "disk"] = "memory"
    """Where shards keep encodings: in memory or, in half precision, in files below `runtime.scratch`."""
    chunk_mib: int = 256
    """Memory for one chunk of rows."""

    def __post_init__(self) -> None:
        check_types("kernel", self)
        check(
            "kernel",
            block=(self.block == 0 or self.block >= 16, self.block, "0 or at least 16"),
            **at_least(1, self, "hops", "layers", "chunk_mib"),
            **at_least(0, self, "ridge"),
        )

    def blocks(self, num_synthetic: int) -> int:
        """B: node i of M is in block i mod B; as nodes come class by class, every block has its share of each class,
        and every class at least B nodes (`coresets.allocate`), so that no block lacks one."""
        return max(1, -(-num_synthetic // self.block)) if self.block else 1

    @property
    def rounds(self) -> int:
        """How often layers follow a hop: K, or once."""
        return self.hops if self.architecture == "gcn" else 1


@dataclass(frozen=True)
class SyntheticConfig:
    """The synthetic set: how many nodes, how long, how it starts and how it is stored."""

    size: float = 0.01
    """Below 1 a fraction of all real nodes, else the number of synthetic nodes M."""
    tokens: int = 16
    """T: token embeddings per synthetic node."""
    init: Literal["random", "medoid", "two-stage"] = "two-stage"
    """Real texts drawn at random; the texts nearest to class-wise k-means centres of P^2 H; or these fitted
    to encodings that were optimised first."""
    label_smoothing: float = 0.1
    """Share of each synthetic label that is spread over all classes, for students; what the kernel predictor chooses
    does not depend on it."""
    learn_labels: bool = False
    """Learn soft labels beside the token embeddings."""
    storage: Literal["auto", "float32", "bfloat16", "int8", "int4", "int2", "int1"] = "auto"
    """Number format of the token embeddings on disk; the integers have one scale a token. For 4 bits and fewer the
    result is settled: brought onto the grid without changing what it encodes to (benchmarks/results/bytes.md). `auto`
    is int4, and int8 for a graph that brings encodings, which have no numbers to spare."""
    settle_passes: int = 30
    """Encoder passes for that."""
    gain: float = 1.0
    """What is settled has encodings so many times as long: few tokens of few bits reach long ones more exactly. The
    kernel predictor does not see a length that all share; a student may."""
    discrete: bool = False
    """Make texts: real tokens (`tokens` of them, special ones counted) whose encodings point where the optimised ones
    do. Stored as token ids, exported as text; less accurate, the more so in another encoder
    (benchmarks/results/discrete.md).
    With `init: two-stage`, and without outer epochs, whose steps would move them off the vocabulary."""

    def __post_init__(self) -> None:
        check_types("synthetic", self)
        whole = self.size < 1 or float(self.size).is_integer()
        check(
            "synthetic",
            size=(self.size > 0 and whole, self.size, "a fraction in (0, 1) or a whole number of nodes"),
            label_smoothing=(0 <= self.label_smoothing < 1, self.label_smoothing, "in [0, 1)"),
            **at_least(1, self, "tokens", "settle_passes"),
            **positive(self, "gain"),
        )


@dataclass(frozen=True)
class TwoStageConfig:
    """`synthetic.init: two-stage`: first the encodings, then the tokens that produce them."""

    feature_steps: int = 120
    """Adam steps on the encodings themselves against the kernel; no encoder pass is needed."""
    student_steps: int = 60
    """Further steps on them (on each block of them) through students: each trains one afresh and follows the loss of
    the real rows back through its training. What the kernel, a student of infinite width, does not see
    (benchmarks/results/students.md)."""
    student_passes: int = 100
    """Such a student is trained for half to all of so many passes."""
    judges: int = 3
    """Fresh students whose mean validation accuracy says which of these encodings are kept."""
    feature_lr: float = 1e-2
    """Step size relative to the root mean square of the encodings."""
    token_steps: int = 120
    """At most so many encoder passes to find the tokens that produce the optimised encodings."""
    token_error: float = 0.006
    """A node is done where its encoding is this near, squared distance relative to its squared norm."""
    discrete_steps: int = 24
    """With `synthetic.discrete`: steps of the search for tokens, each some fifty encoder passes."""
    validate_every: int = 20
    """Train and validate a fresh student each so many feature steps; the best encodings are kept."""

    def __post_init__(self) -> None:
        check_types("two_stage", self)
        check(
            "two_stage",
            **at_least(0, self, "feature_steps", "token_steps", "discrete_steps", "token_error", "student_steps"),
            **at_least(1, self, "student_passes", "judges", "validate_every"),
            **positive(self, "feature_lr"),
        )


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop: steps of the synthetic set against the kernel ridge regression loss."""

    epochs: int | None = None
    """Outer epochs: inner loop, encoding of the real texts, validation, steps. Left open: none after two stages, whose
    result they do not improve (benchmarks/results/students.md), unless labels are to be learned; else 4."""
    steps: int = 8
    """Outer steps per epoch."""
    rows: int = 4096
    """About so many real rows a block in a step, here and in stage one, in turn until all have been seen; 0: all."""
    lr: float = 1e-3
    """AdamW learning rate of the token embeddings."""
    label_lr: float = 1e-2
    """Learning rate of learned labels."""
    weight_decay: float = 0.0
    """AdamW weight decay of the token embeddings."""
    targets: Literal["labels", "teacher"] = "teacher"
    """What the kernel predictor, and students in stage one, are to say: the labels of the training rows (the paper's),
    and, of every other row, what a student trained on them says (benchmarks/results/teacher.md)."""
    loss: Literal["mse", "ce"] = "mse"
    """Squared error (the paper's) or cross-entropy with a learned temperature."""
    temperature_lr: float = 0.05
    """Learning rate of the log temperature."""
    patience: int = 3
    """Stop after so many epochs without a better validation accuracy."""
    inject_batch: int = 32
    """Synthetic nodes encoded at once; changes memory, not the result, but for the draws of the adapters' dropout."""
    dropout: bool = False
    """Keep the adapters' dropout on in outer steps (its random state is replayed in injection)."""

    def __post_init__(self) -> None:
        check_types("outer", self)
        check(
            "outer",
            epochs=(self.epochs is None or self.epochs >= 0, self.epochs, "not negative"),
            rows=(self.rows == 0 or self.rows >= 16, self.rows, "0 or at least 16"),
            **at_least(1, self, "steps", "patience", "inject_batch"),
            **at_least(0, self, "weight_decay"),
            **positive(self, "lr", "label_lr", "temperature_lr"),
        )


@dataclass(frozen=True)
class DistillConfig:
    """The whole of one distillation."""

    seed: int = 0
    """Fixes every random choice."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    two_stage: TwoStageConfig = field(default_factory=TwoStageConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def __post_init__(self) -> None:
        check_types("", self)
        check("", seed=(0 <= self.seed < SEEDS, self.seed, f"from 0 to {SEEDS - 1}"))
        if self.synthetic.discrete and (self.synthetic.init != "two-stage" or self.outer_epochs):
            raise ConfigError(
                f"with synthetic.discrete, synthetic.init must be two-stage (it is {self.synthetic.init}) and "
                f"outer.epochs 0 (it is {self.outer_epochs}): outer steps move tokens off the vocabulary"
            )
        if self.synthetic.learn_labels and not self.outer_epochs:
            raise ConfigError(
                "synthetic.learn_labels with outer.epochs 0: labels are learned in outer steps; set outer.epochs to at "
                "least 1, or leave it open"
            )

    @property
    def outer_epochs(self) -> int:
        """`outer.epochs`, or what it comes to where it is left open."""
        if self.outer.epochs is not None:
            return self.outer.epochs
        return 0 if self.synthetic.init == "two-stage" and not self.synthetic.learn_labels else 4

    @property
    def storage(self) -> str:
        """`synthetic.storage`, or what `auto` comes to."""
        auto = "int8" if self.encoder.name.startswith("given:") else "int4"
        return auto if self.synthetic.storage == "auto" else self.synthetic.storage

    @property
    def settles(self) -> bool:
        """Whether the result is brought onto a grid of a few bits."""
        return self.storage in BITS and not self.synthetic.discrete

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The settings on which a result depends: all but those of where it is computed."""
        return {name: value for name, value in self.to_dict().items() if name not in PLACES}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DistillConfig:
        """The configuration of a nested dict. Raises ConfigError for an unknown key, with the nearest one."""
        return build(DistillConfig, values, "")
