"""Pictures of a sweep, as PNG."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from talk_dist.page import png
from tuning.findings import Findings, judged
from tuning.study import Study, accuracy

COLOURS = {"COMPLETE": "#1f77b4", "PRUNED": "#bbbbbb"}


def draw_all(study: Study, found: Findings) -> dict[str, bytes]:
    """Name -> PNG of every picture that the trials are enough for."""
    drawn = {name: png(partial(draw, study=study, found=found)) for name, draw in PICTURES.items()}
    return {name: picture for name, picture in drawn.items() if picture}


def _scatter(axes: Any, places: list[Any], trials: list[FrozenTrial], size: float, among: list[FrozenTrial]) -> None:
    """Accuracies of ``trials``. Far below most of those ``among`` which they are, as where one diverged, they are
    triangles on the lower edge: the others would lie on top of each other."""
    quarter, best = np.quantile([accuracy(trial) for trial in among], [0.25, 1.0])
    floor = max(min(map(accuracy, among)), quarter - 2 * (best - quarter))
    for below, marker in ((False, "o"), (True, "v")):
        some = [(p, t) for p, t in zip(places, trials, strict=True) if (accuracy(t) < floor) == below]
        colours = [COLOURS[t.state.name] for _, t in some]
        axes.scatter([p for p, _ in some], [max(floor, accuracy(t)) for _, t in some], size, colours, marker)


def _history(figure: Any, study: Study, found: Findings) -> bool:
    """Accuracy by trial, and the best so far."""
    trials = judged(study)
    if not trials:
        return False
    figure.set_size_inches(8, 4)
    axes = figure.subplots()
    _scatter(axes, [trial.number for trial in trials], trials, 25, trials)
    for state, label in (("PRUNED", "stopped early"), ("COMPLETE", "completed")):
        axes.plot([], [], "o", color=COLOURS[state], label=label, ms=5)
    best, path = -1.0, []
    for trial in trials:
        best = max(best, accuracy(trial) if trial.state is TrialState.COMPLETE else -1.0)
        path.append((trial.number, best))
    path = [(number, value) for number, value in path if value >= 0]
    axes.step(*zip(*path, strict=True), where="post", color="#d62728", label="best so far") if path else None
    axes.set(xlabel="trial", ylabel="validation accuracy")
    axes.legend(frameon=False)
    return True


def _importance(figure: Any, study: Study, found: Findings) -> bool:
    """How much of the variance of the accuracy each setting explains."""
    if not found.importances:
        return False
    names = sorted(found.importances, key=lambda name: found.importances[name])
    figure.set_size_inches(8, 0.35 * len(names) + 1)
    axes = figure.subplots()
    axes.barh(names, [found.importances[name] for name in names], color=COLOURS["COMPLETE"])
    axes.set(xlabel="share of the variance of validation accuracy (fANOVA)")
    return True


def _pareto(figure: Any, study: Study, found: Findings) -> bool:
    """Accuracy against seconds and bytes; the trials that nothing beats in all three are filled."""
    done = study.completed
    if not done:
        return False
    figure.set_size_inches(10, 4)
    for axes, name, words in zip(
        figure.subplots(1, 2, sharey=True), ("seconds", "bytes"), ("seconds of distillation", "kB"), strict=True
    ):
        for filled in (False, True):
            some = [t for t in done if (t.number in found.front) == filled]
            colour = COLOURS["COMPLETE"]
            axes.plot(
                [t.user_attrs[name] / (1000 if name == "bytes" else 1) for t in some],
                [accuracy(t) for t in some],
                "o",
                color=colour,
                mfc=colour if filled else "none",
                label="on the front" if filled else "beaten",
            )
        axes.set(xlabel=words, ylabel="validation accuracy" if name == "seconds" else "")
        axes.locator_params(axis="x", nbins=5)
        axes.label_outer()
    axes.legend(frameon=False)
    return True


def _slices(figure: Any, study: Study, found: Findings) -> bool:
    """Accuracy against every setting that varied."""
    trials = judged(study)
    from matplotlib.ticker import NullFormatter

    names = [n for n in sorted({n for t in trials for n in t.params}) if len({t.params.get(n) for t in trials}) > 1]
    if not names:
        return False
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure.set_size_inches(3 * columns, 2.4 * rows)
    panels = iter(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for name, axes in zip(names, panels, strict=False):
        some = sorted((t for t in trials if name in t.params), key=lambda t: str(t.params[name]))
        values = [t.params[name] for t in some]
        few = any(isinstance(t.distributions[name], CategoricalDistribution) for t in some)
        _scatter(axes, [str(v) for v in values] if few else values, some, 14, trials)
        axes.set_title(name)
        if few:
            axes.margins(x=0.3)
        elif any(getattr(t.distributions[name], "log", False) for t in some):
            axes.set_xscale("log")
            ends = [min(values), max(values)]  # a power of ten need not lie between them
            axes.set_xticks(ends, [f"{end:.2g}" for end in ends])
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.locator_params(axis="x", nbins=4)
    for axes in panels:  # those left over
        axes.axis("off")
    return True


PICTURES: dict[str, Callable[..., bool]] = {  # draw(figure, study, found) -> whether there was anything to draw
    "history": _history,
    "importances": _importance,
    "front": _pareto,
    "slices": _slices,
}
