"""How small can the synthetic set be: number formats and numbers of tokens, by bytes, error and accuracy.

A format is STORAGE:TOKENS:GAIN. For each graph stage one is made once with the preset; then tokens are sought for its
encodings (`fit_tokens`, the preset's passes), settled on the format's grid if it has one, and read back from what the
file would hold. The error is ||enc(x) - gain h||^2 / ||gain h||^2. `--test` reads the test nodes too, and the full
training set's: for the formats that the validation chose.

    python benchmarks/bytes.py PREPARED... --formats int8:16:1 int2:16:2 --out benchmarks/results/bytes.md
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case, report, spread

from talk_dist import EvaluateConfig, SyntheticTAG
from talk_dist.distill import describe
from talk_dist.evaluate import reference
from talk_dist.runtime.full import WholeGraph
from talk_dist.synthetic.init import fit_tokens
from talk_dist.synthetic.settle import settle

FORMATS = ("float32:16:1", "bfloat16:16:1", "int8:16:1", "int4:16:1", "int2:16:2", "int1:16:2", "int1:8:3")
EDGE_BYTES = 8  # two int32


def stored(case: Case, storage: Any, tokens: int, gain: float, passes: int) -> tuple[SyntheticTAG, float]:
    """The set that a reader gets, and the seconds it took after stage one."""
    synthetic = dataclasses.replace(
        case.config.synthetic, storage=storage, tokens=tokens, gain=gain, settle_passes=passes
    )
    config, started = dataclasses.replace(case.config, synthetic=synthetic), time.monotonic()
    if tokens not in case.found:
        case.found[tokens] = fit_tokens(case.encoder, case.medoids(tokens), case.h_s, config, lambda *_: None)
    x_s = settle(case.encoder, case.found[tokens], config, lambda *_: None)
    tag = SyntheticTAG(x_s, case.y_s, config=describe(case.pool, case.encoder, config)).as_stored()
    return tag, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--passes", type=int, default=120)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    scores: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for seed, path in enumerate(arguments.data):
        case = Case(path, int(path[-1]) if path[-1].isdigit() else seed)
        meta, name = case.tag.meta, case.tag.meta["name"]
        scores[name, "stage one", "val"] += case.scores(case.h_s)
        if arguments.test:
            whole = reference(WholeGraph(case.tag), case.pool, case.encoder, EvaluateConfig(seeds=3))
            scores[name, "full", "test"] += whole.accuracy
        for form in arguments.formats:
            storage, tokens, gain = form.split(":")
            tag, seconds = stored(case, storage, int(tokens), float(gain), arguments.passes)
            h, target = case.encoder.encode_embeds(tag.token_embeds), float(gain) * case.h_s
            error = float((h - target).square().sum() / target.square().sum())
            graph = meta["text"]["bytes"] + EDGE_BYTES * meta["num_edges"]
            size = tag.num_bytes()
            rows[name, form].append((size, size / meta["text"]["train_bytes"], size / graph, error, seconds))
            scores[name, form, "val"] += case.scores(h)
            if arguments.test:
                scores[name, form, "test"] += case.scores(h, "test")
            read = [scores.get((name, which, split), [])[-3:] for which in (form, "full") for split in ("val", "test")]
            print(path, form, rows[name, form][-1], *read, flush=True)
    lines = [
        "| graph | format:tokens:gain | bytes | of the training texts | of the graph | relative error | validation | "
        "test | retention | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, form), runs in rows.items():
        size, texts, graph, _, seconds = np.mean(runs, axis=0)
        test, full = scores.get((name, form, "test")), scores.get((name, "full", "test"))
        kept = f"{spread(test)} | {np.mean(test) / np.mean(full):.3f}" if test and full else "– | –"
        lines.append(
            f"| {name} | {form} | {size:,.0f} | {texts:.2%} | {graph:.2%} | {spread([run[3] for run in runs])} | "
            f"{spread(scores[name, form, 'val'])} | {kept} | {seconds:.0f} |"
        )
    for (name, form, split), found in scores.items():
        if (name, form) not in rows:
            lines.append(f"| {name} | {form}, {split} | | | | | {spread(found)} | | | |")
    report("Bytes", lines, arguments.out)


if __name__ == "__main__":
    main()
