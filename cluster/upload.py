"""What of the working directory goes to the cluster with a job: which files, how many bytes, where a config lies."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from talk_dist.errors import CapacityError, ConfigError

RUNTIME_ENV = "infra/runtime_env.yaml"
LIMIT = 100 * 1024**2
"""Bytes that a Ray dashboard takes in one request (DASHBOARD_CLIENT_MAX_SIZE in Ray). The 512 MiB of Ray's own
check are those of the storage behind it, and are never reached by an upload."""
ENTRY = 256
"""Bytes that a file costs in the archive beside its content. Ray stores files there without compressing them."""
EXCLUDES = (
    "runs",
    "prepared",
    ".git",
    ".venv",
    "venv",
    "build",
    "dist",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
    "*.parquet",
    "*.npy",
    "*.safetensors",
    "*.pt",
    ".env",
    "*.pem",
)
"""Left out of every upload, in the syntax of .gitignore: results, prepared graphs, what can be made again, secrets."""


def runtime_env(folder: Path, file: str | None) -> dict[str, Any]:
    """The runtime environment of a job: ``file``, or the one in ``folder`` if it is there, with the upload of
    ``folder`` and what it leaves out. Raises ConfigError if the file cannot be used.
    """
    path = Path(file) if file else folder / RUNTIME_ENV
    env: dict[str, Any] = {}
    if file or path.is_file():
        try:
            env = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--runtime-env {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(env, dict):
        raise ConfigError(f"--runtime-env {path}: must hold fields of a Ray runtime environment as `key: value`")
    if "working_dir" in env:
        raise ConfigError(f"--runtime-env {path}: holds a working_dir; give it as --working-dir instead")
    excludes = env.get("excludes") or []
    if not isinstance(excludes, list) or not all(isinstance(pattern, str) for pattern in excludes):
        raise ConfigError(f"--runtime-env {path}: excludes must be a list of patterns")
    return env | {"working_dir": str(folder), "excludes": list(dict.fromkeys([*excludes, *EXCLUDES]))}


class _Enough(Exception):
    """Far above the limit: no need to walk through the rest of somebody's home folder."""


def listing(folder: Path, excludes: Sequence[str]) -> dict[str, int] | None:
    """Bytes of every file that Ray would upload, by its path in ``folder``; far above LIMIT, those found so far.

    It walks as Ray does (.gitignore and .rayignore count), through Ray's own functions. They are internal: where a
    version of Ray has other ones the answer is None, and the upload itself has to fail.
    """
    try:
        from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
    except ImportError:
        return None
    found: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
            if len(found) % 1000 == 0 and sum(found.values()) > 20 * LIMIT:
                raise _Enough

    quiet = logging.getLogger(f"{__name__}.walk")
    quiet.disabled = True
    try:
        _dir_travel(folder, [_get_excludes(folder, list(excludes))], add, include_gitignore=True, logger=quiet)
    except _Enough:
        pass
    except OSError as error:
        raise ConfigError(
            f"--working-dir {folder}: {error.filename or ''} cannot be read ({error.strerror})"
        ) from error
    return found


def check_size(folder: Path, found: Mapping[str, int]) -> None:
    """Raises CapacityError, naming the largest folders, if ``found`` is more than a cluster takes."""
    total = sum(found.values()) + ENTRY * len(found)
    if total <= LIMIT:
        return
    sizes: Counter[str] = Counter()
    for path, size in found.items():
        first, slash, _ = path.partition("/")
        sizes[first + slash] += size
    largest = ", ".join(f"{name} {_mib(size)}" for name, size in sizes.most_common(4))
    raise CapacityError(
        f"--working-dir {folder}: the upload would be {_mib(total)}, and a Ray dashboard takes {_mib(LIMIT)}; largest: "
        f"{largest}. Keep data on storage that the nodes reach, and list the rest in {folder / '.rayignore'}"
    )


def _mib(size: int) -> str:
    return f"{size / 1024**2:,.0f} MiB"


def rebased(arguments: Sequence[str], folder: Path, found: Mapping[str, int] | None) -> list[str]:
    """``arguments``, all of the form `--name=value`, with every file of settings as the job will find it: relative to
    ``folder``.

    Raises ConfigError if a file lies elsewhere or is left out of the upload.
    """
    out = []
    for word in arguments:
        key, _, given = word.partition("=")
        if key not in ("--config", "--space", "--plan"):
            out.append(word)
            continue
        path = Path(given).resolve()
        if not path.is_relative_to(folder):
            raise ConfigError(
                f"{key} {given}: lies outside of {folder}, which is what the cluster gets; "
                f"move the file into it, or give its folder as --working-dir"
            )
        inside = path.relative_to(folder).as_posix()
        if found is not None and inside not in found:
            raise ConfigError(
                f"{key} {given}: is left out of the upload (excludes, .gitignore or .rayignore); move it elsewhere"
            )
        out.append(f"{key}={inside}")
    return out
