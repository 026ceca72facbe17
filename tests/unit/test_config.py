"""Settings: each documented, each checked where it is made, and the whole of them written and read again."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math

import pytest

from talk_dist import config as module
from talk_dist.config import DistillConfig, InnerConfig, OuterConfig
from talk_dist.errors import ConfigError
from talk_dist.evaluate import EvaluateConfig
from talk_dist.presets import preset

SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(DistillConfig) if field.name != "seed"}


@pytest.mark.parametrize("name", ["default", "paper"])
def test_a_configuration_survives_json(name):
    config = preset(name)
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets():
    assert preset() == preset("default") == DistillConfig()
    paper = preset("paper")
    assert (paper.synthetic.tokens, paper.encoder.pooling, paper.outer.loss) == (256, "cls", "mse")
    assert paper.encoder.adapters
    with pytest.raises(ConfigError, match="'fast'; one of default, paper"):
        preset("fast")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("encoder", {"rank": 0, "dropout": 1.0, "batch_tokens": 0}),
        ("kernel", {"hops": 0, "layers": 0, "ridge": -1e-3, "chunk_mib": 0}),
        ("kernel", {"ridge": math.inf}),
        ("synthetic", {"size": 0, "tokens": 0, "gain": math.inf}),
        ("two_stage", {"feature_steps": -1, "token_steps": -1, "validate_every": 0, "feature_lr": -0.1}),
        ("student", {"hidden": 0, "depth": 0, "dropout": -0.1}),
        ("inner", {"passes": 0, "gnn_lr": 0.0, "adapter_lr": 0.0, "patience": 0, "weight_decay": -1.0}),
        ("outer", {"epochs": -1, "steps": 0, "lr": 0.0, "patience": 0, "inject_batch": 0}),
        ("outer", {"label_lr": -1.0, "temperature_lr": 0.0, "weight_decay": -0.1}),
        ("outer", {"lr": math.nan}),
        ("runtime", {"threads": -1}),
    ],
)
def test_every_broken_rule_is_named_with_its_value(section, values):
    with pytest.raises(ConfigError) as error:
        SECTIONS[section](**values)
    for name, value in values.items():
        assert f"{section}.{name} = {value!r}: " in str(error.value)


@pytest.mark.parametrize("size", [2.5, -1, 0.0])
def test_sizes_that_are_neither_a_share_nor_a_count(size):
    with pytest.raises(ConfigError, match=r"synthetic\.size"):
        DistillConfig.from_dict({"synthetic": {"size": size}})


@pytest.mark.parametrize(
    ("values", "wrong", "nearest"),
    [
        ({"sed": 1}, "sed", "seed"),
        ({"outer": {"label_rl": 1}}, "outer.label_rl", "outer.label_lr"),
        ({"encoder": {"pool": "cls"}}, "encoder.pool", "encoder.pooling"),
        ({"kernal": {}}, "kernal", "kernel"),
    ],
)
def test_unknown_keys_name_the_nearest(values, wrong, nearest):
    with pytest.raises(ConfigError) as error:
        DistillConfig.from_dict(values)
    assert f"unknown setting {wrong!r}; the nearest known one is {nearest!r}" in str(error.value)


def test_evaluation_settings():
    ends = {
        name: getattr(EvaluateConfig().recipe, name)
        for name in ("passes", "adapter_passes", "patience", "select_patience")
    }
    assert EvaluateConfig().recipe == InnerConfig(**ends)  # the inner loop's, but for where it ends
    for wrong in ({"seeds": 0}, {"against": ("full", "everything")}):
        with pytest.raises(ConfigError, match="evaluation"):
            EvaluateConfig(**wrong)


@pytest.mark.parametrize(
    ("sections", "epochs"),
    [
        ({}, 0),
        ({"synthetic": {"discrete": True}}, 0),
        ({"synthetic": {"init": "medoid"}}, 4),
        ({"synthetic": {"init": "random"}}, 4),
        ({"synthetic": {"learn_labels": True}}, 4),
        ({"encoder": {"adapters": True}}, 0),
        ({"outer": {"epochs": 2}}, 2),
        ({"synthetic": {"init": "medoid"}, "outer": {"epochs": 0}}, 0),
    ],
)
def test_outer_epochs_left_open_are_those_that_bring_something(sections, epochs):
    config = DistillConfig.from_dict(sections)
    assert config.outer_epochs == epochs
    assert config.to_dict()["outer"]["epochs"] == sections.get("outer", {}).get("epochs")  # still open


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"kernel": {"architecture": "GCN"}}, "kernel.architecture = 'GCN': must be one of gcn, sgc"),
        ({"outer": {"loss": "MSE"}}, "outer.loss = 'MSE': must be one of mse, ce"),
        ({"synthetic": {"tokens": 2.5}}, "synthetic.tokens = 2.5: must be a whole number"),
        ({"synthetic": {"learn_labels": "no"}}, "synthetic.learn_labels = 'no': must be true or false"),
        ({"encoder": {"targets": "query"}}, "encoder.targets = 'query': must be a list such as a,b, each a text"),
        ({"outer": {"epochs": "few"}}, "outer.epochs = 'few'"),
        ({"seed": -1}, "seed = -1: from 0 to"),
        ({"seed": 2**32}, "seed = 4294967296: from 0 to"),
        ({"seed": True}, "seed = True: must be a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(sections, problem):
    with pytest.raises(ConfigError) as error:
        DistillConfig.from_dict(sections)
    assert problem in str(error.value)


def test_labels_cannot_be_learned_without_outer_epochs():
    with pytest.raises(ConfigError, match="labels are learned in outer steps"):
        DistillConfig.from_dict({"synthetic": {"learn_labels": True}, "outer": {"epochs": 0}})


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OuterConfig().lr = 1.0


def test_every_field_is_documented():
    """The help of the command line is made of these."""
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef) or node.name == "DistillConfig":
            continue
        assert ast.get_docstring(node), node.name
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{field.target.id}"
