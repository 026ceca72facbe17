"""The space of a sweep: every point is a configuration, and a YAML that cannot work is refused at once."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from optuna.trial import FixedTrial

from talk_dist.config import DistillConfig
from talk_dist.errors import ConfigError
from talk_dist.presets import preset
from tuning.space import Nearby, Parameter, configured, default_space, drawn, leaves, point_of, read_space, suggest


def anywhere(seed):
    """Stands for an Optuna trial: every setting from its whole range."""
    return Nearby({}, np.random.default_rng(seed))


@pytest.mark.parametrize("adapters", [False, True])
def test_every_point_is_a_configuration_that_differs_there_alone(adapters):
    base = configured(DistillConfig(), {"encoder.adapters": adapters})
    for seed in range(40):
        point = suggest(default_space(), anywhere(seed), base)
        before, after = dict(leaves(base.to_dict())), dict(leaves(configured(base, point).to_dict()))
        assert {key for key in after if after[key] != before[key]} <= point.keys()
        assert all(after[key] == value for key, value in point.items())
        assert ("inner.adapter_lr" in point) == adapters
        assert ("two_stage.token_steps" in point) == (point["synthetic.init"] == "two-stage")


@pytest.mark.parametrize("changed", [{}, {"encoder.adapters": True}, {"outer.epochs": 2}, {"outer.epochs": 0}])
@pytest.mark.parametrize("name", ["default", "paper"])
def test_the_presets_lie_in_the_space_or_next_to_it(name, changed):
    """Of whatever sweep: a start-up trial leaves nothing to chance."""
    space, base = default_space(), configured(preset(), changed)
    point = point_of(space, preset(name), base)
    assert suggest(space, FixedTrial(point), base) == point
    for parameter in space:
        assert parameter.key not in point or parameter.holds(point[parameter.key])
    assert point["kernel.ridge"] == max(preset(name).kernel.ridge, 1e-4)


def test_outer_steps_are_asked_for_where_there_are_outer_epochs():
    """Whether there are any follows from the point itself where the setting is left open."""
    seen = set()
    for seed in range(40):
        point = suggest(default_space(), anywhere(seed), preset())
        epochs = point["synthetic.init"] == "medoid" or point["synthetic.learn_labels"]
        assert ("outer.lr" in point) == ("outer.steps" in point) == epochs
        assert ("outer.label_lr" in point) == point["synthetic.learn_labels"]
        seen.add(epochs)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("epochs", "tree", "asked"),
    [
        (None, {}, True),
        (4, {}, True),
        (0, {}, False),
        (4, {"outer.epochs": [0, 2]}, False),
        (4, {"outer.epochs": 0}, False),
        (0, {"outer.epochs": [1, 2]}, False),
    ],
)
def test_labels_are_learned_only_where_there_are_outer_epochs(epochs, tree, asked):
    """Where some points have none, a trial that is to learn labels there would fail."""
    base = configured(preset(), {"outer.epochs": epochs})
    space, fixed = read_space(tree, base)
    assert ("synthetic.learn_labels" in {parameter.key for parameter in space}) == asked
    for seed in range(20):
        suggest(space, anywhere(seed), configured(base, fixed))  # raises where a point is no configuration


def test_given_encodings_have_one_token_and_none_to_find():
    base = configured(preset(), {"encoder.name": "given:8", "synthetic.tokens": 1})
    texts, given = ({p.key for p in read_space({}, config)[0]} for config in (preset(), base))
    assert texts - given == {"synthetic.tokens", "two_stage.token_steps"}
    assert given < texts


def test_a_yaml_narrows_fixes_extends_and_drops():
    tree = {
        "kernel.ridge": {"low": "1e-2"},  # what YAML makes of 1e-2
        "outer.loss": "ce",
        "student.hidden": [64, 256],
        "outer.lr": None,
        "inner.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True, "when": {"student.hidden": 64}},
    }
    space, fixed = read_space(tree, DistillConfig())
    by_key = {parameter.key: parameter for parameter in space}
    assert by_key["kernel.ridge"] == Parameter("kernel.ridge", 1e-2, 1.0, log=True)
    assert fixed == {"outer.loss": "ce"}
    assert {"outer.loss", "outer.lr"}.isdisjoint(by_key)
    assert by_key["student.hidden"].choices == (64, 256)
    assert by_key["inner.weight_decay"].when == {"student.hidden": (64,)}
    assert list(by_key)[-2:] == ["student.hidden", "inner.weight_decay"]  # asked before what it allows


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"kernel.rigde": [1, 2]}, "unknown setting 'kernel.rigde'; the nearest known one is 'kernel.ridge'"),
        ({"kernel.ridge": {"low": 2.0}}, "kernel.ridge: the range from 2.0 to 1.0 is empty"),
        ({"kernel.ridge": {"low": 0.0}}, "kernel.ridge: a logarithmic range must be above 0"),
        ({"outer.loss": []}, "outer.loss: no choices"),
        ({"outer.lr": {"min": 1}}, "outer.lr.min: unknown; a range has low, high, log and when"),
        ({"outer.lr": {"low": "a"}}, "must be numbers"),
        ({"outer.lr": {"when": {"outer.los": "ce"}}}, "the nearest known one is 'outer.lr.when.outer.loss'"),
        ({"kernel.hops": [0, 1]}, "kernel.hops = 0: at least 1"),
        ({"kernel.architecture": ["sgc", "gnc"]}, "kernel.architecture = 'gnc': must be one of gcn, sgc"),
        ({"outer.loss": "cee"}, "outer.loss = 'cee': must be one of mse, ce"),
        ({"two_stage.feature_steps": {"low": 1.5}}, "two_stage.feature_steps = 1.5: must be a whole number"),
        ({"outer.lr": {"when": "gcn"}}, "outer.lr.when = 'gcn': give settings and their values"),
        ({3: [1]}, "unknown setting '3'"),
        ({"student.dropout": {"low": 0.1, "high": 1.5}}, "student.dropout = 1.5: in [0, 1)"),
        ({"encoder.targets": [["query"], ["query", "value"]]}, "encoder.targets: ['query'] cannot be a choice"),
        (
            {"outer.lr": {"when": {"outer.steps": 2}}, "outer.steps": {"when": {"outer.lr": 1e-3}}},
            "the conditions of outer.lr, outer.steps wait for one another",
        ),
    ],
)
def test_a_space_that_cannot_work_is_refused(tree, problem):
    with pytest.raises(ConfigError) as error:
        read_space(tree, DistillConfig())
    assert problem in str(error.value)


def test_numbers_that_yaml_reads_as_texts_are_numbers():
    """Its numbers with an exponent need a point."""
    tree = {"outer.lr": "1e-3", "kernel.ridge": ["1e-3", "1e-2"], "two_stage.feature_steps": {"low": "1e2"}}
    space, fixed = read_space(tree, DistillConfig())
    by_key = {parameter.key: parameter for parameter in space}
    assert fixed == {"outer.lr": 1e-3}
    assert by_key["kernel.ridge"].choices == (1e-3, 1e-2)
    assert by_key["two_stage.feature_steps"].whole
    assert by_key["two_stage.feature_steps"].low == 100


@pytest.mark.parametrize("first", ["inner.weight_decay", "student.hidden"])
def test_a_condition_is_looked_at_after_what_it_names(first):
    """In whichever order they are written, of added settings and of those of the default space."""
    added = {
        "inner.weight_decay": {"low": 1e-5, "high": 1e-2, "log": True, "when": {"student.hidden": 256}},
        "student.hidden": [128, 256],
    }
    tree = {first: added[first]} | added | {"synthetic.tokens": {"choices": [8, 16], "when": {"outer.loss": "ce"}}}
    base = DistillConfig()
    space, _ = read_space(tree, base)
    for number in range(40):
        point = suggest(space, anywhere(number), base)
        assert ("inner.weight_decay" in point) is (point["student.hidden"] == 256)
        assert ("synthetic.tokens" in point) is (point["outer.loss"] == "ce")


def test_points_that_are_no_configuration_are_drawn_again():
    base = DistillConfig()
    space, _ = read_space({"synthetic.discrete": [False, True], "student.hidden": [128, 256]}, base)
    points = [drawn(space, itertools.repeat(anywhere(number)), base) for number in range(30)]
    assert all(configured(base, point) for point in points)
    assert {point["synthetic.discrete"] for point in points} == {False, True}
    never = Nearby({"synthetic.discrete": True, "synthetic.init": "medoid"}, np.random.default_rng(0), change=0.0)
    with pytest.raises(ConfigError, match=r"hardly a point of it is a configuration.*synthetic[.]discrete"):
        drawn(space, [never, never], base)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        read_space({"outer.loss": [], "kernel.rigde": [1], "outer.lr": {"min": 1}}, DistillConfig())
    assert all(words in str(error.value) for words in ("no choices", "kernel.rigde", "outer.lr.min"))


def test_a_point_can_be_read_back():
    base = DistillConfig()
    point = suggest(default_space(), anywhere(3), base)
    assert point_of(default_space(), configured(base, point), base) == point
    assert dataclasses.asdict(configured(base, point)) == configured(base, point).to_dict()


def test_points_nearby_change_a_few_settings_within_their_ranges():
    base, space = DistillConfig(), default_space()
    start = point_of(space, base, base)
    assert suggest(space, Nearby(start, np.random.default_rng(0), change=0.0), base) == start
    shares = []
    for seed in range(100):
        point = suggest(space, Nearby(start, np.random.default_rng(seed)), base)
        assert all(p.holds(point[p.key]) for p in space if p.key in point)
        common = point.keys() & start.keys()
        shares.append(sum(point[key] != start[key] for key in common) / len(common))
    assert 0.1 < np.mean(shares) < 0.2  # a fifth is drawn again, some of it as it was
    assert len(set(shares)) > 3
