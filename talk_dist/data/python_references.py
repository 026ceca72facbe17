"""Names in Python source resolved to what defines them, by reading the source: nothing is imported or run.

One type, :class:`Namespace` (a module, class or function), and one question, :meth:`Program.evaluate`: which
namespace does this expression denote? An instance is denoted by its class, since both have the same members.
What the source does not tell (a value out of a container, a C function, a parameter without annotation) denotes
nothing, so answers are often missing and seldom wrong.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCK = ast.stmt | ast.excepthandler | ast.match_case


class Import(NamedTuple):
    """``from module import name``; ``import module`` when ``name`` is None."""

    module: str
    name: str | None


class Local(NamedTuple):
    """An expression that is assigned to a name, and where its own names are looked up."""

    scope: Namespace
    value: ast.expr


@dataclass(eq=False)  # hashed by identity: one object a definition
class Namespace:
    """A module, class or function: its definitions (``members``) and what else it binds, in source order."""

    module: str
    package: str  # what relative imports start from
    qualname: str  # "" for the module itself
    node: ast.Module | ast.ClassDef | FunctionNode
    parent: Namespace | None = None
    members: dict[str, Namespace] = field(default_factory=dict)
    bindings: dict[str, list[Import | Local]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)  # modules of ``from module import *``

    @property
    def id(self) -> str:
        return f"{self.module}:{self.qualname}"

    @property
    def name(self) -> str:
        return self.qualname.rpartition(".")[2]

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def owner(self) -> Namespace | None:
        """The class of a method, else None."""
        return self.parent if isinstance(self.node, FunctionNode) and self.parent and self.parent.is_class else None

    def definitions(self) -> Iterator[Namespace]:
        """Functions, classes and methods in this namespace, parents first; not what is inside functions."""
        for member in self.members.values():
            yield member
            if member.is_class:
                yield from member.definitions()


def read_module(name: str, is_package: bool, source: bytes) -> Namespace:
    """The namespace of one module. Raises SyntaxError or ValueError if ``source`` is not Python."""
    tree = ast.parse(source)
    module = Namespace(name, name if is_package else name.rpartition(".")[0], "", tree)
    _collect(module, tree.body)
    return module


def _collect(scope: Namespace, body: Sequence[ast.AST]) -> None:
    """Record what the statements ``body`` bind in ``scope``, those inside ``if``, ``try`` and ``with`` included."""
    pending = list(reversed(body))  # not by recursion: a chain of elif is nested as deep as it is long
    while pending:
        node = pending.pop()
        if isinstance(node, FunctionNode | ast.ClassDef):
            _define(scope, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name if alias.asname else alias.name.partition(".")[0]
                scope.bindings.setdefault(alias.asname or target, []).append(Import(target, None))
        elif isinstance(node, ast.ImportFrom):
            package = scope.package.split(".")
            start = package[: len(package) + 1 - node.level] if node.level else []
            target = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                if alias.name == "*":
                    scope.stars.append(target)
                else:
                    scope.bindings.setdefault(alias.asname or alias.name, []).append(Import(target, alias.name))
        else:
            for variable, value in _assignments(node):
                if isinstance(variable, ast.Name):
                    scope.bindings.setdefault(variable.id, []).append(Local(scope, value))
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, _BLOCK)]
            pending.extend(reversed(inner))


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(variable, expression that says what it is) pairs of one statement; only expressions that can denote."""
    pairs: list[tuple[ast.expr | None, ast.expr | None]] = []
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign):
        pairs = [(node.target, node.value), (node.target, node.annotation)]
    elif isinstance(node, ast.With | ast.AsyncWith):
        pairs = [(item.optional_vars, item.context_expr) for item in node.items]
    for variable, value in pairs:
        if variable is not None and isinstance(value, ast.Name | ast.Attribute | ast.Call):
            yield variable, value


def _define(scope: Namespace, node: FunctionNode | ast.ClassDef) -> None:
    qualname = f"{scope.qualname}.{node.name}" if scope.qualname else node.name
    new = Namespace(scope.module, scope.package, qualname, node, scope)
    old = scope.members.get(node.name)
    if old is None or not old.docstring:  # of overloads, setters and platform variants: the first documented one
        scope.members[node.name] = new
    if isinstance(node, ast.ClassDef):
        _collect(new, node.body)
    elif instance := _instance_name(new):
        for statement in ast.walk(node):
            for variable, value in _assignments(statement):
                if isinstance(variable, ast.Attribute) and _is_name(variable.value, instance):
                    scope.bindings.setdefault(variable.attr, []).append(Local(new, value))


def _is_name(node: ast.AST, name: str | None) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _instance_name(function: Namespace) -> str | None:
    """What a method calls ``self`` or ``cls``; None for other functions."""
    node = function.node
    if function.owner is None or not isinstance(node, FunctionNode):
        return None
    arguments = [*node.args.posonlyargs, *node.args.args]
    static = any(_is_name(mark, "staticmethod") for mark in node.decorator_list)
    return arguments[0].arg if arguments and not static else None


class Program:
    """Modules by dotted name, with the resolution of names across them.

    Answers are remembered; a question that depends on itself has none.
    """

    def __init__(self, modules: Mapping[str, Namespace]):
        self.modules = modules
        self._known: dict[tuple[Namespace, str], Namespace | None] = {}
        self._sought: set[tuple[Namespace, str]] = set()
        self._circular: set[tuple[Namespace, str]] = set()
        self._opened: set[Namespace] = set()

    def find(self, dotted: str) -> Namespace | None:
        """What an absolute dotted name denotes."""
        if dotted in self.modules:
            return self.modules[dotted]
        head, _, last = dotted.rpartition(".")
        return self.member(self.find(head), last) if head else None

    def member(self, space: Namespace | None, name: str) -> Namespace | None:
        """What ``space.name`` denotes, through re-exports, class attributes, ``self.name = …`` and bases."""
        if space is None or isinstance(space.node, FunctionNode):
            return None
        return self._first(space, name, self._member_candidates(space, name))

    def _first(self, space: Namespace, name: str, candidates: Iterator[Namespace | None]) -> Namespace | None:
        """The first candidate that is known, remembered; ``candidates`` may ask the same question again."""
        key = (space, name)
        if key in self._known:
            return self._known[key]
        if key in self._sought:
            self._circular.add(key)
            return None
        self._sought.add(key)
        found = next(filter(None, candidates), None)
        self._sought.remove(key)
        self._circular.discard(key)
        if found or not self._circular:  # else "unknown" may only mean that an outer question is still open
            self._known[key] = found
        return found

    def _member_candidates(self, space: Namespace, name: str) -> Iterator[Namespace | None]:
        yield space.members.get(name)
        yield from self._bound(space, name)
        if space.is_class:
            yield from (self.member(base, name) for base in self.bases(space))
        else:
            if not name.startswith("_"):
                yield from (self.member(self.find(star), name) for star in space.stars)
            yield self.modules.get(f"{space.module}.{name}")

    def _bound(self, space: Namespace, name: str) -> Iterator[Namespace | None]:
        for binding in space.bindings.get(name, ()):
            if isinstance(binding, Local):
                yield self.evaluate(binding.scope, binding.value)
            elif binding.name is None:
                yield self.find(binding.module)
            else:
                yield self.member(self.find(binding.module), binding.name)

    def bases(self, space: Namespace) -> list[Namespace]:
        """The base classes that are known."""
        if not isinstance(space.node, ast.ClassDef) or space.parent is None:
            return []
        bases = (base.value if isinstance(base, ast.Subscript) else base for base in space.node.bases)  # Base[T]
        found = [self.evaluate(space.parent, base) for base in bases]
        return [base for base in found if base is not None and base.is_class and base is not space]

    def lookup(self, scope: Namespace, name: str) -> Namespace | None:
        """What the bare ``name`` denotes inside ``scope``."""
        if scope.is_class:  # its own names, not those of its bases
            own = self.member(scope, name) if name in scope.members or name in scope.bindings else None
            return own or self.lookup(self._enclosing(scope), name)
        if not isinstance(scope.node, FunctionNode):
            return self.member(scope, name)
        self._open(scope)
        if name in scope.members:
            return scope.members[name]
        if name not in scope.bindings:
            return self.lookup(self._enclosing(scope), name)
        if name == _instance_name(scope):
            return scope.owner
        return self._first(scope, name, self._bound(scope, name))

    def _enclosing(self, scope: Namespace) -> Namespace:
        """The scope around ``scope``: names of a class are not seen in the bodies of its methods."""
        outer = scope.parent
        while outer is not None and outer.is_class:
            outer = outer.parent
        return outer or self.modules[scope.module]

    def _open(self, function: Namespace) -> None:
        """Read the body of a function for its local names; a name that denotes nothing still hides a global."""
        if function in self._opened or not isinstance(function.node, FunctionNode):
            return
        self._opened.add(function)
        _collect(function, function.node.body)
        shared: set[str] = set()
        for node in ast.walk(function.node):
            if isinstance(node, ast.Global | ast.Nonlocal):
                shared.update(node.names)
            elif isinstance(node, ast.arg):
                values = [node.annotation] if isinstance(node.annotation, ast.Name | ast.Attribute) else []
                outer = self._enclosing(function)
                function.bindings.setdefault(node.arg, []).extend(Local(outer, value) for value in values)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                function.bindings.setdefault(node.id, [])
        for name in shared:
            function.bindings.pop(name, None)

    def evaluate(self, scope: Namespace, value: ast.expr) -> Namespace | None:
        """What an expression denotes inside ``scope``: names, attributes, ``super()``, and calls of classes or of
        functions whose result is annotated."""
        if isinstance(value, ast.Name):
            return self.lookup(scope, value.id)
        if isinstance(value, ast.Attribute):
            if isinstance(value.value, ast.Call) and _is_name(value.value.func, "super"):
                bases = self.bases(scope.owner) if scope.owner else []
                return next(filter(None, (self.member(base, value.attr) for base in bases)), None)
            return self.member(self.evaluate(scope, value.value), value.attr)
        if isinstance(value, ast.Call):
            made = self.evaluate(scope, value.func)
            if made is None or made.is_class:
                return made
            result = getattr(made.node, "returns", None)
            return self.evaluate(self._enclosing(made), result) if result else None
        return None

    def references(self, definition: Namespace) -> Iterator[Namespace]:
        """Definitions that ``definition`` uses in its code (a class: its bases, and what is outside its methods)."""
        pending: list[ast.AST] = [definition.node]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                found = self.evaluate(definition, node)
                if found is not None and found.qualname:
                    yield found
            skipped = FunctionNode | ast.ClassDef if definition.is_class else ()
            pending.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, skipped))
