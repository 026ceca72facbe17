"""The picture of a run: how it validated epoch by epoch, and what its students reach beside the others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from talk_dist.data import storage
from talk_dist.page import PLOT, can_draw, png

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
SYNTHETIC, RIVAL, KERNEL = "#0b7285", "#ced4da", "#e8890c"


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
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
        _epochs(left, metrics.get("history", []), metrics.get("best_epoch"))
        _sets(right, metrics.get("evaluation", {}).get("rows", []))

    storage.write_atomic(path, png(draw, 10, 4.2, dpi=130))
    return str(path)


def _epochs(axis: Any, history: list[dict[str, Any]], best: int | None) -> None:
    epochs = [record["epoch"] for record in history]
    student = [record["val_accuracy"] for record in history]
    axis.plot(
        epochs, [r["krr_val_accuracy"] for r in history], "o-", color=KERNEL, lw=1.8, ms=5, label="kernel predictor"
    )
    axis.plot(epochs, student, "o-", color=SYNTHETIC, lw=1.8, ms=5, label="student")
    if best in epochs:
        value = student[epochs.index(best)]
        axis.plot(best, value, "o", ms=13, mfc="none", mec=SYNTHETIC, mew=1.5, label=f"kept: epoch {best}, {value:.3f}")
    axis.set_xticks(epochs if len(epochs) <= 12 else np.unique(np.linspace(0, max(epochs), 9).astype(int)))
    axis.margins(x=0.08, y=0.25)
    axis.set_xlabel("outer epoch (0 is the start)", color=INK)
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
