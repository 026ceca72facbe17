"""The commands `prepare`, `estimate`, `inspect` and `export`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from talk_dist.commands import preflight, report
from talk_dist.commands.call import EMBEDDED, Call, api_name, given
from talk_dist.commands.folder import PREPARED, beside
from talk_dist.config import DistillConfig
from talk_dist.data import storage, tables
from talk_dist.data.given import given_width
from talk_dist.data.prepare import prepare
from talk_dist.data.python_api import build_python_api
from talk_dist.data.tag import PreparedTag
from talk_dist.data.tokenizer import load_tokenizer
from talk_dist.errors import ConfigError, DataError
from talk_dist.evaluate import EvaluateConfig
from talk_dist.models.device import bfloat16, pick_device
from talk_dist.models.encoder import load_encoder
from talk_dist.runtime import memory
from talk_dist.runtime.callbacks import ProgressLines
from talk_dist.runtime.pool import LocalPool
from talk_dist.runtime.speed import measured_rate
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.decode import Neighbour, nearest_texts

TEXTS = "synthetic.jsonl"


@dataclass(frozen=True)
class Prepare:
    """Check the tables of a graph, tokenise its texts once, partition it, and publish it for `distill`."""

    nodes: str = ""
    """Node table (Parquet or CSV: node_id, text, label and, if there is one, split), or `python-api`: the
    documented API of this interpreter's standard library. In Parquet a column `encoding`, lists of floats, may stand
    in place of `text`: such a graph is distilled with --encoder.name given:WIDTH --synthetic.tokens 1."""
    edges: str = ""
    """Edge table (src, dst); without it the graph has no edges."""
    out: str = ""
    """Folder to publish, on any pyarrow.fs path."""
    ogb: str = ""
    """Instead of tables: the folder of ogbn-arxiv as OGB unpacks it, with titleabs.tsv.gz in it."""
    packages: tuple[str, ...] = ()
    """With python-api: installed packages instead of the standard library, such as torch,transformers."""
    encoder: str = "minilm"
    """Encoder whose tokenizer is used: `minilm`, a folder, or a Hugging Face name."""
    max_tokens: int = 128
    """Texts are cut to so many tokens."""
    parts: int = 1
    """Partitions, each a shard of its own."""
    method: Literal["auto", "metis", "hash"] = "auto"
    """How nodes are divided; `auto` is METIS where it is fit, else hash."""
    halo_hops: int = 1
    """Depth of the halo: a kernel of K hops needs K - 1."""
    ratios: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Random split into train, val and test, where the tables bring none."""
    split_seed: int = 0
    """Seed of the random split."""
    use_split_column: bool = True
    """False splits at random even where the table has a split column."""
    name: str = ""
    """What cards and tables call the graph; empty: after its file or folder."""

    def run(self, call: Call) -> None:
        if not self.out:
            raise ConfigError("--out: say where to publish the prepared graph, such as --out prepared/mygraph")
        if bool(self.nodes) == bool(self.ogb) or (self.packages and self.nodes != EMBEDDED):
            raise ConfigError(f"give a node table, {EMBEDDED} (with --packages or not), or --ogb FOLDER: one of them")
        if self.edges and (self.ogb or self.nodes == EMBEDDED):
            raise ConfigError(f"{self.edges}: {self.ogb or EMBEDDED} has edges of its own; leave it out")
        name = self.name or None
        if self.ogb:
            source = tables.from_ogb(self.ogb)
        elif self.nodes == EMBEDDED:
            source = tables.from_arrow(*build_python_api(self.packages or None))
            name = name or api_name(self.packages)
        else:
            source = tables.open_tables(self.nodes, self.edges or None)
        lines = ProgressLines()
        tag = prepare(
            source,
            self.out,
            encoder=self.encoder,
            max_tokens=self.max_tokens,
            parts=self.parts,
            method=self.method,
            halo_hops=self.halo_hops,
            ratios=self.ratios,
            split_seed=self.split_seed,
            use_split_column=self.use_split_column,
            name=name,
            progress=lambda done, total: lines.progress("prepare", done, total, {}),
        )
        print(report.prepared(self.out, tag.meta))


@dataclass(frozen=True)
class Estimate:
    """What a distillation will hold and take, from META.json and the settings, before anything runs."""

    data: str = ""
    """Folder of a prepared graph."""
    preset: Literal["default", "paper"] = "default"
    """Settings to start from."""
    evaluate: bool = True
    """Count the evaluation too."""

    def run(self, call: Call, config: DistillConfig) -> None:
        if not self.data:
            raise ConfigError("give the folder of a prepared graph; `talk-dist prepare` makes one")
        tag, problems = PreparedTag(self.data), preflight.Problems()
        preflight.check_tag(tag, config, (), problems)
        problems.done()
        plan = preflight.planned(tag, config, EvaluateConfig() if self.evaluate else None)
        device = torch.device(pick_device(config.encoder.device))
        rate = measured_rate(device, bfloat16(config.encoder.precision, device))
        print(report.plan(self.data, plan, config, memory.available(), rate))
        preflight.refuse_if_too_large(plan, config)


@dataclass(frozen=True)
class Inspect:
    """What is in a prepared graph, an artifact or the folder of a run."""

    path: str = ""
    """Folder to look into."""
    data: str = ""
    """Of an artifact: the prepared graph, for the real texts nearest to each synthetic node; empty: the `prepared/`
    beside the artifact, if there is one."""
    nearest: int = 3
    """So many of them."""

    def run(self, call: Call) -> None:
        path = preflight.artifact_path(given(self.path, "a prepared graph or an artifact"))
        if storage.exists(storage.join(path, "META.json")):
            print(report.prepared(path, PreparedTag(path).meta))
        elif storage.exists(storage.join(path, "config.json")):
            synthetic = SyntheticTAG.from_pretrained(path)
            print(report.artifact(path, synthetic))
            data = self.data or beside(path, PREPARED)
            if self.nearest > 0 and (self.data or storage.exists(storage.join(data, "META.json"))):
                tag = PreparedTag(data)
                if tag.encoding_width is None:  # else there are no texts to show
                    print("", report.neighbours(synthetic, self._neighbours(synthetic, path, tag)), sep="\n")
        else:
            raise DataError(path, "is neither a prepared graph (no META.json) nor an artifact (no config.json)")

    def _neighbours(self, synthetic: SyntheticTAG, path: str, tag: PreparedTag) -> list[list[Neighbour]]:
        """As the frozen encoder sees both: its encodings of the graph are usually known."""
        config, problems = preflight.distilled_with(synthetic, path), preflight.Problems()
        preflight.check_origin(synthetic, path, tag)
        config = replace(config, encoder=replace(config.encoder, adapters=False))
        preflight.check_tag(tag, config, ("train",), problems)
        encoder = load_encoder(config.encoder)
        preflight.check_encoder(encoder, synthetic.token_embeds.shape[1], tag, problems)
        problems.done()
        pool, lines = LocalPool(tag, encoder, config.kernel, config.runtime), ProgressLines()
        pool.encode(encoder.adapters(), lambda done, total: lines.progress("encode", done, total, {}))
        return nearest_texts(synthetic, pool, encoder, self.nearest, config.seed)


@dataclass(frozen=True)
class Export:
    """Write an artifact as a file: for torch-geometric, without code that runs on loading, or a table of texts."""

    artifact: str = ""
    """Folder of an artifact, or of the run that made it."""
    out: str = ""
    """File to write; empty: `synthetic.pt`, or `synthetic.jsonl` of texts, which may be a .parquet too."""
    format: Literal["pyg", "text"] = "pyg"
    """`text`: text and label of each node, from an artifact that was distilled with `synthetic.discrete`."""
    encodings: bool = False
    """Encode the synthetic nodes and put the result in as `x`, for models that start from features."""

    def run(self, call: Call) -> None:
        path = preflight.artifact_path(given(self.artifact, "an artifact"))
        synthetic, encodings = SyntheticTAG.from_pretrained(path), None
        if self.format == "text":
            return self._text(synthetic, path)
        if self.encodings:
            encoder = load_encoder(preflight.distilled_with(synthetic, path).encoder)
            synthetic = synthetic.embedded(encoder.token_table)
            encodings = synthetic.encode(encoder)
        out = self.out or "synthetic.pt"
        synthetic.export_pyg(out, encodings)
        print(f"{out}: read it with Data.from_dict(torch.load({out!r}, weights_only=True))")

    def _text(self, synthetic: SyntheticTAG, path: str) -> None:
        name = preflight.distilled_with(synthetic, path).encoder.name
        if given_width(name) is not None:
            raise ConfigError(f"{path}: was distilled from encodings ({name}), and has no texts; leave --format out")
        tokenizer, out = load_tokenizer(name), self.out or TEXTS
        if not out.endswith((".jsonl", ".parquet")):
            raise ConfigError(f"--out {out}: texts are written as .jsonl or .parquet; name such a file")
        synthetic.export_text(out, tokenizer)
        assert synthetic.token_ids is not None
        same = sum(map(tokenizer.parses_back, synthetic.token_ids.tolist()))
        print(f"{out}: {len(synthetic)} texts; {same} of them are read as the very tokens that were distilled")
