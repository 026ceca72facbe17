"""Settings from files and options: which wins, how they print, and what every kind of mistake gets."""

from __future__ import annotations

import pytest
import yaml

from talk_dist.cli import COMMANDS
from talk_dist.commands.settings import read
from talk_dist.config import DistillConfig
from talk_dist.presets import preset


@pytest.mark.parametrize("name", ["default", "paper"])
def test_printed_settings_are_read_back_the_same(name, told, tmp_path):
    arguments = ["--preset", name, "--outer.lr", "0.002", "--encoder.targets", "query,value", "--seed", "5"]
    printed, _ = told("distill", *arguments, "--print_config")
    (tmp_path / "c.yaml").write_text(printed)
    assert told("distill", "--config", tmp_path / "c.yaml", "--print_config")[0] == printed
    options, config, evaluation = read(COMMANDS["distill"], ["--config", str(tmp_path / "c.yaml")])
    assert (options, config, evaluation) == read(COMMANDS["distill"], arguments)
    assert (config.outer.lr, config.encoder.targets, config.seed) == (0.002, ("query", "value"), 5)
    assert config.synthetic == preset(name).synthetic


def test_the_later_wins(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: paper\nouter: {lr: 1e-3, steps: 3}\nevaluation: {against: [full]}\n")
    arguments = ["--config", str(tmp_path / "c.yaml"), "--outer.steps=4"]
    options, config, evaluation = read(COMMANDS["distill"], arguments)
    assert options.preset == "paper"
    assert config.synthetic.tokens == 256
    assert (config.outer.lr, config.outer.steps) == (1e-3, 4)
    assert evaluation.against == ("full",)
    assert read(COMMANDS["distill"], [*arguments, "--preset", "default"])[1].synthetic == DistillConfig().synthetic


def test_the_command_line_wins_wherever_the_file_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("outer: {lr: 1e-3, steps: 3}\n")
    config = read(COMMANDS["distill"], ["--outer.lr", "0.5", "--config", str(tmp_path / "c.yaml")])[1]
    assert (config.outer.lr, config.outer.steps) == (0.5, 3)


def test_every_wrong_setting_is_named_at_once(told, tmp_path):
    tree = {"encoder": {"rnk": 3, "rank": "x"}, "outer": 3, "foo": {"a": 1}, "evaluation": {"seeds": "many"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    _, err = told(
        "distill", "--config", tmp_path / "c.yaml", "--synthetic.int", "medoid", "--synthetic.init", "best",
        "--evaluation.against", "full,none", "--encoder", "minilm", "--encoder.adapters", "maybe", code=2,
    )  # fmt: skip
    for problem in (
        "unknown setting 'encoder.rnk'; the nearest known one is 'encoder.rank'",
        "unknown setting 'foo'",
        "unknown setting '--synthetic.int'; the nearest known one is '--synthetic.init'",
        "c.yaml: encoder.rank = 'x': must be a whole number",
        "c.yaml: outer = 3: must be a section",
        "c.yaml: evaluation.seeds = 'many': must be a whole number",
        "--synthetic.init = 'best': must be one of random, medoid, two-stage",
        "--evaluation.against = 'full,none': must be a list such as a,b, each one of full, random",
        "--encoder = 'minilm': must be a section: set one of name, ",
        "--encoder.adapters = 'maybe': must be true or false",
    ):
        assert problem in err
    assert "10 problems" in err


def test_a_section_can_be_given_by_its_kind():
    _, config, _ = read(COMMANDS["distill"], ["--runtime", "ray", "--student", "sage", "--deepspeed.workers", "2"])
    assert (config.runtime.kind, config.student.kind, config.deepspeed.workers) == ("ray", "sage", 2)


def test_whole_numbers_of_a_choice_are_listed(told):
    _, err = told("distill", "--deepspeed.stage", "5", "--runtime", "rai", code=2)
    assert "--deepspeed.stage = '5': must be one of 0, 1, 2, 3" in err
    assert "--runtime.kind = 'rai': must be one of local, ray" in err


def test_values_out_of_range_are_named_where_they_were_set(told):
    _, err = told("distill", "--outer.lr", "-1", "--evaluation.recipe.passes", "0", "--inner.patience", "0", code=2)
    for problem in ("outer.lr = -1.0: positive", "evaluation.recipe.passes = 0: ", "inner.patience = 0: at least 1"):
        assert problem in err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["distil"], "unknown setting 'distil'; the nearest known one is 'distill'"),
        (["distill", "somewhere"], "unexpected argument 'somewhere'"),
        (["distill", "--data"], "--data: a value is missing"),
        (["distill", "--data", "--out", "x"], "--data: a value is missing"),
        (["distill", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["distill", "--preset", "fast"], "unknown preset 'fast'; one of default, paper"),
        (["prepare", "nodes.csv"], "--out"),
        (["prepare", "--out", "x"], "give a node table"),
        (["prepare", "nodes.csv", "--packages", "torch", "--out", "x"], "one of them"),
        (["prepare", "absent.csv", "--out", "x"], "absent.csv"),
        (["inspect"], "give the folder"),
        (["inspect", "."], "neither a prepared graph (no META.json) nor an artifact"),
        (["evaluate", "."], "--data: give the folder"),
        (["export", "."], "is no synthetic TAG"),
        (["estimate", "."], "is not a prepared TAG"),
    ],
)
def test_one_message_and_exit_code_two(arguments, problem, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert problem in told(*arguments, code=2)[1]
    assert not list(tmp_path.iterdir())


def test_a_file_says_what_a_command_line_can(tmp_path):
    """YAML's own true and false for a choice, one of a list by itself, a section by its kind, nothing at all."""

    def found(name, text):
        (tmp_path / "c.yaml").write_text(text)
        return read(COMMANDS[name], ["--config", str(tmp_path / "c.yaml")])

    assert found("evaluate", "adapters: false")[0].adapters == "false"
    assert found("prepare", "packages: torch")[0].packages == ("torch",)
    config, evaluation = found("distill", "encoder.targets: query\nevaluation: {against: full}")[1:]
    assert (config.encoder.targets, evaluation.against) == (("query",), ("full",))
    for text in ("", "# outer.lr: 1e-3\n"):
        assert found("distill", text) == read(COMMANDS["distill"], [])


def test_one_problem_of_two_sentences_is_one(told):
    _, err = told("distill", "--synthetic.learn_labels", "true", "--outer.epochs", "0", code=2)
    assert "problems" not in err
    assert "labels are learned in outer steps; set outer.epochs" in err


@pytest.mark.parametrize("text", ["encoder: [", "- secret\n- 2\n", "secret words"])
def test_yaml_that_holds_no_settings(text, told, tmp_path):
    """A wrong file may be anything: its content stays where it is."""
    (tmp_path / "c.yaml").write_text(text)
    error = told("distill", "--config", tmp_path / "c.yaml", code=2)[1]
    assert "c.yaml" in error
    assert "secret" not in error
