"""The whole of it on a real Ray: the command line, killed and gone on with, and what it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from talk_dist.cli import main
from talk_dist.commands.folder import RunFolder
from talk_dist.errors import CapacityError
from tuning import sweep
from tuning.findings import CLOCK


def trials(folder):
    """What is known of every trial, without what a clock says."""
    rows = pq.read_table(Path(folder, "trials.parquet")).drop_columns(list(CLOCK)).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@pytest.fixture(scope="module")
def data(graph, prepare_graph):
    """Folder of the toy graph in two parts, which nobody has encoded."""
    return prepare_graph(graph, parts=2).path


@pytest.fixture(scope="module")
def given(graph, prepare_graph):
    """Folder of the toy graph with encodings in place of texts."""
    return prepare_graph(graph.with_encodings(32), parts=2, encoder="given:32").path


@pytest.fixture(scope="module")
def plain(one_ray, given, given_words, tmp_path_factory):
    """The folder of an undisturbed sweep of five trials, and what it said."""
    out, said = tmp_path_factory.mktemp("plain"), io.StringIO()
    line = given_words(given, out, trials=5, name="s")
    space = line[line.index("--space") + 1] = str(shutil.copy(line[line.index("--space") + 1], out / "space.yaml"))
    with contextlib.redirect_stdout(said):
        assert main(line) == 0
    os.unlink(space)  # the sweep has kept it
    return out / "s", said.getvalue()


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory):
    """The trials of that sweep when it was moved and given a sixth, and of what it repeats afterwards."""
    out = tmp_path_factory.mktemp("whole")
    shutil.copytree(plain[0], out / "s")
    assert main(["tune", "--out", str(out), "--resume", "s", "--trials", "6", "--confirm", "1"]) == 0
    found = trials(out / "s")
    assert found[:5] == trials(plain[0])
    return found


def test_a_sweep_leaves_what_it_says(plain, given, told, tmp_path):
    folder, out = plain
    rows = trials(folder)
    assert [row["number"] for row in rows] == list(range(5))
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    assert len(re.findall(r"^trial \d", out, re.MULTILINE)) == 5
    assert "Ray" not in out  # nothing of Tune's own tables
    done = [row for row in rows if row["state"] == "complete"]
    best = max(done, key=lambda row: (row["accuracy"], -row["number"]))
    assert f"best        validation accuracy {best['accuracy']:.4f} (trial {best['number']})\n" in out

    first = rows[0]  # the settings that the sweep was started with, ridge and all
    assert (first["state"], first["ridge"], first["two_stage.feature_steps"]) == ("complete", 0.1, 6)
    assert best["accuracy"] >= first["accuracy"]

    told("distill", "--data", given, "--config", folder / "best.yaml", "--out", tmp_path / "again")
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
    theirs = optuna.load_study(study_name="s", storage=JournalStorage(backend))  # as optuna-dashboard reads it
    assert [trial.params.get("outer.lr") for trial in theirs.trials] == [row["outer.lr"] for row in rows]


def test_encodings_are_computed_once_for_all_sweeps(one_ray, data, words, told, tmp_path):
    told(*words(data, tmp_path, trials=1, name="first"))
    stamps = {path.name: path.stat().st_mtime_ns for path in Path(data, "encodings").glob("*.npy")}
    assert len(stamps) == 2  # a file a part
    told(*words(data, tmp_path, trials=2, name="second", concurrent=2, objectives="[accuracy, bytes]"))
    assert stamps == {path.name: path.stat().st_mtime_ns for path in Path(data, "encodings").glob("*.npy")}
    assert {row["state"] for row in trials(tmp_path / "second")} == {"complete"}


def test_stopped_and_killed_at_random_and_gone_on_with(given, given_words, whole, told, tmp_path):
    """What is finished stays, nothing is lost or runs twice, and six trials at once are five and then a sixth.
    benchmarks/sweeps.py kills five times on a real graph."""
    line = given_words(given, tmp_path, trials=6, name="s", confirm=1)
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


def test_trials_with_actors_say_the_same(given, given_words, plain, told, tmp_path):
    """A trial's shards live in what was reserved for it."""
    on_ray = ["--runtime.kind", "ray", "--cluster.actors", "1", "--cluster.cpus", "1"]
    told(*given_words(given, tmp_path, *on_ray, trials=2, name="s"))
    assert trials(tmp_path / "s") == trials(plain[0])[:2]


@pytest.fixture
def asked(one_ray, data, words, told, tmp_path, monkeypatch):
    """asked(space, *more, **options) -> what the trials of a sweep would be run with, and their study."""

    def ask(space, *more, **options):
        caught = []
        monkeypatch.setattr(sweep, "run_sweep", lambda *given: caught.append(given))
        line = words(data, tmp_path, *more, **({"trials": 2, "name": "s"} | options))
        small = Path(line[line.index("--space") + 1]).read_text()
        (tmp_path / "space.yaml").write_text(small + space)
        told(*line, "--space", tmp_path / "space.yaml", code=2)  # nothing has run, so there is no best
        ((study, spec),) = caught
        return study, spec

    return ask


@pytest.mark.parametrize(("said", "ridge"), [("0.05", 0.05), ("null", 0.1)])
def test_a_ridge_that_the_space_fixes_is_every_trial_s(asked, said, ridge):
    """No trial chooses it from the ladder, and the preset, which comes second, brings no other."""
    study, spec = asked(f"kernel.ridge: {said}\n")
    points = [study.ask(3)[1] for _ in range(3)]
    assert not spec.ladder
    assert [spec.of(0, point).config.kernel.ridge for point in points] == [ridge] * 3
    _, spec = asked("", name="ladder")
    assert spec.ladder


def test_relative_folders_mean_the_same_to_a_trial(asked, tmp_path, monkeypatch):
    """Which stands in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    _, spec = asked("", "--runtime.cache_folder", "kept", "--runtime.scratch", "spare")
    assert spec.base.runtime.cache_folder == str(tmp_path / "kept")
    assert spec.base.runtime.scratch == str(tmp_path / "spare")
    assert list(tmp_path.glob("kept/encodings/*.npy"))


def test_of_two_sweeps_with_one_folder_the_earlier_stops(asked, tmp_path):
    """Where there are no locks."""
    out = f"file://{tmp_path}/out"
    study, spec = asked("", "--out", out, "--storage", f"sqlite:///{tmp_path}/study.db")
    searcher = sweep._Searcher(study, spec)
    assert searcher.suggest("a")["spec"]["folder"] == f"{out}/s/trials/00000"
    RunFolder(f"{out}/s").claim()
    searcher.on_trial_complete("a", {"failed": "no"})
    assert "has taken over" in str(searcher.error)
    assert searcher.suggest("b") == "FINISHED"
    assert searcher.report("a", {"step": 0, "accuracy": 0.5})  # stops what still runs
    assert not study.ended


def test_what_keeps_a_sweep_from_writing_ends_it(one_ray, given, given_words, told, tmp_path, monkeypatch):
    """In its own words: Tune would start the trial again, whose outcome could not be kept."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sweep.Study, "tell", full)
    _, err = told(*given_words(given, tmp_path, trials=3, name="s"), code=2)
    assert "No space left on device" in err
    assert len(list((tmp_path / "s" / "trials").iterdir())) == 1


def test_a_password_is_not_written_down(asked, told, tmp_path):
    asked("", "--storage", f"sqlite:///{tmp_path}/study.db?password=hunter2")
    assert "hunter2" not in (tmp_path / "s" / "command.json").read_text()
    _, err = told("tune", "--out", tmp_path, "--resume", "s", code=2)
    assert f"--storage sqlite:///{tmp_path}/study.db?password=***: its password was not written down; give" in err
    _, err = told("tune", "--out", tmp_path, "--resume", "s", "--storage", "no://me:hunter2@host/db", code=2)
    assert "no://me:***@host/db: cannot be opened" in err
    assert "hunter2" not in err


def test_a_sweep_that_lost_its_room_says_so_and_ends(one_ray, monkeypatch, capsys):
    """And does not while a trial runs, or while the next one's process starts."""
    clock = [100.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    watch = sweep._Watch([{"CPU": 1000.0}], wait_seconds=60)

    def step(seconds, *states):
        clock[0] += seconds
        watch.on_step_end(0, [SimpleNamespace(status=state) for state in states])

    for states in (["PENDING"], ["RUNNING", "PENDING"], ["RUNNING"], ["PENDING", "TERMINATED"], ["TERMINATED"]):
        step(100, *states)
        step(29, *states)
    assert not capsys.readouterr().err
    step(0, "PENDING")
    for _ in range(20):
        step(2, "PENDING")
    assert capsys.readouterr().err.count("no room for a trial: 1 × (1000 CPU)") == 2  # after 30 s and 40 s
    step(45, "PENDING")
    with pytest.raises(CapacityError, match=r"waited 90 s\. .*--resume goes on"):  # once its process could have started
        step(5, "PENDING")


def test_a_trial_that_fails_keeps_its_reason_and_the_sweep_goes_on(one_ray, given, given_words, told, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("two_stage.feature_lr: [0.01, 1.0e+30, 2.0e+30, 3.0e+30]\nsynthetic.init: two-stage\n")
    out, _ = told(*given_words(given, tmp_path, trials=4, name="s", sampler="random", space=space))
    rows = trials(tmp_path / "s")
    failed = [row for row in rows if row["state"] == "fail"]
    assert 0 < len(failed) < 4
    for row in failed:
        assert row["two_stage.feature_lr"] >= 1e30
        assert "is not positive definite" in row["reason"]
        assert f"trial {row['number']:<4} failed: {row['reason']}" in out


def test_a_sweep_in_which_all_fail_says_why(one_ray, given, given_words, told, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("two_stage.feature_lr: 1.0e+30\nsynthetic.init: two-stage\n")
    _, err = told(*given_words(given, tmp_path, trials=2, space=space), code=2)
    assert "talk-dist tune: all 2 trials failed: the kernel of the 6 synthetic nodes is not positive definite" in err


def test_a_trial_whose_process_dies(given, given_words, whole, told, tmp_path, monkeypatch):
    """Once: it goes on from its checkpoint. Always: it has failed, and the next one runs. Those that are stopped early
    in between take their time to end, and the next one waits for that."""
    complete = [row["number"] for row in whole[:6] if row["state"] == "complete"]  # a stopped one may have no end
    once, always = complete[1], complete[-1]
    assert "pruned" in {row["state"] for row in whole[once:always]}
    for trial, deaths in ((once, 1), (always, 3)):
        for death in range(deaths):
            (tmp_path / f"fuse-{trial:05d}-{death}").touch()
    trial, fuses = sweep._trial, str(tmp_path)

    def mortal(config):
        from ray import tune

        report = tune.report

        def last_words(values):
            report(values)
            here = f"fuse-{config['spec']['folder'][-5:]}"
            left = sorted(name for name in os.listdir(fuses) if name.startswith(here))
            if left and values.get("step") == 1:
                os.unlink(os.path.join(fuses, left[0]))
                os.kill(os.getpid(), signal.SIGKILL)

        tune.report = last_words
        try:
            trial(config)
        except SystemExit:  # stopped early
            time.sleep(3)
            raise
        finally:
            tune.report = report

    monkeypatch.setattr(sweep, "_trial", mortal)
    told(*given_words(given, tmp_path, trials=always + 2, name="s"))
    assert not list(tmp_path.glob("fuse*"))
    rows = trials(tmp_path / "s")
    assert rows[:always] == whole[:always]
    assert rows[always]["state"] == "fail"
    assert "its process died 3 times" in rows[always]["reason"]
    assert rows[always + 1]["state"] != "fail"
