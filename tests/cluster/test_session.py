"""What can be wrong on a cluster is one clear error before any work: connection, room, nodes, folders."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray_head import ROOT, TOKEN, free_ports, started, without_ray

from cluster import session
from cluster.session import RaySession, check_nodes, compare
from talk_dist.cli import main
from talk_dist.config import DistillConfig
from talk_dist.data import storage
from talk_dist.data.tag import PreparedTag
from talk_dist.errors import CapacityError, ConfigError, DataError
from talk_dist.resources import ClusterConfig, DeepSpeedConfig, RuntimeConfig
from talk_dist.synthetic.artifact import SyntheticTAG

pytestmark = pytest.mark.usefixtures("forking")

SMALL = "--encoder.pooling mean --encoder.precision float32 --synthetic.size 6 --synthetic.tokens 5 --inner.passes 5 "
SMALL += "--synthetic.init random --outer.epochs 0 --runtime.threads 1 --runtime.cache false"
PLAN = SimpleNamespace(actor=lambda parts, borrows: SimpleNamespace(host=100 << 20))
PATIENT = ["--cluster.wait_seconds", "100000"]  # whoever waits for room fails the test


def words(tag, encoder_folder, out):
    return ["distill", "--data", str(tag), "--encoder.name", str(encoder_folder), "--out", str(out), *SMALL.split()]


@pytest.fixture
def told(capsys):
    """told(*arguments) -> the one line on stderr of a command that fails with exit code 2."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(word) for word in arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len([line for line in error if line.startswith("talk-dist ")]) == 1
        assert "Traceback" not in "".join(error)
        return error[-1]

    return run


def start(arguments, **environment):
    """The command line in a process of its own."""
    env = without_ray() | {"HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-m", "talk_dist", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def refused(process):
    """What it says as it ends with exit code 2: one line, and not what Ray thinks of it."""
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), error
    (line,) = error.strip().splitlines()
    return line


# -- the connection -------------------------------------------------------------------------------------------


@pytest.fixture
def website():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_addresses_where_no_cluster_is(website, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was left to find out, which takes it 20 seconds"))
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    for address, problem in (
        ("ray://head:10001", "the driver must run in the cluster. Submit it as a job: python -m cluster.submit"),
        ("http://head:8265", "the driver must run in the cluster"),
        (nobody, r"nothing answers there \(.*refused\); give host:port of a Ray head"),
        ("head", "nothing answers there .*; give host:port"),
        ("127.0.0.1:none", "nothing answers there .*; give host:port"),
        (website, "what answers there is no Ray head .*; give host:port"),
    ):
        with pytest.raises(ConfigError, match=f"cluster.address = '{address}': {problem}"):
            session._connect(address)


def test_a_token_that_the_head_does_not_know(tmp_path):
    home = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    with started() as head:
        arguments = ["distill", "--data", str(tmp_path), "--runtime", "ray", "--cluster.address", head.gcs]
        stranger = start([*arguments, "--out", str(tmp_path / "a")], RAY_AUTH_TOKEN="b" * 64, **home)
        friend = start([*arguments, "--out", str(tmp_path / "b")], RAY_AUTH_TOKEN=TOKEN, **home)
        line = refused(stranger)
        assert "is not a prepared TAG" in refused(friend)  # it was let in
    assert f"cluster.address = '{head.gcs}': no Ray cluster lets us in there (InvalidAuthToken" in line
    assert "set RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are set on its head" in line


def test_ray_is_not_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")  # as if it were not there
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    line = refused(start(["distill", "--runtime", "ray", "--out", str(tmp_path / "run")], PYTHONPATH=path))
    assert line.endswith("runtime.kind = 'ray': Ray is not installed; pip install \"talk-dist[ray]\"")


def test_workers_without_a_cluster(told, tmp_path):
    line = told("distill", "--deepspeed.workers", "2", "--out", tmp_path)
    assert line == "talk-dist distill: deepspeed.workers: the workers live on a cluster; add --runtime ray"


# -- room -----------------------------------------------------------------------------------------------------


def test_a_ray_of_our_own_that_is_too_small(tags, encoder_folder, tmp_path):
    arguments = words(tags[2].path, encoder_folder, tmp_path / "run")
    arguments += ["--runtime", "ray", "--cluster.actors", "2", "--cluster.gpus", "1", *PATIENT]
    line = refused(start(arguments, CUDA_VISIBLE_DEVICES=""))
    assert "no room for the shards: 2 × (1 CPU and 1 GPU and " in line
    assert "2 GPU (it has 0 GPU, 0 GPU free)" in line
    assert "Nothing can join a Ray that was started for this run: lower cluster.actors" in line


@pytest.mark.parametrize(
    ("workers", "runs", "actors", "gpus"),
    [(0, 1, 4, 1), (2, 1, 2, 1), (0, 4, 1, 1), (0, 2, 2, 1), (1, 2, 1, 1)],
)
def test_gpus_of_workers_and_of_other_runs_are_not_given_twice(monkeypatch, workers, runs, actors, gpus):
    """Four nodes with a GPU each."""
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}} for _ in range(4)]
    monkeypatch.setattr(session.ray, "nodes", lambda: nodes)
    config = DistillConfig(deepspeed=DeepSpeedConfig(workers=workers, gpus=1.0))
    found = RaySession(config, ExitStack()).allotment(SimpleNamespace(num_parts=4), PLAN, runs)
    assert (len(found.parts), found.gpus) == (actors, gpus)
    assert nodes[0]["Resources"] == {"CPU": 8.0, "GPU": 1.0}


def test_a_cluster_that_starts_workers_when_asked_says_what_it_cannot_know(monkeypatch, capsys):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 0.0}}])

    def allotted(**cluster):
        config = DistillConfig(cluster=ClusterConfig(**cluster))
        return RaySession(config, ExitStack()).allotment(SimpleNamespace(num_parts=4), PLAN)

    assert (allotted().cpus, allotted().gpus) == (1, 0)
    assert "say what your nodes have with --cluster.cpus and --cluster.gpus" in capsys.readouterr().err
    assert (allotted(cpus=8, gpus=1).cpus, allotted(cpus=8, gpus=1).gpus) == (8, 1)
    assert not capsys.readouterr().err


def test_a_run_that_goes_on_has_its_threads_on_its_share_of_the_cores(one_ray, tags, make_encoder):
    session = RaySession(DistillConfig(cluster=ClusterConfig(actors=2, cpus=1)), ExitStack())
    pool = session.pool(tags[2], make_encoder(), PLAN, threads=3)
    try:
        assert (pool._crew.allotment.cpus, pool._crew.allotment.threads) == (1, 3)
        assert torch.get_num_threads() == 3
    finally:
        session.stack.close()
        torch.set_num_threads(1)


def test_encoder_workers_and_shards_share_the_room(one_ray, tags, make_encoder):
    """8 cores are there."""

    def opened(workers, cpus, actors=2):
        cluster = ClusterConfig(actors=actors, cpus=3, wait_seconds=1e5)
        runtime, group = RuntimeConfig(threads=1), DeepSpeedConfig(workers=workers, cpus=cpus)
        return RaySession(DistillConfig(runtime=runtime, cluster=cluster, deepspeed=group), ExitStack(), own=True)

    with pytest.raises(
        CapacityError, match=r"the encoder workers: 3 × \(4 CPU\) .* 12 CPU \(it has 8 .*lower deepspeed"
    ):
        opened(3, 4).encoder()
    for too_much in (opened(3, 1), opened(0, 0, actors=7)):
        with pytest.raises(CapacityError, match=r"no room for the shards: \d × \(3 CPU .*lower cluster\.actors"):
            too_much.pool(tags[7], make_encoder(), PLAN)
    roomy = opened(2, 1)
    roomy.pool(tags[2], make_encoder(), PLAN)
    roomy.stack.close()


# -- the nodes ------------------------------------------------------------------------------------------------

OURS = {"versions": {"Python": "3.11", "torch": "2.13.0", "talk_dist": "version 0123abcd of"}, "meta": b"{}"}


@pytest.mark.parametrize(
    ("theirs", "problems"),
    [
        (OURS, []),
        ({"error": "ModuleNotFoundError: No module named 'cluster'"}, ["cannot run our code: ModuleNotFoundError: No"]),
        ({"versions": {"torch": None}}, [" has no torch, the driver has 2.13.0: install the same version there"]),
        ({"versions": {"torch": "2.8.0"}}, [" has 2.8.0 torch, the driver has 2.13.0"]),
        ({"versions": {"talk_dist": None}}, [" has no talk_dist, the driver has version 0123abcd of"]),
        (
            {"versions": {"talk_dist": "version ffff of"}},
            [" has version ffff of talk_dist, the driver has version 0123"],
        ),
        ({"meta": None}, [" does not see /data/tag: put it on storage that every node sees (NFS, s3://, gs://)"]),
        ({"meta": b"{ }"}, [" has another prepared graph at /data/tag: copy the same one to every node"]),
        ({"versions": {"Python": "3.12"}, "meta": None}, [" has 3.12 Python", " does not see /data/tag"]),
    ],
)
def test_what_is_different_on_a_node(theirs, problems):
    reply = theirs if "error" in theirs else OURS | theirs | {"versions": OURS["versions"] | theirs.get("versions", {})}
    found = compare({"10.0.0.1/aa": OURS, "10.0.0.2/bb": reply}, OURS, b"{}", "/data/tag")
    assert len(found) == len(problems)
    for line, problem in zip(found, problems, strict=True):
        assert line.startswith("node 10.0.0.2/bb ")
        assert problem in line


def test_nodes_that_see_what_we_see(one_ray, tags, monkeypatch):
    check_nodes(tags[2], 60)
    check_nodes(PreparedTag(f"file://{tags[2].path}"), 60)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: b"{}")
    with pytest.raises(DataError, match=r"the cluster: node .* has another prepared graph at "):
        check_nodes(tags[2], 60)


def test_an_encoder_folder_that_workers_cannot_see(one_ray, tags, encoder_folder, told, tmp_path, monkeypatch):
    """Gone when the actors load it, which is what a folder of the driver's own disk is to another node."""
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    pool = session.RayPool

    def hide(*arguments):
        folder.rename(tmp_path / "elsewhere")
        return pool(*arguments)

    monkeypatch.setattr(session, "RayPool", hide)
    line = told(*words(tags[2].path, folder, tmp_path / "run"), "--runtime", "ray", "--cluster.actors", "1")
    assert line.startswith(f"talk-dist distill: encoder '{folder}' cannot be loaded")


def test_a_run_whose_folders_are_all_uris(one_ray, tags, encoder_folder, tmp_path):
    arguments = words(f"file://{tags[2].path}", encoder_folder, f"file://{tmp_path}/run")
    on_ray = ["--runtime", "ray", "--cluster.actors", "1"]
    assert main([*arguments, *on_ray]) == 0
    evaluation = ["--data", arguments[2], "--against", "medoid", "--seeds", "1", "--recipe.passes", "5"]
    tables = []
    for where in ([], on_ray):
        assert main(["evaluate", f"file://{tmp_path}/run", *evaluation, *where]) == 0
        tables.append(SyntheticTAG.from_pretrained(tmp_path / "run" / "synthetic").metrics["evaluation"]["markdown"])
    assert tables[0] == tables[1]
    assert {path.name for path in Path(tmp_path, "run").iterdir()} == {
        "attempt.json", "checkpoint.safetensors", "log.jsonl", "synthetic"
    }  # fmt: skip
