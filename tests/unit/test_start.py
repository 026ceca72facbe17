"""A start that is cut off anywhere, again and again, is the start that never was, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from talk_dist.config import DistillConfig
from talk_dist.distill import distill
from talk_dist.runtime.callbacks import Callback
from talk_dist.runtime.checkpoint import Checkpoint, DistillState, Starting
from talk_dist.synthetic import encodings, init

SETTINGS = {
    "kernel": {"block": 16},  # two blocks, whose students take turns
    "synthetic": {"size": 20, "tokens": 4, "storage": "float32"},
    "two_stage": {
        "feature_steps": 5,
        "student_steps": 4,
        "student_passes": 6,
        "judges": 1,
        "token_steps": 4,
        "token_error": 0.0,
        "validate_every": 2,
    },
    "inner": {"passes": 8},
    "outer": {"loss": "ce"},
}


class CutOff(BaseException):
    pass


class Cut(Callback):
    """Ends the run at its ``left``-th report of the start."""

    def __init__(self, left):
        self.left, self.stages = left, []

    def progress(self, stage, done, total, metrics):
        if stage in ("encodings", "tokens", "words"):
            self.stages.append((stage, done))
            self.left -= 1
            if self.left == 0:
                raise CutOff


class FondOfDistance:
    """A judge who prefers what is far from the first it saw, so that all that steps depend on shows in the result."""

    first = None

    def __call__(self, pool, h_s, *others):
        if self.first is None:
            self.first = h_s.clone()
        return 1.0 - 1.0 / (1.0 + float((h_s - self.first).double().norm()))


@pytest.mark.parametrize("discrete", [False, True])
def test_cut_off_again_and_again(make_encoder, make_pool, tmp_path, monkeypatch, discrete):
    """Each attempt is cut off one report after the next save: that this has an end shows that what is saved is used."""
    monkeypatch.setattr(init, "TOGETHER", 7)
    monkeypatch.setattr(Starting, "SHARE", float("inf"))  # all that may be saved is
    monkeypatch.setattr(encodings, "judged", FondOfDistance())
    tree = SETTINGS | {"synthetic": SETTINGS["synthetic"] | {"discrete": discrete, "tokens": 7 if discrete else 4}}
    config = DistillConfig.from_dict(tree | {"two_stage": SETTINGS["two_stage"] | {"discrete_steps": 3}})
    encoder, told = make_encoder(), Cut(0)
    expected = distill(make_pool(encoder, 2, architecture="sgc"), encoder, config, [told])
    checkpoint, resumed, repeated = Checkpoint(str(tmp_path / "state.safetensors"), {}), [], []
    for _attempt in itertools.count():
        saved = checkpoint.load()
        resumed += [saved.stage] if saved else []
        cut = Cut(5)
        try:
            found = distill(make_pool(encoder, 2, architecture="sgc"), encoder, config, [cut], checkpoint)
            break
        except CutOff:
            repeated += cut.stages
    assert list(dict.fromkeys(resumed)) == ["kernel", "students", "tokens"]
    assert len(resumed) < len(told.stages)
    assert found.token_embeds.equal(expected.token_embeds)
    for name in ("start", "val_accuracy"):
        assert found.metrics[name] == expected.metrics[name]
    assert dict.fromkeys(repeated + cut.stages).keys() == dict.fromkeys(told.stages).keys()
    state = checkpoint.load()
    assert isinstance(state, DistillState)
    assert state.start_seconds > 0


def test_saving_takes_no_more_than_its_share(tmp_path, monkeypatch):
    """However large the tensors are: the first time always, later only when enough time has passed."""
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("talk_dist.runtime.checkpoint.time.monotonic", lambda: next(now))
    checkpoint = Checkpoint(str(tmp_path / "state.safetensors"), {})
    starting, kept = Starting(checkpoint), []
    for step in range(20):
        starting.save("kernel", {"h_s": torch.zeros(2)}, step=step)
        kept.append(checkpoint.load().facts["step"])
    assert kept[0] == 0
    assert 2 <= len(set(kept)) <= 6
