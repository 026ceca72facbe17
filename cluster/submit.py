"""``python -m cluster.submit``: run a command of talk-dist as a job of a Ray cluster, from any machine.

    python -m cluster.submit --address http://HEAD:8265 --config run.yaml --out /data/runs/mygraph

The working directory goes along (code, configs; no data, no results), the settings are checked here first, and the
job's log is shown until it ends. Ctrl-C only stops watching.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import upload
from cluster.dashboard import address_of, connect, plainly, probe, reach
from cluster.main import NO_COMMAND, completed
from talk_dist.cli import COMMANDS
from talk_dist.commands.call import EMBEDDED
from talk_dist.commands.settings import named, read
from talk_dist.errors import ConfigError, TalkDistError
from talk_dist.schema import unknown_key

USAGE = """usage: python -m cluster.submit [options] [COMMAND] [--config FILE] [--section.key VALUE ...]
       python -m cluster.submit [--address URL] --logs JOB_ID | --stop JOB_ID

Run `talk-dist COMMAND` (distill, if none is named) as a job of a Ray cluster, and follow it.

  --address URL        the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS)
  --detach             print the job's id and return
  --job-id NAME        the job's id; a second job of that name is refused
  --working-dir DIR    what the cluster gets of this machine (default: the current directory)
  --runtime-env FILE   a Ray runtime environment (default: infra/runtime_env.yaml in DIR, if it is there)
  --logs JOB_ID        follow a job; with --detach, print what it has written and return
  --stop JOB_ID        stop a job

Exit code: 0 the job succeeded, 1 it failed or was stopped, 2 an error before, 130 Ctrl-C (the job goes on).
`python -m cluster.submit distill --help` lists the settings."""
SILENCE, ATTEMPTS, PAUSE, STOP_SECONDS = 30.0, 5, 1.0, 20.0


@dataclass
class Options:
    """What is not for the job."""

    address: str | None = None
    stop: str | None = None
    logs: str | None = None
    job_id: str | None = None
    working_dir: str = "."
    runtime_env: str | None = None
    detach: bool = False


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Our options, and the words for the job. Raises ConfigError."""
    options, rest, words = Options(), [], iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        name = key[2:].replace("-", "_") if key.startswith("--") and "_" not in key else ""
        if word == "--detach":
            options.detach = True
        elif name != "detach" and name in Options.__annotations__:
            value = value if equals else next(words, "--")
            if not value or value.startswith("--"):
                raise ConfigError(f"{key}: a value is missing")
            setattr(options, name, value)
        else:
            rest.append(word)
    if options.job_id and not re.fullmatch(r"[\w.-]+", options.job_id, re.ASCII):
        raise ConfigError(f"--job-id {options.job_id!r}: letters, digits, '.', '_' and '-' only")
    for name in ("logs", "stop"):
        if getattr(options, name) and rest:
            raise ConfigError(f"--{name} takes no settings of a job; unexpected: {rest[0]!r}")
    return options, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Submit, follow or stop a job; the exit code is what USAGE says."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] and arguments[0] in ("-h", "--help", "help"):
            print(USAGE)
            return 0
        options, rest = parse(arguments)
        if options.logs or options.stop:
            address = address_of(options.address)
            probe(address)
            client = connect(address)
            if options.stop:
                return stop(client, options.stop, address)
            return show(client, str(options.logs), address, follow=not options.detach)
        return submit(options, rest)
    except SystemExit as end:  # --help and --print_config of a command
        return int(end.code or 0)
    except TalkDistError as error:
        print(f"cluster.submit: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def submit(options: Options, rest: Sequence[str]) -> int:
    """Check everything here, upload, start the job, and follow it. Raises ConfigError or CapacityError."""
    words = validated(completed(rest))
    address = address_of(options.address)
    folder = Path(options.working_dir).resolve()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {options.working_dir}: is not a folder")
    env = upload.runtime_env(folder, options.runtime_env)
    probe(address)
    found = upload.listing(folder, env["excludes"])
    if found is not None:
        upload.check_size(folder, found)
    entrypoint = shlex.join(["python", "-m", "cluster.main", *upload.rebased(words, folder, found)])
    client = connect(address)
    if options.job_id:
        refuse_second(client, options.job_id, address)
    with plainly(address):
        job = client.submit_job(entrypoint=entrypoint, submission_id=options.job_id, runtime_env=env)
    again = shlex.join(["python", "-m", "cluster.submit", "--address", address])
    if options.detach:
        print(job)
        print(f"submitted; follow it: {again} --logs {job}, stop it: {again} --stop {job}", file=sys.stderr)
        return 0
    print(f"job {job}: {entrypoint}", file=sys.stderr)
    return show(client, job, address)


def validated(words: Sequence[str]) -> list[str]:
    """The words of a job, its settings by name. Raises ConfigError for settings that it would refuse, or that would
    lose its results."""
    name, *arguments = words
    if name in NO_COMMAND:
        return list(words)
    if name not in COMMANDS:
        raise unknown_key(name, list(COMMANDS))
    command, *_ = read(COMMANDS[name], arguments)
    if name == "export" and not command.out:
        raise ConfigError("--out: a job's working directory is deleted after it; name a file that the nodes share")
    for option in ("out", "data", "artifact", "path", "nodes", "edges", "ogb"):
        path = str(getattr(command, option, ""))
        embedded = option in ("data", "nodes") and path == EMBEDDED
        if path and not embedded and "://" not in path and not path.startswith(("/", "~")):
            raise ConfigError(
                f"--{option} {path}: a job's working directory is a copy without data and results, deleted after it; "
                f"give an absolute path on storage that the nodes share, such as /data/{path}"
            )
    return [name, *named(COMMANDS[name], arguments)]


def jobs_of(client: Any, address: str) -> dict[str, Any]:
    """What the cluster knows of the jobs that were submitted to it, by id."""
    with plainly(address):
        return {details.submission_id: details for details in client.list_jobs() if details.submission_id}


def refuse_second(client: Any, job: str, address: str) -> None:
    """Raises ConfigError if there is a job of that id already."""
    known = jobs_of(client, address)
    if job in known:
        raise ConfigError(
            f"--job-id {job}: the cluster has a job of this id already ({known[job].status.value}); choose another id "
            f"(the same --out goes on where the job ended), or follow that one with --logs {job}"
        )


def details_of(client: Any, job: str, address: str) -> Any:
    """What the cluster knows of a job. Raises ConfigError, which lists the jobs there are if it is none of them."""
    jobs = jobs_of(client, address)
    if job not in jobs:
        recent = ", ".join(list(jobs)[-5:]) or "none"
        raise ConfigError(f"{address} has no job {job!r}; its jobs: {recent}")
    return jobs[job]


def stop(client: Any, job: str, address: str) -> int:
    """Ask a job to end, and wait for that a while. Stopping a job that has ended is no error."""
    status = details_of(client, job, address).status
    ended = status.is_terminal()
    if not ended:
        with plainly(address):
            client.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while not status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
        status = details_of(client, job, address).status
    print(f"job {job}: {status.value}{' already' if ended else ''}")
    return 0


def show(client: Any, job: str, address: str, follow: bool = True) -> int:
    """A job's log and how it ended: 0 if it succeeded, else 1. Without ``follow`` what is there now, and 0."""
    details_of(client, job, address)
    again = f"{shlex.join(['python', '-m', 'cluster.submit', '--address', address])} --logs {job}"
    if not follow:
        with plainly(address):
            sys.stdout.write(client.get_job_logs(job))
        print(f"job {job}: {details_of(client, job, address).status.value}", file=sys.stderr)
        return 0
    try:
        asyncio.run(_tail(client, job, address))
        details = details_of(client, job, address)
    except KeyboardInterrupt:
        print(
            f"\njob {job} goes on; follow it:\n  {again}\nstop it:\n  {again.replace('--logs', '--stop')}",
            file=sys.stderr,
        )
        return 130
    except ConfigError as error:
        raise ConfigError(f"{error}; job {job} may be going on, follow it with: {again}") from error
    succeeded = details.status.value == "SUCCEEDED"
    reason = "" if succeeded else f": {(details.message or '').partition(chr(10))[0]}"
    print(f"job {job}: {details.status.value}{reason}", file=sys.stderr)
    return 0 if succeeded else 1


async def _tail(client: Any, job: str, address: str) -> None:
    """Print the log until the job has ended. A connection that breaks is made again, and nothing is printed twice.

    Raises ConfigError if the cluster cannot be reached any more.
    """
    shown = failures = 0
    while True:
        position, lines = 0, aiter(client.tail_job_logs(job))
        try:
            while (text := await _next(lines, address)) is not None:
                position += len(text)
                if position > shown:
                    sys.stdout.write(text[shown - position :])
                    sys.stdout.flush()
                    shown, failures = position, 0
            if details_of(client, job, address).status.is_terminal():
                return
        except Exception as error:  # aiohttp's, requests', Ray's: all mean that the connection broke
            failures += 1
            if failures >= ATTEMPTS:
                raise error if isinstance(error, ConfigError) else ConfigError(f"lost {address} ({error})") from error
        await asyncio.sleep(PAUSE)


async def _next(lines: Any, address: str) -> str | None:
    """The next piece of a log, None at its end. While there is none, a cluster that has gone is noticed."""
    step = asyncio.ensure_future(anext(lines, None))
    try:
        while not (await asyncio.wait({step}, timeout=SILENCE))[0]:
            await asyncio.to_thread(reach, address)
        return step.result()
    finally:
        step.cancel()


if __name__ == "__main__":
    sys.exit(main())
