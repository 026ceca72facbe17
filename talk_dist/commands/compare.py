"""The command `compare`: a plan in, a report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from talk_dist.commands.call import Call
from talk_dist.commands.folder import RunFolder
from talk_dist.commands.settings import Command, read
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.errors import ConfigError
from talk_dist.page import PLOT, can_draw


@dataclass(frozen=True)
class Compare:
    """Compare methods on graphs as a plan says: every set made, students trained on it, tables and pictures. Start it
    again, whatever ended it, and it goes on."""

    plan: str = ""
    """YAML: `data`, `methods`, and lists of sizes, students, adapters, splits (README, "Comparing")."""
    out: str = "runs/compare"
    """Folder of the comparison."""

    def run(self, call: Call) -> None:
        from talk_dist.compare import report
        from talk_dist.compare.laboratory import Laboratory
        from talk_dist.compare.plan import read_plan

        if not self.plan:
            raise ConfigError("give the YAML file of a plan; the README shows one")
        if not can_draw():  # said now, and not after hours, when the first picture is due
            raise ConfigError(f"compare: matplotlib is not installed; {PLOT}")
        plan = read_plan(self.plan, settings_of)
        folder = RunFolder(self.out)
        with folder.alone():
            folder.check()
            storage.write_atomic(folder.path("plan.yaml"), yaml.safe_dump(plan.tree, sort_keys=False).encode())
            again = f"every finished row is kept; go on with:\n  {call.command}"
            call.stop.advice = lambda: again
            rows, laboratory = [], Laboratory(plan, folder, call)
            for row in laboratory.run():
                rows.append(row)
                name = f"{row['data']} split {row['split']} {row['method']} {row['size']:g} {row['student']}"
                mean = sum(row["accuracy"]) / len(row["accuracy"])
                print(f"{name:<50} {mean:.3f}", flush=True)
            print(report.write(rows, folder.out, call.command, laboratory.pictures()))
            print(f"report      {folder.path('report.html')}")


@dataclass(frozen=True)
class _Preset:
    """Settings of one method."""

    preset: str = "default"


def settings_of(words: list[str], common: Sequence[str] = ()) -> DistillConfig:
    """Of one method: its own words, and those of all methods."""
    config = read(Command("distill", "", _Preset, distill=True), words, common)[1]
    assert config is not None
    return config


COMMAND = Command("compare", "methods side by side, on several graphs, by a plan", Compare, ("plan",))
