"""Settings of a command, from the command line and YAML files, checked against the dataclasses.

jsonargparse parses and writes the help; what is wrong is found here first, all of it, so that one error can
name every setting with its value, what is allowed, and the nearest known name.
"""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from talk_dist.commands.preflight import listed
from talk_dist.config import DistillConfig
from talk_dist.errors import ConfigError
from talk_dist.evaluate import EvaluateConfig
from talk_dist.presets import preset
from talk_dist.schema import unknown_key, words


@dataclass(frozen=True)
class Command:
    """One command: the dataclasses whose fields are its settings, some of which can be given by place."""

    name: str
    summary: str
    options: type
    positional: tuple[str, ...] = ()
    distill: bool = False
    evaluation: str | None = None  # prefix of the evaluation's settings; "" = none

    @property
    def sections(self) -> list[tuple[type, str]]:
        found: list[tuple[type, str]] = [(self.options, "")]
        found += [(DistillConfig, "")] if self.distill else []
        return found + ([(EvaluateConfig, self.evaluation)] if self.evaluation is not None else [])


def read(
    command: Command, arguments: list[str], common: Sequence[str] = ()
) -> tuple[Any, DistillConfig | None, EvaluateConfig | None]:
    """The options of a command, and the configurations it takes. Raises one ConfigError that lists every problem.

    Of one setting a preset says least, then ``common`` arguments, a file, and ``arguments``.
    """
    schema = dict(_schema(command))
    before, shared = _settings(list(common), schema, ())
    arguments, given = _settings(arguments, schema, command.positional)
    arguments, given = before + arguments, shared + given
    files = [(path, list(_flatten(_load_yaml(path), schema))) for key, path in given if key == "config"]
    in_files = [(key, value, path) for path, leaves in files for key, value in leaves]
    inside = ([_word(schema, *leaf) for leaf in leaves] for _, leaves in files)
    arguments = [word for each in arguments for word in (next(inside) if each.startswith("--config=") else [each])]
    problems = [str(unknown_key(f"--{key}", [f"--{k}" for k in schema])) for key, _ in given if key not in schema]
    problems += [f"{path}: {unknown_key(key, list(schema))}" for key, _, path in in_files if key not in schema]
    base = preset()
    try:
        chosen = [value for key, value, _ in in_files if key == "preset"] + [v for k, v in given if k == "preset"]
        base = preset(str(chosen[-1])) if chosen else base
    except ConfigError as error:
        problems.append(str(error))
    parser = _parser(command)
    if command.distill:
        parser.set_defaults(base.to_dict())
    for key, value, *path in [*given, *in_files]:
        allowed = schema.get(key)
        if allowed is not None and key not in ("config", "preset") and not _accepts(allowed, value):
            origin = f"{path[0]}: {key}" if path else f"--{key}"
            problems.append(f"{origin} = {value!r}: must be {words(allowed)}")
    _raise(problems)
    try:
        values = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(re.sub(r"\s*\n\s*", " ", str(error)) + f"; see talk-dist {command.name} --help") from error
    built = [
        _build(kind, values[prefix] if prefix else values, f"{prefix}." if prefix else "", problems)
        for kind, prefix in command.sections
    ]
    _raise(problems)
    options, *rest = built
    config = rest.pop(0) if command.distill else None
    return options, config, rest[0] if rest else None


def named(command: Command, arguments: Sequence[str]) -> list[str]:
    """``arguments`` with every setting as `--name=value`, also one that was given by its place; files of settings
    first. Raises ConfigError where a value is missing or left over."""
    return _settings(list(arguments), dict(_schema(command)), command.positional)[0]


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(listed(problems))


@cache  # jsonargparse reads the sources of all dataclasses to make one; a plan of `compare` needs one a method
def _parser(command: Command) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = " ".join(["talk-dist", command.name, *(f"[{p.upper()}]" for p in command.positional)])
    parser = ArgumentParser(
        prog=f"talk-dist {command.name}",
        usage=f"{usage} [--config FILE] [--section.key VALUE ...]",
        description=command.options.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the settings below.")
    for kind, prefix in command.sections:
        parser.add_class_arguments(kind, prefix or None)
    schema = dict(_schema(command))
    for action in parser._actions:  # jsonargparse offers to read a file for each section, which is refused here
        if is_dataclass(schema.get(action.dest)):
            short = f"{action.dest}.kind"
            action.help, action.metavar = (f"Short for --{short}.", "KIND") if short in schema else (SUPPRESS, None)
    return parser


def _schema(command: Command) -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every setting; a section is there with its dataclass."""
    yield "config", str
    for kind, prefix in command.sections:
        if prefix:
            yield prefix, kind
        yield from _leaves(kind, f"{prefix}." if prefix else "")


def _leaves(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        yield prefix + field.name, hints[field.name]
        if is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name], f"{prefix}{field.name}.")


def _settings(
    arguments: list[str], schema: dict[str, Any], positional: Sequence[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """All arguments in the form --name=value (`a,b` made a list where one is wanted), and the (name, value) pairs."""
    rest, places, out, given = list(arguments), list(positional), [], []
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0] in ("-h", "--help", "--print_config"):
            out.append(word)
            continue
        if not word.startswith("--"):
            if not places:
                raise ConfigError(f"unexpected argument {word!r}; settings are given as --name value")
            word = f"--{places.pop(0)}={word}"
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key}: a value is missing")
            value = rest.pop(0)
        if f"{key}.kind" in schema:  # a section can be given by its kind: --runtime ray, --student sage
            key = f"{key}.kind"
        out.append(f"--{key}={_bracketed(schema.get(key), value)}")
        given.append((key, value))
    out.sort(key=lambda word: not word.startswith("--config="))  # the command line wins, wherever the file is named
    return out, given


def _bracketed(kind: Any, value: str) -> str:
    """`a,b` as `[a,b]` where a list is wanted."""
    return f"[{value}]" if get_origin(kind) is tuple and not value.lstrip().startswith("[") else value


def _word(schema: dict[str, Any], key: str, value: Any) -> str:
    """A setting of a file as one of the command line, which reads both alike then."""
    said = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"--{key}={_bracketed(schema.get(key), said)}"


def _load_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: cannot be read ({reason})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must hold settings as `key: value`, not a {type(tree).__name__}")
    return tree


def _flatten(tree: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and is_dataclass(schema.get(key)):
            yield from _flatten(value, schema, f"{key}.")
        else:
            yield key, value


def _accepts(kind: Any, value: Any) -> bool:
    """Whether jsonargparse takes ``value``, a string of the command line or what YAML read, for this type."""
    if is_dataclass(kind):
        return False
    if isinstance(value, bool) and get_origin(kind) is Literal:
        value = json.dumps(value)  # YAML knows no other true and false
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--value={_bracketed(kind, value)}"])
        else:
            parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def _build(kind: Any, values: Namespace, where: str, problems: list[str]) -> Any:
    """The dataclass of parsed values; what its own checks refuse is added to ``problems``."""
    hints, arguments = get_type_hints(kind), {}
    for field in fields(kind):
        value = values[field.name]
        if is_dataclass(hints[field.name]):
            value = _build(hints[field.name], value, f"{where}{field.name}.", problems)
        arguments[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**arguments)
    except ConfigError as error:  # a recipe is checked by the class of the inner loop, and named after it
        problems += re.split(r"; (?=[\w.]+ = )", re.sub(r"(^|; )\w+\.(?=\w+ = )", rf"\1{where}", str(error)))
    return None
