"""A run folder on any storage: everything that a run writes, and of two drivers the later one goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pyarrow import fs as pafs
from safetensors.torch import load_file

from talk_dist.cli import main
from talk_dist.commands import runs
from talk_dist.commands.folder import RunFolder, beside
from talk_dist.data import storage
from talk_dist.errors import ConfigError
from talk_dist.runtime.callbacks import Callback

NAMES = {"attempt.json", "checkpoint.safetensors", "log.jsonl", "synthetic", "evaluation.md", "run.png", "prepared"}
EPOCHS = 2


@pytest.fixture(scope="module")
def command(tags, encoder_folder):
    """command(out, **settings) -> the arguments of a small distillation; `__` stands for the dot."""

    def arguments(out, **settings):
        given = {
            "data": tags[2].path,
            "out": out,
            "encoder__name": encoder_folder,
            "encoder__pooling": "mean",
            "encoder__precision": "float32",
            "synthetic__size": 6,
            "synthetic__tokens": 5,
            "synthetic__init": "medoid",
            "inner__passes": 10,
            "outer__epochs": EPOCHS,
            "outer__steps": 2,
            "outer__patience": EPOCHS + 1,
            "runtime__threads": 1,
            "runtime__cache": "false",
            **settings,
        }
        pairs = [(f"--{name.replace('__', '.')}", str(value)) for name, value in given.items()]
        return ["distill", *(word for pair in pairs for word in pair)]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The local folder of a run that nothing befalls."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(out)) == 0
    return out


class ObjectStore(pafs.FileSystemHandler):
    """Stands for s3://: flat, without rename. ``wrote`` holds every path that was written."""

    def __init__(self, root: Path):
        root.mkdir()
        self.inner, self.wrote = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem()), []

    def get_type_name(self):
        return "store"

    def get_file_info(self, paths):
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.inner.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.inner.create_dir(path, recursive=recursive)

    def delete_file(self, path):
        self.inner.delete_file(path)

    def open_input_stream(self, path):
        return self.inner.open_input_stream(path)

    def open_input_file(self, path):
        return self.inner.open_input_file(path)

    def open_output_stream(self, path, metadata):
        self.wrote.append(path)
        return self.inner.open_output_stream(path)

    def refuse(self, *_):
        raise NotImplementedError("a store has no such thing")

    move = copy_file = delete_dir = delete_dir_contents = delete_root_dir_contents = open_append_stream = refuse
    normalize_path = staticmethod(lambda path: path)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Behind s3://; other paths are what they were."""
    store, resolve = ObjectStore(tmp_path / "store"), storage.resolve
    store.filesystem = pafs.PyFileSystem(store)

    def route(uri):
        text = os.fspath(uri)
        return (store.filesystem, text.removeprefix("s3://")) if text.startswith("s3://") else resolve(uri)

    monkeypatch.setattr(storage, "resolve", route)
    return store


class Once(Callback):
    """Calls something once: when the run first reports that it works on its start, or after the first epoch."""

    def __init__(self, moment, action):
        self.moment, self.action = moment, action

    def progress(self, *_):
        self.meet("start")

    def epoch(self, record):
        self.meet("epoch")

    def meet(self, moment):
        if moment == self.moment:
            self.moment = None
            self.action()


def at_moment(monkeypatch, moment, action):
    """Call ``action`` once, at a moment of the next run: it has done something and not written it yet."""
    if moment in ("start", "epoch"):
        lines = runs.ProgressLines

        def first():
            monkeypatch.setattr(runs, "ProgressLines", lines)
            return Once(moment, action)

        monkeypatch.setattr(runs, "ProgressLines", first)
        return
    name = {"publish": "readings", "evaluate": "evaluate"}[moment]
    original = getattr(runs, name)

    def once(*args):
        monkeypatch.setattr(runs, name, original)
        action()
        return original(*args)

    monkeypatch.setattr(runs, name, once)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_result(out: Path, truth: Path) -> None:
    name = "synthetic/synthetic.safetensors"
    assert (out / name).read_bytes() == (truth / name).read_bytes()
    states = [load_file(folder / "checkpoint.safetensors") for folder in (out, truth)]
    assert all(states[0][name].equal(states[1][name]) for name in states[1])
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (out, truth)]
    assert [r["val_accuracy"] for r in logs[0]] == [r["val_accuracy"] for r in logs[1]]
    assert [r.get("loss") for r in logs[0]] == [r.get("loss") for r in logs[1]]


def test_a_run_on_a_store_without_rename(command, undisturbed, store, graph, monkeypatch, told, tmp_path):
    """Every file, the embedded graph too, and every command that reads a run."""
    monkeypatch.setattr(runs, "build_python_api", lambda: (graph.nodes, graph.edges))
    out, quick = "s3://bucket/run", {"evaluation__seeds": 1, "evaluation__against": "random", "evaluate": "true"}
    arguments = command(out, data="python-api", evaluation__recipe__passes=3, **quick)
    said, _ = told(*arguments)
    folder = tmp_path / "store" / "bucket" / "run"
    assert {path.name for path in folder.iterdir()} == NAMES
    for line in (
        "artifact    s3://bucket/run/synthetic",
        f"evaluation  {out}/evaluation.md",
        f"picture     {out}/run.png",
    ):
        assert line in said
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert f"going on with what {out}/checkpoint.safetensors holds: the start and 2 epochs" in told(*arguments)[0]
    assert not (tmp_path / "s3:").exists()
    assert not Path("s3:").exists()
    assert "6 nodes of 5 token embeddings" in told("inspect", out)[0]
    assert "trained on 6 synthetic nodes" in told("evaluate", out, "--seeds", 1, "--against", "random")[0]
    assert all(path.startswith("bucket/run/") for path in store.wrote)
    order = [store.wrote.index(f"bucket/run/{name}") for name in ("attempt.json", "prepared/META.json", "log.jsonl")]
    assert order == sorted(order)


def test_a_run_that_died_while_it_published_goes_on(command, undisturbed, store, told, tmp_path, capsys):
    told(*command("s3://bucket/run"))
    folder = tmp_path / "store" / "bucket" / "run"
    (folder / "synthetic" / "config.json").unlink()
    (folder / "synthetic" / "synthetic.safetensors").write_bytes(b"cut short")
    assert "neither a prepared graph" in told("inspect", "s3://bucket/run", code=2)[1]
    told(*command("s3://bucket/run"))
    assert_same_result(folder, undisturbed)


@pytest.mark.parametrize("scheme", ["file", "s3"])
@pytest.mark.parametrize("moment", ["start", "epoch", "publish", "evaluate"])
def test_of_two_drivers_the_later_one_goes_on(
    moment, scheme, command, undisturbed, store, monkeypatch, capsys, tmp_path
):
    """The second runs from its start to its end in the middle of the first, which then stops."""
    folder = tmp_path / "store" / "bucket" / "run"
    out = f"file://{folder}" if scheme == "file" else "s3://bucket/run"
    arguments = command(out, evaluation__seeds=1, evaluation__against="random", evaluation__recipe__passes=3)
    after: list[dict[str, bytes]] = []

    def second() -> None:
        assert main([*arguments, "--evaluate", "true"]) == 0
        after.append(snapshot(folder))

    at_moment(monkeypatch, moment, second)
    assert main([*arguments, "--evaluate", "true"]) == 2
    error = capsys.readouterr().err
    holder = json.loads(after[0]["attempt.json"])
    assert f"another run (attempt {holder['id']}, host {holder['host']}) has taken over {out}" in error
    assert "Traceback" not in error
    assert snapshot(folder) == after[0]
    assert_same_result(folder, undisturbed)


def test_a_run_that_is_refused_takes_nothing_over(command, told, tmp_path):
    out = f"file://{tmp_path}/run"
    told(*command(out))
    before = snapshot(tmp_path / "run")
    assert "seed: 0 there, 3 now" in told(*command(out, seed=3), code=2)[1]
    assert "2 problems" in told(*command(out, synthetic__tokens=99, data="no"), code=2)[1]
    assert snapshot(tmp_path / "run") == before


def test_a_local_folder_is_locked(tmp_path):
    first, second = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "run"))
    with first.alone():
        with pytest.raises(ConfigError, match="another run is at work there"), second.alone():
            pass
        first.check()
        first.claim()
        first.guard()
    with second.alone():
        second.claim()
        second.guard()


def test_a_folder_that_cannot_be_locked_is_fenced(tmp_path, monkeypatch):
    """A mounted store, for example, or one on NFS, where another machine knows nothing of the lock."""

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    first, second = (RunFolder(str(tmp_path / "run")) for _ in range(2))
    with first.alone(), second.alone():
        for folder in (first, second):
            folder.claim()
            folder.guard()
        for write in (first.guard, first.claim, lambda: first.remove("a")):
            with pytest.raises(
                ConfigError, match=rf"attempt {second.attempt}, host .* has taken over .*this one stops"
            ):
                write()
        second.remove("absent")
        for damage in (lambda path: path.write_text("{"), Path.unlink):
            damage(tmp_path / "run" / "attempt.json")
            with pytest.raises(ConfigError, match=r"attempt\.json of this run is gone or damaged"):
                second.guard()
        monkeypatch.setattr(storage, "read_bytes", refuse)
        with pytest.raises(ConfigError, match=r"cannot be read \(.*not supported\); the same command goes on"):
            second.guard()


def test_storage_that_cannot_be_written(command, store, monkeypatch, told):
    def refuse(path, metadata):
        raise OSError("AWS Error ACCESS_DENIED during PutObject")

    monkeypatch.setattr(store, "open_output_stream", refuse)
    _, error = told(*command("s3://bucket/run", synthetic__tokens=99), code=2)
    assert "--out s3://bucket/run: cannot be written (AWS Error ACCESS_DENIED" in error
    assert "synthetic.tokens = 99" in error
    assert "cannot open this file system" in told(*command("nowhere://run"), code=2)[1]


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("runs/a/synthetic", "runs/a/p"),
        ("runs/a/synthetic/", "runs/a/p"),
        ("synthetic", "./p"),
        ("/synthetic", "/p"),
        ("s3://bucket/run/synthetic", "s3://bucket/run/p"),
        ("file:///data/synthetic/", "file:///data/p"),
    ],
)
def test_beside(path, there):
    assert beside(path, "p") == there
