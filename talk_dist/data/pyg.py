"""A torch-geometric ``Data`` as node and edge tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from talk_dist.data.splits import overlap_problems, split_column
from talk_dist.data.tables import BATCH_ROWS, Source, Table, in_memory
from talk_dist.data.tag import SPLITS
from talk_dist.errors import DataError


def from_pyg(data: Any, name: str = "data") -> Source:
    """A PyG ``Data`` with ``text`` or ``raw_texts`` (a list), ``y``, ``edge_index`` and, if any, ``train_mask`` & co.

    Nodes get the ids 0..N-1. Raises DataError for attributes that are missing or do not fit together.
    """
    where = f"{name} (PyG Data)"
    masks = {split: f"{split}_mask" for split in SPLITS}
    texts = next((value for key in ("text", "raw_texts") if (value := getattr(data, key, None)) is not None), None)
    tensors = {key: getattr(data, key, None) for key in ("edge_index", "y", *masks.values())}
    there = {key: value for key, value in tensors.items() if value is not None}
    arrays = {key: _numpy(value) for key, value in there.items() if hasattr(value, "detach")}
    foreign = sorted(there.keys() - arrays.keys())
    problems = [f"attribute {key}: is {type(there[key]).__name__}; make it a tensor" for key in foreign]
    if texts is None:
        problems.append("attribute text: missing; set data.text to a list of strings, one a node")
    elif odd := {type(text).__name__ for text in texts if not isinstance(text, str | None)}:
        problems.append(f"attribute text: has {', '.join(sorted(odd))}; make it strings")
    if "y" not in there:
        problems.append("attribute y: missing; set data.y to one class a node (-1 = unlabelled)")
    if "edge_index" not in there and getattr(data, "adj_t", None) is not None:
        problems.append("attribute edge_index: missing, there is only adj_t; set data.edge_index")
    edge_index = arrays.pop("edge_index", None)
    if edge_index is not None and (edge_index.ndim != 2 or len(edge_index) != 2):
        problems.append(f"attribute edge_index: has shape {edge_index.shape}; make it (2, number of edges)")
    for key, value in arrays.items():
        if value.ndim != 1 and value.shape[1:] != (1,):
            problems.append(f"attribute {key}: has shape {value.shape}; choose one column of it")
        elif texts is not None and len(value) != len(texts):
            problems.append(f"attribute {key}: has {len(value)} rows for {len(texts)} texts; give one a node")
        arrays[key] = value.reshape(-1)
    if texts is None or problems:
        raise DataError(where, problems)
    label = np.nan_to_num(arrays["y"], nan=-1)
    columns = {"node_id": pa.array(np.arange(len(texts))), "label": pa.array(np.where(label < 0, -1, label))}
    members = {split: np.flatnonzero(arrays[key]) for split, key in masks.items() if key in arrays}
    if members:
        columns["split"] = split_column(len(texts), members)

    def batches(wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for begin in range(0, len(texts), BATCH_ROWS):
            batch = {key: column.slice(begin, BATCH_ROWS) for key, column in columns.items()}
            batch["text"] = pa.array(list(texts[begin : begin + BATCH_ROWS]), pa.string())
            yield pa.record_batch({key: batch[key] for key in wanted})

    edges = None
    if edge_index is not None:
        edges = in_memory(pa.table({"src": edge_index[0], "dst": edge_index[1]}), f"{where}, edge_index")
    nodes = Table(where, lambda: [*columns, "text"], batches)
    return Source(name, nodes, edges, overlap_problems(f"{where}, masks", members))


def _numpy(tensor: Any) -> np.ndarray:
    """Which knows no bfloat16."""
    array: np.ndarray = (tensor.double() if tensor.is_floating_point() else tensor).detach().cpu().numpy()
    return array
