"""A run that is stopped in any way, at any moment, and gone on with is the run that never stopped, to the bit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from talk_dist.cli import main
from talk_dist.runtime.callbacks import ProgressLines

FORKS = multiprocessing.get_context("forkserver")  # real processes that need not import torch again
EPOCHS = 3


def run_quietly(arguments, output):
    """In a child process: the command line, its words in a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def forks():
    FORKS.set_forkserver_preload(["talk_dist.cli", "transformers.models.bert.modeling_bert", "peft", __name__])
    return FORKS


MODES = {
    "frozen": ["--synthetic.init", "two-stage", "--two_stage.feature_steps", "20", "--two_stage.token_steps", "20",
               "--two_stage.student_steps", "2", "--two_stage.student_passes", "10"],
    "adapters": ["--encoder.adapters", "true", "--synthetic.learn_labels", "true", "--synthetic.init", "medoid",
                 "--encoder.dropout", "0.3", "--outer.dropout", "true", "--outer.targets", "teacher"],
}  # fmt: skip


@pytest.fixture(scope="module")
def command(tags, encoder_folder):
    """command(mode, out) -> the arguments of a small distillation."""

    def arguments(mode, out):
        settings = {
            "data": tags[2].path,
            "out": out,
            "encoder.name": encoder_folder,
            "encoder.pooling": "mean",
            "encoder.precision": "float32",
            "synthetic.size": 7,
            "synthetic.tokens": 6,
            "synthetic.storage": "float32",
            "inner.passes": 12,
            "outer.epochs": EPOCHS,
            "outer.steps": 4,
            "outer.lr": 0.0005,
            "outer.inject_batch": 3,
            "outer.patience": EPOCHS + 1,
            "runtime.threads": 1,
            "runtime.cache": "false",
        }
        pairs = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return ["distill", *pairs, *MODES[mode]]

    return arguments


@pytest.fixture(scope="module", params=MODES)
def whole(request, command, forks, tmp_path_factory):
    """(mode, folder, seconds) of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    process = forks.Process(target=run_quietly, args=(command(request.param, out), out.with_name("words")))
    process.start()
    _wait_for(lambda: process.exitcode is not None or _epochs(out) >= 1)
    started = time.monotonic()
    process.join()
    assert process.exitcode == 0, out.with_name("words").read_text()
    return request.param, out, time.monotonic() - started


def test_every_signal_at_random_moments(whole, command, forks, tmp_path):
    mode, reference, seconds = whole
    out, words = tmp_path / "run", tmp_path / "words"
    rng = random.Random(mode)
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGKILL]
    stopped = 0
    for attempt in range(20):
        words.unlink(missing_ok=True)
        process = forks.Process(target=run_quietly, args=(command(mode, out), words))
        process.start()
        number = signals[attempt % len(signals)]
        if attempt < 6:
            before = _epochs(out)
            wanted = min(before + attempt % 2, EPOCHS)  # now and then before the next epoch ends
            _wait_for(lambda p=process, w=wanted: p.exitcode is not None or (_epochs(out) >= w and words.exists()))
            time.sleep(rng.uniform(0.0, 1.2 * seconds / EPOCHS))
            with contextlib.suppress(ProcessLookupError):  # it is over
                os.kill(process.pid, number)
        process.join()
        if process.exitcode == 0:
            break
        stopped += 1
        said = words.read_text()
        under_way = said and not (out / "synthetic").exists()  # else it may have died while Python starts or ends
        if number != signal.SIGKILL and under_way:
            assert process.exitcode == 128 + number, said
            assert number.name in said
            assert "Traceback" not in said
    assert process.exitcode == 0, words.read_text()
    assert stopped >= 2
    _assert_same_run(out, reference)


def test_the_advice_is_a_command_that_goes_on(command, tmp_path, capsys):
    """Once with the real program: Ctrl-C, its exit code, and the very words it says to type, though a file says never
    to go on."""
    (tmp_path / "never.yaml").write_text("resume: never\nouter: {epochs: 12, patience: 13}\n")
    words = [*command("frozen", tmp_path / "run"), "--config", str(tmp_path / "never.yaml")]
    words = [sys.executable, "-m", "talk_dist", *words]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: process.poll() is not None or _epochs(tmp_path / "run") >= 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "checkpoint.safetensors holds" in errors  # the epoch of the log may not be saved yet
    advice = errors.strip().splitlines()[-1].split()
    assert advice[:2] == ["talk-dist", "distill"]
    assert main(advice[1:]) == 0
    assert "going on with what" in capsys.readouterr().out
    assert (tmp_path / "run" / "synthetic" / "config.json").exists()


def test_a_start_that_is_stopped_says_what_is_kept_and_goes_on(command, told, tmp_path, monkeypatch):
    told(*command("frozen", tmp_path / "whole"))
    report = ProgressLines.progress

    def stop(lines, stage, done, total, metrics):
        report(lines, stage, done, total, metrics)
        if stage == "tokens":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(ProgressLines, "progress", stop)
        _, err = told(*command("frozen", tmp_path / "run"), code=130)
    assert "checkpoint.safetensors holds a part of the start; go on with:" in err
    with monkeypatch.context() as patched:
        patched.setattr(ProgressLines, "progress", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        shutil.copytree(tmp_path / "run", tmp_path / "over")
        _, err = told(*command("frozen", tmp_path / "over"), "--seed", "9", "--resume", "never", code=130)
    assert "Nothing is saved yet; go on with:" in err
    assert "--seed 9 --resume never" in err  # what lies there is still of the other
    out, err = told(*command("frozen", tmp_path / "run"))
    assert "checkpoint.safetensors holds: a part of the start" in out
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_with_its_threads_wherever_it_does(command, told, tmp_path, monkeypatch):
    """Where the settings leave them open: on another machine, or on fewer nodes, there are others. The process that
    called has its own afterwards."""
    heard = []

    def listen(_, stage, *__):
        heard.append(torch.get_num_threads())

    def stop(_, stage, *__):
        if stage == "tokens":
            os.kill(os.getpid(), signal.SIGINT)

    # short, because two threads spin where two workers share the cores
    short = "--runtime.threads 0 --two_stage.feature_steps 4 --two_stage.student_steps 0 --outer.epochs 0"
    line = [*command("frozen", tmp_path / "run"), *short.split()]
    try:
        torch.set_num_threads(2)
        with monkeypatch.context() as patched:
            patched.setattr(ProgressLines, "progress", stop)
            told(*line, code=130)
        monkeypatch.setattr(ProgressLines, "progress", listen)
        for here, more, used in ((1, [], 2), (2, ["--resume", "never"], 2), (1, ["--resume", "never"], 1)):
            torch.set_num_threads(here)
            heard.clear()
            told(*line, *more)
            assert set(heard) == {used}  # what is replaced says nothing
            assert torch.get_num_threads() == here
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--outer.lr", "0.01"], "outer.lr: 0.0005 there, 0.01 now"),
        (["--seed", "3"], "seed: 0 there, 3 now"),
        (["--synthetic.size", "8"], "synthetic.size: 7.0 there, 8.0 now"),
        (["--runtime.threads", "2"], "threads: 1 there, 2 now"),
        (["--data", "OTHER"], "data hash"),
    ],
)
def test_another_run_is_refused_and_named(whole, command, tags, capsys, changed, named):
    mode, out, _ = whole
    other = [str(tags[7].path) if word == "OTHER" else word for word in changed]
    before = (out / "checkpoint.safetensors").read_bytes()
    try:
        assert main([*command(mode, out), *other]) == 2
    finally:
        torch.set_num_threads(1)
    error = capsys.readouterr().err
    assert named in error
    assert "--resume never" in error
    assert "Traceback" not in error
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_says_what_to_do(command, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoint.safetensors").write_bytes(b"cut short")
    assert main(command("frozen", out)) == 2
    assert "--resume never" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again(whole, command, capsys):
    mode, out, _ = whole
    log = (out / "log.jsonl").read_bytes()
    tensors = (out / "synthetic" / "synthetic.safetensors").read_bytes()
    assert main(command(mode, out)) == 0
    assert f"holds: the start and {EPOCHS} epochs" in capsys.readouterr().out
    assert (out / "log.jsonl").read_bytes() == log
    assert (out / "synthetic" / "synthetic.safetensors").read_bytes() == tensors


def _epochs(out: Path) -> int:
    try:
        return len((out / "log.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def _wait_for(condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def _assert_same_run(out, reference):
    name = "synthetic/synthetic.safetensors"
    assert (out / name).read_bytes() == (reference / name).read_bytes()
    mine, truth = (load_file(folder / "checkpoint.safetensors") for folder in (out, reference))
    assert mine.keys() == truth.keys()
    assert all(mine[name].equal(truth[name]) for name in truth)
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (out, reference)]
    for record in [*logs[0], *logs[1]]:
        del record["seconds"], record["vitals"]
    assert logs[0] == logs[1]
