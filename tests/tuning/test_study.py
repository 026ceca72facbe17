"""The study: killed anywhere and opened again, it asks what it would have asked."""

from __future__ import annotations

import random

import pytest
from optuna.trial import TrialState

from talk_dist.config import DistillConfig
from talk_dist.errors import ConfigError
from tuning import study as study_module
from tuning.findings import findings
from tuning.space import default_space, point_of, suggest
from tuning.study import Strategy, open_study

BASE, SPACE = DistillConfig(), default_space()
TRIALS, EPOCHS = 20, 3


class Killed(Exception):
    pass


class Mortal:
    """Asks an Optuna trial, if nothing kills it before."""

    def __init__(self, trial, maybe):
        self.trial, self.maybe = trial, maybe

    def __getattr__(self, name):
        self.maybe(0.1)
        return getattr(self.trial, name)


def sweep(path, sampler, chance, monkeypatch, seed=0):
    """Run to the end, killed with ``chance`` at every step of every trial; the trials, and the number of kills."""
    dice, kills = random.Random(seed), 0

    def maybe(share=1.0):
        if dice.random() < chance * share:
            raise Killed

    def mortal(space, trial, base):
        """A kill may come between two settings of a point as well."""
        return suggest(space, Mortal(trial, maybe), base)

    monkeypatch.setattr(study_module, "suggest", mortal)
    while True:
        study = open_study(str(path), "s", {"data hash": "x"}, SPACE, BASE, Strategy(sampler, seed=3))
        study.enqueue([point_of(SPACE, BASE, BASE)])
        try:
            while asked := study.ask(TRIALS):
                number, point = asked
                maybe()
                worth = -((point["inner.passes"] / 100 - 1) ** 2) - 100 * (point["inner.gnn_lr"] - 0.01) ** 2
                for epoch in range(EPOCHS):
                    if study.report(number, epoch, worth + 0.1 * epoch):
                        study.tell(number, "pruned")
                        break
                    maybe()
                else:
                    study.tell(number, "complete", accuracy=worth + 0.1 * EPOCHS, seconds=1.0)
                maybe()
            return study, kills
        except Killed:
            kills += 1
            with open(path, "ab") as journal:
                journal.write(b'{"op_code":8,"worker_id"')  # as a power cut leaves an append


def outcome(study):
    return [(t.number, t.state, t.params, t.values) for t in study.trials()]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_kills_change_nothing(tmp_path, monkeypatch, sampler):
    whole, none = sweep(tmp_path / "whole.journal", sampler, 0.0, monkeypatch)
    broken, kills = sweep(tmp_path / "broken.journal", sampler, 0.15, monkeypatch)
    assert none == 0
    assert kills >= 5
    assert outcome(broken) == outcome(whole)
    states = {trial.state for trial in whole.trials()}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(whole.trials()) == TRIALS
    assert whole.trials()[0].params == point_of(SPACE, BASE, BASE)


def test_another_sweep_under_the_same_name_is_refused_with_both_hashes(tmp_path):
    path = str(tmp_path / "s.journal")
    open_study(path, "s", {"data hash": "aaa"}, SPACE, BASE)
    with pytest.raises(ConfigError, match=r"data hash: 'aaa' there, 'bbb' now.*choose another --name"):
        open_study(path, "s", {"data hash": "bbb"}, SPACE, BASE)


@pytest.mark.parametrize("storage", ["/proc/nothing/s.journal", "sqlite:////nothing/s.db", "nonsense://s"])
def test_storage_that_cannot_be_written_is_told(storage):
    with pytest.raises(ConfigError, match=r"--storage .*: cannot be opened"):
        open_study(storage, "s", {}, SPACE, BASE)


def test_a_failed_trial_keeps_its_reason(tmp_path):
    study = open_study(f"sqlite:///{tmp_path}/s.db", "s", {}, SPACE, BASE)
    number, _ = study.ask(1)
    study.tell(number, "failed", reason="ConfigError: no")
    assert study.ask(1) is None
    assert study.best is None
    assert study.trials(TrialState.FAIL)[0].user_attrs["reason"] == "ConfigError: no"


def test_a_rung_lets_the_better_half_go_on_and_other_steps_everybody(tmp_path):
    study = open_study(str(tmp_path / "s.journal"), "s", {}, SPACE, BASE)
    values = [0.5, 0.4, 0.6, 0.3, 0.55, 0.6]
    for step in range(9):
        for number, value in enumerate(values):
            if step == 0:
                study.ask(len(values))
            come = sorted(values[: number + 1], reverse=True)
            worse = value < come[max(1, len(come) // 2) - 1]
            assert study.report(number, step, value) == (worse and step in (0, 2, 4, 8))


def test_what_was_enqueued_is_never_stopped(tmp_path):
    study = open_study(str(tmp_path / "s.journal"), "s", {}, SPACE, BASE)
    study.enqueue([point_of(SPACE, BASE, BASE)])
    for number in (0, 1, 2):
        assert study.ask(3)[0] == number
    assert [study.report(number, 0, value) for number, value in ((1, 0.9), (0, 0.1), (2, 0.5))] == [False, False, True]


def test_without_halving_nothing_is_stopped(tmp_path):
    study = open_study(str(tmp_path / "s.journal"), "s", {}, SPACE, BASE, Strategy(halving=False))
    for number, value in enumerate((0.5, 0.1)):
        study.ask(2)
        assert not study.report(number, 0, value)


def test_several_objectives_are_searched_for_together(tmp_path):
    path, strategy = str(tmp_path / "s.journal"), Strategy(objectives=("accuracy", "bytes"))
    study = open_study(path, "s", {}, SPACE, BASE, strategy)
    for accuracy, size in ((0.5, 10), (0.7, 30), (0.4, 20), (0.7, 40)):
        number, _ = study.ask(4)
        assert not study.report(number, 0, accuracy)
        study.tell(number, "complete", accuracy=accuracy, bytes=size, seconds=1.0)
    assert [trial.number for trial in study.raw.best_trials] == [0, 1]
    assert findings(study).front == [0, 1]
    assert study.best.number == 1
    with pytest.raises(ConfigError, match=r"objectives: \['accuracy', 'bytes'\] there, \['accuracy'\] now"):
        open_study(path, "s", {}, SPACE, BASE)


def test_points_that_wait_are_tried_first_even_if_a_kill_came_between_them(tmp_path):
    points = [point_of(SPACE, BASE, BASE) | {"kernel.layers": layers} for layers in (1, 2)]
    study = open_study(str(tmp_path / "s.journal"), "s", {}, SPACE, BASE)
    study.enqueue(points[:1])
    study.enqueue(points)
    assert [study.ask(3)[1] for _ in points] == points
    study.enqueue(points)
    assert study.ask(3)[1] not in points


def test_the_best_are_repeated_and_judged_by_that(tmp_path):
    """The trial that validated best by luck is not the best of the sweep."""
    path, start = str(tmp_path / "s.journal"), {"kernel.ridge": 0.1, **point_of(SPACE, BASE, BASE)}
    study = open_study(path, "s", {}, SPACE, BASE)
    study.enqueue([start])
    luck, truth = [0.50, 0.90, 0.70, 0.60], [0.52, 0.55, 0.65, 0.99]
    for accuracy in luck:
        number, point = study.ask(4)
        study.tell(number, "complete", accuracy=accuracy, ridge=point["kernel.ridge"])
    assert study.ask(4) is None
    assert study.best.number == 1
    study.confirm(2)
    assert "seed" not in study.trials()[0].user_attrs["pinned"]  # what is repeated stays what it was
    study = open_study(path, "s", {}, SPACE, BASE)
    study.confirm(2)  # killed and begun again: nothing twice
    assert study.repetitions_left == 6
    asked = []
    while again := study.ask(4):
        number, point = again
        original = study.trials()[number].user_attrs["confirms"]
        asked.append((original, point.pop("seed")))
        assert point == study.trials()[original].params
        assert not study.report(number, 0, 0.0)
        study.tell(number, "complete", accuracy=truth[original], ridge=point["kernel.ridge"])
    assert asked == [(original, BASE.seed + 1 + i) for original in (0, 1, 2) for i in (0, 1)]
    assert study.best.number == 2
    assert study.repeats(2) == [0.65, 0.65]
    assert study.repeats(3) == []
    assert len(study.searched) == 4
    study.confirm(2)
    assert study.ask(5)[0] == 10  # the search goes on after it
