"""Whatever dies, and whenever: the same x_s to the bit."""

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
from test_pool import SMALL, answers, local_pool, same

from talk_dist.distill import distill
from talk_dist.errors import ShardError
from talk_dist.runtime.callbacks import Callback
from talk_dist.synthetic.artifact import SyntheticTAG

TRAPS = [
    ("encode", 1),
    ("exchange-H", 0),
    ("propagate", 3),
    ("exchange-Z", 2),
    ("measure_norms", 0),
    ("loss_and_grads", 3),
    ("krr_scores", 1),
    ("student_stage", 2),
    ("exchange-X", 1),
]


class Setting(Callback):
    """Sets a third of the traps after each epoch, so that they spring one after another."""

    def __init__(self, trap):
        self.trap, self.left = trap, list(TRAPS)
        self.epoch({})

    def epoch(self, record):
        for phase, part in self.left[:3]:
            self.trap.set(phase, part)
        self.left = self.left[3:]


def test_actors_killed_in_every_phase_change_nothing(four, make_encoder, make_ray_pool, trap):
    encoder = make_encoder(adapters=True)
    expected = distill(local_pool(four, encoder), encoder, SMALL)
    pool = make_ray_pool(four, encoder, actors=2)
    try:
        found = distill(pool, encoder, SMALL, [Setting(trap)])
        restarts = pool.vitals().restarts
    finally:
        pool.close()
    assert trap.sprung()
    assert restarts == len(TRAPS)
    assert found.token_embeds.equal(expected.token_embeds)
    assert [r.get("loss") for r in found.metrics["history"]] == [r.get("loss") for r in expected.metrics["history"]]


def test_an_actor_that_always_dies_is_given_up_but_not_one_that_dies_now_and_then(
    tags, make_encoder, make_ray_pool, trap
):
    encoder = make_encoder()
    pool = make_ray_pool(tags[2], encoder, attempts=2)
    try:
        pool.encode({})
        for _ in range(2):
            trap.set("sample", 1)
            assert len(pool.sample(2, 0).label)
        trap.set("sample", 1)
        trap.set("propagate", 1)
        with pytest.raises(ShardError, match=r"shard 1 of .* \d+ halo rows\) was lost 2 times in one call"):
            pool.sample(2, 0)
        assert same(answers(pool, {}), answers(local_pool(tags[2], encoder), {}))  # it can still be asked
    finally:
        pool.close()


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
    command = [sys.executable, "-m", "talk_dist", "distill", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", tmp_path / "local"], check=True, capture_output=True, env=environment)
    on_ray = [*command, "--out", tmp_path / "ray", "--runtime", "ray"]
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
