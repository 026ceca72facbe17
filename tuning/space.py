"""What a sweep searches: ranges and choices of the configuration's own fields, some only where others allow them.

The default space is `default_space()`; a YAML file narrows, fixes, extends or drops single parameters of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from talk_dist.config import DistillConfig
from talk_dist.data.given import given_width
from talk_dist.errors import ConfigError
from talk_dist.schema import number, unknown_key

Value = bool | int | float | str


class Suggest(Protocol):
    """What of an Optuna trial is needed here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...


@dataclass(frozen=True)
class Parameter:
    """One setting: a range (``low``, ``high``) or ``choices``; asked for only where ``when`` holds.

    ``when`` maps other settings to the values that they may have.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Value, ...] = ()
    when: Mapping[str, Collection[Value]] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What it is, as a person reads it."""
        what = f"one of {list(self.choices)}" if self.choices else f"{self.low} to {self.high}"
        where = [f"{key} in {allowed}" for key, allowed in self.when.items()]
        return ", ".join([what] + ["log"] * self.log + [f"when {' and '.join(where)}"] * bool(where))

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Every choice, or both ends of the range."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: Suggest) -> Value:
        if self.choices:
            return trial.suggest_categorical(self.key, list(self.choices))
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def holds(self, value: Value) -> bool:
        """Whether ``value`` lies in the range or among the choices."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high


def default_space(given: bool = False) -> list[Parameter]:
    """Worth running as it is, frozen encoder or adapters: what moved validation accuracy on the graphs we have.

    ``given``: for a graph that brings encodings, which are one token each, and found as soon as they are known.
    """
    two_stage = {"synthetic.init": ("two-stage",)}
    through = two_stage | {"two_stage.student_steps": range(1, 1000)}
    adapters = {"encoder.adapters": (True,)}
    steps = {"outer.epochs": range(1, 1000)}
    norms = {"kernel.architecture": ("gcn",), "kernel.hops": (2, 3)}
    labels = {"synthetic.learn_labels": (True,), **steps}
    space = [
        Parameter("synthetic.init", choices=("two-stage", "medoid")),
        Parameter("synthetic.tokens", choices=(8, 16, 32)),
        Parameter("synthetic.label_smoothing", 0.0, 0.3),
        Parameter("synthetic.learn_labels", choices=(False, True)),
        Parameter("kernel.propagation", choices=("mean", "sym")),
        Parameter("kernel.architecture", choices=("sgc", "gcn")),
        Parameter("kernel.hops", choices=(1, 2)),
        Parameter("kernel.layers", choices=(1, 2)),
        Parameter("kernel.norms", choices=("exact", "linear"), when=norms),
        Parameter("kernel.ridge", 1e-4, 1.0, log=True),
        Parameter("outer.loss", choices=("mse", "ce")),
        Parameter("outer.targets", choices=("labels", "teacher")),
        Parameter("two_stage.feature_steps", 40, 240, when=two_stage),
        Parameter("two_stage.feature_lr", 3e-3, 3e-2, log=True, when=two_stage),
        Parameter("two_stage.student_steps", 0, 120, when=two_stage),
        Parameter("two_stage.student_passes", 50, 250, when=through),
        Parameter("two_stage.token_steps", 40, 200, when=two_stage),
        Parameter("outer.lr", 1e-4, 1e-2, log=True, when=steps),
        Parameter("outer.steps", 2, 16, when=steps),
        Parameter("outer.label_lr", 1e-3, 5e-2, log=True, when=labels),
        Parameter("inner.gnn_lr", 2e-3, 2e-2, log=True),
        Parameter("inner.passes", 50, 300),
        Parameter("inner.adapter_lr", 1e-5, 1e-3, log=True, when=adapters),
    ]
    tokens = {"synthetic.tokens", "two_stage.token_steps"} if given else set()
    return [parameter for parameter in space if parameter.key not in tokens]


def suggest(space: list[Parameter], trial: Suggest, base: DistillConfig) -> dict[str, Value]:
    """A point of the space, asked of ``trial`` in order; parameters whose condition fails are left out."""
    point: dict[str, Value] = {}
    for parameter in space:
        if active(parameter, _so_far(base, point)):
            point[parameter.key] = parameter.suggest(trial)
    return point


def drawn(space: list[Parameter], trials: Iterable[Suggest], base: DistillConfig) -> dict[str, Value]:
    """The first point asked of ``trials`` that is a configuration: choices may be good alone and not together.

    Raises ConfigError, with the last one's reason, if there is none.
    """
    error: ConfigError | None = None
    for trial in trials:
        point = suggest(space, trial, base)
        try:
            configured(base, point)
        except ConfigError as reason:
            error = reason
        else:
            return point
    raise ConfigError(f"space: hardly a point of it is a configuration; narrow it: {error}")


@dataclass(frozen=True)
class Nearby:
    """Stands for an Optuna trial: most settings as in ``point``, the others drawn from their whole range.

    A sweep starts with such points rather than anywhere: the space is wide, and most of it is worse than a preset.
    """

    point: Mapping[str, Value]
    rng: np.random.Generator
    change: float = 0.2

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        drawn = self.rng.uniform(np.log(low), np.log(high)) if log else self.rng.uniform(low, high)
        return self._kept(name, float(np.exp(drawn) if log else drawn))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self._kept(name, int(self.rng.integers(low, high + 1)))

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self._kept(name, choices[self.rng.integers(len(choices))])

    def _kept(self, name: str, drawn: Any) -> Any:
        changed = self.rng.random() < self.change
        return drawn if changed else self.point.get(name, drawn)


def active(parameter: Parameter, known: Mapping[str, Any]) -> bool:
    return all(known[key] in allowed for key, allowed in parameter.when.items())


def configured(base: DistillConfig, point: Mapping[str, Value]) -> DistillConfig:
    """``base`` with the settings of a point. Raises ConfigError for a value that the configuration refuses."""
    tree = base.to_dict()
    for key, value in point.items():
        *path, name = key.split(".")
        section = tree
        for step in path:
            section = section[step]
        section[name] = value
    return DistillConfig.from_dict(tree)


def point_of(space: list[Parameter], config: DistillConfig, base: DistillConfig) -> dict[str, Value]:
    """Where ``config`` lies in the space of a sweep over ``base``, for a start-up trial: all that `suggest` asks for
    there; values outside are moved to the nearest inside."""
    values = settings(config)
    point: dict[str, Value] = {}
    for parameter in space:
        if active(parameter, _so_far(base, point)):
            value = values[parameter.key]
            if not parameter.holds(value):
                value = parameter.choices[0] if parameter.choices else min(max(value, parameter.low), parameter.high)
            point[parameter.key] = value
    return point


def _so_far(base: DistillConfig, point: Mapping[str, Value]) -> dict[str, Any]:
    """Every setting with those of an unfinished point, which may be refused as long as others are not there."""
    try:
        return settings(configured(base, point))
    except ConfigError:
        return settings(base) | dict(point)


def read_space(tree: Mapping[str, Any], base: DistillConfig) -> tuple[list[Parameter], dict[str, Value]]:
    """The default space changed by ``tree``, and the settings that ``tree`` fixes.

    A value of ``tree`` is a list of choices, a mapping with low, high and, if wanted, log and when, a single value
    (fixed), or null (as the preset has it). Raises one ConfigError that lists every problem.
    """
    known = settings(base)
    given = given_width(base.encoder.name) is not None
    space = {parameter.key: parameter for parameter in default_space(given)}
    fixed: dict[str, Value] = {}
    problems: list[str] = []
    for key, value in tree.items():
        if key not in known:
            problems.append(str(unknown_key(str(key), list(known))))
            continue
        default = space.pop(key, None)
        try:
            if isinstance(value, Mapping | list):
                space[key] = _parameter(key, value, default, known)
            elif value is not None:
                fixed[key] = number(value, type(known[key]))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("space: " + "; ".join(problems))
    epochs, base = space.get("outer.epochs"), configured(base, fixed)
    if "synthetic.learn_labels" not in tree and (base.outer.epochs == 0 or (epochs and epochs.holds(0))):
        del space["synthetic.learn_labels"]  # labels are learned in outer steps
    order = [parameter.key for parameter in default_space()]
    parameters = sorted(space.values(), key=lambda p: order.index(p.key) if p.key in order else len(order))
    return _checked(_after_their_conditions(parameters), base), fixed


def _after_their_conditions(space: list[Parameter]) -> list[Parameter]:
    """In the order they have, but each after what its `when` names. Raises ConfigError where that goes round."""
    waiting, ordered = list(space), list[Parameter]()
    while waiting:
        keys = {parameter.key for parameter in waiting}
        ready = next((parameter for parameter in waiting if not keys & parameter.when.keys()), None)
        if ready is None:
            raise ConfigError(f"space: the conditions of {', '.join(sorted(keys))} wait for one another")
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _parameter(key: str, value: Any, default: Parameter | None, known: Mapping[str, Any]) -> Parameter:
    when = dict(default.when) if default else {}
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{key}: no choices")
        choices = tuple(number(each, type(known[key])) for each in value)
        if others := [choice for choice in choices if not isinstance(choice, bool | int | float | str)]:
            raise ConfigError(f"{key}: {others[0]!r} cannot be a choice: it must be true or false, a number or a word")
        return Parameter(key, choices=choices, when=when)
    odd = set(value) - {"low", "high", "log", "when", "choices"}
    if odd:
        raise ConfigError(f"{key}.{sorted(odd)[0]}: unknown; a range has low, high, log and when")
    conditions = value.get("when") or {}
    if not isinstance(conditions, Mapping):
        raise ConfigError(f"{key}.when = {conditions!r}: give settings and their values, as `when: {{a.b: c}}`")
    for other, allowed in conditions.items():
        if other not in known:
            raise unknown_key(f"{key}.when.{other}", [f"{key}.when.{name}" for name in known])
        values = allowed if isinstance(allowed, list) else [allowed]
        when[other] = tuple(number(each, type(known[other])) for each in values)
    if "choices" in value:
        return dataclasses.replace(_parameter(key, value["choices"], default, known), when=when)
    start = default or Parameter(key)
    low, high = (number(value.get(end, getattr(start, end)), type(known[key])) for end in ("low", "high"))
    log = value.get("log", start.log)
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in (low, high)):
        raise ConfigError(f"{key}: low = {low!r} and high = {high!r} must be numbers")
    if isinstance(known[key], float):
        low, high = float(low), float(high)
    if not low < high:
        raise ConfigError(f"{key}: the range from {low} to {high} is empty")
    if log and low <= 0:
        raise ConfigError(f"{key}: a logarithmic range must be above 0, not from {low}")
    return Parameter(key, low, high, bool(log), when=when)


def _checked(space: list[Parameter], base: DistillConfig) -> list[Parameter]:
    """The space, if the configuration takes both ends of every range and every choice."""
    problems = []
    for parameter in space:
        for value in parameter.ends:
            try:
                configured(base, {parameter.key: value})
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("space: " + "; ".join(problems))
    return space


def settings(config: DistillConfig) -> dict[str, Any]:
    """Every setting by its dotted name, one that was left open as what it comes to."""
    return dict(leaves(config.to_dict())) | {"outer.epochs": config.outer_epochs}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
