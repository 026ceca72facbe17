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
synthetic.tokens: [4, 6]
two_stage.feature_steps: {low: 2, high: 8}
two_stage.token_steps: {low: 2, high: 8}
two_stage.student_steps: {low: 0, high: 4}
two_stage.student_passes: {low: 3, high: 6}
outer.steps: {low: 1, high: 3}
inner.passes: {low: 10, high: 40}
"""


@pytest.fixture(scope="session")
def small(encoder_folder):
    """The tiny encoder, frozen, and as little of everything as makes a trial."""
    return configured(preset(), {"encoder.name": encoder_folder, "encoder.pooling": "mean", **SMALL})


@pytest.fixture(scope="session")
def words(small, tmp_path_factory):
    """words(data, out, *more, **options) -> a command line of `tune` with these settings and SPACE."""
    file = tmp_path_factory.mktemp("space") / "space.yaml"
    file.write_text(SPACE)

    def make(data, out, *more, **options):
        given = {"data": data, "out": out, "space": file, "confirm": 0} | SMALL | options
        line = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return ["tune", *line, "--encoder.name", small.encoder.name, "--encoder.pooling", "mean", *map(str, more)]

    return make
