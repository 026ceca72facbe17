"""Jobs: submitted to a real Ray head that asks for a token, and every way to get that wrong."""

from __future__ import annotations

import asyncio
import http.server
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from ray.job_submission import JobStatus
from ray_head import ROOT, Head, ended, free_ports, started

from cluster import dashboard, submit, upload
from cluster.main import completed
from talk_dist.errors import ConfigError

pytestmark = pytest.mark.usefixtures("forking")

STUB = "import sys, time\nprint('job of', *sys.argv[1:], flush=True)\ntime.sleep(300)\n"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started() as head:
        yield head


def test_a_command_runs_as_a_job_and_its_end_is_the_exit_code(head: Head, tags, tmp_path: Path) -> None:
    failing = head.start("inspect", "/nowhere", cwd=tmp_path)
    out, err = head.call("inspect", tags[1].path, cwd=tmp_path)
    assert "60" in out
    assert err.rstrip().endswith("SUCCEEDED")
    assert "INFO" not in err
    out, err = ended(failing, code=1)
    assert "talk-dist inspect: /nowhere" in out
    assert "FAILED: Job entrypoint command failed with exit code 2" in err


def test_a_long_job_is_detached_followed_left_and_stopped(head: Head, tmp_path: Path) -> None:
    """Its code comes from the working directory, here a stub that sleeps: what was uploaded is what runs."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").touch()
    (tmp_path / "cluster" / "main.py").write_text(STUB)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text("outer: {steps: 3}\nout: /data/run\n")
    run = ["--working-dir", str(tmp_path), "--config", str(tmp_path / "configs" / "run.yaml"), "--job-id", "nap.1"]
    out, err = head.call(*run, "--detach", cwd=ROOT)
    assert out == "nap.1\n"
    assert "--logs nap.1" in err
    assert "has a job of this id already" in head.call(*run, cwd=ROOT, code=2)[1]

    following = head.start("--logs", "nap.1", cwd=ROOT)
    assert following.stdout is not None
    while not (line := following.stdout.readline()).startswith("job of"):
        assert line, following.communicate()[1]
    settings = ["--config=configs/run.yaml", "--runtime.kind=ray", "--cluster.address=auto"]
    assert line.split()[2:] == ["distill", *settings]
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=30)
    assert following.returncode == 130
    assert "job nap.1 goes on" in err
    assert "--stop nap.1" in err

    assert head.call("--stop", "nap.1", cwd=ROOT)[0] == "job nap.1: STOPPED\n"
    assert "has no job 'nap.2'; its jobs: " in head.call("--logs", "nap.2", cwd=ROOT, code=2)[1]


@pytest.mark.parametrize(
    ("token", "problem"),
    [("b" * 64, "refuses the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN, or"), ("", "asks for a token, and there is")],
)
def test_a_token_that_is_wrong_or_missing(head: Head, token: str, problem: str, tmp_path: Path) -> None:
    out, err = head.call("--version", cwd=tmp_path, token=token, code=2)
    assert problem in err
    assert not out
    assert len(err.splitlines()) == 1


# What follows needs no cluster.

ON_RAY = ["--runtime.kind", "ray", "--cluster.address", "auto"]
Told = Callable[..., str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """told(*arguments) -> the one line on stderr of a call that fails with exit code 2."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that what a call sets is undone

    def run(*arguments: str) -> str:
        assert submit.main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("cluster.submit: ")
        assert err.count("\n") == 1
        return err

    return run


def serve(version: str) -> Iterator[str]:
    """A server that says it is a dashboard of that Ray; without a version, one that is none."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "4", "ray_version": version} if version else {}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def ours() -> Iterator[str]:
    yield from serve(ray.__version__)


@pytest.fixture
def older() -> Iterator[str]:
    yield from serve("2.40.0")


@pytest.fixture
def other() -> Iterator[str]:
    yield from serve("")


def test_no_cluster(told: Told) -> None:
    started = time.monotonic()
    (port,) = free_ports(1)
    assert "no cluster answers at http://127.0.0.1" in told("--address", f"http://127.0.0.1:{port}", "--version")
    assert "no cluster answers at http://no-such-host:8265" in told("--address", "no-such-host:8265", "--version")
    assert time.monotonic() - started < 30
    assert "give the cluster's dashboard: --address" in told("--version")
    for address in ("ray://head:10001", "head", "http://head:port"):
        assert "give the dashboard as http://HEAD:8265" in told("--address", address, "--version")


def test_a_server_that_is_no_dashboard(told: Told, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "ANSWER_SECONDS", 0.5)
    assert "is not a Ray dashboard" in told("--address", other, "--version")
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts, and never says a word
        assert "is not a Ray dashboard" in told("--address", f"http://127.0.0.1:{server.getsockname()[1]}", "--version")


def test_another_version_of_ray(told: Told, older: str) -> None:
    problem = told("--address", older, "--version")
    assert f"runs Ray 2.40.0, this machine Ray {ray.__version__}" in problem


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--outer.lrr", "3", "--out", "/x"], "unknown setting '--outer.lrr'; the nearest known one is '--outer.lr'"),
        (["distil"], "unknown setting 'distil'; the nearest known one is 'distill'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--out", "runs/a"], "--out runs/a: a job's working directory is a copy"),
        (["--out", "/data/a", "--data", "prepared/a"], "such as /data/prepared/a"),
        (["inspect", "runs/a"], "--path runs/a: a job's working directory is a copy"),
        (
            ["prepare", "nodes.parquet", "--out", "/data/a"],
            "--nodes nodes.parquet: a job's working directory is a copy",
        ),
        (["export", "/data/a"], "--out: a job's working directory is deleted after it"),
        (["--logs"], "--logs: a value is missing"),
        (["--stop", "a", "--seed", "1"], "--stop takes no settings of a job; unexpected: '--seed'"),
        (["--job-id", "a b"], "letters, digits"),
    ],
)
def test_wrong_settings_need_no_cluster(arguments: list[str], problem: str, told: Told) -> None:
    assert problem in told("--address", "http://127.0.0.1:9", *arguments)


def test_a_config_must_be_uploaded(told: Told, ours: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("out: /data/run\n")
    work = tmp_path / "work"
    (work / "runs").mkdir(parents=True)
    (work / "runs" / "c.yaml").write_text("out: /data/run\n")
    call = ["--address", ours, "--working-dir", str(work), "--config"]
    assert f"c.yaml: lies outside of {work}" in told(*call, "c.yaml")
    assert "c.yaml: is left out of the upload" in told(*call, "work/runs/c.yaml")
    call = call[:-1]
    assert "--plan c.yaml: lies outside of" in told(*call, "compare", "c.yaml", "--out", "/data/run")
    tune = ["tune", "--data", "/data/a", "--out", "/data/run"]
    assert "--space c.yaml: lies outside of" in told(*call, *tune, "--space", "c.yaml")


@pytest.mark.parametrize("words", [["p.yaml", "--out", "/x"], ["--out", "/x", "p.yaml"], ["--plan=p.yaml", "--out=/x"]])
def test_a_plan_goes_by_its_place_in_the_upload(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plans").mkdir()
    monkeypatch.chdir(tmp_path / "plans")
    found = upload.rebased(submit.validated(["compare", *words]), tmp_path, {"plans/p.yaml": 1})
    assert set(found) == {"compare", "--plan=plans/p.yaml", "--out=/x"}


def test_an_upload_must_be_small(told: Told, ours: str, tmp_path: Path) -> None:
    for name, mib in (("data/a.bin", 80), ("data/b.bin", 15), ("models/c.bin", 10), ("runs/d.bin", 500)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / name, "wb") as file:
            file.truncate(mib * 1024**2)
    problem = told("--address", ours, "--out", "/data/run")
    assert "would be 105 MiB, and a Ray dashboard takes 100 MiB; largest: data/ 95 MiB, models/ 10 MiB" in problem
    assert "runs/" not in problem


class Cluster:
    """A job's log that breaks off after each of some pieces, and is sent from its start again."""

    def __init__(self, pieces: list[str], status: str = "SUCCEEDED"):
        self.log, self.tails, self.pieces = "".join(pieces), 0, pieces
        self.details = SimpleNamespace(submission_id="a", status=JobStatus(status), message="")

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.tails += 1
        yield "".join(self.pieces[: self.tails])
        if self.tails < len(self.pieces):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def list_jobs(self) -> list[SimpleNamespace]:
        return [self.details]


def test_a_log_goes_on_where_its_connection_broke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "PAUSE", 0.0)
    assert submit.show(Cluster(["one\n", "two\nth", "ree\n"]), "a", "http://head:1") == 0
    assert submit.show(Cluster(["four\n"], "STOPPED"), "a", "http://head:1") == 1
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


def test_a_cluster_that_goes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Cluster):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            yield "one\n"
            await asyncio.sleep(60)

    monkeypatch.setattr(submit, "PAUSE", 0.0)
    monkeypatch.setattr(submit, "SILENCE", 0.1)
    (port,) = free_ports(1)
    with pytest.raises(ConfigError, match=r"no cluster answers .*job a may be going on, follow it with: .*--logs a"):
        submit.show(Silent([], "RUNNING"), "a", f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("working_dir: .", "working_dir"), ("excludes: a", "excludes"), ("- a", "fields"), ("[", "read")],
)
def test_a_runtime_environment_that_cannot_be_used(text: str, problem: str, told: Told, tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text(text)
    call = ["--address", "http://127.0.0.1:9", "--out", "/a", "--runtime-env"]
    error = told(*call, "env.yaml")
    assert error.startswith("cluster.submit: --runtime-env env.yaml: ")
    assert problem in error
    assert "nowhere.yaml: cannot be read" in told(*call, "nowhere.yaml")


def test_the_runtime_environment_of_the_repository() -> None:
    """It is taken by itself, and says the same to a plain `ray job submit` as our own list does."""
    env = upload.runtime_env(ROOT, None)
    written = yaml.safe_load((ROOT / upload.RUNTIME_ENV).read_text())
    assert env == {**written, "working_dir": str(ROOT)}
    assert set(upload.EXCLUDES) <= set(written["excludes"])
    found = upload.listing(ROOT, env["excludes"])
    assert found is not None
    assert {"cluster/main.py", "talk_dist/data/prepare.py", "infra/runtime_env.yaml"} <= set(found)
    assert not [path for path in found if path.startswith(("runs/", ".git/")) or "__pycache__" in path]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["distill", *ON_RAY]),
        (["--seed", "1"], ["distill", "--seed", "1", *ON_RAY]),
        (["distill", "--runtime", "local"], ["distill", "--runtime", "local", "--cluster.address", "auto"]),
        (["--runtime.kind=ray", "--cluster.address=h:1"], ["distill", "--runtime.kind=ray", "--cluster.address=h:1"]),
        (["evaluate", "/a"], ["evaluate", "/a", *ON_RAY]),
        (["inspect", "x"], ["inspect", "x"]),
        (["--version"], ["--version"]),
    ],
)
def test_what_a_job_adds(arguments: list[str], words: list[str]) -> None:
    assert completed(arguments) == words


@pytest.mark.parametrize(
    "arguments",
    [["distill", "--out", "/data/a"], ["evaluate", "/data/a"], ["prepare", "python-api", "--out", "/data/p"]],
)
def test_what_a_job_adds_is_what_its_command_takes(arguments: list[str]) -> None:
    submit.validated(completed(arguments))
