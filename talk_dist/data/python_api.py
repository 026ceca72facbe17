"""The embedded text-attributed graph: the documented Python API of an installation, read from its source.

Nodes are documented functions, classes and methods; edges are containment, inheritance, overriding and resolved
references; the label is the package. Nothing is downloaded, imported or run.
"""

from __future__ import annotations

import ast
import difflib
import gc
import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from talk_dist.data.python_references import FunctionNode, Namespace, Program, read_module
from talk_dist.errors import ConfigError, DataError

MIN_DOC_WORDS = 5  # of functions; shorter docstrings ("Internal.", "See base class.") say nothing to classify by
_TESTS = re.compile(r"(.*_)?tests?|test_.*|conftest")
_PRIVATE_TWIN = re.compile(r"_(?:py_?)?(\w+)")  # _pydecimal is the source of decimal, _pyio that of io
# a name in prose, with the back-quote or bracket that may mark it as code
_WORD = re.compile(r"(?<![\w.])(`?)([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)([`(]?)")
_DOTTED = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def build_python_api(packages: Sequence[str] | None = None, num_classes: int = 20) -> tuple[pa.Table, pa.Table]:
    """The graph of the running interpreter's standard library, or of installed ``packages`` (import names).

    The label of a node is its top-level package (``asyncio``; a private source twin counts as its public module:
    ``_pydecimal`` as ``decimal``), or with ``packages`` the sub-package one level below the given name
    (``torch`` → ``torch.nn``). Only nodes of the ``num_classes`` largest labels stay, fewer if there are fewer.
    An undocumented method hands its edges to its class. The result depends on the source alone.

    Returns (nodes, edges): nodes has ``node_id`` (``asyncio.locks:Lock.acquire``), ``text`` and ``label``, by
    ascending node_id; edges has ``src`` and ``dst``, each unordered pair once, no self-loops. All are strings.
    Raises ConfigError for unknown packages and DataError where there is no source to read.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes}; it must be at least 1")
    if isinstance(packages, str) or (packages is not None and not packages):
        raise ConfigError(f"packages is {packages!r}; it must be a list of import names, or None: the standard library")
    with _collection_paused():
        return _build(packages, num_classes)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Syntax trees are many small objects and no garbage: looking for it doubles the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _build(packages: Sequence[str] | None, num_classes: int) -> tuple[pa.Table, pa.Table]:
    modules = dict(_read_packages(packages) if packages is not None else _read_standard_library())
    labels = {name: _label(name, packages) for name in modules}
    definitions = [found for module in modules.values() for found in module.definitions()]
    counts = Counter(labels[found.module] for found in definitions if _is_documented(found))
    kept = sorted(counts, key=lambda label: (-counts[label], label))[:num_classes]
    definitions = sorted((found for found in definitions if labels[found.module] in kept), key=lambda found: found.id)
    roots = {part for name, label in labels.items() for part in (name.partition(".")[0], *label.split("."))}
    given_away = re.compile(rf"\b(?:{'|'.join(label.rpartition('.')[2] for label in kept)})\b")
    nodes: dict[str, Namespace] = {}  # by text: of definitions that read the same, only the first is a node
    for found in filter(_is_documented, definitions):
        text = f"{given_away.sub('module', _signature(found))}\n{_without_modules(found.docstring, roots)}"
        nodes.setdefault(text.encode(errors="replace").decode(), found)  # Arrow takes no lone surrogates
    if not nodes:
        raise DataError(", ".join(packages or ["standard library"]), "has no documented function or class")
    ids = [found.id for found in nodes.values()]
    edges = _edges(Program(modules), definitions, set(nodes.values()))
    columns = {"node_id": ids, "text": list(nodes), "label": [labels[found.module] for found in nodes.values()]}
    ends = {"src": [source for source, _ in edges], "dst": [target for _, target in edges]}
    return _table(columns), _table(ends)


def _table(columns: dict[str, list[str]]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _edges(program: Program, definitions: Sequence[Namespace], nodes: Set[Namespace]) -> list[tuple[str, str]]:
    """Sorted pairs of node ids: (member, its class), (method, what it overrides), (user, used).

    A pair that is linked in several ways has the direction of the first of them.
    """

    def node_of(found: Namespace | None) -> Namespace | None:
        while found is not None and found not in nodes:
            found = found.parent
        return found

    def links() -> Iterator[tuple[Namespace, Namespace | None]]:
        for found in definitions:
            yield found, found.parent
        for found in definitions:
            for base in program.bases(found):
                yield from ((method, program.member(base, name)) for name, method in found.members.items())
        for found in definitions:
            yield from ((found, used) for used in program.references(found))
            yield from ((found, named) for named in _mentions(program, found))

    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for source, target in links():
        a, b = node_of(source), node_of(target)  # a module is no node
        if a is not None and b is not None and a is not b:
            pairs.setdefault(frozenset((a.id, b.id)), (a.id, b.id))
    return sorted(pairs.values())


def _mentions(program: Program, found: Namespace) -> Iterator[Namespace]:
    """Definitions named in a docstring: words that look like code and mean one thing where they stand."""
    for quote, word, mark in _WORD.findall(found.docstring):
        if not (quote or mark or "_" in word or "." in word or any(letter.isupper() for letter in word[1:])):
            continue
        first, *rest = word.split(".")
        readings = {program.member(found.owner or found, first), program.member(program.modules[found.module], first)}
        if not any(readings) and rest:
            readings = {program.modules.get(first)}
        readings.discard(None)
        named = readings.pop() if len(readings) == 1 else None
        for name in rest:
            named = program.member(named, name)
        if named is not None:
            yield named


def _is_documented(found: Namespace) -> bool:
    least = 1 if found.is_class else MIN_DOC_WORDS  # a class with few words still has its bases and its methods
    return not found.name.startswith("__") and len(found.docstring.split()) >= least


def _label(module: str, packages: Sequence[str] | None) -> str:
    parts = module.split(".")
    if packages is None:
        twin = _PRIVATE_TWIN.fullmatch(parts[0])
        return twin[1] if twin and twin[1] in sys.stdlib_module_names else parts[0]
    depth = max(name.count(".") + 1 for name in packages if f"{module}.".startswith(f"{name}."))
    return ".".join(parts[: depth + 1])


def _signature(found: Namespace) -> str:
    """The line that defines it, dotted names without their modules: ``class Foo(module.Bar)`` → ``class Foo(Bar)``."""
    node = found.node
    if isinstance(node, FunctionNode):
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        line = f"{keyword} {node.name}({ast.unparse(node.args)})"
        line += f" -> {ast.unparse(node.returns)}" if node.returns else ""
    else:
        line = f"class {found.name}"
        if isinstance(node, ast.ClassDef) and node.bases:
            line += f"({', '.join(ast.unparse(base) for base in node.bases)})"
    return _DOTTED.sub(lambda match: match[0].rpartition(".")[2], line)


def _without_modules(docstring: str, roots: Set[str]) -> str:
    """``asyncio.locks.Lock`` → ``Lock``; a dotted name that starts with no package stays (``self.lock``)."""
    return _DOTTED.sub(
        lambda match: match[0].rpartition(".")[2] if match[0].partition(".")[0] in roots else match[0], docstring
    )


def _read_standard_library() -> list[tuple[str, Namespace]]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = [item for name in sorted(sys.stdlib_module_names) for item in _read(root / name, name)]
    if not modules:
        raise DataError(
            str(root),
            "holds no Python source of the standard library; use an interpreter that ships it (python.org, conda, "
            "pyenv, a Linux distribution), or give the import names of installed packages instead",
        )
    return modules


def _read_packages(packages: Sequence[str]) -> list[tuple[str, Namespace]]:
    places = {name: _locate(name) for name in sorted(set(packages))}
    missing = [name for name, paths in places.items() if paths is None]
    if missing:
        known = sorted({*importlib.metadata.packages_distributions(), *sys.stdlib_module_names})
        near = {name: difflib.get_close_matches(name, known, n=1) for name in missing}
        listed = ", ".join(f"{name!r}" + "".join(f" (did you mean {n!r}?)" for n in near[name]) for name in missing)
        raise ConfigError(
            f"packages not installed: {listed}; correct the names or install what provides them: "
            f"pip install {' '.join(missing)}"
        )
    found = {name: [item for path in paths or () for item in _read(path, name)] for name, paths in places.items()}
    empty = [f"{name!r} has no readable Python source; leave it out" for name, modules in found.items() if not modules]
    if empty:
        raise DataError("packages", empty)
    return [item for modules in found.values() for item in modules]


def _locate(name: str) -> list[Path] | None:
    """Folders, or files without ``.py``, of a package; None if there is no such package.

    Nothing is imported: ``find_spec`` is asked for the top level only, and what is below it is found by path.
    """
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:  # an empty name, or a running module without a spec
        spec = None
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not places and spec.origin:
        places = [Path(spec.origin).with_name(first)]
    places = [place.joinpath(*rest) for place in places]
    places = [place for place in places if place.is_dir() or place.with_name(f"{place.name}.py").is_file()]
    return places if places or not rest else None


def _read(path: Path, name: str) -> Iterator[tuple[str, Namespace]]:
    """(dotted name, module) of the package folder ``path`` or the file ``path.py``, tests and broken files left out."""
    if _TESTS.fullmatch(path.name) or not path.name.isidentifier():
        return
    file = path.with_name(f"{path.name}.py")
    is_package = (path / "__init__.py").is_file() or (path.is_dir() and not file.is_file())
    file = path / "__init__.py" if is_package else file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            yield name, read_module(name, is_package, file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        pass  # absent, or written for another Python
    if is_package:
        for stem in sorted({child.stem for child in path.iterdir() if child.is_dir() or child.suffix == ".py"}):
            if stem != "__init__":
                yield from _read(path / stem, f"{name}.{stem}")
