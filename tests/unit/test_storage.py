"""Publication: readers see the whole of before or the whole of after, and nothing that is not ours is swept away."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from talk_dist.data import storage
from talk_dist.errors import DataError

MARKER = "META.json"


def publish(target: Path | str, version: int, files: int = 3, error: BaseException | None = None) -> None:
    """A folder whose files and marker all hold ``version``; ``error`` strikes when they are written."""
    with storage.publish_folder(target, MARKER) as folder:
        (folder / "sub").mkdir()
        for index in range(files):
            (folder / "sub" / f"{index}.txt").write_text(str(version))
        (folder / MARKER).write_text(str(version))
        if error:
            raise error


def versions(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_folder_is_published_whole_and_replaced_whole(tmp_path: Path) -> None:
    publish(tmp_path / "deep" / "tag", 1, files=5)
    publish(tmp_path / "deep" / "tag", 2, files=2)
    assert versions(tmp_path / "deep" / "tag") == {"2"}
    assert len(list((tmp_path / "deep" / "tag" / "sub").iterdir())) == 2  # no file of before is left over
    assert os.listdir(tmp_path / "deep") == ["tag"]  # nor any folder beside


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_error_while_writing_leaves_the_folder_of_before(tmp_path: Path, error: BaseException) -> None:
    publish(tmp_path / "tag", 1)
    with pytest.raises(type(error)):
        publish(tmp_path / "tag", 2, error=error)
    assert versions(tmp_path / "tag") == {"1"}
    assert os.listdir(tmp_path) == ["tag"]


@pytest.mark.parametrize("name", ["tag", "a [b]*?"])
def test_what_killed_writers_left_long_ago_goes(tmp_path: Path, name: str) -> None:
    """And nothing that looks alike."""

    def die(write: Any) -> None:
        if os.fork() == 0:
            with write:
                os._exit(9)
        os.wait()

    for _ in range(2):
        die(storage.publish_folder(tmp_path / name, MARKER))
    os.mkdir(tmp_path / f".{name}.of mine.tmp")
    dead, late, mine = sorted(tmp_path.iterdir())
    for path in (dead, mine):
        os.utime(path, (0, 0))
    publish(tmp_path / name, 1)
    storage.write_atomic(tmp_path / f"{name}.json", b"{}")
    assert set(tmp_path.iterdir()) == {late, mine, tmp_path / name, tmp_path / f"{name}.json"}
    os.utime(late, (0, 0))
    publish(tmp_path / name, 2)
    assert not late.exists()


def test_error_at_the_last_rename_leaves_the_folder_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "tag", 1)
    monkeypatch.setattr(storage, "_exchange", lambda *_: False)  # a system that cannot swap in one step
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        publish(tmp_path / "tag", 2)
    assert versions(tmp_path / "tag") == {"1"}
    monkeypatch.setattr(os, "rename", rename)
    publish(tmp_path / "tag", 3)  # and without the swap it still is replaced
    assert versions(tmp_path / "tag") == {"3"}
    assert os.listdir(tmp_path) == ["tag"]


def test_reader_never_finds_the_folder_absent(tmp_path: Path) -> None:
    target = tmp_path / "tag"
    publish(target, 0)
    if not storage._exchange(tmp_path / "tag", tmp_path / "tag"):
        pytest.skip("this file system cannot exchange two folders in one step")
    absent: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if not (target / MARKER).exists():
                absent.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(1, 30):
        publish(target, version)
    done.set()
    reader.join()
    assert not absent
    assert versions(target) == {"29"}


def test_folder_of_something_else_is_not_swept_away(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis.*no META.json.*choose another folder"):
        publish(tmp_path / "thesis", 1)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(DataError, match="in the way"):
        publish(tmp_path / "file", 1)
    assert versions(tmp_path) == {"years of work", "a file"}
    (tmp_path / "empty").mkdir()
    publish(tmp_path / "empty", 1)  # an empty folder is nobody's work
    assert versions(tmp_path / "empty") == {"1"}


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    publish(tmp_path / "disk" / "tag", 1)
    (tmp_path / "tag").symlink_to(tmp_path / "disk" / "tag")
    publish(tmp_path / "tag", 2)
    assert (tmp_path / "tag").is_symlink()
    assert versions(tmp_path / "disk" / "tag") == {"2"}
    assert os.listdir(tmp_path / "disk") == ["tag"]


class ObjectStore:
    """Stands for s3://: a file system that is not local, which notes what was written and can fail at a name."""

    def __init__(self, root: Path):
        self.inner = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
        self.written: list[str] = []
        self.fail_at: str | None = None

    def open_output_stream(self, path: str) -> Any:
        if self.fail_at and path.endswith(self.fail_at):
            raise OSError(errno.ECONNRESET, "Connection reset")
        self.written.append(path)
        return self.inner.open_output_stream(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    (tmp_path / "bucket").mkdir()
    store = ObjectStore(tmp_path / "bucket")
    monkeypatch.setattr(storage, "resolve", lambda uri: (store, os.fspath(uri).removeprefix("s3://")))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return store


def test_object_store_gets_the_marker_last(store: ObjectStore, tmp_path: Path) -> None:
    publish("s3://data/tag", 1)
    assert store.written[-1] == "data/tag/META.json"
    assert len(store.written) == 4
    publish("s3://data/tag", 2)
    assert versions(tmp_path / "bucket" / "data" / "tag") == {"2"}
    assert os.listdir(tmp_path) == ["bucket"]  # the copy that was staged here is gone


def test_object_store_never_shows_a_marker_beside_files_of_another_version(store: ObjectStore, tmp_path: Path) -> None:
    publish("s3://data/tag", 1)
    store.fail_at = "1.txt"
    with pytest.raises(OSError, match="Connection reset"):
        publish("s3://data/tag", 2)
    assert versions(tmp_path / "bucket") == {"1", "2"}  # mixed indeed, and therefore
    assert not storage.exists("s3://data/tag/META.json")
    store.fail_at = None
    publish("s3://data/tag", 3)
    assert versions(tmp_path / "bucket") == {"3"}


def test_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "state.json"
    storage.write_atomic(target, storage.to_json({"step": 1}))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            storage.write_atomic(target, storage.to_json({"step": 2}))
    assert storage.read_json(target) == {"step": 1}
    storage.write_atomic(target, storage.to_json({"step": 3, "text": "Größe"}))
    assert storage.read_json(target) == {"step": 3, "text": "Größe"}
    assert os.listdir(target.parent) == ["state.json"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        storage.read_json(tmp_path / "absent.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(DataError, match=r"half\.json: is not valid JSON.*cut short"):
        storage.read_json(tmp_path / "half.json")
    with pytest.raises(DataError, match=r"nowhere://x.*s3://"):
        storage.resolve("nowhere://x")


def test_uri_and_path_are_the_same_place(tmp_path: Path) -> None:
    storage.write_atomic(f"file://{tmp_path}/a.txt", b"here")
    assert storage.read_bytes(tmp_path / "a.txt") == b"here"
    assert storage.exists(storage.join(f"file://{tmp_path}/", "a.txt"))
    assert not storage.exists(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p@ss:w/rd@host:5432/db", None),
        ("postgresql://me:secret@host:5432/db?sslmode=require", "postgresql://me:***@host:5432/db?sslmode=require"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        *((f"postgresql://me:pa{sign}ss@host/db", "postgresql://me:***@host/db") for sign in "/?#:"),
        ("sqlite:////data/study.db", "sqlite:////data/study.db"),
        ("sqlite:///x?a=1&db_Password=pq&b=2", "sqlite:///x?a=1&db_Password=***&b=2"),
        ("mysql://host/db?token=abc", "mysql://host/db?token=***"),
    ],
)
def test_secrets_of_a_url_are_not_shown(url, shown):
    found = storage.without_secrets(url)
    assert found == shown if shown else "p@ss" not in found


def test_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("kept") == str(tmp_path / "kept")
    assert [storage.absolute(path) for path in ("", "/data/x", "s3://a/b")] == ["", "/data/x", "s3://a/b"]
