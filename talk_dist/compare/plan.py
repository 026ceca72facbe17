"""A plan: what is compared with what, on what, read from one YAML file and checked before anything runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

import yaml

from talk_dist.commands.call import EMBEDDED
from talk_dist.config import DistillConfig
from talk_dist.errors import ConfigError
from talk_dist.schema import accepts, number, unknown_key, words
from talk_dist.synthetic.baselines import FEATURE_LEVEL
from talk_dist.synthetic.coresets import METHODS as CORESETS
from talk_dist.training import StudentConfig, StudentKind

Read = Callable[[list[str], list[str]], DistillConfig]  # a distillation's settings: words of its own, and common ones
FULL = "full"
OF_THE_PLAN = {"seed": "splits", "synthetic.size": "sizes", "encoder.adapters": "adapters"}  # setting -> where it is
TABLES = {"prepared": "", "nodes": "", "edges": "", "max_tokens": 128, "parts": 1, "use_split_column": False}


@dataclass(frozen=True)
class Method:
    """How a training set of M nodes is made: distilled, chosen among real texts, or encodings without texts."""

    name: str
    kind: str  # "distill", "coreset" or "features"
    source: str  # the coreset's or the features' name
    config: DistillConfig
    invert: bool = False  # features: find the tokens that produce them


@dataclass(frozen=True)
class Plan:
    """``data``: name -> settings of `prepare`; the rest is combined with one another."""

    data: dict[str, dict[str, Any]]
    methods: list[Method]
    sizes: tuple[float, ...] = (0.01,)
    """Below 1 a fraction of all nodes; a whole number of nodes; 0 is one node a class."""
    students: tuple[str, ...] = ("gcn",)
    adapters: tuple[bool, ...] = (False,)
    splits: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random splits, and of the methods on them."""
    seeds: int = 3
    """Students trained on each set."""
    full_lr: tuple[float, ...] = (5e-3, 2e-2)
    full_label_smoothing: tuple[float, ...] = (0.0, 0.1, 0.2)
    """Learning rates, and shares of the labels that are spread over all classes, among which the reference, trained on
    everything, has its own chosen on validation nodes."""
    settings: DistillConfig = field(default_factory=DistillConfig)
    """What all methods, and the reference, start from: the encoder and the like, and `student.*` of the students that
    are trained on their sets. They go before a preset, and a method's own file and settings before them."""
    tree: dict[str, Any] = field(default_factory=dict)
    """As it was read."""

    def student(self, kind: str) -> StudentConfig:
        """What is trained on all sets where ``kind`` is asked for. Raises ConfigError if `settings` do not suit it."""
        return replace(self.settings.student, kind=kind)  # type: ignore[arg-type]


def read_plan(path: str, read: Read) -> Plan:
    """The plan at ``path``. Raises one ConfigError that lists every problem, with the nearest known name."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict) or not all(isinstance(tree.get(k), dict) and tree[k] for k in ("data", "methods")):
        raise ConfigError(f"{path}: needs `data:` and `methods:`, each with named entries under it")
    known = [name for name in Plan.__dataclass_fields__ if name != "tree"]
    problems = [f"{path}: {unknown_key(str(key), known)}" for key in tree if key not in known]
    common, methods, plain = tree.get("settings") or {}, [], DistillConfig()
    if not isinstance(common, dict):
        raise ConfigError(f"{path}: settings = {common!r}: must be settings and their values, as `a.b: c`")
    try:
        plain = read([], _words(_own(common)))
    except ConfigError as error:
        problems.append(f"{path}: settings: {error}")
        common = {}
    for name, entry in tree["methods"].items():
        try:
            methods.append(_method(str(name), entry, common, read))
        except ConfigError as error:
            problems.append(f"{path}: methods.{name}: {error}")
    data = {}
    for name, entry in tree["data"].items():
        problems += [f"{path}: data.{name}{problem}" for problem in _wrong_tables(str(name), entry)]
        data[str(name)] = TABLES | entry if isinstance(entry, dict) else TABLES
    own = ("data", "methods", "settings")
    kinds = {name: kind for name, kind in get_type_hints(Plan).items() if name in tree and name not in own}
    rest = {name: _listed(tree[name], kind) for name, kind in kinds.items()}
    problems += [
        f"{path}: {name} = {value!r}: must be {words(kinds[name])}"
        for name, value in rest.items()
        if not accepts(kinds[name], value)
    ]
    if not problems:
        plan = Plan(data, methods, settings=plain, tree=tree, **rest)
        problems = [f"{path}: {problem}" for problem in _wrong(plan)]
    if problems:
        raise ConfigError("\n".join(problems))
    return plan


def _method(name: str, entry: Any, common: Mapping[str, Any], read: Read) -> Method:
    if not isinstance(entry, Mapping):
        raise ConfigError("give `preset:`, `coreset:` or `features:` and settings under it")
    settings = dict(_own(entry))
    kinds = {"coreset": list(CORESETS), "features": list(FEATURE_LEVEL)}
    kind = next((kind for kind in kinds if kind in settings), "distill")
    if name == FULL:
        raise ConfigError("is what the reference, trained on everything, is called; choose another name")
    source, invert = settings.pop(kind, ""), settings.pop("invert", False)
    if not isinstance(invert, bool):
        raise ConfigError(f"invert = {invert!r}: must be true or false")
    if invert and kind != "features":
        raise ConfigError("invert = True: only encodings (`features:`) can be inverted; leave it out")
    if kind != "distill" and source not in kinds[kind]:
        raise ConfigError(f"{kind} = {source!r}: one of {', '.join(kinds[kind])}")
    return Method(name, kind, source, read(_words(settings), _words(common)), invert)


def _own(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """``settings``. Raises ConfigError for those that the plan has a list of."""
    theirs = [f"{key} is the plan's `{OF_THE_PLAN[key]}:`" for key in settings if key in OF_THE_PLAN]
    if theirs:
        raise ConfigError(f"{', '.join(theirs)}; leave it out here")
    return settings


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in settings.items()
    ]


def _listed(value: Any, kind: Any) -> Any:
    """What YAML read; where ``kind`` is a tuple, a list as one, of numbers where it has them."""
    kinds = get_args(kind)
    return tuple(number(each, kinds[0]) for each in value) if kinds and isinstance(value, list) else value


def _wrong_tables(name: str, entry: Any) -> list[str]:
    """What is wrong with an entry of ``data``."""
    if not isinstance(entry, dict):
        return [f" = {entry!r}: give `nodes:` and `edges:`, or `prepared:`"] if name != EMBEDDED or entry else []
    wrong = [f": {unknown_key(str(key), list(TABLES))}" for key in entry if key not in TABLES]
    wrong += [
        f".{key} = {value!r}: must be {words(type(TABLES[key]))}"
        for key, value in entry.items()
        if key in TABLES and not accepts(type(TABLES[key]), value)
    ]
    if name == EMBEDDED and (entry.get("nodes") or entry.get("edges")):
        wrong.append(": is the graph of Python's own library; call one of your tables something else")
    if not wrong and name != EMBEDDED and not (entry.get("nodes") or entry.get("prepared")):
        wrong.append(": give `nodes:` and `edges:`, or `prepared:`")
    return wrong


def _wrong(plan: Plan) -> list[str]:
    checks = {
        "sizes": (
            all(0 <= size < 1 or (float(size).is_integer() and size >= 0) for size in plan.sizes),
            "fractions below 1, or whole numbers of nodes",
        ),
        "students": (set(plan.students) <= set(get_args(StudentKind)), f"some of {', '.join(get_args(StudentKind))}"),
        "adapters": (bool(plan.adapters), "[false], [true] or [false, true]"),
        "splits": (min(plan.splits, default=0) >= 0, "seeds, not negative"),
        "seeds": (plan.seeds > 0, "a number of students, at least 1"),
        "full_lr": (all(rate > 0 for rate in plan.full_lr), "learning rates above 0"),
        "full_label_smoothing": (all(0 <= share < 1 for share in plan.full_label_smoothing), "shares in [0, 1)"),
    }
    wrong = []
    for name, (holds, need) in checks.items():
        value = getattr(plan, name)
        if not holds or value == ():
            wrong.append(f"{name} = {value!r}: must be {need}")
    for name in ("sizes", "students", "splits", "adapters"):
        value = getattr(plan, name)
        if len(set(value)) < len(value):
            wrong.append(f"{name} = {value!r}: must name each once")
    for student in (kind for kind in get_args(StudentKind) if kind in plan.students):
        try:
            plan.student(student)
        except ConfigError as error:
            wrong.append(f"students: {student}: {error}")
    for method in plan.methods:
        if method.kind == "distill" and method.config.encoder.adapters and True not in plan.adapters:
            wrong.append(f"methods.{method.name}: its preset or file trains adapters; set `adapters: [true]`")
    for kind, names in {"data": list(plan.data), "methods": [method.name for method in plan.methods]}.items():
        folders = Counter(map(file_name, names))
        same = [name for name in names if folders[file_name(name)] > 1]
        if same:
            wrong.append(f"{kind}: {', '.join(same)} would share a folder; tell them apart by letters or digits")
    return wrong


def file_name(word: str) -> str:
    """``word`` with nothing in it that a file system minds."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in word)
