"""Token ids: fingerprint, readable tokens, a hub that is asked once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from talk_dist.data import tokenizer as tokenizer_module
from talk_dist.data.tokenizer import load_pretrained, load_tokenizer, resolve_checkpoint
from talk_dist.errors import ConfigError

Tables = tuple[pa.Table, pa.Table]


def test_fingerprint_does_not_change_with_use() -> None:
    tokenizer = load_tokenizer("minilm")
    before = tokenizer.fingerprint
    assert len(tokenizer.encode(["one two three four"], 4)[0]) == 4
    again = load_tokenizer(resolve_checkpoint("minilm"))
    assert len(again.encode(["one two three four"], 128)[0]) == 6
    assert len(tokenizer.encode([], 8)) == 0
    used = replace(tokenizer)  # a new object, whose fingerprint is not cached, over the used backend
    assert before == used.fingerprint == again.fingerprint
    vocabulary = json.loads(tokenizer.backend.to_str())
    vocabulary["model"]["vocab"]["talkdist"] = tokenizer.vocab_size
    other = replace(tokenizer, backend=type(tokenizer.backend).from_str(json.dumps(vocabulary)))
    assert other.fingerprint != before
    assert other.vocab_size == tokenizer.vocab_size + 1


def test_tokens_can_be_read() -> None:
    tokenizer = load_tokenizer("minilm")
    ids = tokenizer.encode(["tokenization"], 8)[0].tolist()
    assert [tokenizer.decode_token(i) for i in ids] == ["[CLS]", "token", "##ization", "[SEP]"]
    with pytest.raises(ConfigError, match=f"{tokenizer.vocab_size}.*not in the vocabulary"):
        tokenizer.decode_token(tokenizer.vocab_size)


def test_unreachable_hub_is_asked_once_and_briefly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(tokenizer_module, "getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    asked: list[bool] = []

    def load(checkpoint: str, local_files_only: bool = False) -> None:
        asked.append(local_files_only)
        raise OSError("not in the cache")

    with pytest.raises(ConfigError) as caught:
        load_pretrained(load, "nobody/nothing")
    assert asked == [True]  # the cache only: no retries without a network
    for part in (
        "'nobody/nothing'",
        "folder at",
        "cache on this machine: not there",
        "127.0.0.1:9 cannot be reached",
        "Use 'minilm'",
    ):
        assert part in str(caught.value)
    monkeypatch.setattr(tokenizer_module, "_hub_obstacle", lambda: None)
    with pytest.raises(ConfigError):
        load_pretrained(load, "nobody/nothing")
    assert asked == [True, True, False]
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_pretrained(load, "nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"does not load.*save_pretrained"):
        load_tokenizer(str(tmp_path))


def test_texts_are_cut_on_the_side_that_the_tokenizer_says(encoder_folder: str) -> None:
    tokenizer = replace(load_tokenizer(encoder_folder), truncation_side="left")
    cut, whole = (tokenizer.encode([text], 9 - 5 * (len(text) > 9))[0] for text in ("ash0 ash1 ash2", "ash1 ash2"))
    assert cut.tolist() == whole.tolist()
