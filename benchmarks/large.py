"""A graph of 158,654 nodes on two actors of one machine: memory, seconds by phase, bytes moved.

    python benchmarks/large.py DATA/msdocs --out benchmarks/results/large.md

Prepared in 8 parts, texts cut to 32 tokens; then encoding, a start from medoids, and one outer epoch of 3 steps, by
`talk-dist distill` in fresh processes. A random encoder of MiniLM's width with few layers stands in for MiniLM.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil
import rig

from talk_dist import PreparedTag, SyntheticTAG, open_tables, prepare
from talk_dist.cli import COMMANDS
from talk_dist.commands.preflight import planned
from talk_dist.commands.settings import read

MIB = 1 << 20
SETTINGS = "--synthetic.init medoid --outer.epochs 1 --outer.steps 3 --runtime.cache false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--size", default="0.01")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = arguments.scratch or Path(name)
        encoder = rig.small_encoder(scratch / "encoder", arguments.layers)
        prepared, began = scratch / "prepared", time.monotonic()
        seconds: dict[str, float] = {}
        if not prepared.exists():
            source = open_tables(arguments.data / "nodes.parquet", arguments.data / "edges.parquet")
            prepare(
                source,
                str(prepared),
                encoder=encoder,
                max_tokens=arguments.max_tokens,
                parts=arguments.parts,
                name=arguments.data.name,
            )
            seconds["prepare"] = time.monotonic() - began
        tag = PreparedTag(str(prepared))
        print(f"prepared: {seconds}", flush=True)
        options = [*SETTINGS.split(), "--encoder.name", encoder, "--synthetic.size", arguments.size]
        with rig.started() as cluster, rig.Watch() as watch:
            words = rig.distill_command(prepared, scratch / "run", options + rig.on_ray(cluster, arguments.actors))
            rig.distill(prepared, scratch / "run", words[words.index("--runtime.threads") + 2 :])
        first, last = rig.records(scratch / "run")
        metrics = SyntheticTAG.from_pretrained(str(scratch / "run" / "synthetic")).metrics
        seconds["encode, halo exchange, norms, start from medoids"] = metrics["seconds"]["start"]
        phases = {name: value for name, value in first["seconds"].items() if name not in ("steps", "epoch")}
        seconds |= {f"epoch 0: {name}": value for name, value in phases.items()}
        for number, step in enumerate(first["seconds"]["steps"], 1):
            seconds[f"outer step {number}: {', '.join(f'{k} {v:.1f}' for k, v in step.items())}"] = sum(step.values())
        seconds["epoch 1: inner loop and validation"] = last["seconds"]["epoch"]
        _, config, _ = read(COMMANDS["distill"], words[words.index("distill") + 1 :])
        assert config is not None
        plan = planned(tag, config, None)
        rows = []
        vitals = last["vitals"]
        for process, found in vitals["host_bytes"].items():
            parts = [int(part) for part in process.removeprefix("shard-").split("+")] if process != "driver" else []
            said = plan.actor(parts).host if parts else plan.driver(False).host
            name = process.replace("shard-", "actor with parts ")
            rows.append([name, f"{said / MIB:,.0f}", f"{found / MIB:,.0f}", f"{said / found:.2f}"])
        store = plan.object_store(arguments.actors, 1)
        rows.append(["object store", f"{store / MIB:,.0f}", f"{watch.store / MIB:,.0f}", f"{store / watch.store:.2f}"])
        together = sum(vitals["host_bytes"].values()) + watch.store
        meta = tag.meta
        cut, ratio = meta["partition"]["edge_cut"], meta["partition"]["halo_ratio"]
        facts = (
            f"{tag.num_nodes:,} nodes, {meta['num_edges']:,} edges, {meta['split_sizes']['train']:,} training rows, "
            f"{len(tag.classes)} classes; {arguments.parts} parts ({cut:,} edges cut, halo {ratio:.2f} of the nodes); "
            f"{plan.nodes:,} synthetic nodes; {arguments.actors} actors with one thread each. The encoder is a random "
            f"BERT with {arguments.layers} layer(s) of width 384 and MiniLM's tokenizer, texts cut to "
            f"{arguments.max_tokens} tokens: its encodings mean nothing, so no accuracy is given."
        )
        times = rig.table(["phase", "seconds"], [[key, f"{value:.1f}"] for key, value in seconds.items()])
        total = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
        sums = (
            f"All processes' peaks and the object store's together: {together / 2**30:.2f} GiB of the machine's {total}"
            f". Bytes moved between processes: {vitals['bytes_moved']:,}. Restarts: {vitals['restarts']}."
        )
        memory = rig.table(["process", "estimate (MiB)", "measured peak (MiB)", "estimate / measured"], rows)
        rig.report(
            arguments.out,
            f"{arguments.data.name}: {tag.num_nodes:,} nodes on {arguments.actors} actors of one machine",
            [facts, memory, sums, times, f"Settings: `{SETTINGS} --synthetic.size {arguments.size}`, seed 0."],
            f"python benchmarks/large.py DATA/{arguments.data.name} --out benchmarks/results/large.md",
        )


if __name__ == "__main__":
    main()
