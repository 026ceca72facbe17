"""A trial: what it reports, what it costs, and the ridge that it chooses by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from talk_dist.evaluate import EvaluateConfig, evaluate
from talk_dist.kernel.krr import dual_coefficients
from talk_dist.kernel.sntk import synthetic_kernel
from talk_dist.models.encoder import TextEncoder, load_encoder
from talk_dist.runtime.outer import accuracy
from talk_dist.runtime.pool import LocalPool
from talk_dist.synthetic.artifact import SyntheticTAG
from talk_dist.synthetic.coresets import allocate, class_centres, sample_for
from talk_dist.synthetic.init import one_hot_labels
from tuning.findings import CLOCK
from tuning.objective import LADDER, TrialSpec, choose_ridge, ridge_scores, run_trial


class Cut(Exception):
    pass


@pytest.fixture
def trial(small, tags, tmp_path):
    """trial(point, folder) -> (the facts, what was reported on the way)."""

    def run(point=(), folder="trial", cut_after=None):
        reports = []

        def report(values):
            reports.append({name: value for name, value in values.items() if name not in CLOCK})
            if len(reports) == cut_after:
                raise Cut

        spec = TrialSpec(tags[2].path, str(tmp_path / folder), small.to_dict(), dict(point))
        try:
            facts = run_trial(spec, report)
        except Cut:
            return {}, reports
        return {name: fact for name, fact in facts.items() if name not in CLOCK}, reports

    return run


def test_what_is_reported(trial, small):
    facts, reports = trial()
    assert [report["step"] for report in reports] == [0, 1, 2, 3]  # stage one, then a validation for every epoch
    assert 0 < reports[0]["accuracy"] <= 1
    assert 0 < reports[0]["krr_accuracy"] <= 1
    values = [report["accuracy"] for report in reports[1:]]
    assert values == sorted(values)
    assert facts["ridge"] in LADDER
    assert facts["bytes"] > 6 * small.synthetic.tokens


def test_a_start_from_texts_reports_no_stage_one(trial):
    _, reports = trial({"synthetic.init": "medoid"})
    assert [report["step"] for report in reports] == [1, 2, 3]


def test_cut_off_anywhere_it_ends_as_if_it_had_not_been(trial):
    whole, reports = trial(folder="whole")
    assert len(reports) >= 3
    for cut_after in (1, 2, 3):
        folder = f"cut-{cut_after}"
        assert trial(folder=folder, cut_after=cut_after)[1] == reports[:cut_after]
        again, rest = trial(folder=folder)
        assert again == whole
        assert rest == reports[-len(rest) :]  # the best of before the cut counts


def test_cut_off_after_the_last_epoch(trial):
    point = {"kernel.ridge": 0.1}  # no ladder, which would encode the texts
    whole, _ = trial(point, folder="whole")
    assert trial(point, folder="whole") == (whole, [])


def test_the_frozen_encoder_reads_every_text_once_in_all_trials(trial, small, graph, prepare_graph, monkeypatch):
    passes = []
    encode = TextEncoder.encode_tokens
    monkeypatch.setattr(
        TextEncoder,
        "encode_tokens",
        lambda self, tokens, *rest: passes.append(len(tokens)) or encode(self, tokens, *rest),
    )
    tag = prepare_graph(graph, parts=3)
    for number, point in enumerate(({}, {"kernel.hops": 1}, {"synthetic.init": "medoid"}, {"kernel.ridge": 0.1})):
        spec = TrialSpec(tag.path, f"{tag.path}-trials/{number}", small.to_dict(), point)
        run_trial(spec, lambda values: None)
    assert sorted(passes) == sorted(part["nodes"] for part in tag.meta["parts"])


def test_the_ladder_is_a_solve_for_every_ridge(small, tags, make_encoder):
    encoder = make_encoder()
    kernel = dataclasses.replace(small.kernel, precision="float64")
    config = dataclasses.replace(small, kernel=kernel)
    pool = LocalPool(tags[2], encoder, kernel, config.runtime)
    scores = ridge_scores(pool, encoder, config, LADDER)
    counts = allocate(6, tags[2].train_class_counts)
    h_s = torch.from_numpy(class_centres(sample_for(pool, counts, config.seed), counts, config.seed))
    k_ss = synthetic_kernel(h_s.double(), kernel.rounds, kernel.layers)
    for ridge in LADDER:
        dual = dual_coefficients(k_ss, one_hot_labels(counts), ridge).dual.numpy()
        assert scores[ridge] == accuracy(pool.krr_scores(h_s.numpy(), dual, "val"))
    best, num_val = max(scores.values()), tags[2].meta["split_sizes"]["val"]
    close = [ridge for ridge in LADDER if best - scores[ridge] <= (best * (1 - best) / num_val) ** 0.5]
    assert choose_ridge(pool, encoder, config, LADDER) == max(close)
    assert choose_ridge(pool, encoder, config, LADDER[::-1]) == max(close)
    assert len(set(scores.values())) > 1  # else nothing was chosen


def test_a_trial_is_worth_what_evaluate_says_of_its_students(trial, small, tags, tmp_path):
    facts, _ = trial(folder="judged")
    encoder = load_encoder(small.encoder)
    pool = LocalPool(tags[2], encoder, small.kernel, small.runtime)
    pool.encode({})
    synthetic = SyntheticTAG.from_pretrained(tmp_path / "judged" / "synthetic")
    (row,) = evaluate(pool, encoder, synthetic, small, EvaluateConfig(against=(), seeds=3, student=small.student))
    assert facts["accuracy"] == np.mean(row.val_accuracy)
    assert facts["spread"] == np.std(row.val_accuracy)
