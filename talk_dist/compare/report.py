"""The results of a comparison: Parquet, Markdown, and one self-contained HTML page."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from talk_dist import page
from talk_dist.compare.picture import draw_retention
from talk_dist.compare.plan import FULL
from talk_dist.data import storage

AXES = {"nodes": "synthetic nodes", "bytes": "bytes", "seconds": "seconds to make"}
Record = dict[str, Any]


def summary(rows: Iterable[Record]) -> list[Record]:
    """One line for each data set, adapters or not, student, size and method: means over splits and students.

    ``gap`` is the kernel predictor's accuracy less the students'; ``retention`` the ratio of mean accuracies to those
    of the same student on everything.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in ("data", "adapters", "student", "size", "method")), []).append(row)
    lines = []
    for key, some in groups.items():
        data, adapters, student, size, method = key
        whole = groups.get((data, adapters, student, 0, FULL), [])
        scores = np.array([accuracy for row in some for accuracy in row["accuracy"]])
        krr = [row["krr_accuracy"] for row in some if row["krr_accuracy"] is not None]
        line = {"data": data, "adapters": adapters, "student": student, "size": size, "method": method}
        line |= {name: float(np.mean([row.get(name, 0.0) for row in some])) for name in ("nodes", "bytes", "seconds")}
        line |= {"accuracy": float(scores.mean()), "spread": float(scores.std()), "students": len(scores)}
        line |= {"macro_f1": float(np.mean([row["macro_f1"] for row in some]))}
        line |= {"val_accuracy": float(np.mean([row["val_accuracy"] for row in some]))}
        line |= {"krr_accuracy": float(np.mean(krr)) if krr else None}
        line |= {"gap": line["krr_accuracy"] - line["accuracy"] if krr else None}
        full = [accuracy for row in whole for accuracy in row["accuracy"]]
        line |= {"retention": line["accuracy"] / float(np.mean(full)) if full else None}
        lines.append(line)
    return lines


def averages(lines: Sequence[Record]) -> list[Record]:
    """One line a method, size, student and adapters: the mean over data sets, the worst of them, the widest gap."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for line in lines:
        if line["method"] != FULL and line["retention"] is not None:
            groups.setdefault(tuple(line[k] for k in ("adapters", "student", "size", "method")), []).append(line)
    out = []
    for (adapters, student, size, method), some in groups.items():
        worst = min(some, key=lambda line: line["retention"])
        gaps = [line["gap"] for line in some if line["gap"] is not None]
        line = {"method": method, "size": size, "student": student, "adapters": adapters, "data sets": len(some)}
        line |= {"retention": float(np.mean([each["retention"] for each in some])), "worst": worst["retention"]}
        out.append(line | {"worst on": worst["data"], "mean gap": float(np.mean(gaps)) if gaps else None})
    return out


def markdown(lines: Sequence[Record]) -> str:
    """The averages, then a table a data set."""
    blocks = [_table(averages(lines))] if averages(lines) else []
    for name in dict.fromkeys(line["data"] for line in lines):
        shown = [_shown(line) for line in lines if line["data"] == name]
        blocks.append(f"## {name}\n\n{_table(shown)}")
    return "\n\n".join(blocks) + "\n"


def write(rows: Sequence[Record], out: str, command: str, pictures: Mapping[str, bytes]) -> str:
    """Everything into the folder ``out``; returns the Markdown. ``pictures``: name -> PNG of the encodings."""
    lines = summary(rows)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "identity"]
    flat = [{name: row.get(name) for name in names} for row in rows]  # a reference lacks some
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat), buffer)
    storage.write_atomic(storage.join(out, "results.parquet"), buffer.getvalue())
    text = markdown(lines)
    note = f"```\n{command}\n```\n\n{provenance(rows)}\n"
    storage.write_atomic(storage.join(out, "results.md"), f"# Comparison\n\n{text}\n{note}".encode())
    small = [line for line in lines if line["method"] != FULL and line["retention"] is not None]
    students = dict.fromkeys((line["student"], line["adapters"]) for line in small)
    drawn = {}
    for student, adapters in students:
        some = [line for line in small if (line["student"], line["adapters"]) == (student, adapters)]
        kind = f"{student}{', adapters' if adapters else ''}"
        for x, words in AXES.items():
            drawn[f"retention against {words}: {kind}"] = draw_retention(some, x, words)
    whole = _page(text, command, provenance(rows), drawn | dict(pictures))
    storage.write_atomic(storage.join(out, "report.html"), whole.encode())
    for name, picture in drawn.items():
        storage.write_atomic(storage.join(out, "".join(c if c.isalnum() else "_" for c in name) + ".png"), picture)
    return text


def provenance(rows: Sequence[Record]) -> str:
    """Machine, versions and revisions that the rows come from, and how many seeds."""
    facts = {key: sorted({str(row[key]) for row in rows}) for key in ("machine", "version", "revision")}
    splits, students = {row["split"] for row in rows}, {len(row["accuracy"]) for row in rows}
    seeds = f"splits {sorted(splits)}, {'/'.join(map(str, sorted(students)))} students on each set"
    return f"{seeds}; " + "; ".join(f"{key} {', '.join(values)}" for key, values in facts.items())


def _shown(line: Record) -> Record:
    kind = line["student"] + (", adapters" if line["adapters"] else "")
    shown = {"trained on": line["method"], "student": kind, "nodes": f"{line['nodes']:,.0f}"}
    shown |= {"bytes": f"{line['bytes']:,.0f}", "seconds": f"{line['seconds']:.0f}" if line["seconds"] else None}
    shown |= {"test accuracy": f"{line['accuracy']:.3f} ± {line['spread']:.3f}", "macro-F1": line["macro_f1"]}
    return shown | {name: line[key] for name, key in (("KRR", "krr_accuracy"), ("retention", "retention"))}


def _table(lines: Sequence[Record]) -> str:
    head = list(lines[0])
    sides = ["---" if isinstance(lines[0][name], str) and not lines[0][name][:1].isdigit() else "---:" for name in head]
    rows = [head, sides, *([_cell(line[name]) for name in head] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _page(text: str, command: str, source: str, pictures: Mapping[str, bytes]) -> str:
    """One self-contained HTML page of the Markdown ``text`` and the pictures."""
    body = []
    for block in text.split("\n\n"):
        if block.startswith("## "):
            body.append(f"<h2>{html.escape(block[3:])}</h2>")
        elif block.startswith("|"):
            head, _, *rows = ([c.strip() for c in line.strip().strip("|").split("|")] for line in block.splitlines())
            body.append(page.table(head, rows))
    about = f"<p><code>{html.escape(command)}</code><br>{html.escape(source)}</p>"
    return page.page("talk-dist compare", "Comparison", about, *body, page.images(pictures))
