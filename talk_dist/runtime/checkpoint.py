"""The state of a distillation, published atomically as one safetensors file: tensors, and JSON in its header.

Every random choice is a function of (seed, epoch) or (seed, step), so a run that goes on from here gives the result of
one that was never interrupted, to the bit. As long as the start is being made the file holds how far that has come.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from talk_dist.data import storage
from talk_dist.errors import ConfigError, DataError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 200


@dataclass
class DistillState:
    """What an outer epoch starts from. ``best`` is (x_s, y_s) as it was when it validated best; ``start_seconds`` is
    what the start took, in whichever process made it, and ``start_history`` how stage one validated."""

    x_s: Tensor  # (M, T, d_tok)
    y_s: Tensor  # (M, C)
    log_temperature: Tensor  # () float64
    epoch: int = 0
    best: tuple[Tensor, Tensor] | None = None
    best_accuracy: float = -1.0
    best_epoch: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    start_seconds: float = 0.0
    start_history: list[dict[str, Any]] = field(default_factory=list)

    def offer(self, accuracy: float) -> bool:
        """Keep the current set if it is the best so far; the earlier of two equals stays."""
        if accuracy <= self.best_accuracy:
            return False
        self.best = (self.x_s.detach().clone(), self.y_s.detach().clone())
        self.best_accuracy, self.best_epoch = accuracy, self.epoch
        return True


@dataclass(frozen=True)
class Standing:
    """How far a start has come: its stage, the tensors and the facts with which that stage goes on, and the seconds
    that it took."""

    stage: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    seconds: float


class Checkpoint:
    """``path`` holds the last finished epoch of the run that ``identity`` (config, data hash) describes, or its
    unfinished start.

    ``guard`` is called before every save, and raises where this run must not write any more.
    """

    def __init__(
        self, path: str, identity: dict[str, Any], resume: bool = True, guard: Callable[[], None] | None = None
    ):
        self.path, self.resume, self.guard = path, resume, guard
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # tuples as they will be read back

    def save(self, state: DistillState) -> None:
        """Publish ``state``. Raises what the guard raises; the state of before is whole then."""
        tensors = {"x_s": state.x_s, "y_s": state.y_s, "log_temperature": state.log_temperature}
        if state.best is not None:
            tensors["best.x_s"], tensors["best.y_s"] = state.best
        tensors |= {f"optimizer.{name}": value for name, value in state.optimizer.items()}
        names = ("epoch", "best_accuracy", "best_epoch", "history", "start_seconds", "start_history")
        self._write("state", tensors, {name: getattr(state, name) for name in names})

    def save_start(self, standing: Standing) -> None:
        """Publish how far the start has come, in the place of any state. Raises what the guard raises."""
        facts = {"stage": standing.stage, "facts": standing.facts, "seconds": standing.seconds}
        self._write("start", standing.tensors, facts)

    def load(self) -> DistillState | Standing | None:
        """The saved state, or how far an unfinished start has come, or None where there is neither or `resume` is off.

        Raises ConfigError if it belongs to another configuration or data set, DataError if it cannot be read.
        """
        tensors, header = self._read()
        if "start" in header:
            return Standing(tensors=tensors, **json.loads(header["start"]))
        if not header:
            return None
        best = (tensors.pop("best.x_s"), tensors.pop("best.y_s")) if "best.x_s" in tensors else None
        optimizer = {name[10:]: value for name, value in tensors.items() if name.startswith("optimizer.")}
        return DistillState(
            tensors["x_s"],
            tensors["y_s"],
            tensors["log_temperature"],
            best=best,
            optimizer=optimizer,
            **json.loads(header["state"]),
        )

    def _write(self, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        metadata = {kind: json.dumps(facts), "identity": json.dumps(self.identity)}
        data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        if self.guard:
            self.guard()
        storage.write_atomic(self.path, save_safetensors(data, metadata))

    @property
    def threads(self) -> int:
        """Of the run that left what is saved; 0 if nothing is. They decide the last bits, so that a run goes on with
        as many, wherever it does. Raises DataError if it cannot be read."""
        _, header = self._parsed()
        return int(json.loads(header["identity"]).get("threads", 0)) if header else 0

    def _read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, header = self._parsed()
        changed = differences(json.loads(header["identity"]), self.identity) if header else []
        if changed:
            raise ConfigError(
                f"{self.path} belongs to another run ({'; '.join(changed)}); "
                "pass --resume never to start over, or choose another --out"
            )
        return tensors, header

    def _parsed(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not self.resume or not storage.exists(self.path):
            return {}, {}
        data = storage.read_bytes(self.path)
        try:
            tensors = load_safetensors(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        except (SafetensorError, ValueError, KeyError) as error:
            raise DataError(self.path, f"cannot be read ({error}); delete it or pass --resume never") from error
        return tensors, header


class Starting:
    """The start on its way, which goes on from what one that was cut off had ``saved``."""

    SHARE = 0.1  # of a start's time that saving may take: what comes sooner is left out

    def __init__(self, checkpoint: Checkpoint | None = None, saved: Standing | None = None):
        self._checkpoint, self._saved = checkpoint, saved
        self._began = time.monotonic() - (saved.seconds if saved else 0.0)
        self._spent = 0.0

    @property
    def seconds(self) -> float:
        """Since it began, in whichever processes."""
        return time.monotonic() - self._began

    def at(self, stage: str) -> Standing | None:
        """What was saved, if it was in this stage."""
        return self._saved if self._saved and self._saved.stage == stage else None

    def save(self, stage: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Where there is a checkpoint. Raises what its guard raises."""
        if self._checkpoint is None or self._spent > self.SHARE * self.seconds:
            return
        before = self.seconds
        self._checkpoint.save_start(Standing(stage, tensors, facts, before))
        self._spent += self.seconds - before


def differences(saved: Any, current: Any, where: str = "") -> list[str]:
    """Where two trees of settings differ, one short line each; ``None`` is what only the other has."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = sorted(saved.keys() | current.keys())
        return [line for key in keys for line in differences(saved.get(key), current.get(key), f"{where}.{key}")]
    return [] if saved == current else [f"{where[1:]}: {_BRIEF.repr(saved)} there, {_BRIEF.repr(current)} now"]


class OuterOptimizer:
    """AdamW on the token embeddings, the labels if they are learned, and the log temperature."""

    def __init__(self, state: DistillState, lr: float, label_lr: float, temperature_lr: float, weight_decay: float):
        self.state = state
        self.parameters = [state.x_s, state.y_s, state.log_temperature]
        rates = [lr, label_lr, temperature_lr]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p], "lr": rate, "weight_decay": weight_decay if p is state.x_s else 0.0}
                for p, rate in zip(self.parameters, rates, strict=True)
            ]
        )
        restore_moments(self.adamw, state.optimizer)

    def step(self, d_xs: Tensor, d_ys: Tensor | None, d_log_temperature: float) -> None:
        """One step; ``d_ys`` None leaves the labels alone."""
        gradients = [d_xs, d_ys, torch.tensor(d_log_temperature)]
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.to(p)
        self.adamw.step()
        for p in self.parameters:
            p.grad = None
        self.state.optimizer = moments(self.adamw)


def moments(adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What Adam knows of each of its parameters, as `index.name`."""
    known = (adam.state.get(p, {}) for group in adam.param_groups for p in group["params"])
    return {f"{index}.{name}": value for index, own in enumerate(known) for name, value in own.items()}


def restore_moments(adam: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """What `moments` gave, among other tensors."""
    for index, p in enumerate(p for group in adam.param_groups for p in group["params"]):
        own = {
            name: saved[f"{index}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq") if f"{index}.{name}" in saved
        }
        if own:
            adam.state[p] = own
