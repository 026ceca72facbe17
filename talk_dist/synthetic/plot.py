"""The picture of a run: how it validated epoch by epoch, and what its students reach beside the others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from talk_dist.data import storage
from talk_dist.page import PLOT, can_draw, plain, png

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
SYNTHETIC, RIVAL, KERNEL = "#0b7285", "#ced4da", "#e8890c"
STAGES = {"kernel": "kernel steps", "students": "students", "": "epochs"}


def plot(metrics: dict[str, Any], title: str, path: str | Path) -> str:
    """Draw the ``metrics`` of an artifact as a PNG at ``path``; returns the path, or what to install for a picture."""
    if not can_draw():
        return f"not drawn: it needs matplotlib ({PLOT})"

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(MUTED)
            axis.tick_params(colors=INK, labelsize=9)
            axis.set_axisbelow(True)
            axis.grid(axis="y", color=GRID)
        figure.suptitle(plain(title), x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
        _validations(left, metrics.get("start", []), metrics.get("history", []), metrics.get("best_epoch"))
        _sets(right, metrics.get("evaluation", {}).get("rows", []))

    storage.write_atomic(path, png(draw, 10, 4.2, dpi=130))
    return str(path)


def _validations(axis: Any, start: list[dict[str, Any]], history: list[dict[str, Any]], best: int | None) -> None:
    """One after the other, as far apart: of the encodings against the kernel, then through students, then of the
    synthetic set as it started and after every outer epoch."""
    records = [*start, *history]
    stages = [STAGES[record.get("stage", "")] for record in records]
    lines = ("krr_val_accuracy", KERNEL, "kernel predictor"), ("val_accuracy", SYNTHETIC, "student")
    for stage in dict.fromkeys(stages):  # no line from one to the next: other things are validated
        first = stages.index(stage)
        places = range(first, first + stages.count(stage))
        for name, color, label in lines:
            values = [records[place][name] for place in places]
            axis.plot(places, values, "o-", color=color, lw=1.8, ms=5, label=None if first else label)
        middle = (first + places[-1]) / 2, 0.02
        axis.annotate(stage, middle, xycoords=("data", "axes fraction"), ha="center", fontsize=8, color=MUTED)
        if first:
            axis.axvline(first - 0.5, color=GRID, lw=1.2)
    kept = next((len(start) + i for i, record in enumerate(history) if record["epoch"] == best), None)
    if kept is not None:
        value = records[kept]["val_accuracy"]
        axis.plot(kept, value, "o", ms=13, mfc="none", mec=SYNTHETIC, mew=1.5, label=f"kept: {value:.3f}")
    shown = range(0, len(records), -(-len(records) // 14) or 1)
    axis.set_xticks(shown, [str(records[place].get("step", records[place].get("epoch"))) for place in shown])
    axis.margins(x=0.08, y=0.25)
    axis.set_xlabel("step or epoch", color=INK)
    axis.set_title("accuracy on validation nodes", loc="left", fontsize=10, color=INK)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)


def _sets(axis: Any, rows: list[dict[str, Any]]) -> None:
    full = next((row for row in rows if row["name"] == "full"), None)
    bars = [row for row in rows if row["name"] != "full"]
    means = [float(np.mean(row["accuracy"])) for row in bars]
    spreads = [float(np.std(row["accuracy"])) for row in bars]
    colors = [SYNTHETIC if row["name"] == "synthetic" else RIVAL for row in bars]
    axis.bar(
        range(len(bars)), means, yerr=spreads, color=colors, width=0.66, error_kw={"ecolor": INK, "lw": 1, "capsize": 3}
    )
    tops = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    if full is not None:
        level = float(np.mean(full["accuracy"]))
        tops.append(level)
        axis.axhline(level, color=INK, ls="--", lw=1.2)
        words = f"all {full['nodes']:,} training nodes: {level:.3f}"
        axis.annotate(
            words,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=INK,
        )
    for place, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
        axis.annotate(
            f"{mean:.3f}",
            (place, mean - spread),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            color="white" if place == 0 else INK,
        )
    axis.set_ylim(0.0, max(tops, default=1.0) + 0.08)
    axis.set_xticks(range(len(bars)), [f"{row['name']}\n{row['nodes']} nodes" for row in bars])
    axis.set_title("test accuracy of fresh students, mean ± std over seeds", loc="left", fontsize=10, color=INK)
