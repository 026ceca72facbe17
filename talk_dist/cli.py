"""``talk-dist COMMAND``: the command line.

The dataclasses are the schema: `--section.key value` on the command line, the same names in a YAML file
(`--config`), and their docstrings as help. Later wins: preset, then the file, then the command line.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from talk_dist import __version__
from talk_dist.commands import compare, tune
from talk_dist.commands.call import Call
from talk_dist.commands.graphs import Estimate, Export, Inspect, Prepare
from talk_dist.commands.runs import Distill, Evaluate
from talk_dist.commands.settings import Command, read
from talk_dist.errors import TalkDistError
from talk_dist.runtime.callbacks import Stop
from talk_dist.schema import unknown_key

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "prepare", "check the tables of a graph, tokenise, partition and publish it", Prepare, ("nodes", "edges")
        ),
        Command("estimate", "memory and time of a distillation, before it runs", Estimate, ("data",), distill=True),
        Command("distill", "distil a graph into a synthetic one", Distill, distill=True, evaluation="evaluation"),
        Command(
            "evaluate",
            "compare students trained on an artifact, its rivals and everything",
            Evaluate,
            ("artifact",),
            evaluation="",
        ),
        compare.COMMAND,
        tune.COMMAND,
        Command("inspect", "what is in a prepared graph or an artifact", Inspect, ("path",)),
        Command("export", "write an artifact for torch-geometric", Export, ("artifact",)),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for an error of the user's, 130 or 143 after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    stop = Stop()
    try:
        if name in ("-h", "--help", "help"):
            print(overview())
            return 0
        if name == "--version":
            print(__version__)
            return 0
        if name not in COMMANDS:
            raise unknown_key(name, list(COMMANDS))
        with warnings.catch_warnings(), stop.on_signals():
            _plain_warnings()
            options, *configs = read(COMMANDS[name], arguments[1:])
            options.run(Call(arguments, stop), *(config for config in configs if config is not None))
        return 0
    except SystemExit as end:  # --help and --print_config of a command
        return int(end.code or 0)
    except KeyboardInterrupt:
        number = stop.signal or signal.SIGINT
        words = f"talk-dist {name}: stopped by {signal.Signals(number).name}. {stop.advice()}"
        print(f"\n{words}".rstrip(), file=sys.stderr)
        return 128 + number
    except TalkDistError as error:
        print(f"talk-dist {name}: {error}", file=sys.stderr)
    except BrokenPipeError:  # `talk-dist inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        full = code in FULL or "No space left" in str(error)
        if not full and code not in (*REFUSED, *IN_THE_WAY):
            raise
        first = "make room" if full else "change its permissions" if code in REFUSED else "move it away"
        advice = f"{first}, or choose another folder, and run the command again"
        print(f"talk-dist {name}: {error}; what was published before is whole: {advice}", file=sys.stderr)
    return 2


def overview() -> str:
    """What `talk-dist --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: talk-dist COMMAND [--config FILE] [--section.key VALUE ...]",
            "",
            "Distil a text-attributed graph into a synthetic one a hundredth of its size.",
            "",
            *lines,
            "",
            "talk-dist COMMAND --help lists its settings, --print_config prints them all as YAML.",
        ]
    )


def _plain_warnings() -> None:
    """Our own warnings as one line each; those of libraries are for developers."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"talk_dist\.")
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
