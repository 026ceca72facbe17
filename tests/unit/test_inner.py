"""The inner loop: what `fit` trains, what it keeps, and what its result depends on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from torch.nn.functional import cross_entropy

from talk_dist.config import InnerConfig, StudentConfig
from talk_dist.models.gnn import Student, drawing, dropped
from talk_dist.models.inner import fit_encodings, soft_labels, train

M, C = 9, 3
CALM = StudentConfig(hidden=16, dropout=0.0)
KINDS = ["gcn", "sage", "sgc", "appnp", "gat"]


@pytest.fixture(scope="module")
def synthetic():
    """x_s (M, T, d_tok) and y_s (M, C)."""
    x_s = 0.3 * torch.randn(M, 4, 32, generator=torch.Generator().manual_seed(0))
    return x_s, torch.eye(C).repeat(M // C, 1)


@pytest.fixture
def adapted(make_encoder):
    return make_encoder(adapters=True, dropout=0.0)


def training_loss(encoder, student, x_s, y_s):
    with torch.no_grad():
        return float(cross_entropy(student(encoder.encode_embeds(x_s)), y_s))


def state_of(student, encoder=None):
    weights = {name: value.numpy().copy() for name, value in student.state_dict().items()}
    return weights | (encoder.adapters() if encoder else {})


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# -- students on synthetic nodes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_nodes_only_see_themselves(kind):
    """The logits of a node are the same whoever is beside it, and those of the dense student on the identity."""
    student = Student(StudentConfig(kind=kind, hidden=16), 8, C, seed=0).eval()
    h = torch.randn(M, 8, generator=torch.Generator().manual_seed(0))
    logits = student(h).detach()
    truth = reference.student(student, h.double(), torch.eye(M, dtype=torch.float64))
    torch.testing.assert_close(logits.double(), truth, rtol=1e-4, atol=1e-5)
    for i in range(M):
        torch.testing.assert_close(student(h[i : i + 1])[0].detach(), logits[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_students_follow_from_their_seed(kind):
    """And leave the global random state alone."""
    state = torch.get_rng_state()
    first = Student(StudentConfig(kind=kind, hidden=16), 8, C, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = (Student(StudentConfig(kind=kind, hidden=16), 8, C, seed=seed) for seed in (1, 2))
    assert same(state_of(first), state_of(again))
    assert not same(state_of(first), state_of(other))


def test_soft_labels_are_probabilities():
    """Negative entries cut, rows summing to one; a one-hot row is left as it is; a row without mass stays zero."""
    y = torch.tensor([[0.0, 1.0, 0.0], [2.0, -1.0, 6.0], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(soft_labels(y), expected)


# -- fit --------------------------------------------------------------------------------------------------


def test_adapters_and_student_learn_together(adapted, synthetic):
    """Adapters move, also the half that starts at zero; the loss falls; nothing else of the encoder changes."""
    adapted.reset_adapters(0)
    before, fingerprint = adapted.adapters(), adapted.fingerprint
    student = Student(CALM, adapted.width, C, seed=0)
    first = training_loss(adapted, student, *synthetic)
    result = adapted.fit(student, *synthetic, InnerConfig(passes=12, adapter_lr=1e-2))
    for name, value in adapted.adapters().items():
        assert np.abs(value - before[name]).max() > 1e-3, name
    assert result.loss < 0.5 * first
    assert not student.training
    assert not any(p.requires_grad for p in adapted.model.parameters())
    del adapted.__dict__["fingerprint"]
    assert adapted.fingerprint == fingerprint


def test_adapters_help_beyond_the_student(adapted, make_encoder, synthetic):
    """With the same student and passes a lower loss than with the frozen encoder: their gradient is of use."""
    config = InnerConfig(passes=12, adapter_lr=1e-2)
    losses = [
        encoder.fit(Student(CALM, encoder.width, C, seed=0), *synthetic, config).loss
        for encoder in (adapted, make_encoder())
    ]
    assert losses[0] < 0.9 * losses[1]


def test_passes_with_adapters_have_a_limit_of_their_own(adapted, make_encoder, synthetic):
    config = InnerConfig(passes=9, adapter_passes=4)
    for encoder, passes in ((adapted, 4), (make_encoder(), 9)):
        assert encoder.fit(Student(CALM, encoder.width, C, seed=0), *synthetic, config).passes == passes
    assert adapted.fit(Student(CALM, adapted.width, C, seed=0), *synthetic, replace(config, passes=3)).passes == 3


def test_the_best_pass_is_what_remains(adapted, synthetic):
    """With a step size that overshoots, the last pass is not the best: loss and state are those of the best."""
    adapted.reset_adapters(0)
    student = Student(CALM, adapted.width, C, seed=0)
    result = adapted.fit(student, *synthetic, InnerConfig(passes=9, gnn_lr=0.3, adapter_lr=0.05))
    assert training_loss(adapted, student, *synthetic) == pytest.approx(result.loss, rel=1e-4)
    assert result.selected == -result.loss
    losses = []  # the same run, one pass after another
    for passes in range(1, 10):
        adapted.reset_adapters(0)
        fresh = Student(CALM, adapted.width, C, seed=0)
        losses.append(adapted.fit(fresh, *synthetic, InnerConfig(passes=passes, gnn_lr=0.3, adapter_lr=0.05)).loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == losses[-2] == result.loss < losses[0]


@pytest.mark.parametrize("batch", [2, 4])
def test_the_batch_changes_memory_not_the_result(adapted, synthetic, batch):
    """Gradients of all batches are summed before the step (no dropout here: its draws do depend on the batch)."""
    states = []
    for size in (batch, M):
        adapted.reset_adapters(0)
        student = Student(CALM, adapted.width, C, seed=0)
        result = adapted.fit(student, *synthetic, InnerConfig(passes=4, adapter_lr=1e-3), batch=size)
        states.append(state_of(student, adapted) | {"loss": result.loss})
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("adapters", [True, False])
def test_fit_follows_from_its_seed(make_encoder, synthetic, adapters):
    """Bit for bit, with both dropouts, whatever was drawn before; the global random state is left alone."""
    encoder = make_encoder(adapters=adapters, dropout=0.3)
    states = []
    for seed in (5, 5, 6):
        torch.rand(seed)
        encoder.reset_adapters(0)
        student = Student(StudentConfig(hidden=16, dropout=0.5), encoder.width, C, seed=0)
        before = torch.get_rng_state()
        encoder.fit(student, *synthetic, InnerConfig(passes=5), seed=seed, batch=4)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(state_of(student, encoder))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_a_frozen_encoder_runs_once(make_encoder, synthetic, monkeypatch):
    """Whatever the number of passes; and the result is that of `fit_encodings` on its encodings."""
    encoder = make_encoder()
    calls = []
    original = encoder.forward_embeds
    monkeypatch.setattr(encoder, "forward_embeds", lambda x, *rest: calls.append(len(x)) or original(x, *rest))
    students = [Student(CALM, encoder.width, C, seed=0) for _ in range(2)]
    encoder.fit(students[0], *synthetic, InnerConfig(passes=15), batch=4, seed=2)
    assert calls == [4, 4, 1]
    fit_encodings(students[1], encoder.encode_embeds(synthetic[0]), synthetic[1], InnerConfig(passes=15), seed=2)
    for one, two in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_a_mask_hides_tokens_in_training(adapted, synthetic):
    """What is behind the mask may be anything."""
    x_s, y_s = synthetic
    mask = torch.ones(x_s.shape[:2])
    mask[:, 3] = 0
    noisy = x_s.clone()
    noisy[:, 3] = 50.0
    states = []
    for x in (x_s, noisy):
        adapted.reset_adapters(0)
        student = Student(CALM, adapted.width, C, seed=0)
        adapted.fit(student, x, y_s, InnerConfig(passes=3), mask=mask)
        states.append(state_of(student, adapted))
    assert all(np.abs(value - states[1][name]).max() < 1e-4 for name, value in states[0].items())


# -- train: when it stops and what it keeps ---------------------------------------------------------------


def scripted(losses, select=None, selected=-math.inf, progress=None, **settings):
    """`train` on a student whose losses are given; its weights after the step of pass i are i (in one entry)."""
    student = Student(CALM, 4, C, seed=0)
    marker = next(student.parameters())
    with torch.no_grad():
        marker.view(-1)[0] = 0

    def step(index):
        with torch.no_grad():
            marker.view(-1)[0] = index
        return torch.tensor(losses[index - 1])

    config = InnerConfig(**{"passes": len(losses), "target_loss": 0.0, "patience": 100, **settings})
    # nothing has a gradient, so that AdamW leaves the marker alone
    ask = select and (lambda model: select(marker.view(-1)[0].item()))
    result = train(step, student, config, seed=0, select=ask, selected=selected, progress=progress)
    return result, next(student.parameters()).view(-1)[0].item()


def test_progress_is_told_before_every_pass():
    told = []
    scripted([3.0, 2.0, 0.5, 1.0], progress=lambda *counts: told.append(counts), target_loss=0.6)
    assert told == [(0, 4), (1, 4), (2, 4)]


def test_without_a_choice_the_lowest_loss_wins():
    """And a later equal one replaces it."""
    result, kept = scripted([3.0, 1.0, 2.0, 1.0, 5.0])
    assert (result.passes, result.loss, result.selected, kept) == (5, 1.0, -1.0, 4.0)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({"patience": 2}, 4), ({"patience": 3}, 8), ({"target_loss": 1.5}, 5), ({"passes": 3}, 3), ({}, 8)],
)
def test_when_training_stops(settings, passes):
    """After ``patience`` passes without a lower loss, below ``target_loss``, or after ``passes``."""
    assert scripted([3.0, 2.0, 2.5, 2.0, 1.0, 1.1, 1.2, 1.3], **settings)[0].passes == passes


def test_a_selected_student_is_the_best_of_those_asked():
    """Asked every ``select_every`` passes and at the end; the first of equals stays; the training loss has no say."""
    asked = []

    def select(marker):
        asked.append(marker)
        return {2.0: 0.5, 4.0: 0.8, 6.0: 0.8, 7.0: 0.1}[marker]

    result, kept = scripted([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], select, select_every=2)
    assert asked == [2.0, 4.0, 6.0, 7.0]
    assert (result.selected, result.loss, kept) == (0.8, 3.0, 4.0)


@pytest.mark.parametrize(("patience", "passes"), [(0, 12), (1, 6), (2, 8), (3, 12)])
def test_training_ends_where_validation_no_longer_rises(patience, passes):
    """After so many answers in a row that are no better; what was best stays."""
    answers = {2.0: 0.1, 4.0: 0.5, 6.0: 0.5, 8.0: 0.2, 10.0: 0.6, 12.0: 0.6}
    settings = {"select_every": 2, "select_patience": patience}
    result, kept = scripted([9.0] * 12, answers.__getitem__, **settings)
    assert (result.passes, kept) == (passes, 10.0 if passes == 12 else 4.0)


@pytest.mark.parametrize(("selected", "kept"), [(0.5, 3.0), (0.7, 0.0)])
def test_the_start_remains_if_nothing_is_better(selected, kept):
    result, found = scripted([9.0, 8.0, 7.0], lambda _: 0.7, selected=selected)
    assert (result.selected, found) == (0.7, kept)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_every_number_has_a_draw_of_its_own(share):
    """Also the four numbers that share one draw of 64 bits."""
    torch.manual_seed(0)
    ones = torch.ones(200_000, 4)
    found = dropped(ones, share)
    hit = (found == 0).double()
    assert torch.allclose(found[found > 0], torch.tensor(1 / (1 - share)), rtol=1e-4)
    np.testing.assert_allclose(hit.mean(0), share, atol=5 * math.sqrt(share * (1 - share) / len(ones)))
    series = torch.cat([hit, hit.roll(1, 0)], 1)  # and the four that are drawn next
    np.testing.assert_allclose(torch.corrcoef(series.T), np.eye(8), atol=5 / math.sqrt(len(ones)))
    assert not dropped(ones, share).equal(found)
    torch.manual_seed(0)
    assert dropped(ones, share).equal(found)


def test_dropout_of_nothing_and_of_nearly_everything():
    ones = torch.ones(99, 7)
    assert dropped(ones, 0.0).equal(ones)
    assert dropped(ones, 1 - 1e-9).isfinite().all()


def test_draws_are_torchs_of_a_seed_and_leave_no_trace():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    torch.manual_seed(1)
    with drawing(5):
        assert torch.rand(3).equal(expected)
    assert torch.rand(3).equal(undisturbed)


# -- the law of a pass ----------------------------------------------------------------------------------------


class OneNumber:
    """An encoder whose only adapter is one number."""

    def __init__(self):
        self.number = torch.nn.Parameter(torch.ones(1))

    def adapter_parameters(self):
        return {"a": self.number}

    def adapters(self):
        return {"a": self.number.detach().numpy().copy()}

    def load_adapters(self, adapters):
        pass


def test_selection_is_without_dropout_and_training_with_it():
    student, modes = Student(CALM, 4, C, 0), []

    def step(_):
        modes.append(student.training)
        return torch.tensor(1.0)

    config = InnerConfig(passes=4, select_every=2, target_loss=0.0)
    train(step, student, config, seed=0, select=lambda s: modes.append(s.training) or 0.5)
    assert modes == [True, True, False, True, True, False]


def test_adapters_are_validated_as_often_as_their_setting_says():
    config, asked = InnerConfig(passes=8, select_every=2, adapter_select_every=3, target_loss=0.0), []

    def select(_):
        asked.append(0)
        return 0.5

    for encoder, looks in ((OneNumber(), 3), (None, 4)):  # and at the end
        asked.clear()
        train(lambda _: torch.tensor(1.0), Student(CALM, 4, C, 0), config, encoder=encoder, seed=0, select=select)
        assert len(asked) == looks


def test_weight_decay_is_the_student_s_alone():
    """Without any gradient AdamW only decays."""
    encoder, student = OneNumber(), Student(CALM, 4, C, 0)
    before = [p.detach().clone() for p in student.parameters()]

    def step(_):
        for p in [*student.parameters(), encoder.number]:
            p.grad = torch.zeros_like(p)
        return torch.tensor(1.0)

    config = InnerConfig(passes=1, gnn_lr=0.1, adapter_lr=0.1, weight_decay=0.5)
    train(step, student, config, encoder=encoder, seed=0, select=lambda _: 1.0)
    for was, p in zip(before, student.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), was * (1 - 0.1 * 0.5))
    assert float(encoder.number) == 1.0


def test_each_pass_and_batch_has_a_dropout_of_its_own(make_encoder, synthetic, monkeypatch):
    encoder, seeds = make_encoder(adapters=True, dropout=0.5), []
    forward = encoder.forward_embeds

    def noted(x, mask=None, seed=None, *rest):
        seeds.append(seed)
        return forward(x, mask, seed, *rest)

    monkeypatch.setattr(encoder, "forward_embeds", noted)
    encoder.fit(Student(CALM, encoder.width, C, 0), *synthetic, InnerConfig(passes=3, target_loss=0.0), batch=4, seed=4)
    drawn = [seed for seed in seeds if seed is not None]
    assert len(set(drawn)) == len(drawn) == 3 * 3


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_before_every_linear_layer(kind, monkeypatch):
    student, seen = Student(StudentConfig(kind=kind, hidden=16, dropout=0.5), 8, C, 0), []
    monkeypatch.setattr("talk_dist.models.gnn.dropped", lambda x, share: seen.append((x.shape[1], share)) or x)
    student.train()(torch.randn(5, 8))
    widths = [8] if kind == "sgc" else [8, 16]
    assert seen == [(width, 0.5) for width in widths]
    student.eval()(torch.randn(5, 8))
    assert len(seen) == len(widths)
