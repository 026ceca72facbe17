"""Pictures of a comparison, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from talk_dist.page import plain, png
from talk_dist.runtime.pool import ShardPool

SHOWN = 400  # real training rows a class: more is only ink
COLOURS = ("#0b7285", "#e8890c", "#7048e8", "#c2255c", "#2b8a3e", "#868e96", "#1971c2", "#a61e4d", "#5c940d", "#343a40")


def draw_encodings(pool: ShardPool, h_s: np.ndarray, labels: np.ndarray, title: str) -> bytes:
    """Real training rows (P^2 H) and a synthetic set (M, d) in the plane of the real rows' first two principal axes."""
    sample = pool.sample(SHOWN, 0)
    mean = sample.features.mean(0)
    axes_of = np.linalg.svd(sample.features - mean, full_matrices=False)[2][:2]
    real, synthetic = ((x - mean) @ axes_of.T for x in (sample.features, h_s))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for c, name in enumerate(pool.tag.classes[: len(COLOURS)]):
            colour = COLOURS[c]
            axes.plot(*real[sample.label == c].T, ".", ms=3, color=colour, alpha=0.35)
            axes.plot(*synthetic[labels == c].T, "*", ms=13, color=colour, mec="black", mew=0.6, label=plain(name))
        axes.set(xticks=[], yticks=[], title=f"{plain(title)}: stars are synthetic")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return png(draw, 8, 5)


def draw_retention(rows: Sequence[dict[str, Any]], x: str, words: str) -> bytes:
    """Mean retention of each method against ``x`` ("nodes", "bytes" or "seconds"), one panel a data set.

    ``rows`` are the lines of the summary; a method's sizes are joined.
    """
    from matplotlib.ticker import NullFormatter

    names = list(dict.fromkeys(row["data"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, names, strict=True):
            for index, method in enumerate(methods):
                some = sorted((r for r in rows if (r["data"], r["method"]) == (name, method)), key=lambda r: r[x])
                style = {"color": COLOURS[index % len(COLOURS)], "ms": 6, "lw": 1.4, "label": plain(method)}
                axes.errorbar([r[x] for r in some], [r["retention"] for r in some], fmt="o-", **style)
            axes.axhline(1.0, color="#343a40", ls="--", lw=1)
            axes.set(xscale="log", xlabel=words, title=plain(name))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e4e7eb")
        panels[0].set_ylabel("retention of full-data test accuracy")
        panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return png(draw, 3.2 * len(names) + 1.6, 3.6)
