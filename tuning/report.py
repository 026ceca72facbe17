"""What a sweep found: the best settings, the table of its trials, and pictures that explain them.

`write` leaves best.yaml (for `talk-dist distill --config`), trials.parquet, PNGs and one HTML page that holds them all.
"""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from optuna.trial import FrozenTrial

from talk_dist import page
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from tuning.findings import FACTS, Findings, config_of, findings
from tuning.plots import draw_all
from tuning.study import CONFIRMS, Study, accuracy


def table(study: Study) -> pa.Table:
    """One row a trial: number, state, what came of it, what it reported on the way, its settings."""
    trials = study.ended
    names = sorted({name for trial in trials for name in trial.params})
    facts = [*FACTS, CONFIRMS, "reason"]
    columns: dict[str, list[Any]] = {
        "number": [trial.number for trial in trials],
        "state": [trial.state.name.lower() for trial in trials],
    }
    columns |= {name: [trial.user_attrs.get(name) for trial in trials] for name in facts}
    steps = sorted({step for trial in trials for step in trial.intermediate_values})
    columns |= {f"step {step}": [trial.intermediate_values.get(step) for trial in trials] for step in steps}
    settings = {name: [trial.params.get(name) for trial in trials] for name in names}
    return pa.table(columns | {name: _column(values) for name, values in settings.items()})


def _column(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    return values if len(kinds) < 2 else [None if value is None else str(value) for value in values]


def write(study: Study, base: DistillConfig, out: str, command: str) -> Findings:
    """Everything into the folder ``out``."""
    found = findings(study)
    buffer = io.BytesIO()
    pq.write_table(table(study), buffer)
    storage.write_atomic(storage.join(out, "trials.parquet"), buffer.getvalue())
    if found.best:
        storage.write_atomic(storage.join(out, "best.yaml"), _settings(found.best, base, command))
        with storage.publish_folder(storage.join(out, "front"), "README.md") as folder:
            for number in found.front:
                (folder / f"{number:05d}.yaml").write_bytes(_settings(study.trials()[number], base, command))
            (folder / "README.md").write_text(_front(study, found))
    pictures = draw_all(study, found)
    for name, png in pictures.items():
        storage.write_atomic(storage.join(out, f"{name}.png"), png)
    storage.write_atomic(storage.join(out, "report.html"), _page(study, found, pictures, command).encode())
    return found


def _settings(trial: FrozenTrial, base: DistillConfig, command: str) -> bytes:
    tree = _plain(config_of(trial, base).to_dict())
    return (f"# {command}\n# trial {trial.number}\n" + yaml.safe_dump(tree, sort_keys=False)).encode()


def _front(study: Study, found: Findings) -> str:
    lines = ["No other trial is more accurate, faster and smaller than these.", ""]
    lines += ["| settings | validation accuracy | seconds | bytes |", "| --- | ---: | ---: | ---: |"]
    for number in found.front:
        trial = study.trials()[number]
        facts = f"{accuracy(trial):.4f} | {trial.user_attrs['seconds']:.0f} | {trial.user_attrs['bytes']:,}"
        lines.append(f"| {number:05d}.yaml | {facts} |")
    return "\n".join(lines) + "\n"


def words(study: Study, trial: FrozenTrial) -> str:
    """What a trial is worth, beside the first, in words."""
    text = f"{accuracy(trial):.4f} (trial {trial.number})"
    for who, number in {"from other seeds": trial.number, "the first trial": 0}.items():
        values = study.repeats(number)
        if values and (who == "from other seeds" or trial.number):
            text += f", {who} {sum(values) / len(values):.4f}"
    return text


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _page(study: Study, found: Findings, pictures: Mapping[str, bytes], command: str) -> str:
    """One self-contained HTML page."""
    counts = Counter(trial.state.name.lower() for trial in study.ended)
    rows = table(study).to_pylist()
    rows.sort(key=lambda row: -1.0 if row["accuracy"] is None else -row["accuracy"])
    shown = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    trials = page.table(shown, ([_cell(row[name]) for name in shown] for row in rows))
    best = words(study, found.best) if found.best else "no trial was completed"
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return page.page(
        "talk-dist tune",
        f"A sweep of {len(rows)} trials",
        f"<p><code>{html.escape(command)}</code></p>",
        f"<p>Best validation accuracy: <b>{best}</b>. {states}.</p>",
        page.images({name.capitalize(): picture for name, picture in pictures.items()}),
        f"<h2>Trials</h2><div style='overflow-x:auto'>{trials}</div>",
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
