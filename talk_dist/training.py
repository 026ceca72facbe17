"""Settings of a student and of its training, here and wherever one is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from talk_dist.schema import at_least, check, check_types, positive

StudentKind = Literal["gcn", "sage", "sgc", "appnp", "gat"]


@dataclass(frozen=True)
class StudentConfig:
    """The graph neural network on top of the encoder."""

    kind: StudentKind = "gcn"
    """Architecture."""
    hidden: int = 256
    """Hidden width."""
    depth: int = 2
    """Propagation hops (APPNP: ten power iterations whatever the depth)."""
    dropout: float = 0.5
    """Dropout before each linear layer."""
    propagation: Literal["auto", "mean", "sym"] = "auto"
    """How neighbours weigh: `mean` is D^-1 A, as in the kernel; `sym` is D^-1/2 A D^-1/2. Left open, SAGE has the first
    and the others have the second, as published; GAT learns its own."""

    def __post_init__(self) -> None:
        check_types("student", self)
        check(
            "student",
            propagation=(
                self.kind != "gat" or self.propagation == "auto",
                self.propagation,
                "must be auto for a GAT, whose weights are learnt",
            ),
            dropout=(0 <= self.dropout < 1, self.dropout, "in [0, 1)"),
            **at_least(1, self, "hidden", "depth"),
        )


@dataclass(frozen=True)
class InnerConfig:
    """Training adapters and student on a small set (inner loop), by AdamW and cross-entropy."""

    passes: int = 200
    """At most so many passes."""
    adapter_passes: int = 0
    """At most so many of them with adapters, where each encodes the set (0: as many)."""
    gnn_lr: float = 5e-3
    """Learning rate of the student."""
    adapter_lr: float = 1e-4
    """Learning rate of the adapters."""
    weight_decay: float = 5e-4
    """Weight decay of the student."""
    patience: int = 20
    """Stop after so many passes without a lower training loss."""
    target_loss: float = 1e-3
    """Stop below this training loss."""
    select_every: int = 10
    """Passes between validations where a student is selected by validation accuracy (evaluation)."""
    adapter_select_every: int = 50
    """The same with adapters, where each validation encodes the real texts again."""
    select_patience: int = 0
    """Stop after so many validations without a better one (0: never)."""

    def __post_init__(self) -> None:
        check_types("inner", self)
        check(
            "inner",
            **at_least(1, self, "passes", "patience", "select_every", "adapter_select_every"),
            **at_least(0, self, "adapter_passes", "weight_decay", "select_patience"),
            **positive(self, "gnn_lr", "adapter_lr"),
        )

    @property
    def joint_passes(self) -> int:
        """At most so many passes where adapters are trained."""
        return min(self.passes, self.adapter_passes or self.passes)


Against = Literal["full", "random", "herding", "kcenter", "medoid"]


@dataclass(frozen=True)
class EvaluateConfig:
    """How students are trained and compared."""

    against: tuple[Against, ...] = ("full", "random", "herding", "kcenter", "medoid")
    """The full training set and coresets of the same size."""
    seeds: int = 5
    """Students trained from so many seeds; the table shows mean ± standard deviation."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The student."""
    recipe: InnerConfig = field(
        default_factory=lambda: InnerConfig(passes=1000, adapter_passes=200, patience=1000, select_patience=10)
    )
    """How every student is trained, whatever it is trained on: until ten validations in a row are no better."""
    full_lr: tuple[float, ...] = (5e-3, 2e-2)
    """Learning rates among which the full training set has its own chosen, on validation nodes."""
    full_label_smoothing: tuple[float, ...] = (0.0, 0.1)
    """The same for the share of its labels that is spread over all classes, as `synthetic.label_smoothing` of small
    sets: on some graphs a reference without it is the weaker one."""
    full_epochs: int = 4
    """With adapters: epochs of joint training on the full training set."""

    def __post_init__(self) -> None:
        check_types("evaluation", self)
        check(
            "evaluation",
            **at_least(1, self, "seeds"),
            full_lr=(bool(self.full_lr) and min(self.full_lr) > 0, self.full_lr, "learning rates above 0"),
            full_label_smoothing=(
                bool(self.full_label_smoothing) and all(0 <= share < 1 for share in self.full_label_smoothing),
                self.full_label_smoothing,
                "shares in [0, 1)",
            ),
            **at_least(0, self, "full_epochs"),
        )
