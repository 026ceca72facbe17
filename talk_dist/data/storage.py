"""Files on any ``pyarrow.fs`` path (a local path, ``s3://``, ``gs://``, ``hdfs://``), published atomically.

A reader sees a whole file or folder, or the whole one of before: writing happens beside the target, and
one rename (or, where a store has no rename, the marker file that is copied last) makes it visible.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from talk_dist.errors import DataError

HIDDEN = "***"
LEFT_SECONDS = 24 * 3600  # nobody writes for so long without a new file


def resolve(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The file system of ``uri`` and the path inside it. Raises DataError for a scheme that pyarrow lacks."""
    text = os.fspath(uri)
    if "://" not in text:
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(text, f"cannot open this file system ({error}); use a path, file://, s3:// or gs://") from error


def absolute(path: str) -> str:
    """A local path wherever a process stands, whether anything is there or not; nothing and URIs as they are."""
    return path if "://" in path or not path else os.path.abspath(os.path.expanduser(path))


def without_secrets(url: str) -> str:
    """``url`` as it may be shown: `HIDDEN` for a password, and for a parameter that sounds like one."""
    url = re.sub(r"(://[^/@:]*:)[^@]*(@)", rf"\g<1>{HIDDEN}\2", url)
    return re.sub(r"(?i)([?&][^=&#]*(?:pass|pwd|secret|token|key)[^=&#]*=)[^&#]*", rf"\g<1>{HIDDEN}", url)


def join(uri: str | os.PathLike[str], *names: str) -> str:
    return "/".join([os.fspath(uri).rstrip("/"), *names])


def exists(uri: str | os.PathLike[str]) -> bool:
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def check_writable(folder: str) -> None:
    """Raises OSError unless files can be made in ``folder``, which is made if it is not there."""
    filesystem, path = resolve(folder)
    probe = join(path, f".writable-{uuid.uuid4().hex[:8]}")
    filesystem.create_dir(path, recursive=True)
    filesystem.open_output_stream(probe).close()
    filesystem.delete_file(probe)


def stamp(uri: str) -> list[list[Any]] | None:
    """Name, size and time of the file at ``uri``, or of every file of that folder; None if nothing is there."""
    filesystem, path = resolve(uri)
    found = filesystem.get_file_info(path)
    if found.type == pafs.FileType.NotFound:
        return None
    files = filesystem.get_file_info(pafs.FileSelector(path)) if found.type == pafs.FileType.Directory else [found]
    return sorted([file.base_name, file.size, file.mtime_ns] for file in files if file.is_file)


def local_path(uri: str | os.PathLike[str]) -> str | None:
    """Where ``uri`` lies on this machine; None on another file system."""
    filesystem, path = resolve(uri)
    return path if isinstance(filesystem, pafs.LocalFileSystem) else None


def file_hash(path: str | os.PathLike[str]) -> str:
    """sha256 hex of a local file, read a piece at a time. Raises DataError if it is missing."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DataError(os.fspath(path), "no such file") from error


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """The whole file. Raises DataError if it is missing."""
    filesystem, path = resolve(uri)
    try:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        raise DataError(os.fspath(uri), "no such file") from error


def read_json(uri: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:  # no JSON, or no UTF-8
        raise DataError(os.fspath(uri), f"is not valid JSON ({error}); it was cut short or edited") from error


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False) + "\n").encode()


def write_atomic(uri: str | os.PathLike[str], data: bytes) -> None:
    """Publish one file: readers see the old bytes or the new ones, never a part."""
    filesystem, path = resolve(uri)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:  # an object store publishes an object whole
            stream.write(data)
        return
    temporary = _beside(Path(path))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def publish_folder(uri: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """A local folder to write into; when the block ends without an error it becomes the folder ``uri``.

    ``marker`` names the file without which readers refuse the folder. After an error in the block (a full disk, an
    interrupt) the folder of before is untouched. On a store without rename the old marker goes first and the new one
    comes last, so that a copy cut short is refused and never mixed. Raises DataError, before the block runs, if
    ``uri`` is a local folder of something else (not empty, no marker), which must not be swept away.
    """
    filesystem, path = resolve(uri)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    if local:
        path = os.path.realpath(path)  # through a link, replace what it points to
        if (
            os.path.exists(path)
            and not os.path.exists(join(path, marker))
            and (os.path.isfile(path) or os.listdir(path))
        ):
            raise DataError(path, f"is in the way: it has no {marker}, so it is not replaced; choose another folder")
        os.makedirs(os.path.dirname(path), exist_ok=True)
    parent = os.path.dirname(path) if local else os.environ.get("TMPDIR", "/var/tmp")
    staging = _beside(Path(parent, os.path.basename(path)))
    staging.mkdir()
    try:
        yield staging
        if local:
            _swap(staging, Path(path))
        else:
            _copy(staging, filesystem, path, marker)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _beside(target: Path) -> Path:
    """A name of its own beside ``target``, for what is to become it. What killed processes left under such names long
    ago goes: it may be a whole graph."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        with suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def _swap(staging: Path, target: Path) -> None:
    for file in staging.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    if not target.exists():
        os.rename(staging, target)
        return
    if _exchange(staging, target):  # staging, which the caller removes, is now the folder of before
        return
    previous = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.previous")
    os.rename(target, previous)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(previous, target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, so that readers find one of them at any time; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _copy(staging: Path, filesystem: pafs.FileSystem, path: str, marker: str) -> None:
    files = sorted(file for file in staging.rglob("*") if file.is_file())
    files.sort(key=lambda file: file.name == marker)
    if filesystem.get_file_info(f"{path}/{marker}").type == pafs.FileType.File:
        filesystem.delete_file(f"{path}/{marker}")
    for file in files:
        target = f"{path}/{file.relative_to(staging).as_posix()}"
        filesystem.create_dir(os.path.dirname(target), recursive=True)
        with filesystem.open_output_stream(target) as stream, open(file, "rb") as source:
            shutil.copyfileobj(source, stream, 1 << 20)
