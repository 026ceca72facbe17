"""What pages of results are made of: pictures as PNG, and one self-contained HTML file that holds them."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

PLOT = 'pip install "talk-dist[plot]"'  # what brings matplotlib
STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:75em}td,th{padding:2px 10px;text-align:left}"
    "img{max-width:100%}tr:nth-child(even){background:#f4f6f8}"
)


def can_draw() -> bool:
    """Whether matplotlib, which is an extra, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plain(text: str) -> str:
    """``text``, anyone's, as matplotlib shows it letter by letter: between two dollars it would read mathematics."""
    return text.replace("$", r"\$")


def png(draw: Callable[[Any], object], width: float = 6.4, height: float = 4.8, dpi: int = 120) -> bytes:
    """What ``draw`` puts on a figure of so many inches; nothing where it returns False."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    if draw(figure) is False:
        return b""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def page(title: str, heading: str, *blocks: str) -> str:
    """The file. ``blocks`` are HTML, the rest is text."""
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(heading)}</h1>{''.join(blocks)}"
    )


def images(pictures: Mapping[str, bytes]) -> str:
    """Title -> PNG as HTML, each under its title, in the page itself."""
    return "".join(
        f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' src='data:image/png;base64,"
        f"{base64.b64encode(picture).decode()}'>"
        for title, picture in pictures.items()
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Texts as an HTML table."""

    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
