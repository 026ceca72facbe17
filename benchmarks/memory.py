"""What `estimate` says of every process beside what it takes: peaks of resident memory, and of the object store.

    python benchmarks/memory.py DATA --out benchmarks/results/memory.md [--only NAME,NAME]

DATA holds the folders cora_cane and arxiv_2023 with their nodes.parquet and edges.parquet. Every set-up is a
distillation from the command line in fresh processes, short in steps (they do not change the peak), without a
cache of encodings. The estimate is that of the same settings.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import rig

from talk_dist import open_tables, prepare
from talk_dist.cli import COMMANDS
from talk_dist.commands.preflight import planned
from talk_dist.commands.settings import read
from talk_dist.config import DistillConfig
from talk_dist.data.tag import PreparedTag
from talk_dist.runtime.estimate import Plan

SHORT = "--two_stage.feature_steps 6 --two_stage.validate_every 6 --two_stage.token_steps 3 --outer.epochs 1"
SHORT += " --two_stage.student_steps 2 --outer.steps 3 --runtime.cache false"
ADAPTERS = "--encoder.adapters true --inner.passes 5"
RANDOM = "--synthetic.init random"
MIB = 1 << 20


@dataclass(frozen=True)
class Setup:
    """``actors`` 0: a local run. ``small``: a random encoder of one layer and MiniLM's width, else MiniLM."""

    data: str
    what: str
    parts: int = 1
    actors: int = 0
    workers: int = 0
    options: str = ""
    max_tokens: int = 128
    small: bool = False


SETUPS = {
    "local": Setup("cora_cane", "local"),
    "local-adapters": Setup("cora_cane", "local, adapters, T = 64", options=ADAPTERS + " --synthetic.tokens 64"),
    "local-many": Setup("cora_cane", "local, M = 1,200", options="--synthetic.size 1200", small=True),
    "one-actor": Setup("cora_cane", "1 actor", actors=1),
    "two-actors": Setup("arxiv_2023", "2 actors", parts=4, actors=2),
    "two-actors-many": Setup(
        "arxiv_2023", "2 actors, M = 1,500", parts=4, actors=2, options=RANDOM + " --synthetic.size 1500", small=True
    ),
    "zero-1": Setup("cora_cane", "1 actor, 2 workers at stage 1", 1, 1, 2, f"{ADAPTERS} --deepspeed.stage 1", 32),
    "zero-3": Setup("cora_cane", "1 actor, 2 workers at stage 3", 1, 1, 2, f"{ADAPTERS} --deepspeed.stage 3", 32),
}


def plan_of(tag: PreparedTag, command: list[str]) -> tuple[Plan, DistillConfig]:
    _, config, _ = read(COMMANDS["distill"], command[command.index("distill") + 1 :])
    assert config is not None
    return planned(tag, config, None), config


def measure(setup: Setup, data: Path, scratch: Path) -> list[tuple[str, str, int, int]]:
    """(process, its largest phase, estimated, measured) of each process."""
    encoder = rig.small_encoder(scratch / "small") if setup.small else "minilm"
    prepared = scratch / f"{setup.data}-{setup.parts}-{setup.max_tokens}-{setup.small}"
    if not prepared.exists():
        folder = data / setup.data
        source = open_tables(folder / "nodes.parquet", folder / "edges.parquet")
        prepare(source, str(prepared), encoder=encoder, max_tokens=setup.max_tokens, parts=setup.parts)
    tag = PreparedTag(str(prepared))
    options = [*SHORT.split(), "--encoder.name", encoder, *setup.options.split()]
    with tempfile.TemporaryDirectory() as out:
        if not setup.actors:
            vitals = rig.distill(prepared, out, options)[-1]["vitals"]["host_bytes"]
            process = plan_of(tag, rig.distill_command(prepared, out, options))[0].whole()
            return [("the run", process.largest, process.host, vitals["driver"])]
        with rig.started() as cluster, rig.Watch() as watch:
            options += rig.on_ray(cluster, setup.actors)
            if setup.workers:
                options += ["--deepspeed.workers", str(setup.workers)]
            vitals = rig.distill(prepared, out, options)[-1]["vitals"]["host_bytes"]
        plan, config = plan_of(tag, rig.distill_command(prepared, out, options))
        driver = plan.driver(setup.workers > 0)
        rows = [("driver", driver.largest, driver.host, vitals.pop("driver"))]
        for name, found in vitals.items():
            if name.startswith("encoder-"):
                who, process = "worker", plan.worker(setup.workers, config.deepspeed.stage)
            else:
                process = plan.actor([int(part) for part in name.removeprefix("shard-").split("+")])
                who = name.replace("shard-", "actor with ") if setup.parts > 1 else "actor"
            rows.append((who, process.largest, process.host, found))
        return [*rows, ("object store", "", plan.object_store(setup.actors, 1, setup.workers > 0), watch.store)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default=",".join(SETUPS))
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.only.split(","):
            setup = SETUPS[name]
            for process, phase, estimated, found in measure(
                setup, arguments.data, arguments.scratch or Path(temporary)
            ):
                sizes = [f"{estimated / MIB:,.1f}", f"{found / MIB:,.1f}", f"{estimated / found:.2f}"]
                rows.append([f"{setup.data}, {setup.what}", process, phase, *sizes])
                print(" | ".join(rows[-1]), flush=True)
    names = ["set-up", "process", "largest phase", "estimate (MiB)", "measured (MiB)", "estimate / measured"]
    rig.report(
        arguments.out,
        "Memory: the estimate beside the measured peak",
        [rig.table(names, rows)],
        "python benchmarks/memory.py DATA --out benchmarks/results/memory.md",
    )


if __name__ == "__main__":
    main()
