"""What prepare holds, what it refuses, and what a full disk leaves."""

from __future__ import annotations

import errno
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import by_id, files_of

from talk_dist.data import prepare as prepare_module
from talk_dist.data.prepare import prepare
from talk_dist.data.tables import Source, Table, from_arrow
from talk_dist.data.tag import PreparedTag, TokenLists
from talk_dist.errors import ConfigError, DataError

Tables = tuple[pa.Table, pa.Table]


def test_full_disk_leaves_the_prepared_tag_of_before(
    tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = prepare(from_arrow(*tables), tmp_path / "tag", parts=2)
    before = files_of(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((pq.ParquetWriter, "write_table"), (prepare_module, "save_file"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                prepare(from_arrow(*tables), tmp_path / "tag", parts=3)
    assert files_of(tmp_path) == before
    assert by_id(PreparedTag(tag.path)) == by_id(tag)


class CountingTokenizer:
    """In place of the real one where texts are too long to be tokenised in a test: one token a text."""

    fingerprint = "counting"

    def encode(self, texts: list[str], max_tokens: int) -> TokenLists:
        return self.encode_and_count(texts, max_tokens)[0]

    def encode_and_count(self, texts: list[str], max_tokens: int) -> tuple[TokenLists, int]:
        return TokenLists(np.arange(len(texts) + 1), np.array([len(text) for text in texts], np.int32)), 0


def test_texts_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gigabytes of text pass through; at no time are there 64 MB of them."""
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda name: CountingTokenizer())
    batches, rows, text_bytes = 128, 128, 1 << 16  # 8 MB a batch, 1 GB a reading
    text = pa.array(["x" * text_bytes] * rows)
    held: list[int] = []

    def stream(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for index in range(batches):
            ids = np.arange(index * rows, (index + 1) * rows)
            columns = {"node_id": ids, "text": pa.concat_arrays([text]), "label": ids % 2}
            columns["text"] = pa.concat_arrays([text.slice(0, rows // 2), text.slice(rows // 2)])  # its own memory
            yield pa.record_batch({name: columns[name] for name in wanted})
            held.append(pa.total_allocated_bytes() - start + tracemalloc.get_traced_memory()[0])

    source = Source("stream", Table("generated", lambda: ["node_id", "text", "label"], stream))
    start = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        tag = prepare(source, tmp_path / "tag", parts=2)
    finally:
        tracemalloc.stop()
    assert len(held) == 2 * batches  # once to check, once to tokenise
    assert tag.meta["text"]["bytes"] == batches * rows * text_bytes
    assert max(held) < 64 << 20


def test_progress_counts_nodes(tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "ENCODE_ROWS", 25)
    told: list[tuple[int, int]] = []
    prepare(from_arrow(*tables), tmp_path / "tag", progress=lambda done, total: told.append((done, total)))
    assert told == [(25, 60), (50, 60), (60, 60)]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"parts": 0}, "parts is 0"),
        ({"parts": 61}, "parts is 61, but the graph has 60 nodes"),
        ({"halo_hops": 0}, "halo_hops is 0"),
        ({"method": "metsi"}, "'metsi'; use one of auto, metis, hash"),
        ({"max_tokens": 4096}, "max_tokens is 4096.*takes 3 to 512"),
        ({"max_tokens": 2}, "max_tokens is 2"),
        ({"ratios": (0.9, 0.2, 0.2)}, "ratios"),
        ({"ratios": (0, 0.5, 0.5)}, "ratios"),
        ({"encoder": "/no/such/folder"}, "cannot be loaded.*/no/such/folder: none.*minilm"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, tables: Tables, setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare(from_arrow(*tables), tmp_path / "tag", **setting)
    assert not (tmp_path / "tag").exists()


def test_prepared_tag_that_was_changed_is_refused(tmp_path: Path, tables: Tables) -> None:
    tag = prepare(from_arrow(*tables), tmp_path / "tag", parts=2)
    file = tmp_path / "tag" / "part-00001" / "graph.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    tag.partition(0)
    with pytest.raises(DataError, match=r"part-00001/graph\.safetensors changed.*prepare the graph again"):
        tag.partition(1)
    meta = tmp_path / "tag" / "META.json"
    whole = json.loads(meta.read_text())
    for changed in (whole | {"num_nodes": whole["num_nodes"] + 1}, {"format": whole["format"]}):
        meta.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"META\.json changed.*prepare the graph again"):
            PreparedTag(str(tmp_path / "tag"))
    meta.write_text("[]")
    with pytest.raises(DataError, match="has format None"):
        PreparedTag(str(tmp_path / "tag"))
