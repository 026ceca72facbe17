"""Nodes and drivers that go, and an actor that eats: in processes of their own, each with its own Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_pool import SMALL, local_pool

from talk_dist.cli import main
from talk_dist.distill import distill
from talk_dist.synthetic.artifact import SyntheticTAG

pytestmark = pytest.mark.usefixtures("forking")


def run_script(name, *arguments, seconds=240, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, Path(__file__).with_name(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)


def test_a_node_that_is_removed_changes_nothing(four, make_encoder, tmp_path):
    """Three simulated nodes; one goes after the first epoch, with the actor on it."""
    encoder = make_encoder(adapters=True)
    expected = distill(local_pool(four, encoder), encoder, SMALL)
    done = run_script("lose_a_node.py", four.path, encoder.config.name, tmp_path / "found")
    assert done.returncode == 0, done.stderr
    found, report = SyntheticTAG.from_pretrained(tmp_path / "found"), json.loads(done.stdout.splitlines()[-1])
    assert report["nodes before"] == 3
    assert report["restarts"] >= 1
    assert found.token_embeds.equal(expected.as_stored().token_embeds)


def test_a_killed_driver_goes_on_to_the_same_result(four, encoder_folder, tmp_path):
    """SIGKILL after the first checkpoint; the same command again; as if nothing had been."""
    settings = [
        "--data", four.path, "--encoder.name", encoder_folder, "--encoder.pooling", "mean",
        "--encoder.adapters", "true", "--encoder.precision", "float32",
        "--synthetic.size", "6", "--synthetic.tokens", "4", "--synthetic.init", "random",
        "--student.hidden", "16", "--inner.passes", "15",
        "--outer.epochs", "3", "--outer.patience", "9", "--outer.steps", "2", "--runtime.threads", "1",
    ]  # fmt: skip
    assert main(["distill", *settings, "--out", str(tmp_path / "local")]) == 0
    on_ray = [sys.executable, "-m", "talk_dist", "distill", *settings, "--out", tmp_path / "ray", "--runtime", "ray"]
    on_ray += ["--cluster.actors", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(on_ray, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as driver:
        log = tmp_path / "ray" / "log.jsonl"
        end = time.monotonic() + 120
        while not (log.exists() and log.read_text()) and time.monotonic() < end and driver.poll() is None:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL
    done = subprocess.run(on_ray, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on with what .*checkpoint.safetensors holds: the start", done.stdout)
    tensors = [(tmp_path / name / "synthetic" / "synthetic.safetensors").read_bytes() for name in ("local", "ray")]
    assert tensors[0] == tensors[1]


def test_an_actor_killed_for_memory_is_named_with_what_was_expected(tags, encoder_folder):
    memory = psutil.virtual_memory()
    spare = max(0.12, (3 << 30) / memory.total)  # for what else runs meanwhile
    threshold = f"{1 - memory.available / memory.total + spare:.3f}"
    monitor = {"RAY_memory_usage_threshold": threshold, "RAY_memory_monitor_refresh_ms": "50"}
    done = run_script("run_out_of_memory.py", tags[1].path, encoder_folder, **monitor)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^shard 0 of .* \(60 nodes, 0 halo rows\) ran out of memory: estimate: 100 MiB, last seen with \d+ MiB; "
        r".*running low on memory.* To go on, prepare the graph in more --parts",
        done.stdout,
        flags=re.MULTILINE,
    ), done.stdout
