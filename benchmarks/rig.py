"""What the benchmarks of the cluster share: a Ray of their own, `talk-dist` beside it, and a look at the processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import ray
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

from talk_dist.commands.report import machine
from talk_dist.data.tokenizer import resolve_checkpoint

KINDS = ("ray::ShardActor", "ray::EncoderWorker")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@contextmanager
def started(nodes: int = 1, cpus: int = 8) -> Iterator[Cluster]:
    """Simulated nodes on this machine, each with a scheduler and an object store of its own."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cpus)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def workers(kinds: Sequence[str] = KINDS) -> dict[int, str]:
    """pid -> class of the actors that descend from this process: nobody else's."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0].partition(".")[0]
        except psutil.Error:  # it has just ended
            continue
        if name in kinds:
            found[process.pid] = name.removeprefix("ray::")
    return found


def resident(pid: int, field: str = "VmHWM") -> int:
    """Bytes of resident memory that a process has held at most, or holds now ("VmRSS"); 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)


class Watch(threading.Thread):
    """The peak of the object stores together, for as long as the block runs."""

    def __init__(self, every: float = 0.2):
        super().__init__(daemon=True)
        self.every, self.over = every, threading.Event()
        self.store = 0

    def run(self) -> None:
        while not self.over.wait(self.every):
            if ray.is_initialized():
                nodes = [(n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]]
                used = sum(node_stats(*node, False).store_stats.object_store_bytes_used for node in nodes)
                self.store = max(self.store, used)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def distill_command(data: str | Path, out: str | Path, options: Sequence[str]) -> list[str]:
    words = ["--data", str(data), "--out", str(out), "--runtime.threads", "1", *options]
    return [sys.executable, "-m", "talk_dist", "distill", *words]


def on_ray(cluster: Cluster, actors: int) -> list[str]:
    return ["--runtime.kind", "ray", "--cluster.address", cluster.address, "--cluster.actors", str(actors)]


def distill(data: str | Path, out: str | Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """`talk-dist distill` in a process of its own; its log, a record an epoch."""
    done = subprocess.run(distill_command(data, out, options), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return records(out)


def records(out: str | Path) -> list[dict[str, Any]]:
    log = Path(out) / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def small_encoder(folder: str | Path, layers: int = 1, width: int = 384) -> str:
    """A random BERT with MiniLM's tokenizer and width: what a graph costs, without the language model's share."""
    import torch
    from transformers import BertConfig, BertModel

    source = Path(resolve_checkpoint("minilm"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": width}
    BertModel(BertConfig(vocab_size=30522, **shape)).save_pretrained(folder)
    return str(folder)


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown: the first column to the left, the others to the right."""
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(out: Path | None, title: str, blocks: Sequence[str], command: str) -> None:
    """A result file: what was found, how, and where."""
    versions = f"ray {ray.__version__}, {os.cpu_count()} cores"
    text = "\n\n".join([f"# {title}", *blocks, f"```\n{command}\n```", f"Machine: {machine()}, {versions}."]) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
