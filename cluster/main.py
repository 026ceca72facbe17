"""The entry point of a Ray job: ``python -m cluster.main [COMMAND] [settings]``.

The command line of talk-dist, on the cluster that the job runs on. A job that is started again with the same
settings goes on from its checkpoint, because that is what `--resume auto`, the default, does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from talk_dist import cli

DEFAULT = "distill"
ON_RAY = {
    "distill": {"runtime.kind": "ray", "cluster.address": "auto"},
    "tune": {"cluster.address": "auto"},
    "evaluate": {"runtime.kind": "ray", "cluster.address": "auto"},
}
"""What a job adds to commands that use the cluster: trials are spread over it, each in one process unless told
otherwise. The others read a folder and run in the job's own process."""
NO_COMMAND = ("-h", "--help", "--version")


def completed(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with a command, and with the cluster it runs on unless the command line names one.

    A YAML file does not count as naming one: `--print_config` writes `runtime: {kind: local}` for everybody, and
    whoever submits that file as a job means the cluster.
    """
    words = list(arguments)
    if not words or (words[0].startswith("-") and words[0] not in NO_COMMAND):
        words.insert(0, DEFAULT)
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    for name, value in ON_RAY.get(words[0], {}).items():
        if not given & {name, name.removesuffix(".kind")}:
            words += [f"--{name}", value]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is that of the command line."""
    return cli.main(completed(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
