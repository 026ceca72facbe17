"""The command `tune`: the only door from here to `tuning`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import yaml

from talk_dist.commands import preflight
from talk_dist.commands.call import Call, without
from talk_dist.commands.folder import RunFolder
from talk_dist.commands.place import place, refuse_workers_here
from talk_dist.commands.settings import Command, read
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import load_encoder
from talk_dist.presets import preset
from talk_dist.runtime.callbacks import ProgressLines
from talk_dist.runtime.estimate import Plan

WORDS, SPACE = "command.json", "space.yaml"


@dataclass(frozen=True)
class Tune:
    """Search good settings for a graph. Start it again, whatever ended it, and it goes on: `--resume NAME`."""

    data: str = ""
    """Folder of a prepared graph."""
    out: str = "runs/tune"
    """Where sweeps live, each in a folder of its name."""
    name: str = "sweep"
    """Name of the sweep."""
    resume: str = ""
    """Go on with the sweep of this name, with the settings it was started with."""
    preset: Literal["default", "paper"] = "default"
    """Settings that the space does not touch."""
    space: str = ""
    """YAML that narrows, fixes, extends or drops parameters of the default space."""
    trials: int = 40
    """Trials in all."""
    concurrent: int = 1
    """Trials at once. With one, a sweep that was killed and goes on ends as if it had not been."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How the next trial is chosen."""
    halving: bool = True
    """Stop a trial early that is in the worse half at a rung: by the validation accuracy of students on the encodings
    of stage one, then on the synthetic set after 2, 4, 8, … validations."""
    objectives: tuple[Literal["accuracy", "seconds", "bytes"], ...] = ("accuracy",)
    """What is searched for. With several, the search spreads over their Pareto front and stops no trial early."""
    ladder: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 0.1)
    """Ridges among which each trial chooses by itself, at no cost; empty (`[]`) searches kernel.ridge by trials."""
    students: int = 3
    """Fresh students whose mean validation accuracy a finished trial is worth."""
    confirm: int = 3
    """So many of the best trials, and the first, are repeated from two other seeds; the best is chosen by that (0: by
    the search alone, which flatters it)."""
    storage: str = ""
    """URL of a data base for the study (sqlite:///…, postgresql://…); empty: a journal file in the sweep's folder."""
    cpus: float = 0.0
    """Cores of a trial's own process (0: an equal share of them; none with `--runtime ray`, where actors work)."""
    gpus: float = 0.0
    """GPUs of a trial's own process."""

    def __post_init__(self) -> None:
        if min(self.trials, self.concurrent, self.students) < 1:
            counts = f"trials = {self.trials}, concurrent = {self.concurrent}, students = {self.students}"
            raise ConfigError(f"{counts}: at least 1 of each")
        if min(self.cpus, self.gpus, self.confirm) < 0:
            raise ConfigError(f"cpus = {self.cpus}, gpus = {self.gpus}, confirm = {self.confirm}: not negative")
        if "accuracy" not in self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"objectives = {list(self.objectives)}: accuracy, and each once")
        if any(ridge <= 0 for ridge in self.ladder):
            raise ConfigError(f"ladder = {list(self.ladder)}: ridges above 0")

    def run(self, call: Call, config: DistillConfig) -> None:
        if self.resume:
            path = storage.join(self.out, self.resume, WORDS)
            if not storage.exists(path):
                raise ConfigError(f"--resume {self.resume}: {path} is not there; the sweep was never started in --out")
            now, kept = call.arguments[1:], storage.join(self.out, self.resume, SPACE)
            words = without([*storage.read_json(path), *now], "out", "resume")  # what is given now counts
            if storage.exists(kept) and without(now, "space") == now:  # another is refused by the study
                words = [*without(words, "space"), "--space", kept]
            words += ["--out", self.out]
            options, saved, _ = read(COMMAND, words)
            if options.name != self.resume:
                reason = f"its settings are those of {options.name!r}; give the folder that name again"
                raise ConfigError(f"--resume {self.resume}: {reason}, or leave --name out")
            return options.run(Call(["tune", *words], call.stop), saved)
        if storage.HIDDEN in self.storage:
            raise ConfigError(f"--storage {self.storage}: its password was not written down; give --storage again")
        if not self.data:
            raise ConfigError("--data: give the folder of a prepared graph; `talk-dist prepare` makes one")
        if "://" in self.out and not self.storage:
            raise ConfigError(f"--out {self.out}: a journal needs a local folder; give a data base with --storage")
        folder = RunFolder(storage.join(self.out, self.name))
        with folder.alone():
            folder.check()
            self._run(call, config, folder)

    def _run(self, call: Call, config: DistillConfig, folder: RunFolder) -> None:
        try:
            from cluster.pool import everywhere
            from cluster.session import open_session
            from tuning import report
            from tuning.space import configured, point_of, read_space
            from tuning.study import Strategy, open_study
            from tuning.sweep import SweepSpec, reserved, run_sweep
        except ModuleNotFoundError as error:
            if error.name not in ("ray", "optuna", "pandas"):
                raise
            raise ConfigError(f'tune: {error.name} is not installed; pip install "talk-dist[tune]"') from error
        tag = PreparedTag(everywhere(self.data))
        own = self._tree()
        ladder = () if "kernel.ridge" in own else self.ladder  # what the space says of it counts
        tree = {"kernel.ridge": None} if ladder else {}
        space, fixed = read_space(tree | own, config)
        base = configured(config, fixed)
        runtime = base.runtime
        runtime = replace(
            runtime, cache_folder=storage.absolute(runtime.cache_folder), scratch=storage.absolute(runtime.scratch)
        )  # a trial stands in a folder of its own
        base = replace(base, encoder=replace(base.encoder, name=everywhere(base.encoder.name)), runtime=runtime)
        refuse_workers_here(base)
        ends = [configured(base, {parameter.key: value}) for parameter in space for value in parameter.ends]
        self._check(tag, [base, *ends])
        identity = base.deciding() | {
            "data hash": tag.meta["hash"],
            "space": {parameter.key: parameter.words for parameter in space},
            "ladder": ladder,
            "students": self.students,
        }
        strategy = Strategy(self.sampler, base.seed, self.objectives, self.halving)
        journal = self.storage or folder.path("study.journal")
        study = open_study(journal, self.name, identity, space, base, strategy)
        folder.claim()
        words = [self._told(word) for word in call.arguments[1:]]
        storage.write_atomic(folder.path(WORDS), storage.to_json(words))
        if own:
            storage.write_atomic(folder.path(SPACE), yaml.safe_dump(own, sort_keys=False).encode())
        again = shlex.join(["talk-dist", "tune", "--out", self.out, "--resume", self.name])
        call.stop.advice = lambda: f"{len(study.ended)} trials are done; go on with:\n  {again}"
        presets = [
            {"kernel.ridge": (start if ladder else base).kernel.ridge, **point_of(space, start, base)}
            for start in (base, preset())
        ]
        presets = presets[:1] if presets[0] == presets[1] else presets
        study.enqueue(presets[: self.trials])
        with open_session(base) as session:
            plan = preflight.planned(tag, base, None)
            placed, bundles = reserved(session, tag, base, plan, self.concurrent, self.cpus, self.gpus)
            if not base.encoder.adapters and base.runtime.cache:
                _warm(tag, placed, plan)
            out = everywhere(folder.out)
            same = {name: getattr(self, name) for name in ("trials", "concurrent", "students", "confirm")}
            spec = SweepSpec(tag.path, out, placed, bundles=bundles, ladder=ladder, guard=folder.guard, **same)
            run_sweep(study, spec)
        folder.guard()
        found = report.write(study, base, folder.out, self._told(call.command))
        if found.best is None:
            reasons = {str(trial.user_attrs.get("reason")) for trial in study.ended}
            raise ConfigError(f"all {len(study.ended)} trials failed: {'; '.join(sorted(reasons))}")
        best = folder.path("best.yaml")
        print(f"best        validation accuracy {report.words(study, found.best)}")
        words = ["--data", self.data, "--config", best, "--out", folder.path("best"), "--evaluate", "true"]
        print(f"settings    {best}: {shlex.join(['talk-dist', 'distill', *words])}")
        print(f"report      {folder.path('report.html')}")

    def _told(self, words: str) -> str:
        """``words`` as they may be written down: without the password of ``storage``."""
        return words.replace(self.storage, storage.without_secrets(self.storage)) if self.storage else words

    def _check(self, tag: PreparedTag, configs: Sequence[DistillConfig]) -> None:
        """Raises one error that lists every value of the space with which the graph cannot be distilled."""
        problems = preflight.Problems()
        base = configs[0]
        encoder = None if base.deepspeed.workers else problems.attempt(lambda: load_encoder(base.encoder))
        for config in configs:
            preflight.check_tag(tag, config, ("val",), problems)
            if encoder is not None:
                preflight.check_encoder(encoder, config.synthetic.tokens, tag, problems)
        problems.errors = list({str(error): error for error in problems.errors}.values())
        problems.done()

    def _tree(self) -> dict[str, Any]:
        if not self.space:
            return {}
        try:
            tree = yaml.safe_load(storage.read_bytes(self.space)) or {}
        except (yaml.YAMLError, OSError) as error:
            raise ConfigError(f"--space {self.space}: is not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"--space {self.space}: must map settings to ranges, choices or values")
        return tree


def _warm(tag: PreparedTag, base: DistillConfig, plan: Plan) -> None:
    """A frozen encoder's encodings, once for all trials: they find them beside the graph."""
    with place(base) as where:
        pool = where.pool(tag, where.encoder(), plan)
        pool.encode({}, partial(ProgressLines().progress, "encode", metrics={}))


COMMAND = Command("tune", "search good settings for a graph", Tune, distill=True)
