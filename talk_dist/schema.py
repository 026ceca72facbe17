"""How settings are checked and built: range rules, nested dicts, and the nearest name for one that is unknown."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from talk_dist.errors import ConfigError


def check(section: str, **rules: tuple[bool, Any, str]) -> None:
    """Each rule is (holds, value, what is needed). Raises one ConfigError that lists the broken ones."""
    broken = [f"{section}.{name} = {value!r}: {need}" for name, (holds, value, need) in rules.items() if not holds]
    if broken:
        raise ConfigError("; ".join(broken))


def build(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise unknown_key(f"{where}{key}", [f"{where}{name}" for name in known])
    arguments = {}
    for key, value in values.items():
        factory = known[key].default_factory
        nested = factory is not dataclasses.MISSING and dataclasses.is_dataclass(factory)
        arguments[key] = build(factory, value, f"{where}{key}.") if nested else value
        if isinstance(arguments[key], list):
            arguments[key] = tuple(arguments[key])
    return kind(**arguments)


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """The error for a setting that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"unknown setting {key!r}; the nearest known one is {near[0]!r}" if near else key)
