"""Settings with which a trial on the toy graph takes a second."""

from __future__ import annotations

import pytest

from talk_dist.presets import preset
from tuning.space import configured

SMALL = {
    "seed": 1,
    "synthetic.size": 6,
    "synthetic.tokens": 4,
    "two_stage.feature_steps": 6,
    "two_stage.student_steps": 2,
    "two_stage.student_passes": 5,
    "two_stage.token_steps": 6,
    "two_stage.validate_every": 3,
    "inner.passes": 20,
    "student.hidden": 16,
    "outer.epochs": 2,
    "outer.steps": 2,
    "runtime.threads": 1,
}
SPACE = """
two_stage.feature_steps: {low: 2, high: 8}
two_stage.student_steps: {low: 0, high: 4}
two_stage.student_passes: {low: 3, high: 6}
outer.steps: {low: 1, high: 3}
inner.passes: {low: 10, high: 40}
"""
TEXTS = """
synthetic.tokens: [4, 6]
two_stage.token_steps: {low: 2, high: 8}
"""


@pytest.fixture(scope="session")
def small(encoder_folder):
    """The tiny encoder, frozen, and as little of everything as makes a trial."""
    return configured(preset(), {"encoder.name": encoder_folder, "encoder.pooling": "mean", **SMALL})


@pytest.fixture(scope="session")
def words(small, tmp_path_factory):
    """words(data, out, *more, **options) -> a command line of `tune` with these settings and this space."""
    encoder = {"encoder.name": small.encoder.name, "encoder.pooling": "mean"}
    return _line(SMALL | encoder, SPACE + TEXTS, tmp_path_factory.mktemp("space") / "space.yaml")


@pytest.fixture(scope="session")
def given_words(tmp_path_factory):
    """The same for a graph that brings encodings of width 32: no process has a language model to load."""
    encoder = {"encoder.name": "given:32", "synthetic.tokens": 1}
    return _line(SMALL | encoder, SPACE, tmp_path_factory.mktemp("space") / "space.yaml")


def _line(settings, space, file):
    file.write_text(space)

    def make(data, out, *more, **options):
        given = {"data": data, "out": out, "space": file, "confirm": 0} | settings | options
        return ["tune", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *map(str, more)]

    return make
