"""Rows of a data file: JSONL or Parquet, read whole, each row knowing where it stands.

Owns the file formats and the look-up of columns. What a column means belongs to `miles.data.prompts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.errors import DataError, did_you_mean

PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `place` is `file:line` (JSONL) or `file, row N` (Parquet), both counted from 1."""

    place: str
    values: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSONL or Parquet file. Empty lines are skipped. Raises DataError."""
    if path.is_dir():
        raise DataError(f"{path} is a directory", fix="name one JSONL or Parquet file")
    if not path.is_file():
        siblings = (other.name for other in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise DataError(
            f"data file {path} does not exist.{did_you_mean(path.name, siblings)}",
            fix="correct data.path; relative paths count from the run file",
        )
    if path.suffix in PARQUET_SUFFIXES:
        rows = _read_parquet(path)
    elif path.suffix in JSONL_SUFFIXES:
        rows = _read_jsonl(path)
    else:
        readable = ", ".join(JSONL_SUFFIXES + PARQUET_SUFFIXES)
        raise DataError(
            f"{path} has the suffix '{path.suffix}'; readable are {readable}",
            fix="convert it to JSONL: one JSON object per line",
        )
    if not rows:
        raise DataError(f"{path} holds no rows", fix="one JSON object per line, or a Parquet table with rows")
    return rows


def require_column(rows: list[Row], column: str, key: str) -> None:
    """Raise DataError for the first row without `column`; `key` is the config key that names the column."""
    missing = [row for row in rows if row.values.get(column) is None]
    if not missing:
        return
    columns = _columns(rows)
    if column not in columns:
        raise DataError(
            f"{missing[0].place}: no column '{column}'.{did_you_mean(column, columns)}",
            fix=f"set {key} to one of {', '.join(columns)}",
        )
    raise DataError(
        f"{missing[0].place}: '{column}' is missing or null, in {len(missing)} of {len(rows)} rows",
        fix="fill it in every row, or remove those rows",
    )


def has_column(rows: Iterable[Row], column: str) -> bool:
    """Whether any row has a value in `column`."""
    return any(row.values.get(column) is not None for row in rows)


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.values))


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                rows.append(Row(place, _parse_line(place, line)))
    return rows


def _parse_line(place: str, line: bytes) -> dict[str, Any]:
    fix = "write one JSON object per line, in UTF-8"
    try:
        values = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})", fix=fix) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno})", fix=fix) from error
    if not isinstance(values, dict):
        raise DataError(f"{place}: {kind_of(values)} where a row (an object) belongs", fix=fix)
    return values


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON and with its article."""
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        int: "a number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}", fix="write the file again") from error
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]
