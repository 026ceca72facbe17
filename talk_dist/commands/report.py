"""What the commands print: a prepared graph, an artifact, a plan, an evaluation."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from talk_dist.config import DistillConfig
from talk_dist.evaluate import EvaluateConfig, Row, retention, table
from talk_dist.runtime.estimate import PASSING, Plan, Process
from talk_dist.runtime.memory import gib
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.decode import Neighbour

EXCERPT = 100  # characters of a real text


def prepared(path: str, meta: dict[str, Any]) -> str:
    """A prepared graph, from its META.json."""
    text, part, made = meta["text"], meta["partition"], meta["tokenizer"]
    split = meta["split"]
    how = "by the split column" if split["how"] == "column" else f"random, seed {split['seed']}, {split['ratios']}"
    sizes = ", ".join(f"{name} {count:,}" for name, count in meta["split_sizes"].items())
    edges = meta["num_edges"]
    cut = f"{part['edge_cut']:,} edges cut ({part['edge_cut'] / max(1, edges):.1%})"
    facts = [
        ("graph", f"{meta['name']}, hash {meta['hash'][:16]}"),
        ("nodes", f"{meta['num_nodes']:,}, {meta['num_labelled']:,} labelled, {part['isolated']:,} isolated"),
        ("edges", f"{edges:,} undirected"),
        ("splits", f"{sizes} ({how})"),
        *_content(text, made, meta.get("encodings")),
        ("parts", f"{part['parts']} ({part['method']}: {part['why']}), {cut}"),
        ("halo", f"{part['halo_ratio']:.2f} of the nodes, {part['halo_hops']} hops"),
    ]
    counts, names = meta["class_counts"], ["all", "train", "val", "test"]
    classes = [[label, *(counts[name][i] for name in names)] for i, label in enumerate(meta["classes"])]
    blocks = [_facts(f"{path}: a prepared graph", facts), _columns(["class", *names], classes)]
    if len(meta["parts"]) > 1:
        names = ["nodes", "halo", "entries", "tokens", "train"]
        rows = [[str(i), *(record[name] for name in names)] for i, record in enumerate(meta["parts"])]
        blocks.append(_columns(["part", *names], rows))
    return "\n\n".join(blocks)


def _content(text: dict[str, int], made: dict[str, Any], encodings: dict[str, int] | None) -> list[tuple[str, str]]:
    """Of a prepared graph: its texts, or the encodings in their place."""
    size = f"{text['bytes']:,} bytes, {text['train_bytes']:,} of training nodes"
    if encodings is not None:
        return [("encodings", f"{encodings['width']} wide, float16, {size}"), ("encoder", made["name"])]
    cut = f"{made['name']}, cut at {made['max_tokens']} tokens ({made['truncated']:,} texts were longer)"
    return [("texts", f"{size}; {text['tokens']:,} tokens"), ("tokenizer", cut)]


def artifact(path: str, tag: SyntheticTAG) -> str:
    """An artifact: its sizes, what it reached, and the nearest tokens of each synthetic node."""
    c, m = tag.config, tag.metrics
    nodes, tokens, width = tag.token_embeds.shape
    kind = f"{tokens} token embeddings ({width} wide)" if tag.token_ids is None else f"{tokens} token ids"
    if tag.content == "encodings" or tag.encoded:
        kind = f"one encoding ({width} wide)"
    labels = tag.labels.argmax(1).tolist()
    text = c.get("text_bytes", {})
    share = f", {tag.num_bytes() / text['train_bytes']:.1%} of the training {tag.content}' bytes" if text else ""
    facts = [
        (
            "made from",
            f"{c.get('dataset')}, {c.get('num_real_nodes', 0):,} nodes, hash {c.get('dataset_hash', '')[:16]}",
        ),
        ("size", f"{nodes} nodes of {kind}"),
        ("bytes", f"{tag.num_bytes():,} as {tag.stored_as}{share}"),
        ("encoder", f"{c.get('encoder', {}).get('name')}, {c.get('encoder', {}).get('pooling')} pooling"),
        ("validation", f"accuracy {m['val_accuracy']:.4f} while distilling" if "val_accuracy" in m else "not measured"),
        ("command", c.get("command", "not recorded")),
    ]
    blocks = [_facts(f"{path}: a synthetic graph", facts)]
    counts = [[name, labels.count(i)] for i, name in enumerate(tag.classes)]
    blocks.append(_columns(["class", "synthetic nodes"], counts))
    if "evaluation" in m:
        blocks.append(m["evaluation"]["markdown"])
    if c.get("readings"):
        names = [_line(name) for name in tag.classes]
        width = max(map(len, names))
        read = [f"  {names[y]:<{width}}  {line}" for y, line in zip(labels, c["readings"], strict=True)]
        blocks.append("nearest tokens of each synthetic node\n" + "\n".join(read))
    return "\n\n".join(blocks)


def neighbours(tag: SyntheticTAG, found: Sequence[Sequence[Neighbour]]) -> str:
    """The real training texts nearest to each synthetic node, the beginning of each."""
    lines = ["nearest real training texts of each synthetic node: cosine with P^2 H, class, text"]
    for label, near in zip(tag.labels.argmax(1).tolist(), found, strict=True):
        lines.append(f"  {_line(tag.classes[label])}")
        lines += [f"    {n.cosine:.3f}  {_line(n.label)}  {_line(n.text)[:EXCERPT]}" for n in near]
    return "\n".join(lines)


def plan(path: str, found: Plan, config: DistillConfig, available: int | None, rate: float) -> str:
    """Memory and time of a distillation, process by process."""
    arrays = {name: sum(shard[name] for shard in found.shards) for name in found.shards[0]}
    passing = {name: arrays.pop(name) for name in PASSING}
    memory = [["encoder", gib(found.model)], [f"shards ({len(found.shards)})", gib(sum(arrays.values()))]]
    memory += [[f"  {name}", gib(size)] for name, size in arrays.items()]
    memory += [["on its way between shards", gib(passing["halo"])]] if passing["halo"] else []
    memory += [["  on disk (runtime.scratch)", gib(found.disk)]] if found.disk else []
    memory += [["driver", gib(found.driver_arrays)]]
    memory += [[f"while: {name}", gib(size)] for name, size in found.whole().working.items()]
    processes = [[name, gib(p.host), gib(p.on_device) if p.device else "–"] for name, p in _processes(found, config)]
    processes.append(["free here now", "unknown" if available is None else gib(available), ""])
    seconds = found.seconds(rate)
    times = [[name, _duration(value)] for name, value in seconds.items()]
    times.append(["together", _duration(sum(seconds.values()))])
    words = f"time on one machine at {rate / 1e9:.0f} GFLOP/s (measured now; a factor of two is usual)"
    return "\n\n".join(
        [
            f"{path}: {found.nodes} synthetic nodes, an artifact of {found.artifact_bytes:,} bytes",
            _columns(["what is in memory", ""], memory),
            _columns(["peak of a process", "host", "GPU"], processes),
            _columns([words, ""], times),
        ]
    )


def _processes(found: Plan, config: DistillConfig) -> list[tuple[str, Process]]:
    if config.runtime.kind == "local":
        return [("the run", found.whole())]
    parts = len(found.shards)
    actors = min(config.cluster.actors or parts, parts)
    rows = [("driver", found.driver(config.deepspeed.workers > 0))]
    rows += [
        (f"actor {index}", found.actor(range(index, parts, actors), config.deepspeed.encode_texts))
        for index in range(actors)
    ]
    if config.deepspeed.workers:
        worker = found.worker(config.deepspeed.workers, config.deepspeed.stage, config.deepspeed.encode_texts)
        rows += [(f"encoder worker {index}", worker) for index in range(config.deepspeed.workers)]
    store = Process(found.object_store(actors, group=config.deepspeed.workers > 0), {}, 0, {"encode": 0})
    return [*rows, ("object stores together", store)]


def summary(rows: Sequence[Row], tag: SyntheticTAG, config: EvaluateConfig, adapters: bool) -> str:
    """The result in one sentence."""
    row, real = rows[0], tag.config.get("num_real_nodes")
    text = tag.config.get("text_bytes", {}).get("train_bytes")
    inside = [f"{row.nodes / real:.1%} of {real:,}"] if real else []
    inside += [f"{row.bytes:,} bytes" + (f", {row.bytes / text:.1%} of the training {tag.content}" if text else "")]
    encoder = "an encoder with LoRA adapters" if adapters else "the frozen encoder"
    line = f"{config.student.kind.upper()} students on {encoder}, trained on {row.nodes} synthetic nodes "
    line += f"({'; '.join(inside)}), "
    line += f"reach a test accuracy of {np.mean(row.accuracy):.3f} ± {np.std(row.accuracy):.3f}"
    kept, full = retention(rows, row), next((r for r in rows if r.name == "full"), None)
    if kept is None or full is None:
        return line + "."
    return line + f": {kept:.1%} of the {np.mean(full.accuracy):.3f} that the {full.nodes:,} training nodes give."


def evaluation(
    rows: Sequence[Row], tag: SyntheticTAG, config: EvaluateConfig, adapters: bool, command: str, took: str
) -> str:
    """evaluation.md: the table, and what it takes to get it again."""
    recipe, student = config.recipe, config.student
    chosen = "the pass is chosen on the validation nodes"
    if adapters:
        chosen += (
            f", with adapters, which follow for at most {recipe.joint_passes} passes, every "
            f"{recipe.adapter_select_every} of them (full: after each of "
            f"{config.full_epochs} epochs; on deepspeed.workers the lowest training loss counts instead)"
        )
    until = f", until {recipe.select_patience} validations in a row are no better" if recipe.select_patience else ""
    far = f"{student.depth} hops and " if student.kind != "appnp" else ""  # which goes as far as it always does
    others = "float16 encodings of the others"
    if tag.content == "texts":
        others = "the token ids of a coreset, the texts of the full training set"
    how = (
        f"Mean ± standard deviation over {config.seeds} seeds. Every student is a {student.kind.upper()} of "
        f"{far}width {student.hidden}, trained for at most {recipe.passes:,} passes at learning "
        f"rate {recipe.gnn_lr:g}{until}; {chosen}, the test nodes are scored once. {_chosen(rows)}Bytes: the "
        f"synthetic set as stored, {others}. KRR: the kernel predictor, without a student. Retention: relative to the "
        "full set."
    )
    made = f"Data set hash `{tag.config.get('dataset_hash')}`. Seconds: {took}. Machine: {machine()}."
    title = f"# {tag.config.get('dataset')}: synthetic against real"
    said = summary(rows, tag, config, adapters)
    return "\n\n".join([title, said, table(rows), how, f"```\n{command}\n```", made]) + "\n"


def _chosen(rows: Sequence[Row]) -> str:
    full = next((row.chosen for row in rows if row.chosen), None)
    if full is None:
        return ""
    chosen = f"learning rate {full['gnn_lr']:g} and label smoothing {full['label_smoothing']:g}"
    return f"Full: {chosen}, chosen on the validation nodes. "


def machine() -> str:
    """The hardware and versions beside a number."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    processor = f"{next(names, platform.machine())}, {torch.get_num_threads()} threads{gpu}"
    return f"{processor}; Python {platform.python_version()}, torch {torch.__version__}"


def _facts(title: str, facts: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in facts)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in facts)])


def _line(text: str) -> str:
    """A label of anyone's, on one line."""
    return " ".join(text.split("\n"))


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    cells = [list(names)] + [[f"{v:,}" if isinstance(v, int) else _line(str(v)) for v in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = []
    for first, *rest in cells:
        numbers = [value.rjust(width) for value, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
