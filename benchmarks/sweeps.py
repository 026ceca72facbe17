"""Sweeps on a real graph: killed and gone on with, and one way to search beside another.

    python benchmarks/sweeps.py kills PREPARED --kills 5 --trials 20 --out benchmarks/results/sweep-kills.md
    python benchmarks/sweeps.py search TPE_FOLDER RANDOM_FOLDER --out benchmarks/results/sweep-search.md
    python benchmarks/sweeps.py fidelity RANDOM_FOLDER PREPARED --out benchmarks/results/sweep-fidelity.md
    python benchmarks/sweeps.py memory PREPARED --trials 60 --out benchmarks/results/sweep-memory.md

`kills` runs `talk-dist tune` once undisturbed and once with SIGKILLs of the driver at random times, each followed by
`--resume`, and compares the tables of trials. `search` reads finished sweeps of as many trials each: what each found,
and how soon it had what the last one found at last. `fidelity` repeats stage one of the completed trials of a sweep
without halving: how well does what is known then order the trials by what they reach at last? `memory` watches the
processes of a sweep. Other settings of `kills` and `memory` are handed on to `talk-dist tune`.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import rig
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from scipy.stats import spearmanr

from talk_dist import LocalPool, PreparedTag, TextEncoder, preset
from talk_dist.runtime.teacher import RealSide
from talk_dist.synthetic.init import initialise
from tuning.findings import CLOCK
from tuning.space import configured
from tuning.study import CONFIRMS

TUNE = [sys.executable, "-m", "talk_dist", "tune"]


def trials(folder: Path) -> list[dict[str, Any]]:
    """The table of trials without what depends on the clock."""
    rows: list[dict[str, Any]] = pq.read_table(folder / "trials.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def kills(arguments: argparse.Namespace, more: list[str]) -> None:
    dice, log = random.Random(arguments.seed), list[list[str]]()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        start = [*TUNE, "--data", arguments.data, "--out", name, "--trials", str(arguments.trials), *more]
        began = time.monotonic()
        subprocess.run([*start, "--name", "whole"], check=True, stdout=subprocess.DEVNULL)
        alone, began = time.monotonic() - began, time.monotonic()
        print(f"undisturbed: {alone:.0f} s", flush=True)
        command = [*start, "--name", "killed"]
        while True:
            driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            try:
                wait = None if len(log) == arguments.kills else dice.uniform(0.1, 2 * alone / (arguments.kills + 1))
                text = driver.communicate(timeout=wait)[0].decode()
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGKILL)
                text = driver.communicate()[0].decode()
                done = sum(line.startswith("trial ") for line in text.splitlines())
                log.append([str(len(log) + 1), f"{time.monotonic() - began:.1f}", str(done)])
                print("kill", *log[-1], flush=True)
                begun = (scratch / "killed" / "command.json").exists()
                command = [*TUNE, "--out", name, "--resume", "killed"] if begun else command
                continue
            if driver.returncode:
                raise SystemExit(text)
            break
        whole, killed = trials(scratch / "whole"), trials(scratch / "killed")
    wrong = [f"trial {a['number']}: {a} / {b}" for a, b in zip(whole, killed, strict=True) if a != b]
    facts = [
        ["graph", Path(arguments.data).name],
        ["trials", str(len(whole))],
        ["of these completed", str(sum(row["state"] == "complete" for row in whole))],
        ["kills of the driver", str(len(log))],
        ["seconds, undisturbed and killed", f"{alone:.0f} and {time.monotonic() - began:.0f}"],
        ["trials that differ (state, settings, accuracies, epochs, ridge, bytes)", str(len(wrong))],
    ]
    text = "SIGKILL of the driver at random times, then `--resume`. `trials told`: lines that this start had printed."
    table = rig.table(["kill", "second", "trials told"], log)
    flags = f"--kills {arguments.kills} --trials {arguments.trials} --seed {arguments.seed}"
    command_line = " ".join(["python benchmarks/sweeps.py kills", Path(arguments.data).name, flags, *more])
    rig.report(
        arguments.out, "A sweep killed and gone on with", [rig.table(["", " "], facts), text, table], command_line
    )
    if wrong or len(log) < arguments.kills:
        raise SystemExit("\n".join(wrong) or f"only {len(log)} kills")


def memory(arguments: argparse.Namespace, more: list[str]) -> None:
    """Resident memory of the driver and of the process of the trials, at the end of each trial."""
    with tempfile.TemporaryDirectory() as name:
        command = [*TUNE, "--data", arguments.data, "--out", name, "--trials", str(arguments.trials), *more]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert driver.stdout is not None
        seen: list[tuple[int, int]] = []
        for line in driver.stdout:
            if line.startswith("trial "):
                time.sleep(0.3)  # what the trial held has been given back
                held = sum(rig.resident(pid, "VmRSS") for pid in rig.workers(("ray::ImplicitFunc",)))
                seen.append((rig.resident(driver.pid, "VmRSS"), held))
        if driver.wait():
            raise SystemExit(driver.returncode)
    seen = seen[:-1]  # the last trial ends with its process
    tenths = range(0, len(seen), max(1, len(seen) // 10))
    rows = [[str(i + 1), f"{seen[i][0] / 2**20:.0f}", f"{seen[i][1] / 2**20:.0f}"] for i in tenths]
    later = seen[len(seen) // 4 :]
    slopes = [float(np.polyfit(range(len(later)), [s[i] for s in later], 1)[0]) / 2**20 for i in (0, 1)]
    text = "After the first quarter, by least squares: "
    text += f"{slopes[0]:+.2f} MiB a trial in the driver, {slopes[1]:+.2f} in the trials' process."
    trials = ["--trials", str(arguments.trials)]
    command_line = " ".join(["python benchmarks/sweeps.py memory", Path(arguments.data).name, *trials, *more])
    blocks = [rig.table(["trial", "driver, MiB", "trials' process, MiB"], rows), text]
    rig.report(arguments.out, f"Memory over {len(seen)} trials", blocks, command_line)


def studied(folder: Path) -> list[FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=None, storage=storage).trials


def progress(folder: Path) -> list[tuple[float, float]]:
    """(CPU seconds of all trials so far, validation accuracy) of the completed trials, in the order they ended, without
    the first, which both searches begin with, and the repetitions."""
    ended = [trial for trial in studied(folder) if trial.datetime_complete and CONFIRMS not in trial.user_attrs]
    ended.sort(key=lambda trial: str(trial.datetime_complete))
    spent, path = 0.0, []
    for trial in ended:
        spent += float(trial.user_attrs.get("cpu_seconds", 0.0))
        if trial.state.name == "COMPLETE" and trial.number:
            path.append((spent, float(trial.user_attrs["accuracy"])))
    return path


def search(arguments: argparse.Namespace, more: list[str]) -> None:
    folders = [Path(folder) for folder in arguments.folders]
    goal = max(accuracy for _, accuracy in progress(folders[-1]))
    rows = []
    for folder in folders:
        path = progress(folder)
        states = [t.state.name for t in studied(folder) if CONFIRMS not in t.user_attrs]
        reached = next((seconds for seconds, accuracy in path if accuracy >= goal), None)
        facts = [folder.name, str(len(states)), str(states.count("PRUNED")), f"{max(a for _, a in path):.4f}"]
        rows.append([*facts, f"{path[-1][0]:.0f}", "never" if reached is None else f"{reached:.0f}"])
    header = ["sweep", "trials", "stopped early", "best validation accuracy", "CPU s", f"CPU s to {goal:.4f}"]
    text = f"Without trial 0, the preset, with which both begin ({first(folders[0]):.4f}). {goal:.4f} is the best that "
    text += f"{folders[-1].name} found at last. CPU seconds of the trials' process: what else the machine did counts "
    text += "little."
    command_line = " ".join(["python benchmarks/sweeps.py search", *(folder.name for folder in folders)])
    rig.report(arguments.out, "One way to search beside another", [rig.table(header, rows), text], command_line)


def first(folder: Path) -> float:
    return float(studied(folder)[0].user_attrs["accuracy"])


def fidelity(arguments: argparse.Namespace, more: list[str]) -> None:
    folder, tag = Path(arguments.folder), PreparedTag(arguments.data)
    encoder = TextEncoder(preset().encoder)
    known: list[list[float]] = []
    last: dict[str, float] = {}

    def note(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        last.update(metrics)

    for trial in studied(folder):
        if trial.state.name != "COMPLETE" or trial.params["synthetic.init"] != "two-stage":
            continue
        settings = {**trial.params, "kernel.ridge": trial.user_attrs["ridge"], "two_stage.token_steps": 0}
        config = configured(preset(), settings)
        pool = LocalPool(tag, encoder, config.kernel, config.runtime)
        real = RealSide(pool, config)
        real.encode(encoder, note)
        initialise(real, encoder, config, note)
        validations = [trial.intermediate_values[step] for step in (1, 2)]
        known.append([last["krr_val"], last["val"], *validations, float(trial.user_attrs["accuracy"])])
        print(trial.number, known[-1], flush=True)
    names = ["kernel predictor after stage one", "students after stage one", "first validation", "second validation"]
    columns = list(zip(*known, strict=True))
    shown = [[name, f"{spearmanr(columns[i], columns[-1]).statistic:.2f}"] for i, name in enumerate(names)]
    text = f"Rank correlation (Spearman) with the final validation accuracy of {len(known)} trials that began in two "
    text += "stages, drawn at random, none stopped early. All of them are validation accuracies."
    blocks = [rig.table(["known", "correlation"], shown), text]
    command_line = f"python benchmarks/sweeps.py fidelity {folder.name} {Path(arguments.data).name}"
    rig.report(arguments.out, "What an early look is worth", blocks, command_line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    killing = commands.add_parser("kills")
    killing.add_argument("data")
    killing.add_argument("--kills", type=int, default=5)
    killing.add_argument("--trials", type=int, default=20)
    killing.add_argument("--seed", type=int, default=0)
    killing.set_defaults(run=kills)
    searching = commands.add_parser("search")
    searching.add_argument("folders", nargs="+")
    searching.set_defaults(run=search)
    looking = commands.add_parser("fidelity")
    looking.add_argument("folder")
    looking.add_argument("data")
    looking.set_defaults(run=fidelity)
    growing = commands.add_parser("memory")
    growing.add_argument("data")
    growing.add_argument("--trials", type=int, default=60)
    growing.set_defaults(run=memory)
    for command in (killing, searching, looking, growing):
        command.add_argument("--out", type=Path)
    arguments, more = parser.parse_known_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments.run(arguments, more)


if __name__ == "__main__":
    main()
