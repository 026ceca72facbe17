"""The commands `distill` and `evaluate`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from talk_dist.commands import preflight, report
from talk_dist.commands.call import EMBEDDED, Call, api_name, given, without
from talk_dist.commands.folder import ARTIFACT, PREPARED, RunFolder, beside
from talk_dist.commands.place import Place, place
from talk_dist.config import DistillConfig
from talk_dist.data import storage, tables
from talk_dist.data.prepare import prepare
from talk_dist.data.python_api import build_python_api
from talk_dist.data.tag import PreparedTag
from talk_dist.distill import distill
from talk_dist.errors import ConfigError, DataError, TalkDistError
from talk_dist.evaluate import EvaluateConfig, as_metrics, evaluate, table
from talk_dist.models.protocol import Encoder
from talk_dist.resources import ClusterConfig, RuntimeConfig
from talk_dist.runtime.callbacks import Callback, Callbacks, JsonLines, ProgressLines
from talk_dist.runtime.checkpoint import Checkpoint, DistillState, Standing
from talk_dist.runtime.pool import ShardPool
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.decode import readings
from talk_dist.synthetic.plot import plot

EVALUATION, PICTURE, CHECKPOINT = "evaluation.md", "run.png", "checkpoint.safetensors"


@dataclass(frozen=True)
class Distill:
    """Distil a prepared graph, or the embedded one, into a synthetic graph."""

    data: str = EMBEDDED
    """Folder of a prepared graph, or `python-api`: the API of this interpreter's standard library."""
    out: str = "runs/python-api"
    """Folder of the run, on any pyarrow.fs path: checkpoint, log, the artifact `synthetic/`, and the evaluation."""
    preset: Literal["default", "paper"] = "default"
    """Settings to start from. paper: TaLK (arXiv 2606.22975) to the letter."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on with the same run from where it was; `never` starts over."""
    evaluate: bool = False
    """Afterwards train fresh students on the result and on its rivals, as `evaluation` says, and compare."""

    def run(self, call: Call, config: DistillConfig, evaluation: EvaluateConfig) -> None:
        folder = RunFolder(self.out)
        with folder.alone(), place(config) as where:
            self._run(call, folder, where, config, evaluation)

    def _run(
        self, call: Call, folder: RunFolder, where: Place, config: DistillConfig, evaluation: EvaluateConfig
    ) -> None:
        lines = ProgressLines()
        tag, encoder, plan = preflight.check(
            config,
            evaluation if self.evaluate else None,
            folder,
            where.encoder,
            lambda encoder: self._open(folder, encoder, config, lines),
        )
        path, resume = folder.path(CHECKPOINT), self.resume == "auto"
        pool = where.pool(tag, encoder, plan, Checkpoint(path, {}, resume).threads)
        checkpoint = Checkpoint(path, identity(tag, encoder, config), resume, folder.guard)
        checkpoint.load()  # refuses the state of another run, before this one takes the folder from anybody
        folder.claim()
        saved = checkpoint.load()
        call.stop.advice = lambda: self._advice(call, checkpoint)
        history = saved.history if isinstance(saved, DistillState) else ()
        log = JsonLines(folder.path("log.jsonl"), history, folder.guard)
        log.write()
        if saved:
            print(f"going on with what {path} holds: {_held(saved)}")
        call.lap("prepare")
        synthetic = distill(pool, encoder, config, [call.stop, lines, log, *where.callbacks], checkpoint)
        about = {"command": call.command, "readings": readings(synthetic, encoder)}
        synthetic = replace(synthetic, config=synthetic.config | about)
        artifact = folder.path(ARTIFACT)
        if not synthetic.stored_at(artifact):  # a finished run, again: what it was found to be worth stays
            folder.remove(EVALUATION, PICTURE)
            synthetic.save_pretrained(artifact)
        call.lap("distill")
        if self.evaluate:
            tell = Callbacks([call.stop, lines, *where.callbacks])
            _evaluate(call, tell, pool, encoder, synthetic, config, evaluation, artifact, folder)
            return
        print(f"{len(synthetic)} synthetic nodes, {synthetic.num_bytes():,} bytes: {artifact}")
        print(f"evaluate them: talk-dist evaluate {shlex.quote(self.out)} --data {shlex.quote(tag.path)}")

    def _advice(self, call: Call, checkpoint: Checkpoint) -> str:
        try:
            saved = Checkpoint(checkpoint.path, checkpoint.identity).load()
        except (TalkDistError, OSError):  # of another run, which `--resume never` was about to replace, or out of reach
            saved = None
        done = f"{checkpoint.path} holds {_held(saved)}" if saved else "Nothing is saved yet"
        again = ["talk-dist", *(without(call.arguments, "resume") if saved else call.arguments)]
        again += ["--resume", "auto"] if saved and self.resume == "never" else []  # a file of settings may say it too
        return f"{done}; go on with:\n  {shlex.join(again)}"

    def _open(
        self, run: RunFolder, encoder: Encoder | None, config: DistillConfig, lines: Callback
    ) -> PreparedTag | None:
        if self.data != EMBEDDED:
            return PreparedTag(self.data)
        if encoder is None:
            return None
        folder, hops = run.path(PREPARED), max(1, config.kernel.rounds - 1)
        if storage.exists(storage.join(folder, "META.json")):
            tag = PreparedTag(folder)
            made = tag.meta["tokenizer"]["fingerprint"], tag.meta["name"]
            if made == (encoder.tokenizer.fingerprint, api_name()) and tag.meta["partition"]["halo_hops"] >= hops:
                return tag
            if self.resume == "auto" and any(map(storage.exists, (run.path(CHECKPOINT), run.path(ARTIFACT)))):
                raise ConfigError(
                    f"--out {self.out}: holds a run on another graph ({tag.meta['name']}, for another encoder or fewer "
                    "hops of halo); choose another --out, or pass --resume never to replace it"
                )
        run.claim()  # another run there may be reading the graph that is replaced
        print("reading the standard library's own documentation into a graph")
        source = tables.from_arrow(*build_python_api())
        return prepare(
            source,
            folder,
            encoder=config.encoder.name,
            max_tokens=min(128, encoder.tokenizer.max_length),
            halo_hops=hops,
            name=api_name(),
            progress=lambda done, total: lines.progress("prepare", done, total, {}),
        )


@dataclass(frozen=True)
class Evaluate:
    """Train fresh students on an artifact, and on what it is compared with, and score them on the real graph."""

    artifact: str = ""
    """Folder of an artifact, or of the run that made it."""
    data: str = ""
    """Folder of the prepared graph; empty: the `prepared/` beside the artifact."""
    force: bool = False
    """Evaluate on a graph that is not the one the artifact was made from."""
    adapters: Literal["as-distilled", "true", "false"] = "as-distilled"
    """Whether the students' encoders train LoRA adapters too. The table goes into the artifact either way."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Where the shards are. Threads and the cache of encodings, if left open, are those of the distillation."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """With `--runtime ray`: which cluster, and what of it."""

    def run(self, call: Call, evaluation: EvaluateConfig) -> None:
        path = preflight.artifact_path(given(self.artifact, "an artifact"))
        near = beside(path, PREPARED)
        if not self.data and not storage.exists(near):
            raise ConfigError("--data: give the folder of the prepared graph that the artifact was made from")
        synthetic, tag = SyntheticTAG.from_pretrained(path), PreparedTag(self.data or near)
        storage.check_writable(beside(path, ""))  # the table goes into the artifact, which is published anew
        config = preflight.distilled_with(synthetic, path)
        runtime, then = self.runtime, config.runtime
        runtime = replace(
            runtime,
            threads=runtime.threads or then.threads,
            cache=runtime.cache and then.cache,
            cache_folder=runtime.cache_folder or then.cache_folder,
        )
        config = replace(config, runtime=runtime, cluster=self.cluster)
        if self.adapters != "as-distilled":
            config = replace(config, encoder=replace(config.encoder, adapters=self.adapters == "true"))
        with place(config) as where:
            encoder, plan = preflight.check_evaluation(
                synthetic, path, tag, config, evaluation, self.force, where.encoder
            )
            pool = where.pool(tag, encoder, plan)
            call.lap("prepare")
            tell = Callbacks([call.stop, ProgressLines(), *where.callbacks])
            _evaluate(call, tell, pool, encoder, synthetic, config, evaluation, path, None)


def identity(tag: PreparedTag, encoder: Encoder, config: DistillConfig) -> dict[str, Any]:
    """All that decides the bits of a run: it can only be resumed where all this is the same."""
    here = {"data hash": tag.meta["hash"], "threads": torch.get_num_threads()}
    return config.deciding() | here | {"weights, precision or device": encoder.fingerprint}


def _evaluate(
    call: Call,
    tell: Callbacks,
    pool: ShardPool,
    encoder: Encoder,
    synthetic: SyntheticTAG,
    config: DistillConfig,
    evaluation: EvaluateConfig,
    path: str,
    folder: RunFolder | None,
) -> None:
    """Evaluate, write the table into the artifact at ``path`` and, with a picture, beside it: into ``folder``, or where
    those of an earlier evaluation lie. Print it."""
    seen = storage.stamp(path)
    rows = evaluate(pool, encoder, synthetic, config, evaluation, tell.progress)
    call.lap("evaluate")
    took = ", ".join(f"{name} {value:.0f}" for name, value in call.seconds.items())
    about = {
        "command": call.command,
        "adapters": config.encoder.adapters,
        "machine": report.machine(),
        "seconds": call.seconds,
    }
    metrics = synthetic.metrics | {"evaluation": as_metrics(rows, evaluation) | about}
    synthetic = replace(synthetic, metrics=metrics)
    sentence = report.summary(rows, synthetic, evaluation, config.encoder.adapters)
    print(table(rows), "", sentence, "", sep="\n", flush=True)  # whatever becomes of the artifact
    if folder is not None:
        folder.guard()
    if storage.stamp(path) != seen:
        raise DataError(path, "was replaced while it was evaluated; this table is not kept there: evaluate it again")
    synthetic.save_pretrained(path)
    print(f"artifact    {path}")
    if folder is not None or storage.exists(beside(path, EVALUATION)):
        text = report.evaluation(rows, synthetic, evaluation, config.encoder.adapters, call.command, took)
        storage.write_atomic(beside(path, EVALUATION), text.encode())
        print(f"evaluation  {beside(path, EVALUATION)}")
        drawn = plot(synthetic.metrics, str(synthetic.config["dataset"]), beside(path, PICTURE))
        print(f"picture     {drawn}")
    print(f"seconds     {took}")


def _held(saved: DistillState | Standing) -> str:
    """What was saved, counted as `outer.epochs` counts: the first that finishes is the start itself."""
    if isinstance(saved, Standing):
        return "a part of the start"
    if saved.epoch < 2:
        return "the start" if saved.epoch else "the start, not yet validated"
    return f"the start and {saved.epoch - 1} epoch{'s' if saved.epoch > 2 else ''}"
