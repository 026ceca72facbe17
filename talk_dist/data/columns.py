"""What the checks of both tables share: which columns are there, and of what kind they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from talk_dist.data.splits import show

TWICE = "is there more than once; drop or rename all but one"


def missing_columns(
    where: str, present: list[str], required: Sequence[str], problems: list[str], needed: str = ""
) -> list[str]:
    """The required columns that a table lacks; ``needed`` names all that are required, if that takes more words."""
    missing = [name for name in required if name not in present]
    if missing:
        what = f"missing column{'s' * (len(missing) > 1)} {', '.join(missing)} (it has {show(present, 12)})"
        problems.append(f"{where}: {what}; add or rename, {needed or ', '.join(required)} are required")
    return missing


def whole_numbers(column: pa.Array | pa.ChunkedArray) -> Any:
    """Which strings are integers of 64 bits, as such are written. Of 19 digits the order of the words tells."""
    short = pc.match_substring_regex(column, r"^(0|-?[1-9][0-9]{0,17})$")
    for sign, largest in (("", "9223372036854775807"), ("-", "-9223372036854775808")):
        long = pc.match_substring_regex(column, f"^{sign}[1-9][0-9]{{18}}$")
        short = pc.or_(short, pc.and_(long, pc.less_equal(column, largest)))
    return short


def plain(column: pa.Array) -> pa.Array:
    """The column without dictionary encoding (pandas categories) and views, which few functions of Arrow take. Raises
    TypeError for bytes that are no text: Arrow reads them and fails wherever they are used."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    if is_text(column.type):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise TypeError(f"is not valid UTF-8 ({error}); decode and write it again") from error
    return column


def integers(column: pa.Array) -> pa.Array:
    """The column as int64. Raises TypeError for a number that is beyond them."""
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise TypeError(f"has numbers that are too large ({error}); use signed 64-bit integers or strings") from error


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
