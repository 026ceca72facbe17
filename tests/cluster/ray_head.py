"""A Ray head of a test's own, on free ports, that asks for a token; and calls of `cluster.submit` to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKEN = "a" * 64


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def without_ray() -> dict[str, str]:
    """The environment without what another Ray of this process has left there."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])  # jobs find our packages wherever they run
    return env | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@dataclass
class Head:
    """A Ray head of its own: its dashboard, and how to call `cluster.submit` with its token."""

    address: str
    home: str
    gcs: str
    """host:port for drivers."""

    def start(self, *arguments: str, cwd: Path, token: str = TOKEN) -> subprocess.Popen[str]:
        env = without_ray() | {"RAY_AUTH_TOKEN": token, "HOME": self.home}  # a home without a token file
        command = [sys.executable, "-m", "cluster.submit", "--address", self.address, *arguments]
        pipe = subprocess.PIPE
        # A job that a shell started in the background ignores SIGINT, and so would its children.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)

    def call(self, *arguments: str, cwd: Path, token: str = TOKEN, code: int = 0) -> tuple[str, str]:
        return ended(self.start(*arguments, cwd=cwd, token=token), code)


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What a call wrote, once it has ended as it should."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


@contextmanager
def started() -> Iterator[Head]:
    """The head, until the block ends. It takes ten seconds; only its own processes are ended."""
    folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # short: the sockets in it have paths of at most 107 bytes
    gcs, web, agent, client = free_ports(4)
    env = without_ray() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": str(folder)}
    ports = f"--port={gcs} --dashboard-port={web} --dashboard-agent-listen-port={agent}"
    words = f"start --head --block {ports} --ray-client-server-port={client} --min-worker-port=0 --max-worker-port=0"
    words += f" --num-cpus=2 --object-store-memory=100000000 --temp-dir={folder}/ray"
    with open(folder / "log", "w") as log:
        ray_cli = [sys.executable, "-m", "ray.scripts.scripts"]
        process = subprocess.Popen([*ray_cli, *words.split()], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        here = Head(f"http://127.0.0.1:{web}", str(folder), f"127.0.0.1:{gcs}")
        request = urllib.request.Request(f"{here.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.3)
        yield here
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # only this head's processes: others may run Ray here
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=4)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        shutil.rmtree(folder, ignore_errors=True)
