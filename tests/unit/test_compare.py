"""The laboratory: its rows are what `evaluate` says, it goes on from anywhere, and a wrong plan is refused whole."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn.functional import cosine_similarity

from talk_dist.commands.compare import settings_of
from talk_dist.compare import laboratory, report
from talk_dist.compare.picture import draw_encodings, draw_retention
from talk_dist.compare.plan import read_plan
from talk_dist.config import DistillConfig, StudentConfig
from talk_dist.evaluate import EvaluateConfig, evaluate, reference
from talk_dist.runtime.callbacks import ProgressLines
from talk_dist.runtime.pool import LocalPool
from talk_dist.synthetic.coresets import sample_for
from talk_dist.synthetic.decode import nearest_texts
from talk_dist.synthetic.plot import plot

LITTLE = {
    "synthetic.tokens": 4,
    "two_stage.feature_steps": 4,
    "two_stage.student_steps": 2,
    "two_stage.student_passes": 4,
    "two_stage.token_steps": 4,
    "two_stage.validate_every": 2,
    "outer.epochs": 1,
    "outer.steps": 2,
}
METHODS = {
    "talk": {"preset": "default", **LITTLE},
    "medoid": {"coreset": "medoid"},
    "centres": {"features": "centres"},
    "inverted": {"features": "centres", "invert": True, **LITTLE},
}


@pytest.fixture
def plan(tags, encoder_folder, tmp_path):
    """plan(**changes) -> the path of a plan; None leaves an entry out."""
    common = {"encoder.name": encoder_folder, "encoder.pooling": "mean", "encoder.precision": "float32"}
    common |= {"runtime.threads": 1, "inner.passes": 20}

    def write(**changes):
        tree = {"data": {"toy": {"prepared": tags[2].path}}, "settings": common, "methods": METHODS}
        tree |= {"sizes": [6], "splits": [0], "seeds": 2, "full_lr": [5e-3], "full_label_smoothing": [0.0]}
        path = tmp_path / "plan.yaml"
        path.write_text(
            yaml.safe_dump(
                {key: value for key, value in (tree | changes).items() if value is not None}, sort_keys=False
            )
        )
        return str(path)

    return write


def rows_in(folder):
    """Every row without what a clock says."""
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    return [{key: value for key, value in row.items() if key not in ("seconds", "command")} for row in rows]


def test_a_row_is_what_evaluate_says(plan, told, tags, make_encoder, tmp_path):
    told("compare", plan(), "--out", tmp_path / "out")
    rows = {row["method"]: row for row in rows_in(tmp_path / "out")}
    assert list(rows) == ["full", *METHODS]
    encoder, config = make_encoder(), DistillConfig()
    pool = LocalPool(tags[2], encoder, config.kernel, config.runtime)
    medoid = laboratory.SyntheticTAG.from_pretrained(tmp_path / "out" / "sets" / "toy-split_0-medoid-6-frozen")
    settings = EvaluateConfig(seeds=2, against=("full", "medoid"), full_lr=(5e-3,), full_label_smoothing=(0.0,))
    expected = evaluate(pool, encoder, medoid, config, settings)
    for name, row in zip(("medoid", "full"), expected, strict=False):
        assert rows[name]["accuracy"] == list(row.accuracy)
        assert rows[name]["val_accuracy"] == list(row.val_accuracy)
        assert rows[name]["krr_accuracy"] == row.krr_accuracy
    assert rows["medoid"]["bytes"] == expected[2].bytes  # token ids, not their embeddings
    assert rows["centres"]["bytes"] < rows["inverted"]["bytes"]
    check_a_set_of_encodings(tmp_path / "out" / "sets" / "toy-split_0-centres-6-frozen", rows["centres"], pool, told)


def check_a_set_of_encodings(path, row, pool, told):
    """It is nowhere taken for one of token embeddings, though they are as wide."""
    encoder, made = pool.shards[0].encoder, laboratory.SyntheticTAG.from_pretrained(path)
    expected = evaluate(pool, encoder, made, DistillConfig(), EvaluateConfig(seeds=2, against=()))[0]
    assert row["accuracy"] == list(expected.accuracy)
    assert row["krr_accuracy"] == expected.krr_accuracy
    h_s = made.token_embeds[:, 0]
    assert torch.equal(made.encode(encoder), h_s)
    assert torch.equal(made.to_pyg().x, h_s)
    assert "token_embeds" not in made.to_pyg()
    sample = sample_for(pool, np.bincount(made.labels.argmax(1)), 0)
    nearest = np.array([near[0].cosine for near in nearest_texts(made, pool, encoder, 1, 0)])
    cosines = cosine_similarity(h_s[:, None], torch.from_numpy(sample.features)[None], dim=2)
    np.testing.assert_allclose(nearest, cosines.amax(1), rtol=1e-5)
    assert "Its nodes are encodings" in (path / "README.md").read_text()
    assert "6 nodes of one encoding" in told("inspect", path)[0]
    _, err = told("evaluate", path, "--data", pool.tag.path, "--adapters", "true", code=2)
    assert "holds encodings, which train no adapters: pass --adapters false" in err


def test_it_goes_on_from_anywhere_to_the_same_rows(plan, told, tmp_path, monkeypatch):
    path = plan(students=["gcn", "sgc"], seeds=1)
    told("compare", path, "--out", tmp_path / "whole")
    keep, calls = laboratory.Laboratory._keep, 0

    def stopped(*arguments):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return keep(*arguments)

    monkeypatch.setattr(laboratory.Laboratory, "_keep", stopped)
    codes = []
    while not codes or codes[-1]:
        codes.append(laboratory_exit(path, tmp_path / "cut"))
    assert codes == [130] * (len(codes) - 1) + [0]
    assert len(codes) == 5  # ten rows, two a start
    assert rows_in(tmp_path / "cut") == rows_in(tmp_path / "whole")


def laboratory_exit(path, out):
    from talk_dist.cli import main

    return main(["compare", path, "--out", str(out)])


def test_test_nodes_are_read_for_the_chosen_learning_rate_alone(plan, told, tags, make_encoder, tmp_path, monkeypatch):
    """Two students, two rates, two label smoothings, two seeds. The graph is read and the pool opened once for both
    students."""
    asked, graphs, opened = [], [], []
    scores, whole, place = LocalPool.student_scores, laboratory.WholeGraph, laboratory.place
    monkeypatch.setattr(LocalPool, "student_scores", lambda *a: asked.append(a[2]) or scores(*a))
    monkeypatch.setattr(laboratory, "WholeGraph", lambda tag: graphs.append(tag) or whole(tag))
    monkeypatch.setattr(laboratory, "place", lambda config: opened.append(config) or place(config))
    choices = {"full_lr": [1e-3, 2e-2], "full_label_smoothing": [0.0, 0.2]}
    path = plan(students=["gcn", "sgc"], methods={"medoid": METHODS["medoid"]}, **choices)
    told("compare", path, "--out", tmp_path / "out")
    reads = [index for index, split in enumerate(asked) if split == "test"]
    assert len(reads) == 8  # four of the reference, four of the medoids
    assert reads[1] == reads[0] + 1  # the reference's come after all of its training
    assert reads[3] == reads[2] + 1
    assert (len(graphs), len(opened)) == (1, 2)  # for the reference, and for the medoids

    encoder, config = make_encoder(), DistillConfig()
    pool = LocalPool(tags[2], encoder, config.kernel, config.runtime)
    expected = reference(whole(tags[2]), pool, encoder, EvaluateConfig(seeds=2, **choices))
    row = next(row for row in rows_in(tmp_path / "out") if (row["method"], row["student"]) == ("full", "gcn"))
    assert (row["chosen"], row["accuracy"]) == (expected.chosen, list(expected.accuracy))


def test_a_distillation_that_is_resumed_counts_all_its_seconds(plan, told, tmp_path, monkeypatch):
    path, epoch, out = plan(methods={"talk": METHODS["talk"]}), ProgressLines.epoch, tmp_path / "out"

    def stopped(*arguments):
        monkeypatch.setattr(ProgressLines, "epoch", epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLines, "epoch", stopped)  # of epoch 0, before it is saved
    told("compare", path, "--out", out, code=130)
    (saved,) = (out / "work").glob("*.safetensors")
    header = saved.read_bytes()
    tree = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    before = json.loads(tree["state"])["start_seconds"]
    assert before > 0
    told("compare", path, "--out", out)
    made = laboratory.SyntheticTAG.from_pretrained(out / "sets" / "toy-split_0-talk-6-frozen")
    epochs = sum(record["seconds"]["epoch"] for record in made.metrics["history"])
    assert made.metrics["made"]["seconds"] == pytest.approx(before + epochs)


def test_a_set_that_was_cut_off_is_begun_again_where_the_plan_has_changed(plan, told, tmp_path, monkeypatch):
    """Nothing of it is finished; the rows that are stay."""
    methods, out, epoch = {"medoid": METHODS["medoid"], "talk": METHODS["talk"]}, tmp_path / "out", ProgressLines.epoch

    def stopped(*arguments):
        monkeypatch.setattr(ProgressLines, "epoch", epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLines, "epoch", stopped)
    told("compare", plan(methods=methods, seeds=1), "--out", out, code=130)
    before = {path.name: path.read_bytes() for path in (out / "rows").iterdir()}
    methods["talk"] = methods["talk"] | {"two_stage.feature_steps": 2}
    told("compare", plan(methods=methods, seeds=1), "--out", out)
    assert before.items() < {path.name: path.read_bytes() for path in (out / "rows").iterdir()}.items()
    made = laboratory.SyntheticTAG.from_pretrained(out / "sets" / "toy-split_0-talk-6-frozen")
    assert [record["step"] for record in made.metrics["start"] if record["stage"] == "kernel"] == [0, 2]


def test_names_are_no_mathematics():
    """matplotlib reads what stands between two dollars."""
    name, rng = "100% $a & b% $", np.random.default_rng(0)
    sample = SimpleNamespace(features=rng.normal(size=(9, 4)), label=np.arange(9) % 3)
    pool = SimpleNamespace(sample=lambda *_: sample, tag=SimpleNamespace(classes=[name, "b", "c"]))
    assert draw_encodings(pool, sample.features[:3], np.arange(3), name)
    assert draw_retention([{"data": name, "method": name, "nodes": 3, "retention": 1.0}], "nodes", "nodes")


def test_pictures_need_matplotlib_and_that_is_told_at_once(plan, told, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, err = told("compare", plan(), "--out", tmp_path / "out", code=2)
    assert 'matplotlib is not installed; pip install "talk-dist[plot]"' in err
    assert not (tmp_path / "out").exists()
    assert plot({}, "toy", tmp_path / "run.png") == 'not drawn: it needs matplotlib (pip install "talk-dist[plot]")'


def test_rows_of_other_settings_are_refused(plan, told, tmp_path):
    told("compare", plan(methods={"medoid": {"coreset": "medoid"}}), "--out", tmp_path / "out")
    _, err = told("compare", plan(methods={"medoid": {"coreset": "random"}}), "--out", tmp_path / "out", code=2)
    assert "medoid-6-frozen-gcn.json was made with other settings" in err
    assert "method" in err


def test_encodings_train_no_encoder(plan, told, tmp_path):
    told("compare", plan(adapters=[True], methods={"c": METHODS["centres"], "i": METHODS["inverted"]}, seeds=1),
         "--out", tmp_path / "out")  # fmt: skip
    assert [row["method"] for row in rows_in(tmp_path / "out")] == ["full", "i"]


def test_one_node_a_class(plan, told, tmp_path):
    told("compare", plan(sizes=[0], methods={"medoid": {"coreset": "medoid"}}), "--out", tmp_path / "out")
    assert [row["nodes"] for row in rows_in(tmp_path / "out")][1] == 3


def test_all_that_is_wrong_is_told_before_anything_runs(plan, told, tmp_path):
    wrong = {"talk": {"preset": "default", "outer.epoch": 1}, "best": {"coreset": "best"}, "odd": 3}
    path = plan(methods=wrong, data={"toy": {"node": "x"}}, sise=[0.01])
    _, err = told("compare", path, "--out", tmp_path / "out", code=2)
    for words in (
        "unknown setting 'sise'; the nearest known one is 'sizes'",
        "methods.talk: unknown setting '--outer.epoch'; the nearest known one is '--outer.epochs'",
        "methods.best: coreset = 'best': one of random, herding, kcenter, medoid",
        "methods.odd: give `preset:`, `coreset:` or `features:`",
        "data.toy: unknown setting 'node'; the nearest known one is 'nodes'",
    ):
        assert words in err
    assert not (tmp_path / "out").exists()
    _, err = told("compare", plan(students=["mlp"], seeds=0), "--out", tmp_path / "out", code=2)
    assert "students = ('mlp',): must be some of gcn, sage, sgc, appnp, gat" in err
    assert "seeds = 0: must be a number of students, at least 1" in err


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sizes": [1.5]}, "sizes = (1.5,): must be fractions below 1, or whole numbers of nodes"),
        ({"data": {"a-b": {"prepared": "x"}, "a_b": {"prepared": "y"}}}, "data: a-b, a_b would share a folder"),
        ({"methods": {key: {"coreset": "random"} for key in ("m 1", "m-1")}}, "methods: m 1, m-1 would share a folder"),
        ({"sizes": 0.01}, "sizes = 0.01: must be a list such as a,b, each a number"),
        ({"splits": 3}, "splits = 3: must be a list"),
        ({"seeds": [3]}, "seeds = [3]: must be a whole number"),
        ({"splits": [1, 0, 1]}, "splits = (1, 0, 1): must name each once"),
        ({"data": {"python-api": {"nodes": "x.csv"}}}, "data.python-api: is the graph of Python's own library"),
        ({"splits": [-1]}, "splits = (-1,): must be seeds, not negative"),
        ({"adapters": ["no"]}, "adapters = ('no',): must be a list such as a,b, each true or false"),
        ({"settings": ["a"]}, "settings = ['a']: must be settings and their values"),
        ({"data": {"toy": "nodes.csv"}}, "data.toy = 'nodes.csv': give `nodes:` and `edges:`, or `prepared:`"),
        ({"data": {"toy": {"nodes": 5}}}, "data.toy.nodes = 5: must be a text"),
        ({"data": {"toy": {"nodes": "n.csv", "parts": "two"}}}, "data.toy.parts = 'two': must be a whole number"),
        ({"data": {"toy": {"max_tokens": 24}}}, "data.toy: give `nodes:` and `edges:`, or `prepared:`"),
        ({"data": {"toy": {3: 4}}}, "data.toy: unknown setting '3'"),
        ({"methods": {"full": {"coreset": "random"}}}, "methods.full: is what the reference"),
        ({"methods": {"c": {"features": "centres", "invert": "no"}}}, "invert = 'no': must be true or false"),
        ({"methods": {"m": {"coreset": "medoid", "invert": True}}}, "methods.m: invert = True: only encodings"),
        ({"methods": {"t": {"synthetic.size": 5}}}, "methods.t: synthetic.size is the plan's `sizes:`; leave it out"),
        (
            {"settings": {"seed": 1, "encoder.adapters": True}},
            "settings: seed is the plan's `splits:`, encoder.adapters",
        ),
        (
            {"settings": {"student.propagation": "mean"}, "students": ["gcn", "gat"]},
            "students: gat: student.propagation = 'mean': must be auto",
        ),
        (
            {"methods": {"p": {"preset": "paper"}}},
            "methods.p: its preset or file trains adapters; set `adapters: [true]`",
        ),
    ],
)
def test_an_ordinary_mistake_is_told(plan, changes, problem):
    with pytest.raises(laboratory.ConfigError) as error:
        read_plan(plan(**changes), settings_of)
    assert problem in str(error.value)


def test_a_plans_keys_are_words(plan):
    path = plan()
    with open(path, "a") as file:
        file.write("5: 1\n")
    with pytest.raises(laboratory.ConfigError, match="unknown setting '5'"):
        read_plan(path, settings_of)


def test_a_methods_settings_its_file_the_common_ones_and_a_preset_in_this_order(plan, tmp_path):
    (tmp_path / "best.yaml").write_text("kernel: {ridge: 0.5, layers: 2}\nsynthetic.tokens: 8\nseed: 7\n")
    file = {"config": str(tmp_path / "best.yaml")}
    methods = {"best": file, "own": file | {"kernel.layers": 3}, "preset": {"preset": "paper"}}
    common = {"kernel.ridge": 0.25, "kernel.layers": 1, "synthetic.tokens": 4, "inner.passes": 9}
    read = read_plan(plan(settings=common, methods=methods, adapters=[True]), settings_of).methods
    found = [(m.config.kernel.ridge, m.config.kernel.layers, m.config.synthetic.tokens) for m in read]
    assert found == [(0.5, 2, 8), (0.5, 3, 8), (0.25, 1, 4)]
    assert {m.config.inner.passes for m in read} == {9}
    assert [m.config.encoder.adapters for m in read] == [False, False, True]


def test_students_are_those_of_the_common_settings(plan, told, tags, make_encoder, tmp_path):
    common = {"encoder.name": make_encoder().config.name, "encoder.pooling": "mean", "encoder.precision": "float32"}
    common |= {"student.hidden": 8, "student.propagation": "mean", "runtime.threads": 1}
    methods = {"medoid": METHODS["medoid"]}
    told("compare", plan(settings=common, methods=methods, seeds=1), "--out", tmp_path / "out")
    encoder, config = make_encoder(), DistillConfig()
    pool = LocalPool(tags[2], encoder, config.kernel, config.runtime)
    medoid = laboratory.SyntheticTAG.from_pretrained(tmp_path / "out" / "sets" / "toy-split_0-medoid-6-frozen")
    student = StudentConfig(hidden=8, propagation="mean")
    expected = evaluate(pool, encoder, medoid, config, EvaluateConfig(seeds=1, student=student, against=()))
    (row,) = (row for row in rows_in(tmp_path / "out") if row["method"] == "medoid")
    assert row["val_accuracy"] == list(expected[0].val_accuracy)
    assert row["accuracy"] == list(expected[0].accuracy)


def test_the_reference_of_a_graph_with_a_split_of_its_own_is_trained_once(plan, told, tmp_path):
    told("compare", plan(methods={"medoid": METHODS["medoid"]}, splits=[1, 0], seeds=1), "--out", tmp_path / "out")
    assert [(row["method"], row["split"]) for row in rows_in(tmp_path / "out")] == [
        ("full", 1), ("medoid", 1), ("medoid", 0)
    ]  # fmt: skip


def test_a_plan_has_its_numbers_as_yaml_writes_them(plan):
    path = plan(full_lr=["5e-3", 1])
    assert read_plan(path, settings_of).full_lr == (5e-3, 1)


def test_a_plan_that_names_another_graph_is_not_given_the_old_ones_rows(plan, told, tables, tmp_path):
    """Nor another cut of the same; the same tables once more are the same graph."""
    nodes, edges = tables
    pq.write_table(nodes, tmp_path / "a.parquet")
    pq.write_table(nodes.set_column(1, "text", nodes["text"][::-1]), tmp_path / "b.parquet")
    pq.write_table(edges, tmp_path / "edges.parquet")

    def compared(code=0, **spec):
        spec = {"max_tokens": 24, "edges": str(tmp_path / "edges.parquet")} | spec
        spec["nodes"] = str(tmp_path / (spec["nodes"] + ".parquet"))
        path = plan(data={"toy": spec}, methods={"medoid": {"coreset": "medoid"}}, seeds=1)
        return told("compare", path, "--out", tmp_path / "out", code=code)[1]

    compared(nodes="a")
    before = rows_in(tmp_path / "out")
    assert "made with other settings (data hash" in compared(nodes="b", code=2)
    assert "made with other settings (data hash" in compared(nodes="a", max_tokens=3, code=2)
    compared(nodes="a")
    assert rows_in(tmp_path / "out") == before
    (tmp_path / "a.parquet").rename(tmp_path / "c.parquet")
    compared(nodes="a")  # tables that are gone are as they were
    pq.write_table(edges.slice(0, 20), tmp_path / "edges.parquet")  # but for one that is there and changed
    assert "no such file or folder" in compared(nodes="a", code=2)
    pq.write_table(edges, tmp_path / "edges.parquet")
    (tmp_path / "c.parquet").rename(tmp_path / "a.parquet")
    shutil.rmtree(tmp_path / "out" / "prepared" / "toy-0")
    compared(nodes="a")  # prepared again
    assert rows_in(tmp_path / "out") == before
    pq.write_table(pq.read_table(tmp_path / "b.parquet"), tmp_path / "a.parquet")
    assert "made with other settings (data hash" in compared(nodes="a", code=2)


def test_what_cannot_be_made_is_told_before_the_first_training(plan, told, tags, tmp_path):
    sizes = {"sizes": [6, 0.01, 2], "methods": {"medoid": {"coreset": "medoid"}}}
    _, err = told("compare", plan(**sizes), "--out", tmp_path / "out", code=2)
    for size, nodes in (("0.01", 1), ("2", 2)):
        assert f"toy, medoid, size {size}: synthetic.size gives {nodes} nodes for 3 classes" in err
    long = {"medoid": {"coreset": "medoid"}, "long": {"preset": "default", "synthetic.tokens": 500}}
    _, err = told("compare", plan(methods=long), "--out", tmp_path / "out", code=2)
    assert "toy, long, size 6: synthetic.tokens = 500" in err
    big = {"big": {"preset": "default", "encoder.batch_tokens": 10**12}}
    assert "toy, big, size 6: this" in told("compare", plan(methods=big), "--out", tmp_path / "out", code=2)[1]
    tables = {name: {"nodes": str(tmp_path / f"{name}.parquet"), "max_tokens": 9} for name in ("a", "b")}
    _, err = told("compare", plan(data={"toy": {"prepared": tags[2].path}} | tables), "--out", tmp_path / "out", code=2)
    assert all(f"data.{name}: {tmp_path}/{name}.parquet: no such file or folder" in err for name in tables)
    assert not (tmp_path / "out" / "rows").exists()
    assert not (tmp_path / "out" / "prepared").exists()


def test_nothing_is_inverted_where_there_are_no_texts(graph, prepare_graph, plan, told, tmp_path):
    """And that is said before the first training."""
    data = {"toy": {"prepared": prepare_graph(graph.with_encodings(32), encoder="given:32").path}}
    settings = {"encoder.name": "given:32", "synthetic.tokens": 1, "runtime.threads": 1, "inner.passes": 5}
    centres = {"centres": {"features": "centres"}, "inverted": {"features": "centres", "invert": True}}
    path = plan(data=data, settings=settings, methods=centres)
    _, err = told("compare", path, "--out", tmp_path / "out", code=2)
    assert "toy, inverted, size 6: " in err
    assert "brings encodings in place of texts" in err
    assert not (tmp_path / "out" / "rows").exists()
    told(
        "compare", plan(data=data, settings=settings, methods={"centres": centres["centres"]}), "--out", tmp_path / "b"
    )


def test_a_plan_of_two_encoders_is_refused(plan, other_encoder_folder):
    two = {"a": {"coreset": "random"}, "b": {"coreset": "random", "encoder.name": other_encoder_folder}}
    for methods in (two, {"b": two["b"]}):  # the reference is one of them
        with pytest.raises(laboratory.ConfigError, match=r"one: name it as encoder[.]name under"):
            laboratory.plan_encoder(read_plan(plan(methods=methods), settings_of))


def test_the_summary_by_hand():
    def row(method, data, accuracy, krr=None, size=0.01):
        facts = {"adapters": False, "student": "gcn", "size": size, "nodes": 3, "bytes": 10, "macro_f1": [0.5]}
        facts |= {"method": method, "data": data, "accuracy": accuracy, "val_accuracy": [0.5], "krr_accuracy": krr}
        return facts

    lines = report.summary(
        [
            row("full", "a", [0.8, 1.0], size=0),
            row("talk", "a", [0.8, 0.9], 0.9),
            row("talk", "a", [0.9, 1.0], 1.0),
            row("full", "b", [0.5], size=0),
            row("talk", "b", [0.4], 0.4),
        ]
    )
    talk = next(line for line in lines if (line["method"], line["data"]) == ("talk", "a"))
    assert talk["accuracy"] == pytest.approx(0.9)
    assert talk["spread"] == pytest.approx(np.std([0.8, 0.9, 0.9, 1.0]))
    assert talk["retention"] == pytest.approx(1.0)
    assert talk["gap"] == pytest.approx(0.05)
    (mean,) = report.averages(lines)
    assert mean["retention"] == pytest.approx(0.9)
    assert (mean["worst"], mean["worst on"], mean["data sets"]) == (pytest.approx(0.8), "b", 2)


def test_the_report_holds_everything(plan, told, tmp_path):
    out, _ = told("compare", plan(methods={"talk": METHODS["talk"]}), "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 4  # retention against three things, and the encodings
    assert "talk-dist compare" in page
    assert "| talk | gcn | 6 |" in out
    row = json.loads((tmp_path / "out" / "rows" / "toy-split_0-talk-6-frozen-gcn.json").read_text())
    assert {"machine", "version", "revision", "command", "seconds"} <= row.keys()
    seconds = pq.read_table(tmp_path / "out" / "results.parquet")["seconds"].to_pylist()
    assert seconds == [None, row["seconds"]]
