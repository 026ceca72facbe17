"""The whole of it on a real Ray: the command line, killed and gone on with, and what it leaves behind."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from talk_dist.cli import main
from tuning import sweep
from tuning.findings import CLOCK


def trials(folder):
    """What is known of every trial, without what a clock says."""
    rows = pq.read_table(Path(folder, "trials.parquet")).drop_columns(list(CLOCK)).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@pytest.fixture(scope="module")
def whole(one_ray, tags, words, tmp_path_factory):
    """The trials of an undisturbed sweep of six, and of what it repeated."""
    out = tmp_path_factory.mktemp("whole")
    assert main(words(tags[2].path, out, trials=6, name="s", confirm=1)) == 0
    return trials(out / "s")


def test_a_sweep_leaves_what_it_says(one_ray, graph, prepare_graph, words, told, tmp_path):
    tag, folder = prepare_graph(graph, parts=2), tmp_path / "sweep"
    out, _ = told(*words(tag.path, tmp_path, trials=8))
    rows = trials(folder)
    assert [row["number"] for row in rows] == list(range(8))
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    assert len(re.findall(r"^trial \d", out, re.MULTILINE)) == 8
    assert "Ray" not in out  # nothing of Tune's own tables
    done = [row for row in rows if row["state"] == "complete"]
    best = max(done, key=lambda row: (row["accuracy"], -row["number"]))
    assert f"best        validation accuracy {best['accuracy']:.4f} (trial {best['number']})\n" in out

    first = rows[0]  # the settings that the sweep was started with, ridge and all
    assert (first["state"], first["ridge"], first["synthetic.tokens"]) == ("complete", 0.1, 4)
    assert best["accuracy"] >= first["accuracy"]

    told("distill", "--data", tag.path, "--config", folder / "best.yaml", "--out", tmp_path / "again")
    made = tmp_path / "again" / "synthetic" / "synthetic.safetensors"
    kept = folder / "trials" / f"{best['number']:05d}" / "synthetic" / "synthetic.safetensors"
    assert made.read_bytes() == kept.read_bytes()  # best.yaml is the trial, to the bit

    for name in ("history.png", "front.png", "slices.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert "http" not in re.sub(r"base64,[^']*", "", page)  # self-contained
    fronts = {int(path.stem) for path in (folder / "front").glob("*.yaml")}
    assert max(row["accuracy"] for row in rows if row["number"] in fronts) == best["accuracy"]

    backend = JournalFileBackend(str(folder / "study.journal"))
    theirs = optuna.load_study(study_name="sweep", storage=JournalStorage(backend))  # as optuna-dashboard reads it
    assert [trial.params.get("outer.lr") for trial in theirs.trials] == [row["outer.lr"] for row in rows]


def test_encodings_are_computed_once_for_all_sweeps(one_ray, graph, prepare_graph, words, told, tmp_path):
    tag = prepare_graph(graph, parts=2)
    told(*words(tag.path, tmp_path, trials=1, name="first"))
    stamps = {path.name: path.stat().st_mtime_ns for path in Path(tag.path, "encodings").glob("*.npy")}
    assert len(stamps) == 2  # a file a part
    told(*words(tag.path, tmp_path, trials=2, name="second", concurrent=2, objectives="[accuracy, bytes]"))
    assert stamps == {path.name: path.stat().st_mtime_ns for path in Path(tag.path, "encodings").glob("*.npy")}
    assert {row["state"] for row in trials(tmp_path / "second")} == {"complete"}


def test_stopped_and_killed_at_random_and_gone_on_with(one_ray, tags, words, whole, told, tmp_path):
    """What is finished stays, nothing is lost or runs twice. benchmarks/sweeps.py kills five times on a real graph."""
    line = words(tags[2].path, tmp_path, trials=6, name="s", confirm=1)
    completed = [f"{row['number']:05d}" for row in whole if row["state"] == "complete"]  # others may leave no folder
    for number, begun in zip((signal.SIGTERM, signal.SIGKILL), completed[1:], strict=False):
        command = [sys.executable, "-m", "talk_dist", *line]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "s" / "trials" / begun).exists():
            assert driver.poll() is None
            time.sleep(0.05)
        time.sleep(random.Random().uniform(0.0, 1.0))
        driver.send_signal(number)
        _, err = driver.communicate()
        line = ["tune", "--out", str(tmp_path), "--resume", "s"]
        if number == signal.SIGTERM:
            assert driver.returncode == 128 + number
            assert f"trials are done; go on with:\n  talk-dist {' '.join(line)}\n" in err
    told(*line)
    assert trials(tmp_path / "s") == whole


def test_more_trials_for_a_sweep_that_was_done(one_ray, tags, words, whole, told, tmp_path):
    line = words(tags[2].path, tmp_path, trials=3, name="s")
    space = line[line.index("--space") + 1] = shutil.copy(line[line.index("--space") + 1], tmp_path / "space.yaml")
    told(*line)
    assert trials(tmp_path / "s") == whole[:3]
    os.unlink(space)  # the sweep has kept it
    told("tune", f"--out={tmp_path}", "--resume", "s", "--trials", "6", "--confirm", "1")
    assert trials(tmp_path / "s") == whole


def test_trials_with_actors_say_the_same(one_ray, tags, words, whole, told, tmp_path):
    """A trial's shards live in what was reserved for it."""
    on_ray = ["--runtime.kind", "ray", "--cluster.actors", "1", "--cluster.cpus", "1"]
    told(*words(tags[2].path, tmp_path, *on_ray, trials=2, name="s"))
    assert trials(tmp_path / "s") == whole[:2]


def test_a_trial_that_fails_keeps_its_reason_and_the_sweep_goes_on(one_ray, tags, words, told, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("two_stage.feature_lr: [0.01, 1.0e+30, 2.0e+30, 3.0e+30]\nsynthetic.init: two-stage\n")
    out, _ = told(*words(tags[2].path, tmp_path, trials=4, name="s", sampler="random", space=space))
    rows = trials(tmp_path / "s")
    failed = [row for row in rows if row["state"] == "fail"]
    assert 0 < len(failed) < 4
    for row in failed:
        assert row["two_stage.feature_lr"] >= 1e30
        assert "is not positive definite" in row["reason"]
        assert f"trial {row['number']:<4} failed: {row['reason']}" in out


def test_a_sweep_in_which_all_fail_says_why(one_ray, tags, words, told, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("two_stage.feature_lr: 1.0e+30\nsynthetic.init: two-stage\n")
    _, err = told(*words(tags[2].path, tmp_path, trials=2, space=space), code=2)
    assert "talk-dist tune: all 2 trials failed: the kernel of the 6 synthetic nodes is not positive definite" in err


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_trial_whose_process_dies(one_ray, tags, words, whole, told, tmp_path, monkeypatch, deaths):
    """Once: it goes on from its checkpoint. Always: it has failed, and the next one runs."""
    for number in range(deaths):
        (tmp_path / f"fuse-{number}").touch()
    trial, fuses = sweep._trial, str(tmp_path)

    def mortal(config):
        from ray import tune

        report = tune.report

        def last_words(values):
            report(values)
            left = sorted(name for name in os.listdir(fuses) if name.startswith("fuse"))
            if left and values.get("step") == 1 and config["spec"]["folder"].endswith("00001"):
                os.unlink(os.path.join(fuses, left[0]))
                os.kill(os.getpid(), signal.SIGKILL)

        tune.report = last_words
        try:
            trial(config)
        finally:
            tune.report = report

    monkeypatch.setattr(sweep, "_trial", mortal)
    told(*words(tags[2].path, tmp_path, trials=3, name="s"))
    assert not list(tmp_path.glob("fuse*"))
    rows = trials(tmp_path / "s")
    if deaths == 1:
        assert rows == whole[:3]
    else:
        assert rows[1]["state"] == "fail"
        assert "its process died 3 times" in rows[1]["reason"]
        assert rows[2]["state"] != "fail"
