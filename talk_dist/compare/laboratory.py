"""Run a plan, cell by cell; every result is on disk before the next begins, so that any end can be gone on from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from talk_dist import __version__
from talk_dist.commands import preflight
from talk_dist.commands.call import EMBEDDED, Call, api_name
from talk_dist.commands.folder import RunFolder
from talk_dist.commands.place import place
from talk_dist.commands.report import machine
from talk_dist.commands.runs import identity
from talk_dist.compare.cell import Cell, encodings, training_set
from talk_dist.compare.picture import draw_encodings
from talk_dist.compare.plan import FULL, Method, Plan
from talk_dist.config import DistillConfig, StudentConfig
from talk_dist.data import storage, tables
from talk_dist.data.prepare import prepare
from talk_dist.data.python_api import build_python_api
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError
from talk_dist.evaluate import EvaluateConfig, Row, reference, score
from talk_dist.models.protocol import Encoder
from talk_dist.runtime.callbacks import Callbacks, ProgressLines
from talk_dist.runtime.checkpoint import Checkpoint, differences
from talk_dist.runtime.full import WholeGraph
from talk_dist.runtime.pool import ShardPool
from talk_dist.synthetic.artifact import CONFIG, SyntheticTAG

Record = dict[str, Any]
Pair = tuple[str, int]  # a graph and the seed of its split


class Laboratory:
    """``folder`` holds prepared graphs, sets and one JSON file a row."""

    def __init__(self, plan: Plan, folder: RunFolder, call: Call):
        self.plan, self.folder = plan, folder
        self.tell = Callbacks([call.stop, ProgressLines()])
        self.drawn = [
            Cell(data, plan.splits[0], plan.methods[0], size, False)
            for data, size in itertools.product(plan.data, plan.sizes)
        ]
        self.about = {"version": __version__, "revision": revision(), "machine": machine(), "command": call.command}

    def run(self) -> Iterator[Record]:
        """Every row of the plan, as it becomes known or is read again.

        Raises ConfigError if a row was made with other settings.
        """
        plan, encoder = self.plan, plan_encoder(self.plan)
        pairs = list(itertools.product(plan.data, plan.splits))
        tags = {pair: self._prepared(pair[0], plan.data[pair[0]], pair[1], encoder) for pair in pairs}
        cells = {
            (data, seed): [
                cell
                for size, method, adapters in itertools.product(plan.sizes, plan.methods, plan.adapters)
                if (cell := Cell(data, seed, method, size, adapters)).possible
            ]
            for data, seed in pairs
        }
        self._check(tags, cells)
        for (data, seed), tag in tags.items():
            for adapters in plan.adapters:
                yield from self._reference(data, seed, tag, adapters)
            for cell in cells[data, seed]:
                yield from self._cell(cell, tag)

    def _check(self, tags: Mapping[Pair, PreparedTag], cells: Mapping[Pair, Sequence[Cell]]) -> None:
        """Raises one ConfigError that lists every cell that cannot be made, before the first is."""
        wrong = []
        for pair, tag in tags.items():
            for cell in cells[pair]:
                problems = preflight.Problems()
                preflight.check_tag(tag, cell.config(len(tag.classes)), ("val", "test"), problems)
                wrong += [f"{cell.data}, {cell.method.name}, size {cell.size:g}: {e}" for e in problems.errors]
        if wrong:
            raise ConfigError("\n".join(dict.fromkeys(wrong)))

    def pictures(self) -> dict[str, bytes]:
        """Title -> PNG of the encodings of the first method's sets, as far as they were drawn."""
        paths = {cell.name: self._picture(cell) for cell in self.drawn}
        return {name: storage.read_bytes(path) for name, path in paths.items() if storage.exists(path)}

    def _work(self, cell: Cell) -> str:
        return self.folder.path("work", f"{cell.name}.safetensors")

    def _picture(self, cell: Cell) -> str:
        return self.folder.path("pictures", f"{cell.name}.png")

    # -- one cell -----------------------------------------------------------------------------------------

    def _cell(self, cell: Cell, tag: PreparedTag) -> Iterator[Record]:
        config = cell.config(len(tag.classes))
        known = {student: self._row(cell, student, tag) for student in self.plan.students}
        if all(known.values()):
            yield from (row for row in known.values() if row)
            return
        with self._opened(tag, config, self._work(cell)) as (pool, encoder):
            made = self._made(cell, tag, pool, encoder, config)
            encoder.reset_adapters(0)
            self._encode(pool, encoder)
            trained_on = training_set(cell, made, pool, encoder, config, EvaluateConfig().recipe)
            for student, row in known.items():
                if row is None:
                    scored = score(trained_on, pool, encoder, self._evaluation(student), self.tell.progress)
                    row = self._keep(cell, student, tag, scored, {"seconds": made.metrics["made"]["seconds"]})
                yield row

    def _made(
        self, cell: Cell, tag: PreparedTag, pool: ShardPool, encoder: Encoder, config: DistillConfig
    ) -> SyntheticTAG:
        path = self.folder.path("sets", cell.name)
        if storage.exists(storage.join(path, CONFIG)):
            made = SyntheticTAG.from_pretrained(path)
            _same(path, made.metrics["made"]["identity"], self._identity(cell, tag))
            return made
        encoder.reset_adapters(config.seed)
        self._encode(pool, encoder)
        checkpoint = Checkpoint(self._work(cell), identity(tag, encoder, config))
        made = cell.make(tag, pool, encoder, self.tell, checkpoint)
        facts = made.metrics["made"] | {"identity": self._identity(cell, tag)}
        made = dataclasses.replace(made, metrics=made.metrics | {"made": facts})
        if cell in self.drawn:
            encoder.reset_adapters(0)
            self._encode(pool, encoder)
            picture = draw_encodings(pool, encodings(made, encoder).numpy(), made.labels.argmax(1).numpy(), cell.name)
            storage.write_atomic(self._picture(cell), picture)
        made.save_pretrained(path)
        return made

    def _reference(self, data: str, seed: int, tag: PreparedTag, adapters: bool) -> Iterator[Record]:
        """Every student trained on everything."""
        cell = Cell(data, seed, Method(FULL, FULL, "", self.plan.settings), 0, adapters)
        known = {student: self._row(cell, student, tag) for student in self.plan.students}
        if all(known.values()):
            yield from (row for row in known.values() if row)
            return
        with self._opened(tag, cell.config(len(tag.classes))) as (pool, encoder):
            whole = WholeGraph(tag)
            for student, row in known.items():
                if row is None:
                    encoder.reset_adapters(0)
                    self._encode(pool, encoder)
                    scored = reference(whole, pool, encoder, self._evaluation(student), self.tell.progress)
                    row = self._keep(cell, student, tag, scored, {})
                yield row

    # -- what is known ------------------------------------------------------------------------------------

    def _identity(self, cell: Cell, tag: PreparedTag, student: str = "") -> Record:
        """What a set, or a student's row, depends on, as JSON keeps it."""
        tree, method = cell.config(len(tag.classes)).deciding(), cell.method
        tree |= {"data hash": tag.meta["hash"], "method": [method.kind, method.source, method.invert]}
        if student:
            tree["evaluation"] = dataclasses.asdict(self._evaluation(student))
        return dict(json.loads(json.dumps(tree)))

    def _row(self, cell: Cell, student: str, tag: PreparedTag) -> Record | None:
        path = self.folder.path("rows", f"{cell.name}-{student}.json")
        if not storage.exists(path):
            return None
        row: Record = storage.read_json(path)
        _same(path, row["identity"], self._identity(cell, tag, student))
        return row

    def _keep(self, cell: Cell, student: str, tag: PreparedTag, scored: Row, facts: Record) -> Record:
        row = {"data": cell.data, "split": cell.seed, "method": cell.method.name, "size": cell.size}
        row |= {"adapters": cell.adapters, "student": student} | dataclasses.asdict(scored) | facts | self.about
        row |= {"identity": self._identity(cell, tag, student)}
        storage.write_atomic(self.folder.path("rows", f"{cell.name}-{student}.json"), storage.to_json(row))
        return row

    def _evaluation(self, student: str) -> EvaluateConfig:
        plan, kind = self.plan, StudentConfig(kind=student)  # type: ignore[arg-type]
        shares = plan.full_label_smoothing
        return EvaluateConfig(seeds=plan.seeds, student=kind, full_lr=plan.full_lr, full_label_smoothing=shares)

    # -- small things -------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, tag: PreparedTag, config: DistillConfig, work: str = "") -> Iterator[tuple[ShardPool, Encoder]]:
        """What a cell needs; ``work``: where a set that is being made stands."""
        runtime = config.runtime  # the splits of a graph share their encodings
        shared = runtime.cache_folder or self.folder.out
        with place(dataclasses.replace(config, runtime=dataclasses.replace(runtime, cache_folder=shared))) as where:
            encoder, plan = where.encoder(), preflight.check_memory(tag, config, EvaluateConfig())
            threads = Checkpoint(work, {}).threads if work else 0
            yield where.pool(tag, encoder, lambda parts: plan.actor(parts).host, threads), encoder

    def _prepared(self, data: str, spec: dict[str, Any], seed: int, encoder: str) -> PreparedTag:
        if spec["prepared"]:
            return PreparedTag(spec["prepared"])
        path = self.folder.path("prepared", f"{data}-{seed}")
        name = api_name() if data == EMBEDDED else data
        wanted = spec | {"name": name, "encoder": encoder}
        if data != EMBEDDED:  # tables that are gone are as they were
            wanted["stamps"] = [storage.stamp(uri) for uri in (spec["nodes"], spec["edges"]) if uri]
        said = f"{path}.json"
        saved = storage.read_json(said) if storage.exists(said) else {}
        if saved.get("stamps") and None in wanted.get("stamps", ()):
            wanted["stamps"] = saved["stamps"]
        if saved == json.loads(json.dumps(wanted)):
            return PreparedTag(path)
        # what the plan said before may lie there; if it was another graph, its rows are refused after this
        if data == EMBEDDED:
            source = tables.from_arrow(*build_python_api())
        else:
            source = tables.open_tables(spec["nodes"], spec["edges"] or None)
        rest = {key: spec[key] for key in ("max_tokens", "parts", "use_split_column")}
        tag = prepare(source, path, encoder=encoder, split_seed=seed, name=name, **rest)
        storage.write_atomic(said, storage.to_json(wanted))
        return tag

    def _encode(self, pool: ShardPool, encoder: Encoder) -> None:
        pool.encode(encoder.adapters(), lambda done, total: self.tell.progress("encode", done, total, {}))


def _same(path: str, saved: Record, now: Record) -> None:
    if changed := differences(saved, now):
        raise ConfigError(f"{path} was made with other settings ({'; '.join(changed)}); choose another --out")


def plan_encoder(plan: Plan) -> str:
    """The one encoder whose tokenizer prepares the graphs. Raises ConfigError if the methods want several."""
    names = {method.config.encoder.name for method in plan.methods}
    if len(names) > 1:
        raise ConfigError(f"the methods name the encoders {', '.join(sorted(names))}: one plan, one encoder")
    return names.pop()


def revision() -> str:
    """The git revision of this code, or nothing where it is installed without one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return ""
    return done.stdout.strip()
