"""A package written for the purpose: every kind of edge is resolved, exactly."""

import sys
import textwrap
from collections import Counter

import pyarrow as pa
import pytest

from talk_dist.data.python_api import build_python_api


def rows(edges: pa.Table) -> list[tuple[str, str]]:
    return list(zip(edges["src"].to_pylist(), edges["dst"].to_pylist(), strict=True))


ORCHARD = {
    "__init__": """
        from .trees.apple import *
        from .trees.apple import Apple as Fruit
        raise RuntimeError("this package must not be imported")
    """,
    "trees.__init__": "",
    "trees.base": """
        import functools

        class Tree:
            "A tree, as in orchard.trees.base.Tree or self.name or orchard.market."
            def grow(self, years=functools.WRAPPER, trees=None) -> "Tree":
                "Grow for some years, at least one."
            @staticmethod
            def seed(self):
                "Plant a seed, which has no tree yet."
                return self.grow()

        def prune(tree: Tree):
            "Cut what grew too long."
            tree.grow()

        def water(): "Too short."
    """,
    "trees.apple": """
        from orchard import market  # circular: the star of orchard/__init__ looks for market here first
        from .base import Tree, prune

        def grow():
            "Grow anything but a tree."

        class Apple(Tree):
            "A tree that bears apples."
            def grow(self, years=1):
                "Grow, and bear apples after that."
                super().seed()
            def pick(self):
                "Pick all apples that are ripe."
                self.grow()
            def _undocumented(self):
                prune(self)
            class Core:
                "What is left of it."

        class Pear(Tree[int]):
            "A tree that bears pears."
            habit = grow  # the function: a class body does not see the names of its bases
            def pick(self):
                "Pick the pears, or plant one."
                self.seed()

        async def sell_all():
            "Sell every tree there is here."
            return market.shop.sell()
    """,
    "market.__init__": "from . import shop",
    "market.shop": """
        import orchard.trees.apple
        import orchard.trees.apple as wood
        from orchard import Fruit, market, prune as saw
        from ..trees.base import prune as cut

        def advertise():
            "Praise what Shop.empty gives away, and trim and nothing() else."
            with Fruit() as fruit:
                return fruit.pick, market

        class Shop:
            "Sells what others grew."
            def __init__(self):
                "Open the shop with one tree."
                self.stock = Fruit()
            def empty(self):
                "Give away all that owner has: advertise() may mean two things."
                self.stock.pick()
            def advertise(self):
                "Put a sign in the window."
            @property
            def owner(self):
                "Return who owns the shop today."
            @owner.setter
            def owner(self, name):
                pass

        def buy() -> Fruit:
            "Buy one and take it home."

        def sell():
            "Sell by the full dotted name."
            return orchard.trees.apple.Apple.Core

        def carve():
            "Carve it out of some wood."
            return buy().pick, wood.sell_all, trim

        def trim():
            "Trim by another name for prune."
            cut(None), carve

        def shadow(cut, sell):
            "Use names that hide globals, as sell( would."
            for wood in cut():
                return wood.sell_all, sell

        def replace():
            "Replace a function of this module."
            global buy
            buy, _ = buy, saw
    """,
    "market.broken": "def (:",
    "tests.test_shop": """
        def check():
            "Check that the shop is open."
    """,
}


@pytest.fixture
def orchard(tmp_path, monkeypatch):
    for name, source in ORCHARD.items():
        file = tmp_path.joinpath("orchard", *name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    return build_python_api(["orchard"])


APPLE, BASE, SHOP = "orchard.trees.apple", "orchard.trees.base", "orchard.market.shop"


def test_every_kind_of_edge_is_resolved_exactly(orchard):
    assert "orchard" not in sys.modules
    expected = {
        # containment
        (f"{BASE}:Tree.grow", f"{BASE}:Tree"),
        (f"{BASE}:Tree.seed", f"{BASE}:Tree"),
        (f"{APPLE}:Apple.grow", f"{APPLE}:Apple"),
        (f"{APPLE}:Apple.pick", f"{APPLE}:Apple"),
        (f"{APPLE}:Apple.Core", f"{APPLE}:Apple"),
        (f"{APPLE}:Pear.pick", f"{APPLE}:Pear"),
        (f"{SHOP}:Shop.empty", f"{SHOP}:Shop"),
        (f"{SHOP}:Shop.advertise", f"{SHOP}:Shop"),
        (f"{SHOP}:Shop.owner", f"{SHOP}:Shop"),
        # inheritance, overriding, super(), a class body
        (f"{APPLE}:Apple", f"{BASE}:Tree"),
        (f"{APPLE}:Pear", f"{BASE}:Tree"),
        (f"{APPLE}:Apple.grow", f"{BASE}:Tree.grow"),
        (f"{APPLE}:Apple.grow", f"{BASE}:Tree.seed"),
        (f"{APPLE}:Pear", f"{APPLE}:grow"),
        # self.method, own and inherited; a method without docstring refers for its class; an annotated parameter
        (f"{APPLE}:Apple.pick", f"{APPLE}:Apple.grow"),
        (f"{APPLE}:Pear.pick", f"{BASE}:Tree.seed"),
        (f"{APPLE}:Apple", f"{BASE}:prune"),
        (f"{BASE}:prune", f"{BASE}:Tree"),
        (f"{BASE}:prune", f"{BASE}:Tree.grow"),
        # import of a dotted module, of a module under another name, of a package that imports the importer
        (f"{SHOP}:sell", f"{APPLE}:Apple"),
        (f"{SHOP}:sell", f"{APPLE}:Apple.Core"),
        (f"{SHOP}:carve", f"{APPLE}:sell_all"),
        (f"{APPLE}:sell_all", f"{SHOP}:sell"),
        # from ..x import y as z; a name through a star; a global; two that use each other are one edge
        (f"{SHOP}:trim", f"{BASE}:prune"),
        (f"{SHOP}:replace", f"{BASE}:prune"),
        (f"{SHOP}:replace", f"{SHOP}:buy"),
        (f"{SHOP}:carve", f"{SHOP}:trim"),
        # a re-export under another name; the type of self.stock, of `with … as`, of an annotated result
        (f"{SHOP}:Shop", f"{APPLE}:Apple"),
        (f"{SHOP}:Shop.empty", f"{APPLE}:Apple"),
        (f"{SHOP}:Shop.empty", f"{APPLE}:Apple.pick"),
        (f"{SHOP}:advertise", f"{APPLE}:Apple"),
        (f"{SHOP}:advertise", f"{APPLE}:Apple.pick"),
        (f"{SHOP}:buy", f"{APPLE}:Apple"),
        (f"{SHOP}:carve", f"{SHOP}:buy"),
        (f"{SHOP}:carve", f"{APPLE}:Apple.pick"),
        # a name in a docstring that looks like code and means one thing; trim, prune, owner could be plain words
        (f"{SHOP}:advertise", f"{SHOP}:Shop.empty"),
        (f"{SHOP}:shadow", f"{SHOP}:sell"),
    }
    found = set(rows(orchard[1]))
    assert (found - expected, expected - found) == (set(), set())


def test_nodes_are_what_is_documented_outside_tests(orchard):
    nodes = {row["node_id"]: row for row in orchard[0].to_pylist()}
    shop = ["Shop", "Shop.advertise", "Shop.empty", "Shop.owner"]
    shop += ["advertise", "buy", "carve", "replace", "sell", "shadow", "trim"]
    apple = ["Apple", "Apple.Core", "Apple.grow", "Apple.pick", "Pear", "Pear.pick", "grow", "sell_all"]
    base = ["Tree", "Tree.grow", "Tree.seed", "prune"]
    places = {SHOP: shop, APPLE: apple, BASE: base}
    assert list(nodes) == [f"{module}:{name}" for module, names in places.items() for name in names]
    assert Counter(row["label"] for row in nodes.values()) == {"orchard.market": 11, "orchard.trees": 12}
    assert nodes[f"{BASE}:Tree"]["text"] == "class Tree\nA tree, as in Tree or self.name or market."
    grow = "def grow(self, years=WRAPPER, module=None) -> 'Tree'\nGrow for some years, at least one."
    assert nodes[f"{BASE}:Tree.grow"]["text"] == grow
    assert nodes[f"{APPLE}:sell_all"]["text"].startswith("async def sell_all()\n")


def test_the_largest_labels_stay(orchard):
    nodes, edges = build_python_api(["orchard"], num_classes=1)
    assert set(nodes["label"].to_pylist()) == {"orchard.trees"}
    assert rows(edges) == [(a, b) for a, b in rows(orchard[1]) if SHOP not in a and SHOP not in b]
    nodes, _ = build_python_api(["orchard.trees"])  # labels are one level below the name that was given
    assert set(nodes["label"].to_pylist()) == {APPLE, BASE}


def test_of_identical_texts_the_first_stays(tmp_path, monkeypatch):
    tmp_path.joinpath("twins.py").write_text(
        'class A:\n "First."\n def f(self):\n  "Do what both of us do."\n'
        'class B:\n "Second."\n def f(self):\n  "Do what both of us do."\n  return A\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    nodes, edges = build_python_api(["twins"])
    assert nodes["node_id"].to_pylist() == ["twins:A", "twins:A.f", "twins:B"]
    assert rows(edges) == [("twins:A.f", "twins:A"), ("twins:B", "twins:A")]  # B answers for B.f
