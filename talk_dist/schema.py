"""How settings are checked and built: types, ranges, nested dicts, and the nearest name for one that is unknown."""

from __future__ import annotations

import dataclasses
import difflib
import math
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from talk_dist.errors import ConfigError

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_types(section: str, settings: Any) -> None:
    """Every field of the dataclass ``settings`` must be what its annotation says: a choice that is none would silently
    mean another. Raises one ConfigError that lists those which are not."""
    rules = {
        name: (accepts(kind, getattr(settings, name)), getattr(settings, name), f"must be {words(kind)}")
        for name, kind in _hints(settings.__class__).items()
    }
    check(section, **rules)


_hints = cache(get_type_hints)


def accepts(kind: Any, value: Any) -> bool:
    """Whether ``value`` is of a setting's type ``kind``."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return value in arguments
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(accepts(arguments[0], each) for each in value)
    if arguments:  # one of several types
        return any(accepts(each, value) for each in arguments)
    if kind in (int, float):  # and none of numpy's integers, which JSON does not take
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def number(value: Any, kind: Any) -> Any:
    """``value``; where ``kind`` is a number, the one that a text says: YAML reads 1e-2 as a text."""
    if not isinstance(value, str) or kind not in (int, float):
        return value
    try:
        found = float(value)
    except ValueError:
        return value
    return int(found) if kind is int and found.is_integer() else found


def words(kind: Any) -> str:
    """What a type allows, for people."""
    if kind in PLAIN:
        return PLAIN[kind]
    if dataclasses.is_dataclass(kind):
        return f"a section: set one of {', '.join(f.name for f in dataclasses.fields(kind))} in it"
    arguments = [a for a in get_args(kind) if a is not Ellipsis]
    if get_origin(kind) is tuple:
        count = "" if Ellipsis in get_args(kind) else f" of {len(arguments)}"
        return f"a list{count} such as a,b, each {words(arguments[0])}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    return str(kind)


def check(section: str, **rules: tuple[bool, Any, str]) -> None:
    """Each rule is (holds, value, what is needed). Raises one ConfigError that lists the broken ones."""
    prefix = f"{section}." if section else ""
    broken = [f"{prefix}{name} = {value!r}: {need}" for name, (holds, value, need) in rules.items() if not holds]
    if broken:
        raise ConfigError("; ".join(broken))


def at_least(least: int, config: Any, *names: str) -> dict[str, tuple[bool, Any, str]]:
    """Rules for `check`: these numbers of ``config`` are finite and at least so large."""
    need = f"at least {least}" if least else "not negative"
    return {name: (least <= getattr(config, name) < math.inf, getattr(config, name), need) for name in names}


def positive(config: Any, *names: str) -> dict[str, tuple[bool, Any, str]]:
    """Rules for `check`: these numbers of ``config`` are finite and above 0."""
    return {name: (0 < getattr(config, name) < math.inf, getattr(config, name), "positive") for name in names}


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
