"""The command `tune`: the only door from here to `tuning`."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from talk_dist.commands import preflight
from talk_dist.commands.call import Call
from talk_dist.commands.settings import Command, read
from talk_dist.config import DistillConfig, preset
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import ConfigError
from talk_dist.models.encoder import load_encoder
from talk_dist.runtime.pool import LocalPool

WORDS = "command.json"


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
    preset: Literal["default", "quick", "paper"] = "default"
    """Settings that the space does not touch."""
    space: str = ""
    """YAML that narrows, fixes, extends or drops parameters of the default space."""
    trials: int = 40
    """Trials in all."""
    concurrent: int = 1
    """Trials at once. With one, a sweep that was killed and goes on ends as if it had not been."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How the next trial is chosen."""
    ladder: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
    """Ridges among which each trial chooses by itself, at no cost; empty (`[]`) searches kernel.ridge by trials."""
    storage: str = ""
    """URL of a data base for the study (sqlite:///…, postgresql://…); empty: a journal file in the sweep's folder."""
    cpus: float = 1.0
    """Cores of a trial."""
    gpus: float = 0.0
    """GPUs of a trial."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.concurrent < 1:
            raise ConfigError(f"trials = {self.trials}, concurrent = {self.concurrent}: at least 1 of each")

    def run(self, call: Call, config: DistillConfig) -> None:
        if self.resume:
            path = storage.join(self.out, self.resume, WORDS)
            if not storage.exists(path):
                raise ConfigError(f"--resume {self.resume}: {path} is not there; the sweep was never started in --out")
            options, saved, _ = read(COMMAND, storage.read_json(path))
            options._run(Call(["tune", *storage.read_json(path)], call.stop), saved)
            return
        self._run(call, config)

    def _run(self, call: Call, config: DistillConfig) -> None:
        try:
            from cluster.session import open_session
            from tuning import report
            from tuning.space import configured, point_of, read_space
            from tuning.study import open_study
            from tuning.sweep import SweepSpec, run_sweep
        except ModuleNotFoundError as error:
            if error.name not in ("ray", "optuna", "pandas"):
                raise
            raise ConfigError(f'tune: {error.name} is not installed; pip install "talk-dist[tune]"') from error
        if not self.data:
            raise ConfigError("--data: give the folder of a prepared graph; `talk-dist prepare` makes one")
        tag, folder = PreparedTag(self.data), storage.join(self.out, self.name)
        tree = {} if not self.ladder else {"kernel.ridge": None}
        space, fixed = read_space(tree | self._tree(), config)
        base = configured(config, fixed)
        problems = preflight.Problems()
        for hops in next((p.choices for p in space if p.key == "kernel.hops"), (base.kernel.hops,)):
            preflight.check_tag(tag, configured(base, {"kernel.hops": hops}), ("val",), problems)
        problems.done()
        settings = {name: value for name, value in base.to_dict().items() if name not in ("runtime", "cluster")}
        identity = settings | {
            "data hash": tag.meta["hash"],
            "space": [dataclasses.asdict(parameter) for parameter in space],
            "sampler": self.sampler,
            "ladder": self.ladder,
        }
        place = self.storage or storage.join(folder, "study.journal")
        study = open_study(place, self.name, identity, space, base, self.sampler, base.seed)
        storage.write_atomic(storage.join(folder, WORDS), storage.to_json(call.arguments[1:]))
        presets = [point_of(space, base), point_of(space, preset("default"))]
        study.enqueue(presets[:1] if presets[0] == presets[1] else presets)
        again = shlex.join(["talk-dist", "tune", "--out", self.out, "--resume", self.name])
        call.stop.advice = lambda: f"Go on with:\n  {again}"
        spec = SweepSpec(
            self.data, folder, base, self.trials, self.concurrent, self.cpus, self.gpus, tuple(self.ladder)
        )
        with open_session(base):
            if not base.encoder.adapters and base.runtime.kind == "local":
                self._warm(tag, base)
            run_sweep(study, spec)
        found = report.write(study, base, folder, call.command)
        if found.best is None:
            reasons = {str(trial.user_attrs.get("reason")) for trial in study.trials()}
            raise ConfigError("every trial failed: " + "; ".join(sorted(reasons)))
        print(f"best        {found.best.values[0]:.4f} validation accuracy, trial {found.best.number}")
        best = storage.join(folder, "best.yaml")
        print(f"settings    {best}: talk-dist distill --data {self.data} --config {best} --evaluate true")
        print(f"report      {storage.join(folder, 'report.html')}")

    def _tree(self) -> dict[str, Any]:
        if not self.space:
            return {}
        try:
            tree = yaml.safe_load(storage.read_bytes(self.space)) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"--space {self.space}: is not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"--space {self.space}: must map settings to ranges, choices or values")
        return tree

    def _warm(self, tag: PreparedTag, base: DistillConfig) -> None:
        """A frozen encoder's encodings, once for all trials: they find them beside the graph."""
        LocalPool(tag, load_encoder(base.encoder), base.kernel, base.runtime).encode({})


COMMAND = Command("tune", "search good settings for a graph", Tune, distill=True)
