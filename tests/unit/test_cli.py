"""The command line: every command on a tiny graph, and what is refused before any text is encoded."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
import warnings

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from torch_geometric.data import Data

from talk_dist import __version__
from talk_dist.cli import COMMANDS, main
from talk_dist.commands import call, place, runs
from talk_dist.commands.folder import RunFolder
from talk_dist.config import DistillConfig
from talk_dist.data.tag import PreparedTag
from talk_dist.runtime import memory
from talk_dist.runtime.callbacks import Callback, Stop
from talk_dist.synthetic.artifact import SyntheticTAG

SMALL = {
    "encoder.pooling": "mean",
    "encoder.precision": "float32",
    "synthetic.size": "6",
    "synthetic.tokens": "5",
    "two_stage.feature_steps": "5",
    "two_stage.student_steps": "2",
    "two_stage.student_passes": "5",
    "two_stage.token_steps": "5",
    "inner.passes": "10",
    "outer.epochs": "1",
    "outer.steps": "2",
    "runtime.threads": "1",
}
QUICK_EVALUATION = {"evaluation.seeds": "2", "evaluation.recipe.passes": "10", "evaluation.against": "full,random"}


def words(**settings):
    """settings as --name value; `__` stands for the dot."""
    return flat({name.replace("__", "."): str(value) for name, value in settings.items()})


def flat(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(tags, encoder_folder, tmp_path_factory):
    """The folder of a run that was distilled and evaluated."""
    out = tmp_path_factory.mktemp("cli") / "run"
    settings = {"data": tags[2].path, "out": out, "evaluate": "true", "encoder.name": encoder_folder}
    assert main(["distill", *flat(settings | SMALL | QUICK_EVALUATION)]) == 0
    return out


# -- every command ----------------------------------------------------------------------------------------


def test_the_program_itself():
    run = [sys.executable, "-m", "talk_dist"]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    done = subprocess.run([*run, "distill", "--outer.lrr", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "talk-dist distill: unknown setting '--outer.lrr'; the nearest known one is '--outer.lr'\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, told):
    out, _ = told(name, "--help")
    assert COMMANDS[name].options.__doc__.split()[0] in out
    assert "configuration file" not in out  # of a section, which is refused
    if COMMANDS[name].distill:
        assert "AdamW learning rate of the token embeddings" in " ".join(out.split())


def test_overview(told):
    assert told()[0] == told("--help")[0] == told("help")[0]
    assert told("--version")[0].strip() == __version__


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_prepare_and_inspect(kind, graph, encoder_folder, told, tmp_path):
    write = pq.write_table if kind == "parquet" else pacsv.write_csv
    for name, table in (("nodes", graph.nodes), ("edges", graph.edges)):
        write(table, tmp_path / f"{name}.{kind}")
    tables = [tmp_path / f"nodes.{kind}", tmp_path / f"edges.{kind}"]
    settings = words(out=tmp_path / "tag", encoder=encoder_folder, max_tokens=20, parts=3, halo_hops=2, name="trees")
    out, _ = told("prepare", *tables, *settings)
    tag = PreparedTag(str(tmp_path / "tag"))
    assert (tag.num_nodes, tag.num_parts, tag.meta["name"]) == (60, 3, "trees")
    assert tag.meta["tokenizer"]["max_tokens"] == 20
    for word in ("trees", "60,", "3 (metis", "2 hops", "birch"):
        assert word in out
    assert told("inspect", tmp_path / "tag")[0] == out


def test_prepare_random_split_and_ratios(graph, encoder_folder, told, tmp_path):
    pq.write_table(graph.nodes, tmp_path / "nodes.parquet")
    settings = words(out=tmp_path / "tag", encoder=encoder_folder, max_tokens=20, use_split_column="false")
    told("prepare", tmp_path / "nodes.parquet", *settings, "--ratios", "0.5,0.3,0.2", "--split_seed", "3")
    meta = PreparedTag(str(tmp_path / "tag")).meta
    assert meta["split"] == {"how": "random", "seed": 3, "ratios": [0.5, 0.3, 0.2]}
    assert meta["num_edges"] == 0


def test_prepare_the_api_of_a_package(encoder_folder, told, tmp_path):
    settings = words(out=tmp_path / "tag", encoder=encoder_folder, max_tokens=20, packages="jsonargparse,packaging")
    told("prepare", "python-api", *settings)
    meta = PreparedTag(str(tmp_path / "tag")).meta
    assert meta["name"] == "python-api-jsonargparse-packaging"
    assert any(name.startswith("packaging.") for name in meta["classes"])


def test_estimate(tags, encoder_folder, told):
    out, _ = told("estimate", tags[2].path, *words(encoder__name=encoder_folder, synthetic__size=6))
    for word in ("peak", "encode", "evaluate", "together", "shards (2)"):
        assert word in out


def test_distill_leaves_what_it_says(finished):
    names = {"attempt.json", "checkpoint.safetensors", "log.jsonl", "synthetic", "evaluation.md", "run.png"}
    assert {path.name for path in finished.iterdir()} == names
    tag = SyntheticTAG.from_pretrained(finished / "synthetic")
    assert len(tag) == len(tag.config["readings"]) == 6
    assert tag.config["command"].startswith("talk-dist distill --data ")
    assert DistillConfig.from_dict(tag.config["distill"]).outer.steps == 2
    rows = {row["name"]: row for row in tag.metrics["evaluation"]["rows"]}
    assert list(rows) == ["synthetic", "full", "random"]
    assert len(rows["full"]["accuracy"]) == 2
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [0, 1]
    card, note = (finished / "synthetic" / "README.md").read_text(), (finished / "evaluation.md").read_text()
    for text in (card, note):
        assert tag.metrics["evaluation"]["markdown"] in text
        assert tag.config["command"] in text
    assert "GCN students on the frozen encoder, trained on 6 synthetic nodes (10.0% of 60; " in note
    assert (finished / "run.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_result_was_found_to_be_worth_goes_only_with_the_result(finished, tags, encoder_folder, tmp_path):
    """A finished run again, wherever it is computed, leaves its evaluation; another result takes it away. What is
    damaged is made again."""
    run = shutil.copytree(finished, tmp_path / "run")
    settings = {"data": tags[2].path, "out": run, "encoder.name": encoder_folder} | SMALL
    worth = ["evaluation.md", "run.png", "synthetic/metrics.json", "synthetic/README.md"]
    before = [(run / name).read_bytes() for name in worth]
    for elsewhere in ({}, {"runtime.cache": "false", "cluster.attempts": 7}):
        assert main(["distill", *flat(settings | elsewhere)]) == 0
        assert [(run / name).read_bytes() for name in worth] == before
    again, artifact = settings | {"seed": 1}, run / "synthetic"
    damages = [
        lambda: again.update(resume="never"),
        lambda: (again.pop("resume"), (artifact / "metrics.json").unlink()),
        lambda: (artifact / "config.json").write_bytes(b"{"),
        lambda: (artifact / "synthetic.safetensors").write_bytes(b"{"),
    ]
    for damage in damages:
        damage()
        (run / "evaluation.md").write_text("of something else")
        assert main(["distill", *flat(again)]) == 0
        assert not {"evaluation.md", "run.png"} & {path.name for path in run.iterdir()}
        assert "evaluation" not in SyntheticTAG.from_pretrained(artifact).metrics


def test_inspect_an_artifact_or_the_run_around_it(finished, told):
    out, _ = told("inspect", finished)
    assert out == told("inspect", finished / "synthetic")[0]
    for word in ("6 nodes of 5 token embeddings", "birch", "[CLS]", "| full |", "talk-dist distill"):
        assert word in out


def test_evaluate_writes_into_the_artifact(finished, tags, told, tmp_path):
    tag = SyntheticTAG.from_pretrained(finished / "synthetic")
    tag.save_pretrained(tmp_path / "copy")
    settings = flat({"data": tags[2].path, "seeds": 1, "against": "medoid", "student.kind": "sage", "recipe.passes": 5})
    out, _ = told("evaluate", tmp_path / "copy", *settings)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    after = SyntheticTAG.from_pretrained(tmp_path / "copy")
    assert [row["name"] for row in after.metrics["evaluation"]["rows"]] == ["synthetic", "medoid"]
    assert after.metrics["evaluation"]["config"]["student"]["kind"] == "sage"
    assert after.token_embeds.equal(tag.token_embeds)
    assert after.metrics["evaluation"]["markdown"] in out
    assert "SAGE students on the frozen encoder, trained on 6" in out
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "run.png").read_bytes()
    told("evaluate", run, *settings)  # a run's page says what its artifact says
    assert after.metrics["evaluation"]["markdown"] in (run / "evaluation.md").read_text()
    assert (run / "run.png").read_bytes() != before


def test_an_artifact_is_evaluated_wherever_one_is(tags, encoder_folder, told, tmp_path):
    """What was said of the machine that distilled it holds there alone."""
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    there = {"kernel.fields": "disk", "runtime.scratch": scratch, "runtime.cache_folder": tmp_path / "kept"}
    told("distill", *flat({"data": tags[2].path, "out": out, "encoder.name": encoder_folder} | SMALL | there))
    shutil.rmtree(scratch)
    shutil.rmtree(tmp_path / "kept")
    config = json.loads((out / "synthetic" / "config.json").read_text())
    config["distill"]["encoder"]["device"] = "cuda"
    (out / "synthetic" / "config.json").write_text(json.dumps(config))
    told("evaluate", out, *flat({"data": tags[2].path, "seeds": 1, "against": "medoid", "recipe.passes": 5}))
    told("inspect", out, "--data", tags[2].path)
    told("export", out, "--out", tmp_path / "a.pt", "--encodings", "true")
    assert not (tmp_path / "kept").exists()
    assert not scratch.exists()
    here = {"data": tags[2].path, "seeds": 1, "against": "random", "recipe.passes": 5, "runtime.cache_folder": scratch}
    told("evaluate", out, *flat(here))
    assert list(scratch.glob("encodings/*.npy"))


def test_a_set_that_is_replaced_while_it_is_evaluated_stays(finished, tags, told, tmp_path, monkeypatch):
    tag, path = SyntheticTAG.from_pretrained(finished / "synthetic"), tmp_path / "copy"
    tag.save_pretrained(path)
    other, evaluated = dataclasses.replace(tag, token_embeds=tag.token_embeds + 1.0), runs.evaluate
    monkeypatch.setattr(runs, "evaluate", lambda *given: other.save_pretrained(path) or evaluated(*given))
    line = flat({"data": tags[2].path, "seeds": 1, "against": "random", "recipe.passes": 3})
    out, err = told("evaluate", path, *line, code=2)
    assert "| random |" in out
    assert "was replaced while it was evaluated" in err
    assert SyntheticTAG.from_pretrained(path).token_embeds.equal(other.as_stored().token_embeds)


def test_who_listens_to_a_run_hears_its_evaluation(tags, encoder_folder, told, tmp_path, monkeypatch):
    heard = set()

    class Ear(Callback):
        def progress(self, stage, *_):
            heard.add(stage)

    monkeypatch.setattr(place.Here, "callbacks", [Ear()])
    settings = {"data": tags[2].path, "out": tmp_path, "evaluate": "true", "encoder.name": encoder_folder}
    told("distill", *flat(settings | SMALL | QUICK_EVALUATION))
    assert {"synthetic", "random"} < heard


def test_passwords_are_not_written_down():
    said = call.Call(["distill", "--out", "s3://me:hunter2@bucket/run"], Stop()).command
    assert said == "talk-dist distill --out 's3://me:***@bucket/run'"


def test_a_table_that_cannot_be_kept_is_printed_all_the_same(finished, tags, told, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    SyntheticTAG.from_pretrained(finished / "synthetic").save_pretrained(copy)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(copy))

    line = ["evaluate", copy, *flat({"data": tags[2].path, "seeds": 1, "against": "random", "recipe.passes": 3})]
    with monkeypatch.context() as patched:
        patched.setattr(SyntheticTAG, "save_pretrained", refuse)
        out, err = told(*line, code=2)
    assert "| random |" in out
    assert "Permission denied" in err
    assert "change its permissions, or choose another folder" in err
    told("evaluate", tmp_path / "typo" / "run", "--data", tags[2].path, code=2)
    assert not (tmp_path / "typo").exists()
    monkeypatch.setattr("talk_dist.data.storage.check_writable", refuse)
    monkeypatch.setattr(runs, "evaluate", lambda *_: pytest.fail("trained first"))
    assert "Permission denied" in told(*line, code=2)[1]


def test_inspect_refuses_texts_of_another_graph(finished, tags, told):
    _, err = told("inspect", finished, "--data", tags[7].path, code=2)
    assert "was made from" in err
    assert "give that graph" in err
    assert "--force" not in err


def test_export(finished, told, tmp_path):
    told("export", finished, "--out", tmp_path / "a.pt", "--encodings", "true")
    data = Data.from_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert data.validate()
    assert data.x.shape == (6, 32)
    told("export", finished / "synthetic", "--out", tmp_path / "b.pt")
    assert "x" not in torch.load(tmp_path / "b.pt", weights_only=True)
    _, err = told("export", finished, "--out", tmp_path, code=2)
    assert "Is a directory" in err
    copy = shutil.copytree(finished / "synthetic", tmp_path / "copy")
    (copy / "config.json").write_text('{"storage": "int4"}')
    _, err = told("export", copy, "--out", tmp_path / "c.pt", "--encodings", "true", code=2)
    assert "does not say how it was distilled" in err


def test_the_embedded_graph_is_prepared_once(graph, encoder_folder, told, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(runs, "build_python_api", lambda: built.append(1) or (graph.nodes, graph.edges))
    monkeypatch.setattr(runs, "api_name", lambda: "python-api-3")
    small = SMALL | {"encoder.name": encoder_folder, "outer.epochs": 0, "synthetic.init": "random", "kernel.hops": 1}
    arguments = ["distill", "--data", "python-api", "--out", tmp_path, *flat(small)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told(*arguments)
        assert PreparedTag(str(tmp_path / "prepared")).meta["name"] == "python-api-3"
        told(*arguments, "--outer.lr", "0.1", "--resume", "never")
        assert len(built) == 1
        deeper = ["--kernel.hops", "3", "--kernel.architecture", "gcn"]  # needs a deeper halo
        _, err = told(*arguments, *deeper, code=2)
        assert "holds a run on another graph" in err
        assert "going on with what" in told(*arguments, "--outer.lr", "0.1")[0]  # what was refused left it as it was
        told(*arguments, *deeper, "--resume", "never")
        monkeypatch.setattr(runs, "api_name", lambda: "python-api-4")
        told(*arguments, "--resume", "never")  # another Python
    assert len(built) == 3
    assert told("evaluate", tmp_path, "--seeds", 1, "--against", "full", "--recipe.passes", 3)[0]


# -- before any encoding ------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_found_before_encoding(tags, encoder_folder, told, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "distill", lambda *_: pytest.fail("went on"))
    (tmp_path / "file").write_text("")
    settings = words(
        data=tags[2].path, out=tmp_path / "file" / "run", encoder__name=encoder_folder, synthetic__size=2,
        synthetic__tokens=65, kernel__architecture="gcn", kernel__hops=4,
    )  # fmt: skip
    _, err = told("distill", *settings, code=2)
    for problem in (
        "4 problems",
        "cannot be written",
        "2 nodes for 3 classes",
        "kernel.hops = 4",
        "--halo_hops 3",
        "synthetic.tokens = 65",
    ):
        assert problem in err


def test_an_encoder_or_data_that_is_not_there(told, tmp_path):
    _, err = told("distill", *words(data=tmp_path / "no", out=tmp_path / "run", encoder__name="no-such/model"), code=2)
    assert "2 problems" in err
    assert "encoder 'no-such/model' cannot be loaded. Tried" in err
    assert "is not a prepared TAG" in err


def test_another_tokenizer(tags, encoder_folder, tmp_path, told):
    other = shutil.copytree(encoder_folder, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"ash1"', '"oak"'))
    settings = words(data=tags[1].path, out=tmp_path / "run", encoder__name=other, synthetic__size=6)
    _, err = told("distill", *settings, code=2)
    assert "was tokenised for encoder" in err


def test_texts_longer_than_the_encoder_reads(encoder_folder, graph, prepare_graph, told, tmp_path):
    """Whose tokenizer does not know how many tokens that are."""
    mini = shutil.copytree(encoder_folder, tmp_path / "mini")
    known = json.loads((mini / "tokenizer_config.json").read_text())
    known.pop("model_max_length")
    (mini / "tokenizer_config.json").write_text(json.dumps(known))
    tag = prepare_graph(graph, encoder=str(mini), max_tokens=100)
    _, err = told("distill", *words(data=tag.path, out=tmp_path / "run", encoder__name=mini, synthetic__size=6), code=2)
    assert "texts of up to 100 tokens, but encoder" in err
    assert "has 64 positions; prepare it again with --max_tokens 64 or fewer" in err


def test_something_in_the_way_of_the_artifact(tags, encoder_folder, told, tmp_path):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "thesis.txt").write_text("mine")
    _, err = told("distill", *words(data=tags[1].path, out=tmp_path, encoder__name=encoder_folder), code=2)
    assert "is in the way" in err
    assert (tmp_path / "synthetic" / "thesis.txt").read_text() == "mine"


def test_a_machine_that_is_too_small(tags, encoder_folder, told, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 100 << 20)
    arguments = words(data=tags[1].path, out=tmp_path, encoder__name=encoder_folder, synthetic__size=6)
    assert "100 MiB are free" in told("distill", *arguments, code=2)[1]
    out, err = told("estimate", tags[1].path, *arguments[4:], code=2)
    assert "peak" in out
    assert "To fit" in err


def test_evaluating_on_another_graph(finished, tags, graph, prepare_graph, told, tmp_path):
    SyntheticTAG.from_pretrained(finished / "synthetic").save_pretrained(tmp_path / "copy")
    small = words(seeds=1, against="random", recipe__passes=3)
    _, err = told("evaluate", tmp_path / "copy", "--data", tags[7].path, *small, code=2)
    assert "--force true" in err
    config = tmp_path / "copy" / "config.json"
    share = json.loads(config.read_text())
    share["distill"]["synthetic"]["size"] = 0.01  # of the graph that it was made from, where that was six
    config.write_text(json.dumps(share))
    told("evaluate", tmp_path / "copy", "--data", tags[7].path, "--force", "true", *small)
    renamed = graph.nodes.set_column(
        2, "label", [[f"{name}2" if name else "" for name in graph.nodes["label"].to_pylist()]]
    )
    other = prepare_graph(type(graph)(renamed, graph.edges, graph.label, graph.split, graph.adjacency))
    _, err = told("evaluate", tmp_path / "copy", "--data", other.path, "--force", "true", *small, code=2)
    assert "classes" in err


def test_a_full_disk_is_one_message(finished, tags, encoder_folder, told, monkeypatch, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "synthetic" / "synthetic.safetensors").read_bytes()

    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(SyntheticTAG, "save_pretrained", full)
    settings = {"data": tags[2].path, "out": run, "encoder.name": encoder_folder, "seed": 1, "resume": "never"}
    _, err = told("distill", *flat(settings | SMALL), code=2)
    assert "No space left on device" in err
    assert "is whole: make room" in err
    assert (run / "synthetic" / "synthetic.safetensors").read_bytes() == before


def test_a_folder_that_another_run_holds(tags, encoder_folder, told, tmp_path):
    settings = flat({"data": tags[2].path, "out": tmp_path / "run", "encoder.name": encoder_folder} | SMALL)
    with RunFolder(str(tmp_path / "run")).alone():
        _, err = told("distill", *settings, code=2)
    assert "another run is at work there" in err
    told("distill", *settings)


def test_the_name_of_the_embedded_graph_tells_what_it_depends_on():
    assert call.api_name() == f"python-api-{sys.version.split()[0]}"
