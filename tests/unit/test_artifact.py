"""The artifact: what is saved is read again, in every number format; damage is told, a full disk harms nothing."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_geometric.data import Data

from talk_dist.config import BITS
from talk_dist.data import storage
from talk_dist.errors import ConfigError, DataError
from talk_dist.runtime.checkpoint import Checkpoint, DistillState
from talk_dist.synthetic import grid
from talk_dist.synthetic.artifact import SyntheticTAG, label_type

FORMATS = ("float32", "bfloat16", "int8", "int4", "int2", "int1")


def make(kind="float32", mask=False, seed=0, **metrics):
    """Five nodes of four tokens in three classes; rows of tokens differ a thousandfold in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, 8, generator=generator) * torch.logspace(-2, 1, 4)[None, :, None]
    x[0, 0] = 0.0
    labels = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 2, 2]), 3).float()
    keep = torch.tensor([[1, 1, 1, 0]] * 5) if mask else None
    config = {"storage": kind, "classes": ["ash", "birch", "cedar"], "dataset": "trees", "num_real_nodes": 500}
    return SyntheticTAG(x, labels, keep, config, metrics)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(kind, mask, tmp_path):
    tag = make(kind, mask, val_accuracy=0.5)
    tag.save_pretrained(tmp_path / "a")
    back = SyntheticTAG.from_pretrained(tmp_path / "a")
    assert back.token_embeds.dtype == torch.float32
    error = (back.token_embeds - tag.token_embeds).abs()
    bound = {
        "float32": torch.zeros(()),
        "bfloat16": tag.token_embeds.abs() * 2**-8,  # eight bits of mantissa
        "int8": tag.token_embeds.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5),  # half a step of a token's scale
    }
    if kind in bound:
        assert (error <= bound[kind]).all()
    else:  # no worse, over a token, than half a step of a grid as wide as its numbers, at 16 bits
        half = tag.token_embeds.abs().amax(-1) / (2 ** BITS[kind] - 1) * (1 + 2**-10) + 1e-4
        assert (error.square().sum(-1) <= 8 * half.square()).all()
    assert back.labels.equal(tag.labels)
    assert (back.mask is None) if not mask else back.mask.equal(tag.mask)
    assert (back.config, back.metrics) == (tag.config, tag.metrics)
    assert back.token_embeds.equal(tag.as_stored().token_embeds)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_second_round_changes_nothing_and_bytes_are_those_on_disk(kind, tmp_path):
    tag = make(kind).as_stored()
    tag.save_pretrained(tmp_path / "a")
    again = SyntheticTAG.from_pretrained(tmp_path / "a")
    assert torch.allclose(again.token_embeds, tag.token_embeds, rtol=1e-6 if kind == "int8" else 0.0, atol=0.0)
    size = (tmp_path / "a" / "synthetic.safetensors").stat().st_size
    assert tag.num_bytes() <= size <= tag.num_bytes() + 1024
    tokens = {"float32": 640, "bfloat16": 320, "int8": 160 + 80, "int4": 80 + 40, "int2": 40 + 40, "int1": 20 + 40}
    assert tag.num_bytes() == tokens[kind] + 5
    assert sum(t.nbytes for t in load_file(tmp_path / "a" / "synthetic.safetensors").values()) == tag.num_bytes()


def test_labels_are_indices_only_where_they_say_all(tmp_path):
    """Soft ones, and those whose classes the configuration does not name, stay as they are."""
    plain = make()
    for tag, size in [
        (plain, 5),
        (replace(plain, labels=plain.labels * 0.9), 60),
        (replace(plain, config={"storage": "float32"}), 60),
    ]:
        assert tag.num_bytes() == 640 + size
        assert tag.as_stored().labels.equal(tag.labels)
    assert [label_type(c) for c in (256, 257, 2**15 + 1)] == [torch.uint8, torch.int16, torch.int32]


def test_an_artifact_of_before_still_loads(tmp_path):
    """Labels as a matrix, whatever the configuration names."""
    tag = make("int8")
    tag.save_pretrained(tmp_path / "a")
    stored = {name: t for name, t in tag.tensors().items() if name != "label_index"} | {"labels": tag.labels}
    save_file(stored, tmp_path / "a" / "synthetic.safetensors")
    back = SyntheticTAG.from_pretrained(tmp_path / "a")
    assert back.labels.equal(tag.labels)
    assert back.token_embeds.equal(tag.as_stored().token_embeds)


def test_packed_tokens_are_not_read_by_another_configuration(tmp_path):
    for kind, other in (("int2", {}), ("int8", {"storage": "int4"})):
        make(kind).save_pretrained(tmp_path / kind)
        (tmp_path / kind / "config.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"config\.json says storage"):
            SyntheticTAG.from_pretrained(tmp_path / kind)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_is_on_a_grid_stays_as_it_is(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, 4, 16), generator=generator)
    codes[..., 0] = 2**bits - 1  # an outermost level
    step = torch.logspace(-3, 3, 12).view(3, 4, 1).half().float()
    x = (codes - grid.top(bits)) * step
    assert grid.steps(x, bits).equal(step)
    packed = grid.pack(x, bits)
    assert grid.unpack(packed["token_embeds"], packed["token_scales"], bits).equal(x)
    assert grid.on_grid(-x, step, bits).equal(-x)
    for odd in (torch.zeros(1, 1, 16), torch.full((1, 1, 16), 1e9), torch.full((1, 1, 16), 1e-9)):
        once = grid.unpack(*grid.pack(odd, bits).values(), bits)
        assert torch.isfinite(once).all()
        assert grid.unpack(*grid.pack(once, bits).values(), bits).equal(once)


def test_a_token_fills_whole_bytes():
    with pytest.raises(ConfigError, match="needs a width that 8 divides, not 12"):
        grid.pack(torch.ones(1, 1, 12), 1)


def test_int8_scales_each_token_by_itself():
    tag = make("int8")
    relative = (tag.as_stored().token_embeds - tag.token_embeds).norm(dim=-1) / tag.token_embeds.norm(dim=-1)
    assert relative[1:].max() < 0.01


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_truncated_tensors(keep, tmp_path):
    make().save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "synthetic.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"synthetic\.safetensors cannot be read"):
        SyntheticTAG.from_pretrained(tmp_path / "a")


def test_what_else_can_be_wrong_with_a_folder(tmp_path):
    with pytest.raises(DataError, match="talk-dist distill"):
        SyntheticTAG.from_pretrained(tmp_path / "nothing")
    make().save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "synthetic.safetensors"
    whole = file.read_bytes()
    save_file({"labels": torch.zeros(2, 3)}, file)
    with pytest.raises(DataError, match="has no token_embeds"):
        SyntheticTAG.from_pretrained(tmp_path / "a")
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        SyntheticTAG.from_pretrained(tmp_path / "a")
    file.write_bytes(whole)
    (tmp_path / "a" / "metrics.json").write_text('{"val')
    with pytest.raises(DataError, match="JSON"):
        SyntheticTAG.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("file", ["synthetic.safetensors", "metrics.json", "README.md", "config.json"])
def test_a_full_disk_leaves_the_artifact_of_before(file, tmp_path, monkeypatch):
    make(seed=1).save_pretrained(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def full(write):
        def attempt(self, data, *args, **kwargs):
            if self.name == file:
                write(self, data[: len(data) // 2], *args, **kwargs)
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
            return write(self, data, *args, **kwargs)

        return attempt

    monkeypatch.setattr(Path, "write_bytes", full(Path.write_bytes))
    monkeypatch.setattr(Path, "write_text", full(Path.write_text))
    with pytest.raises(OSError, match="No space left"):
        make(seed=2).save_pretrained(tmp_path / "a")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert SyntheticTAG.from_pretrained(tmp_path / "a").token_embeds.equal(make(seed=1).token_embeds)


def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path, monkeypatch):
    def state(epoch):
        return DistillState(torch.full((2, 3, 4), float(epoch)), torch.eye(2), torch.tensor(0.5), epoch=epoch)

    checkpoint = Checkpoint(str(tmp_path / "c"), {"seed": 0})
    checkpoint.save(state(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(state(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert checkpoint.load().epoch == 1


def test_to_pyg():
    data = make(mask=True).to_pyg(torch.ones(5, 6))
    assert isinstance(data, Data)
    assert data.validate()
    assert data.has_self_loops()
    assert (data.num_nodes, data.num_edges) == (5, 5)
    assert data.y.tolist() == [0, 0, 1, 2, 2]
    assert data.x.shape == (5, 6)
    assert data.mask.shape == (5, 4)
    assert "x" not in make().to_pyg()


def test_an_export_loads_without_running_code(tmp_path):
    tag = make("int8").as_stored()
    tag.export_pyg(tmp_path / "a.pt", torch.ones(5, 6))
    data = Data.from_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert data.validate()
    assert data.token_embeds.equal(tag.token_embeds)
    assert data.y_soft.equal(tag.labels)
    assert (data.num_nodes, data.x.shape) == (5, (5, 6))


def test_the_card_says_what_it_is(tmp_path):
    tag = make("int8", val_accuracy=0.876)
    about = {"command": "talk-dist distill --data x", "readings": ["a | b", "c", "d", "e", "f"]}
    replace(tag, config=tag.config | about).save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    for words in (
        "trees",
        "5 (1.00% of 500)",
        "245 (int8",
        "87.6 %",
        "talk-dist distill --data x",
        "| ash | a \\| b |",
    ):
        assert words in card
    odd = ["a | b", "two\nlines", *tag.classes[2:]]
    replace(tag, config=tag.config | about | {"classes": odd}).save_pretrained(tmp_path / "odd")
    card = (tmp_path / "odd" / "README.md").read_text()
    assert "| classes | a \\| b, two lines" in card
    assert "| a \\| b | a \\| b |" in card
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dataset"] == "trees"


def test_an_id_that_the_table_has_just_not_is_refused():
    tag = SyntheticTAG(torch.zeros(1, 2, 0), torch.eye(1), token_ids=torch.tensor([[0, 5]]))
    assert tag.embedded(torch.zeros(6, 3)).token_embeds.shape == (1, 2, 3)
    with pytest.raises(DataError, match="go up to 5"):
        tag.embedded(torch.zeros(5, 3))


def test_a_class_without_synthetic_nodes_keeps_its_column():
    config = {"classes": ["a", "b", "c"], "storage": "float32"}
    tag = SyntheticTAG(torch.ones(2, 1, 4), torch.eye(3)[[0, 1]], config=config)
    assert tag.as_stored().labels.equal(tag.labels)


@pytest.mark.parametrize("bits", [1, 2])
def test_steps_of_a_grid_are_better_than_those_that_reach_the_largest_number(bits):
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    widest = x.abs().amax(-1, keepdim=True) / grid.top(bits)
    errors = [(grid.on_grid(x, step, bits) - x).square().sum() for step in (grid.steps(x, bits), widest)]
    assert errors[0] < 0.8 * errors[1]
