"""The house: what may import what, how long a file is, and what `import talk_dist` must not bring along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import talk_dist

ROOT = Path(talk_dist.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CLUSTER = sorted(ROOT.with_name("cluster").glob("*.py"))
FLOORS = [
    {"errors"},
    {"schema", "page"},
    {"resources", "training"},
    {"config"},
    {"presets"},
    {"kernel"},
    {"data"},
    {"models"},
    {"runtime", "synthetic"},
    {"distill", "training_sets"},
    {"evaluate"},
    {"__init__"},
    {"commands", "compare"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imported(file: Path) -> list[str]:
    """Every module that the file imports, at the top or later, with `from package import module` told apart."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_import_talk_dist_brings_neither_ray_nor_deepspeed():
    code = (
        "import sys, talk_dist, talk_dist.cli\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'ray', 'deepspeed', 'optuna', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    floor = FLOOR[room_of(file)]
    for name in imported(file):
        first, *rest = name.split(".")
        doors = {"ray": (), "deepspeed": (), "cluster": ("place.py", "tune.py"), "tuning": ("tune.py",)}
        assert file.name in doors.get(first, (file.name,)), f"{file} imports {name}"
        if first == "talk_dist":
            target = rest[0] if rest and rest[0] in FLOOR else "__init__"
            assert FLOOR[target] <= floor, f"{file} imports {name}, which is above it"


def test_the_runtime_knows_nothing_of_synthetic():
    """They share a floor; the start of a synthetic set uses the pool, so the other way would be a circle."""
    for file in FILES:
        if room_of(file) == "runtime":
            assert not [name for name in imported(file) if name.startswith("talk_dist.synthetic")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_fits_a_reader(file):
    limit = 150 if file == ROOT / "distill.py" else 300
    assert len(file.read_text().splitlines()) <= limit


@pytest.mark.parametrize("file", CLUSTER, ids=lambda file: file.name)
def test_the_cluster_side_keeps_the_rules(file):
    """No file for more than a reader, nothing of tuning, and DeepSpeed through one door that opens late."""
    assert len(file.read_text().splitlines()) <= 300
    found = {name.partition(".")[0] for name in imported(file)}
    assert "tuning" not in found
    assert ("deepspeed" in found) == (file.name == "encoder_worker.py")
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in top if "deepspeed" in ast.unparse(node)]


def test_no_drawer_for_everything():
    assert not {"utils", "helpers", "common"} & {part for file in FILES for part in file.with_suffix("").parts}


def test_public_names():
    for name in ("prepare", "distill", "evaluate", "SyntheticTAG", "LocalPool", "TextEncoder", "DistillConfig"):
        assert hasattr(talk_dist, name)
    assert callable(talk_dist.distill)
