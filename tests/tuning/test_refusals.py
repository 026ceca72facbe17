"""What cannot work is told before the first trial, and before Ray is started."""

from __future__ import annotations

import fcntl
import os

import pytest
import ray

from talk_dist.commands.settings import read
from talk_dist.commands.tune import COMMAND
from talk_dist.errors import ConfigError


@pytest.fixture
def refused(words, told, tags, tmp_path, monkeypatch):
    """refused(space or "", **options) -> the one line of the refusal."""
    monkeypatch.setattr(ray, "init", None)

    def run(space="", parts=2, out=tmp_path / "out", **options):
        if space:
            (tmp_path / "space.yaml").write_text(space)
            options["space"] = tmp_path / "space.yaml"
        out, err = told(*words(tags[parts].path, out, **options), code=2)
        assert "trial 0" not in out
        return err

    return run


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        ("kernel.rigde: [1, 2]", "unknown setting 'kernel.rigde'; the nearest known one is 'kernel.ridge'"),
        ("outer.lr: {low: 2.0}", "outer.lr: the range from 2.0 to 0.01 is empty"),
        ("kernel.architecture: gcn\nkernel.hops: [1, 5]", "kernel.hops = 5: "),
        ("synthetic.size: [6, 2]", "synthetic.size gives 2 nodes for 3 classes; every class needs one"),
        ("synthetic.tokens: [16, 5000]", "synthetic.tokens = 5000: encoder"),
        ("- 1", "must map settings to ranges"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_space_that_cannot_work(refused, space, problem):
    assert problem in refused(space)


def test_a_space_whose_every_point_fails(refused):
    err = refused("kernel.architecture: gcn\nkernel.hops: [7, 8]\nsynthetic.size: [1, 2]")
    for words in ("kernel.hops = 7", "kernel.hops = 8", "gives 1 node", "gives 2 nodes"):
        assert words in err


def test_options_that_cannot_work(refused):
    assert "trials = 0, concurrent = 1, students = 3: at least 1 of each" in refused(trials=0)
    assert "objectives = ['bytes']: accuracy, and each once" in refused(objectives="[bytes]")
    assert "ladder = [0.0]: ridges above 0" in refused(ladder="[0]")
    assert "--out s3://bucket/x: a journal needs a local folder; give a data base with --storage" in refused(
        out="s3://bucket/x"
    )


def test_workers_without_a_cluster(refused):
    assert "deepspeed.workers: the workers live on a cluster; add --runtime ray" in refused(**{"deepspeed.workers": 2})


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(out=tmp_path / "file")
    assert "--storage sqlite:////nothing/s.db: cannot be opened" in refused(storage="sqlite:////nothing/s.db")


def test_another_graph_under_the_same_name(refused, words, tags, told, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise ConfigError("the study is open by now")

    monkeypatch.setattr(ray, "init", stop)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert "the study is open by now" in refused()
    hashes = [tags[parts].meta["hash"] for parts in (2, 7)]
    assert f"data hash: {hashes[0]!r} there, {hashes[1]!r} now" in refused(parts=7)
    space = tmp_path / "other.yaml"
    space.write_text("synthetic.tokens: [4, 8]\n")
    _, err = told("tune", "--resume", "sweep", "--out", tmp_path / "out", "--space", space, code=2)
    assert "space.synthetic.tokens: 'one of [4, 6]' there, 'one of [4, 8]' now" in err
    assert max(map(len, err.split("; "))) < 250


def test_a_sweep_at_work_in_the_folder(refused, tmp_path):
    folder = tmp_path / "out" / "sweep"
    folder.mkdir(parents=True)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another run is at work there" in refused()
    os.close(handle)


def test_a_name_that_was_never_started(told, tmp_path):
    _, err = told("tune", "--resume", "nobody", "--out", tmp_path, code=2)
    assert "--resume nobody: " in err
    assert "is not there; the sweep was never started in --out" in err


def test_the_default_space_reads_as_it_is_documented():
    options, config, _ = read(COMMAND, ["--data", "x", "--objectives", "[accuracy, bytes]", "--ladder", "[]"])
    assert options.objectives == ("accuracy", "bytes")
    assert options.ladder == ()
    assert config is not None
