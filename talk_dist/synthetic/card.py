"""The card of an artifact: what it is, what it reached, how to use it and how to make it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talk_dist.synthetic.artifact import SyntheticTAG


def card(tag: SyntheticTAG) -> str:
    """A dataset card in Markdown with the front matter that model hubs read."""
    c, m = tag.config, tag.metrics
    nodes, tokens = tag.token_embeds.shape[:2]
    real = c.get("num_real_nodes")
    share = f" ({nodes / real:.2%} of {real:,})" if real else ""
    text = c.get("text_bytes", {})
    against = f", {tag.num_bytes() / text['train_bytes']:.1%} of the training {tag.content}' bytes" if text else ""
    encoder = c.get("encoder", {})
    what = "learned token embeddings" if tag.token_ids is None else "texts made of the encoder's own tokens"
    each = f", {tokens} tokens each"
    if tag.encoded:
        what, each = "encodings, which only a student of this encoder, frozen, can be trained on", ""
    elif tag.content == "encodings":
        what, each = "learned encodings, as the real nodes had them in place of texts", ""
    lines = [
        "---",
        "tags: [text-attributed-graph, dataset-distillation, talk]",
        "---",
        f"# {c.get('dataset', 'a graph')}, distilled to {nodes} synthetic nodes",
        "",
        "A synthetic text-attributed graph made by `talk-dist`: a language model and GNN trained on it stand in for",
        f"ones trained on the real graph. Its nodes are {what}; each only has its self-loop.",
        "",
        "| | |",
        "| --- | --- |",
        f"| nodes | {nodes}{share}{each} |",
        f"| bytes | {tag.num_bytes():,} ({tag.stored_as}{against}) |",
        f"| classes | {_cell(', '.join(tag.classes))} |",
        f"| encoder | {encoder.get('name')}, {encoder.get('pooling')} pooling, width {encoder.get('width')} |",
        f"| data set hash | `{str(c.get('dataset_hash'))[:16]}` |",
        f"| seed | {c.get('seed')} |",
        f"| validation accuracy while distilling | {_percent(m.get('val_accuracy'))} |",
        "",
    ]
    if "evaluation" in m:
        lines += ["## What it reaches", "", m["evaluation"]["markdown"], ""]
    if c.get("command"):
        lines += ["## Make it again", "", "```", c["command"], "```", ""]
    lines += [
        "## Use it",
        "",
        "```python",
        "from talk_dist import SyntheticTAG",
        'tag = SyntheticTAG.from_pretrained("this folder")',
        "data = tag.to_pyg()  # torch_geometric.data.Data",
        "```",
        "",
    ]
    if c.get("readings"):
        lines += ["## Nearest-token reading", "", "| class | tokens |", "| --- | --- |"]
        labels = tag.labels.argmax(1).tolist()
        for label, reading in zip(labels, c["readings"], strict=True):
            lines.append(f"| {_cell(tag.classes[label])} | {_cell(reading)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """``text``, a label or token of anyone's, as the content of one table cell."""
    return " ".join(text.split("\n")).replace("|", "\\|")


def _percent(value: Any) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"
