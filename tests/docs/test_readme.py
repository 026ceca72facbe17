"""What README.md shows runs: commands parse, snippets execute, tables come from benchmarks/results/."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch_geometric.data import Data

import talk_dist
from cluster import submit
from cluster.main import completed
from talk_dist.cli import COMMANDS
from talk_dist.commands.compare import settings_of
from talk_dist.commands.settings import read
from talk_dist.compare.plan import read_plan
from tuning.space import read_space

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


LINES = [line for block in blocks("bash") for line in block.splitlines()]
SHOWN = [line for line in LINES if line.startswith("talk-dist ")]
JOBS = [line for line in LINES if line.startswith("python -m cluster.submit ")]


@pytest.mark.parametrize("command", SHOWN)
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    for file in [Path(after) for word, after in pairwise(words) if word == "--config"]:
        file.parent.mkdir(parents=True)
        file.write_text(yaml.safe_dump({"kernel": {"ridge": 0.01}}))
    read(COMMANDS[words[1]], words[2:])


@pytest.mark.parametrize(
    "command", [line for line in "\n".join(blocks("bash")).splitlines() if "cluster.submit" in line]
)
def test_jobs_parse(command: str) -> None:
    options, rest = submit.parse(shlex.split(command)[3:])
    assert options.address
    submit.validated(completed(rest))


def test_the_plan_reads(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("yaml") if "methods:" in block)
    (tmp_path / "plan.yaml").write_text(block)
    plan = read_plan(str(tmp_path / "plan.yaml"), settings_of)
    assert [method.kind for method in plan.methods] == ["distill", "distill", "coreset", "features", "features"]


@pytest.mark.parametrize("plan", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_of_the_benchmarks_can_be_run(plan: Path) -> None:
    assert read_plan(str(plan), settings_of).methods


@pytest.mark.parametrize("block", [block for block in blocks("yaml") if "methods:" not in block])
def test_spaces_read(block: str) -> None:
    tree = yaml.safe_load(block)
    space, fixed = read_space(tree, talk_dist.preset())
    assert {parameter.key for parameter in space} | fixed.keys() >= {key for key in tree if tree[key] is not None}


def test_there_are_commands_and_the_marked_ones_exist() -> None:
    assert len(SHOWN) >= 6
    for mark in ("install", "test"):
        assert re.search(rf"<!-- ci: {mark} -->\n```bash\n.+\n```", README), mark


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of "Your own graph", then of "Reading the result", on a graph of 240 nodes."""
    own_graph, reading = blocks("python")
    monkeypatch.chdir(tmp_path)
    words = ["cat dog bird", "stone iron gold", "rain wind snow"]
    label = torch.arange(240) % 3
    text = [f"{words[int(c)]} number {i}" for i, c in enumerate(label)]
    ring = torch.arange(240)
    data = Data(edge_index=torch.stack([ring, (ring + 3) % 240]), y=label, num_nodes=240)
    data.text = text
    names: dict = {"data": data}
    preset = talk_dist.preset("default")  # 1 % of 240 nodes would be fewer than three classes
    small = replace(preset.synthetic, size=3, tokens=4)
    config = replace(preset, synthetic=small, two_stage=replace(preset.two_stage, student_steps=2, token_steps=5))
    monkeypatch.setattr(talk_dist, "preset", lambda name: config)
    exec(own_graph, names)
    assert len(names["synthetic"]) == 3
    exec(reading.replace("runs/python-api", "runs/mygraph"), names)
    assert names["data"].y.tolist() == [0, 1, 2]


def test_result_tables_are_those_of_the_benchmarks() -> None:
    """Every row of a result table in the README stands in a file under benchmarks/results/."""
    results = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks/results").glob("*.md"))
    rows = [line for line in README.splitlines() if re.match(r"\| \S+ \| [\d,]+ \| [\d,]+ \|", line)]
    assert rows
    assert [row for row in rows if row not in results] == []
