"""What a user keeps: the synthetic TAG as safetensors, its configuration, metrics and card.

A discrete one is kept as token ids, and its embeddings are those rows of the encoder's token table: `embedded`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from talk_dist.config import BITS, PLACES
from talk_dist.data import storage
from talk_dist.data.given import given_width
from talk_dist.errors import DataError
from talk_dist.models.inner import smoothed
from talk_dist.synthetic import grid

if TYPE_CHECKING:
    from torch_geometric.data import Data

    from talk_dist.data.tokenizer import Tokenizer
    from talk_dist.models.protocol import Encoder

TENSORS, CONFIG, METRICS, CARD = "synthetic.safetensors", "config.json", "metrics.json", "README.md"


@dataclass(frozen=True)
class SyntheticTAG:
    """M synthetic nodes that only see themselves: token embeddings and labels.

    ``token_ids``: of a discrete set, real tokens, special ones included; stored in the place of the embeddings.
    ``config``: encoder, number format, data set, seed and the whole distillation configuration;
    ``metrics``: what was measured on the way and by `evaluate`.
    """

    token_embeds: Tensor  # (M, T, d_tok) float32; d_tok = 0 where ids were read and nobody has called `embedded`
    labels: Tensor  # (M, C) float32, rows are label weights
    mask: Tensor | None = None  # (M, T) int64, 0 = padding; None = no padding
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    token_ids: Tensor | None = None  # (M, T) int64

    def __len__(self) -> int:
        return len(self.token_embeds)

    @property
    def classes(self) -> list[str]:
        return list(self.config.get("classes") or map(str, range(self.labels.shape[1])))

    @property
    def content(self) -> str:
        """What the real nodes had: texts, or encodings in their place."""
        return "texts" if given_width(str(self.config.get("encoder", {}).get("name"))) is None else "encodings"

    @property
    def encoded(self) -> bool:
        """Whether its nodes are encodings, in ``token_embeds`` (M, 1, d): what a method without texts makes."""
        return self.config.get("level") == "features"

    def encode(self, encoder: Encoder) -> Tensor:
        """Encodings (M, d): by ``encoder`` as it is, or the nodes themselves. Raises DataError as `embedded` does."""
        if self.encoded:
            return self.token_embeds[:, 0]
        return encoder.encode_embeds(self.embedded(encoder.token_table).token_embeds, self.mask)

    @property
    def stored_as(self) -> str:
        return "token ids" if self.token_ids is not None else str(self.config.get("storage", "float32"))

    def embedded(self, table: Tensor) -> SyntheticTAG:
        """With token embeddings, from an encoder's ``table`` (V, d_tok) if ids are all there is.

        Raises DataError if the table lacks some of them.
        """
        if self.token_ids is None or self.token_embeds.shape[2]:
            return self
        if int(self.token_ids.max()) >= len(table):
            raise DataError("token_ids", f"go up to {int(self.token_ids.max())}, the encoder has {len(table)} tokens")
        return replace(self, token_embeds=table[self.token_ids.to(table.device)].cpu())

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The M texts of a discrete set, special tokens left out. Raises DataError if it is none."""
        if self.token_ids is None:
            raise DataError(
                "token_embeds", "are no texts: embeddings lie between words; distil with synthetic.discrete"
            )
        return [tokenizer.decode(ids) for ids in self.token_ids.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        """As stored, in the number format of ``config["storage"]``; ids in as few bytes as hold them."""
        stored = self._stored_labels()
        if self.mask is not None:
            stored["mask"] = self.mask.to(torch.uint8).contiguous()
        kind, x = self.stored_as, self.token_embeds.detach().contiguous()
        if self.token_ids is not None:
            small = int(self.token_ids.max()) < 1 << 16
            stored["token_ids"] = self.token_ids.to(torch.uint16 if small else torch.int32).contiguous()
        elif kind in BITS:
            stored |= grid.pack(x, BITS[kind])
        elif kind == "int8":
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127.0
            stored["token_scales"] = scale.squeeze(-1).contiguous()
            stored["token_embeds"] = (x / scale).round().to(torch.int8)
        else:
            stored["token_embeds"] = x.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
        return stored

    def _stored_labels(self) -> dict[str, Tensor]:
        """Labels that are classes, softened as the configuration says, as their indices, where it names all classes;
        others as they are."""
        index, known = self.labels.argmax(1), len(self.config.get("classes") or ())
        if known != self.labels.shape[1] or not self.labels.equal(_labels(index, known, self.config)):
            return {"labels": self.labels.contiguous()}
        return {"label_index": index.to(label_type(known))}

    def num_bytes(self) -> int:
        """Bytes of the tensors as stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def as_stored(self) -> SyntheticTAG:
        """The set that a reader of the artifact gets: after one round of its number format."""
        read = _from_tensors(self.tensors(), self.config, self.metrics)
        return read if read.token_ids is None else replace(read, token_embeds=self.token_embeds)

    def save_pretrained(self, path: str | Path) -> None:
        """Publish the artifact folder atomically; after an error the one of before is whole."""
        from talk_dist.synthetic.card import card  # the card reads this class

        with storage.publish_folder(path, marker=CONFIG) as folder:
            (folder / TENSORS).write_bytes(self._tensor_file())
            (folder / METRICS).write_bytes(storage.to_json(self.metrics))
            (folder / CARD).write_text(card(self), encoding="utf-8")
            (folder / CONFIG).write_bytes(storage.to_json(self.config))

    def stored_at(self, path: str | Path) -> bool:
        """Whether this very set is there already and whole, made from the same graph and by the same settings, wherever
        they had it computed."""

        def made(config: dict[str, Any]) -> bytes:
            settings = {name: value for name, value in config.get("distill", {}).items() if name not in PLACES}
            return storage.to_json(config | {"command": "", "distill": settings})

        try:
            tensors = storage.read_bytes(storage.join(path, TENSORS))
            config, _ = (storage.read_json(storage.join(path, name)) for name in (CONFIG, METRICS))
        except (DataError, FileNotFoundError):  # nothing, or something damaged
            return False
        return tensors == self._tensor_file() and made(config) == made(self.config)

    def _tensor_file(self) -> bytes:
        return save_safetensors(self.tensors(), {"format": "pt"})

    @staticmethod
    def from_pretrained(path: str | Path) -> SyntheticTAG:
        """Load an artifact. Raises DataError if a file is missing or damaged."""
        if not storage.exists(storage.join(path, CONFIG)):
            raise DataError(str(path), f"is no synthetic TAG (no {CONFIG}); `talk-dist distill` makes one")
        try:
            tensors = load_safetensors(storage.read_bytes(storage.join(path, TENSORS)))
            alias = {"token_ids": "token_embeds", "label_index": "labels"}
            missing = {"token_embeds", "labels"} - {alias.get(name, name) for name in tensors}
        except SafetensorError as error:
            raise DataError(str(path), f"{TENSORS} cannot be read ({error}); distil or copy it again") from error
        if missing:
            raise DataError(str(path), f"{TENSORS} has no {' and no '.join(sorted(missing))}; distil or copy it again")
        config, metrics = (storage.read_json(storage.join(path, name)) for name in (CONFIG, METRICS))
        kind, embeds = config.get("storage"), tensors.get("token_embeds")
        if embeds is not None and (embeds.dtype == torch.uint8) != (kind in BITS):
            raise DataError(str(path), f"{CONFIG} says storage {kind!r}, {TENSORS} is another; distil or copy it again")
        return _from_tensors(tensors, config, metrics)

    def to_pyg(self, encodings: Tensor | None = None) -> Data:
        """A torch-geometric ``Data``: self-loops, ``y`` (class index), ``y_soft``, ``mask``,
        ``token_embeds`` and, of a discrete set, ``token_ids``.

        ``encodings`` (M, d), for example ``tag.encode(encoder)``, become ``x``; of an `encoded` set its own.
        """
        from torch_geometric.data import Data

        nodes = torch.arange(len(self))
        embeds = self.token_embeds if self.token_embeds.shape[2] else None
        if self.encoded:
            encodings, embeds = self.token_embeds[:, 0], None
        fields = {"x": encodings, "mask": self.mask, "token_embeds": embeds, "token_ids": self.token_ids}
        return Data(
            edge_index=torch.stack([nodes, nodes]),
            y=self.labels.argmax(1),
            y_soft=self.labels,
            num_nodes=len(self),
            **{name: value for name, value in fields.items() if value is not None},
        )

    def export_text(self, path: str | Path, tokenizer: Tokenizer) -> None:
        """Write a table of text and label, Parquet if ``path`` ends so, else JSON lines; of soft labels the heaviest.

        Raises DataError if the set is not discrete.
        """
        names = self.classes
        rows = [
            {"text": text, "label": names[label]}
            for text, label in zip(self.texts(tokenizer), self.labels.argmax(1).tolist(), strict=True)
        ]
        if str(path).endswith(".parquet"):
            buffer = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), buffer)
            storage.write_atomic(path, buffer.getvalue().to_pybytes())
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            storage.write_atomic(path, lines.encode())

    def export_pyg(self, path: str | Path, encodings: Tensor | None = None) -> None:
        """Write the fields of `to_pyg` as a plain dict of tensors.

        Read it with ``Data.from_dict(torch.load(path, weights_only=True))``: no code runs on loading.
        """
        import io

        buffer = io.BytesIO()
        torch.save(self.to_pyg(encodings).to_dict(), buffer)
        storage.write_atomic(path, buffer.getvalue())


def label_type(classes: int) -> torch.dtype:
    """The smallest integers that index so many classes."""
    return torch.uint8 if classes <= 256 else torch.int16 if classes <= 2**15 else torch.int32


def _labels(index: Tensor, classes: int, config: dict[str, Any]) -> Tensor:
    one_hot = torch.nn.functional.one_hot(index.long(), classes).float()
    return smoothed(one_hot, float(config.get("label_smoothing", 0.0)))


def _from_tensors(tensors: dict[str, Tensor], config: dict[str, Any], metrics: dict[str, Any]) -> SyntheticTAG:
    kind, ids = config.get("storage"), tensors["token_ids"].long() if "token_ids" in tensors else None
    if ids is not None:
        x = torch.zeros(*ids.shape, 0)
    elif kind in BITS:
        x = grid.unpack(tensors["token_embeds"], tensors["token_scales"], BITS[kind])
    else:
        x = tensors["token_embeds"].float()
        if "token_scales" in tensors:
            x = x * tensors["token_scales"].unsqueeze(-1)
    if "label_index" in tensors:
        classes = len(config.get("classes") or ()) or -1  # -1: as many as the indices need
        labels = _labels(tensors["label_index"], classes, config)
    else:
        labels = tensors["labels"]
    mask = tensors["mask"].long() if "mask" in tensors else None
    return SyntheticTAG(x, labels, mask, json.loads(json.dumps(config)), metrics, ids)
