"""How good is it: a fresh student on the synthetic set against the full training set and coresets.

For every seed: a random 60/20/20 split, a distillation and `--students` students a row, all of that seed. The
table gives mean ± standard deviation over all of them. Nothing is chosen on test nodes.

    python benchmarks/quality.py FOLDER --seeds 3 --out benchmarks/results/NAME.md [--section.key VALUE ...]

FOLDER holds nodes.parquet and edges.parquet; `python-api` is the embedded graph. Of a prepared graph the split stays
as it is, and the seeds are those of the distillation alone. `--config best.yaml` takes what a sweep found.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

from talk_dist import (
    EvaluateConfig,
    LocalPool,
    PreparedTag,
    TextEncoder,
    distill,
    evaluate,
    open_tables,
    prepare,
)
from talk_dist.cli import COMMANDS
from talk_dist.commands.report import machine
from talk_dist.commands.settings import read
from talk_dist.config import StudentConfig
from talk_dist.data.python_api import build_python_api
from talk_dist.data.tables import Source, from_arrow
from talk_dist.evaluate import Row, table
from talk_dist.runtime.callbacks import ProgressLines


def merge(rows: list[Row]) -> Row:
    """The same row of several seeds as one."""
    krr = [r.krr_accuracy for r in rows if r.krr_accuracy is not None]
    return Row(
        rows[0].name,
        round(sum(r.nodes for r in rows) / len(rows)),
        round(sum(r.bytes for r in rows) / len(rows)),
        tuple(a for r in rows for a in r.accuracy),
        tuple(a for r in rows for a in r.macro_f1),
        tuple(a for r in rows for a in r.val_accuracy),
        sum(krr) / len(krr) if krr else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--config")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--students", type=int, default=3)
    parser.add_argument("--student", default="gcn")
    parser.add_argument("--against", default="full,random,herding,kcenter,medoid")
    parser.add_argument("--out", type=Path)
    arguments, options = parser.parse_known_args()
    lines, rows_by_seed, seconds = ProgressLines(), [], []
    folder = Path(arguments.data)

    start = ["--config", arguments.config] if arguments.config else ["--preset", arguments.preset]

    def source() -> Source:
        if arguments.data == "python-api":
            return from_arrow(*build_python_api())
        return open_tables(folder / "nodes.parquet", folder / "edges.parquet")

    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        _, config, _ = read(COMMANDS["distill"], [*start, "--seed", str(seed), *options])
        assert config is not None
        with tempfile.TemporaryDirectory() as scratch:
            if (folder / "META.json").exists():
                tag = PreparedTag(str(folder))
            else:
                out = f"{scratch}/prepared"
                tag = prepare(source(), out, split_seed=seed, use_split_column=False, name=folder.name)
            encoder = TextEncoder(config.encoder)
            pool = LocalPool(tag, encoder, config.kernel, config.runtime)
            started = time.monotonic()
            synthetic = distill(pool, encoder, config, [lines])
            seconds.append(time.monotonic() - started)
            settings = EvaluateConfig(
                against=tuple(arguments.against.split(",")) if arguments.against else (),
                seeds=arguments.students,
                student=StudentConfig(kind=arguments.student),
            )
            rows_by_seed.append(evaluate(pool, encoder, synthetic, config, settings, lines.progress))
            print(f"seed {seed}\n{table(rows_by_seed[-1])}", flush=True)

    merged = [merge(list(rows)) for rows in zip(*rows_by_seed, strict=True)]
    took = ", ".join(f"{s:.0f}" for s in seconds)
    command = f"python {shlex.join(sys.argv)}"
    settings_used = " ".join([*(word.removeprefix("--") for word in start), *options])
    text = "\n".join(
        [
            f"# {folder.name}: {arguments.student.upper()} students, {merged[0].nodes} nodes, {settings_used}",
            "",
            table(merged),
            "",
            f"Mean ± standard deviation over {arguments.seeds} distillations (each of a split of its own, unless the "
            f"graph came prepared) × {arguments.students} "
            "students. KRR: the kernel predictor, no student. Retention: relative to the full set.",
            f"Seconds to distil, encoding included: {took}. Machine: {machine()}.",
            "",
            "```",
            command.replace(f"{folder.parent}/", "DATA/") if folder.parent.name else command,
            "```",
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
