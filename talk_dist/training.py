"""Settings of a student and of its training, here and wherever one is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
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

    def __post_init__(self) -> None:
        check_types("student", self)
        check(
            "student",
            dropout=(0 <= self.dropout < 1, self.dropout, "in [0, 1)"),
            **at_least(1, self, "hidden", "depth"),
        )


@dataclass(frozen=True)
class InnerConfig:
    """Training adapters and student on a small set (inner loop), by AdamW and cross-entropy."""

    passes: int = 200
    """At most so many passes."""
    adapter_passes: int = 200
    """At most so many of them with adapters, where each encodes the set."""
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
            **at_least(1, self, "passes", "adapter_passes", "patience", "select_every", "adapter_select_every"),
            **at_least(0, self, "weight_decay", "select_patience"),
            **positive(self, "gnn_lr", "adapter_lr"),
        )
