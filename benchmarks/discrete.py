"""What texts are worth: token ids of the real vocabulary against learned embeddings, at home and in another encoder.

For each prepared graph (one a split): the default preset; its embeddings projected to their nearest tokens; texts by
discrete inversion (`synthetic.discrete`) of several lengths; medoids; everything. `--students` students a row; nothing
is chosen on test nodes. Each set and row is kept in WORK, so a run that was cut off goes on.

    python benchmarks/discrete.py GRAPH-s0 GRAPH-s1 ... --work WORK --tokens 16,32,64 --out result.md

The other encoder is the first `--layers` layers of the same MiniLM: it reads texts by the same vocabulary, but gives
other encodings. Seed i is that of the i-th graph's distillation.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from cases import merge

from talk_dist import DistillConfig, EvaluateConfig, LocalPool, PreparedTag, SyntheticTAG, TextEncoder, distill, preset
from talk_dist.commands.report import machine
from talk_dist.config import EncoderConfig
from talk_dist.data.tokenizer import resolve_checkpoint
from talk_dist.evaluate import Row, reference, retention, score
from talk_dist.runtime.callbacks import Callback, ProgressLines
from talk_dist.runtime.full import WholeGraph
from talk_dist.synthetic.coresets import allocate
from talk_dist.synthetic.decode import nearest_tokens
from talk_dist.training_sets import TrainingSet, coreset_tag, tag_set

FULL, MEDOID, LEARNED, PROJECTED = "full", "medoid texts", "embeddings", "projected"


class Told(Callback):
    """The last of what a stage told."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}

    def progress(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        self.facts = metrics if stage == "words" else self.facts


def truncated(layers: int, work: Path) -> str:
    """A checkpoint of MiniLM's first layers."""
    folder = work / f"minilm-{layers}-layers"
    if not folder.exists():
        from transformers import AutoModel

        model = AutoModel.from_pretrained(resolve_checkpoint("minilm"))
        model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:layers], layers
        shutil.copytree(resolve_checkpoint("minilm"), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        model.save_pretrained(folder)
    return str(folder)


class Bench:
    """One graph: its sets, and their rows with an encoder."""

    def __init__(self, path: str, seed: int, work: Path, students: int):
        self.tag, self.seed, self.work, self.students = PreparedTag(path), seed, work, students
        self.name, self.lines = Path(path).name, ProgressLines()

    def open(self, name: str) -> None:
        """Take the encoder ``name``."""
        base = preset()
        self.config = replace(
            base,
            seed=self.seed,
            encoder=EncoderConfig(name=name),
            runtime=replace(base.runtime, threads=1, cache_folder=str(self.work)),
        )
        self.encoder = TextEncoder(self.config.encoder)
        self.pool = LocalPool(self.tag, self.encoder, self.config.kernel, self.config.runtime)
        self.pool.encode(self.encoder.adapters())

    def made(self, name: str, tokens: int) -> SyntheticTAG:
        """A set that was distilled with MiniLM, now or before."""
        path = self.work / f"{self.name}-{name.replace(' ', '-')}"
        if not path.exists():
            told, started = Told(), time.process_time()
            config: DistillConfig = self.config
            if tokens:
                synthetic = replace(config.synthetic, tokens=tokens, discrete=True)
                config = replace(config, synthetic=synthetic, outer=replace(config.outer, epochs=0))
            tag = distill(self.pool, self.encoder, config, [self.lines, told])
            facts = told.facts | {"cpu_seconds": time.process_time() - started}
            replace(tag, metrics=tag.metrics | {"made": facts}).save_pretrained(path)
        return SyntheticTAG.from_pretrained(path)

    def training_set(self, name: str, recipe: EvaluateConfig) -> TrainingSet:
        if name == MEDOID:
            counts = allocate(len(self.made(LEARNED, 0)), self.tag.train_class_counts)
            tag, size = coreset_tag(self.pool, self.encoder, counts, "medoid", replace(self.config, seed=self.seed))
            return replace(tag_set(name, tag, self.pool, self.encoder, self.config, recipe.recipe), bytes=size)
        if name == PROJECTED:
            tag = self.made(LEARNED, 0)
            ids = nearest_tokens(tag.token_embeds, self.encoder.token_table)
            tag = replace(tag, token_embeds=self.encoder.token_table[ids], token_ids=ids)
        else:
            tag = self.made(name, int(name.split()[-1]) if name != LEARNED else 0)
        return tag_set(name, tag, self.pool, self.encoder, self.config, recipe.recipe)

    def row(self, name: str, where: str) -> Row:
        """Scores, now or before."""
        path = self.work / f"{self.name}-{where}-{name.replace(' ', '-')}.json"
        if not path.exists():
            evaluation = EvaluateConfig(seeds=self.students)
            self.pool.encode(self.encoder.adapters())
            if name == FULL:
                row = reference(WholeGraph(self.tag), self.pool, self.encoder, evaluation)
            else:
                row = score(self.training_set(name, evaluation), self.pool, self.encoder, evaluation)
            path.write_text(json.dumps(asdict(row)))
        return Row(**json.loads(path.read_text()))


def table(names: list[str], rows: dict[str, list[Row]], facts: dict[str, list[dict[str, float]]]) -> list[str]:
    """Rows of all splits as one Markdown table."""
    merged = {name: merge(rows[name]) for name in names}
    lines = [
        "| trained on | nodes | bytes | validation | test accuracy | macro-F1 | KRR (test) | retention | cosine | "
        "CPU seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in merged.items():
        scores = (row.val_accuracy, row.accuracy, row.macro_f1)
        spread = " | ".join(f"{np.mean(s):.3f} ± {np.std(s):.3f}" for s in scores)
        known = [[f[key] for f in facts.get(name, []) if key in f] for key in ("cosine", "cpu_seconds")]
        cosine, seconds = (f"{np.mean(k):{form}}" if k else "–" for k, form in zip(known, (".3f", ".0f"), strict=True))
        krr = "–" if row.krr_accuracy is None else f"{row.krr_accuracy:.3f}"
        kept = retention(list(merged.values()), row)
        lines.append(
            f"| {name} | {row.nodes:,} | {row.bytes:,} | {spread} | {krr} | {kept:.3f} | {cosine} | {seconds} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", default="16,32,64")
    parser.add_argument("--students", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = [f"texts of {length}" for length in arguments.tokens.split(",") if length]
    names = [FULL, MEDOID, LEARNED, PROJECTED, *texts]
    benches = [Bench(path, seed, arguments.work, arguments.students) for seed, path in enumerate(arguments.data)]
    blocks = []
    places = {"minilm": "minilm", "other": truncated(arguments.layers, arguments.work)} if arguments.layers else {}
    for where, encoder in (places or {"minilm": "minilm"}).items():
        rows: dict[str, list[Row]] = {name: [] for name in names}
        for bench in benches:
            bench.open(encoder)
        for name in names:  # the quick ones of all splits first
            rows[name] = [bench.row(name, where) for bench in benches]
            print(where, name, [np.mean(row.accuracy).round(3) for row in rows[name]], flush=True)
        made = {name: [bench.made(name, 0).metrics["made"] for bench in benches] for name in [LEARNED, *texts]}
        blocks += [f"Encoder {Path(encoder).name}:", "", *table(names, rows, made if where == "minilm" else {}), ""]
    command = f"python {shlex.join(sys.argv)}"
    text = "\n".join([*blocks, f"Machine: {machine()}.", "", "```", command, "```", ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
