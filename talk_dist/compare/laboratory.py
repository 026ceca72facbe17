"""Run a plan, cell by cell; every result is on disk before the next begins, so that any end can be gone on from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from talk_dist import __version__
from talk_dist.commands import preflight
from talk_dist.commands.call import EMBEDDED, Call, api_name
from talk_dist.commands.folder import RunFolder
from talk_dist.commands.place import place
from talk_dist.commands.report import machine
from talk_dist.commands.runs import identity
from talk_dist.compare.cell import Cell, training_set
from talk_dist.compare.picture import draw_encodings
from talk_dist.compare.plan import FULL, Method, Plan
from talk_dist.config import DistillConfig
from talk_dist.data import storage, tables
from talk_dist.data.prepare import prepare
from talk_dist.data.python_api import build_python_api
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError
from talk_dist.evaluate import EvaluateConfig, Row, reference, score
from talk_dist.models.encoder import load_encoder
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
        self._own = [call.stop, ProgressLines()]
        self.tell = Callbacks(self._own)
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
        self._check_tables(pairs)
        tags = {pair: self._prepared(pair[0], plan.data[pair[0]], pair[1], encoder) for pair in pairs}
        cells = [(cell, tags[pair]) for pair in pairs for cell in self._cells(*pair)]
        known = [self._known(cell, tag) for cell, tag in cells]
        self._check([cell for cell, rows in zip(cells, known, strict=True) if not all(rows.values())])
        for (cell, tag), rows in zip(cells, known, strict=True):
            yield from self._rows(cell, tag, rows)

    def _cells(self, data: str, seed: int) -> Iterator[Cell]:
        """Of one split: the references, of students trained on everything, and what is compared with them."""
        plan = self.plan
        if not plan.data[data]["prepared"] or seed == plan.splits[0]:  # else the split is always the same
            for adapters in plan.adapters:
                yield Cell(data, seed, Method(FULL, FULL, "", plan.settings), 0, adapters)
        for size, method, adapters in itertools.product(plan.sizes, plan.methods, plan.adapters):
            if (cell := Cell(data, seed, method, size, adapters)).possible:
                yield cell

    def _check_tables(self, pairs: Sequence[Pair]) -> None:
        """Raises one ConfigError that lists every table that is not there, of graphs that are not prepared either."""
        missing = {
            f"data.{data}: {uri}: no such file or folder"
            for data, seed in pairs
            for uri in (self.plan.data[data]["nodes"], self.plan.data[data]["edges"])
            if uri and storage.stamp(uri) is None and not storage.exists(f"{self._graph(data, seed)}.json")
        }
        if missing:
            raise ConfigError("\n".join(sorted(missing)))

    def _graph(self, data: str, seed: int) -> str:
        return self.folder.path("prepared", f"{data}-{seed}")

    def _check(self, cells: Sequence[tuple[Cell, PreparedTag]]) -> None:
        """Raises one ConfigError that lists every cell that cannot be made, before the first is."""
        settings, wrong = self.plan.settings, list[str]()
        # a language model that needs workers of its own is not loaded here, but checked with the first cell
        encoder = load_encoder(settings.encoder) if cells and not settings.deepspeed.workers else None
        for cell, tag in cells:
            config, problems = cell.config(len(tag.classes)), preflight.Problems()
            preflight.check_tag(tag, config, ("val", "test"), problems)
            if encoder is not None and cell.method.kind in ("distill", FULL):
                preflight.check_encoder(encoder, config.synthetic.tokens, tag, problems)
            problems.attempt(partial(cell.check, tag))
            problems.attempt(partial(preflight.check_memory, tag, config, EvaluateConfig()))
            wrong += [f"{cell.data}, {cell.method.name}, size {cell.size:g}: {error}" for error in problems.errors]
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

    def _rows(self, cell: Cell, tag: PreparedTag, known: dict[str, Record | None]) -> Iterator[Record]:
        """One a student, in the order of the plan; those that are ``known`` as they are."""
        config, facts = cell.config(len(tag.classes)), Record()
        if all(known.values()):
            yield from (row for row in known.values() if row)
            return
        with self._opened(tag, config, self._work(cell)) as (pool, encoder):
            if cell.method.kind == FULL:
                self._encode_afresh(pool, encoder)
                trained = partial(reference, WholeGraph(tag))
            else:
                made = self._made(cell, tag, pool, encoder, config)
                facts["seconds"] = made.metrics["made"]["seconds"]
                self._encode_afresh(pool, encoder)
                trained = partial(score, training_set(cell, made, pool, encoder, config, EvaluateConfig().recipe))
            for student, row in known.items():
                if row is None:
                    scored = trained(pool, encoder, self._evaluation(student), self.tell.progress)
                    row = self._keep(cell, student, tag, scored, facts)
                yield row

    def _made(
        self, cell: Cell, tag: PreparedTag, pool: ShardPool, encoder: Encoder, config: DistillConfig
    ) -> SyntheticTAG:
        path = self.folder.path("sets", cell.name)
        if storage.exists(storage.join(path, CONFIG)):
            made = SyntheticTAG.from_pretrained(path)
            _same(path, made.metrics["made"]["identity"], self._identity(cell, tag))
        else:
            self._encode_afresh(pool, encoder, config.seed)
            made = cell.make(tag, pool, encoder, self.tell, self._begun(cell, identity(tag, encoder, config)))
            facts = made.metrics["made"] | {"identity": self._identity(cell, tag)}
            made = dataclasses.replace(made, metrics=made.metrics | {"made": facts})
            made.save_pretrained(path)
        if cell in self.drawn and not storage.exists(self._picture(cell)):
            self._encode_afresh(pool, encoder)
            picture = draw_encodings(pool, made.encode(encoder).numpy(), made.labels.argmax(1).numpy(), cell.name)
            storage.write_atomic(self._picture(cell), picture)
        return made

    def _begun(self, cell: Cell, identity: Record) -> Checkpoint:
        """Where a set stands that was cut off; if the plan has changed since, where one begins: nothing is lost but
        what nobody wants any more."""
        begun = Checkpoint(self._work(cell), identity)
        try:
            begun.load()
        except ConfigError:
            return Checkpoint(self._work(cell), identity, resume=False)
        return begun

    # -- what is known ------------------------------------------------------------------------------------

    def _identity(self, cell: Cell, tag: PreparedTag, student: str = "") -> Record:
        """What a set, or a student's row, depends on, as JSON keeps it."""
        tree, method = cell.config(len(tag.classes)).deciding(), cell.method
        tree |= {"data hash": tag.meta["hash"], "method": [method.kind, method.source, method.invert]}
        if student:
            tree["evaluation"] = dataclasses.asdict(self._evaluation(student))
        return dict(json.loads(json.dumps(tree)))

    def _known(self, cell: Cell, tag: PreparedTag) -> dict[str, Record | None]:
        return {student: self._row(cell, student, tag) for student in self.plan.students}

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
        plan = self.plan
        trained, shares = plan.student(student), plan.full_label_smoothing
        return EvaluateConfig(seeds=plan.seeds, student=trained, full_lr=plan.full_lr, full_label_smoothing=shares)

    # -- small things -------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, tag: PreparedTag, config: DistillConfig, work: str = "") -> Iterator[tuple[ShardPool, Encoder]]:
        """What a cell needs; ``work``: where a set that is being made stands."""
        runtime = config.runtime  # the splits of a graph share their encodings
        shared = runtime.cache_folder or self.folder.out
        with place(dataclasses.replace(config, runtime=dataclasses.replace(runtime, cache_folder=shared))) as where:
            self.tell = Callbacks([*self._own, *where.callbacks])
            encoder, plan = where.encoder(), preflight.check_memory(tag, config, EvaluateConfig())
            threads = Checkpoint(work, {}).threads if work else 0
            yield where.pool(tag, encoder, plan, threads), encoder

    def _prepared(self, data: str, spec: dict[str, Any], seed: int, encoder: str) -> PreparedTag:
        if spec["prepared"]:
            return PreparedTag(spec["prepared"])
        path = self._graph(data, seed)
        name = api_name() if data == EMBEDDED else data
        wanted = spec | {"name": name, "encoder": encoder}
        said = f"{path}.json"
        saved = storage.read_json(said) if storage.exists(said) else {}
        if data != EMBEDDED:  # a table that is gone is as it was
            uris = [uri for uri in (spec["nodes"], spec["edges"]) if uri]
            then = saved.get("stamps", ())
            wanted["stamps"] = [storage.stamp(uri) or was for uri, was in itertools.zip_longest(uris, then) if uri]
        if saved == json.loads(json.dumps(wanted)) and storage.exists(storage.join(path, "META.json")):
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

    def _encode_afresh(self, pool: ShardPool, encoder: Encoder, seed: int = 0) -> None:
        encoder.reset_adapters(seed)
        pool.encode(encoder.adapters(), lambda done, total: self.tell.progress("encode", done, total, {}))


def _same(path: str, saved: Record, now: Record) -> None:
    if changed := differences(saved, now):
        raise ConfigError(f"{path} was made with other settings ({'; '.join(changed)}); choose another --out")


def plan_encoder(plan: Plan) -> str:
    """The one encoder whose tokenizer prepares the graphs. Raises ConfigError if the methods want several."""
    names = {plan.settings.encoder.name} | {method.config.encoder.name for method in plan.methods}
    if len(names) > 1:
        raise ConfigError(
            f"the plan names the encoders {', '.join(sorted(names))}, and all that is compared, the reference "
            "too, needs one: name it as encoder.name under `settings:` and leave it out of the methods"
        )
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
