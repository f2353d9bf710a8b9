# SPDX-License-Identifier: Apache-2.0
"""Rows of a JSONL, CSV or Parquet file, read strictly, with the place each row came from.

Promised: a row is either read whole or refused with the file, the line, what was found and what was expected. Nothing of a
row is ever quoted in an error, neither values nor field names (the first line of a CSV file without a header is a record).
Not promised: the types of the values. JSON and Parquet keep theirs, CSV knows text only.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from privacy.errors import RecordsError

MAX_LINE_BYTES = 16 * 2**20
FORMATS = ".jsonl, .jsonl.gz, .csv, .csv.gz or .parquet"

Row = dict[str, object]


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(place, row) for every row, in the file's order. The place is the line the row starts on; in Parquet, its number from 1.

    Blank lines are passed over; a UTF-8 byte order mark at the start is tolerated.

    Raises:
        RecordsError: no such file, an unknown ending, no row at all, or a row that cannot be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    if kind == ".parquet" and not packed:
        rows = _parquet(path)
    elif kind in {".jsonl", ".csv"}:
        lines = _lines(path, packed=packed)
        rows = _jsonl(path, lines) if kind == ".jsonl" else _csv(path, lines)
    else:
        raise RecordsError(f"{path}: cannot tell the format from the file's name", hint=f"name it with {FORMATS}", file=str(path))
    return _at_least_one(path, rows)


def refuse(path: Path, line: int, found: str, hint: str) -> NoReturn:
    """Raise the error for one row: ``file:line: what was found and what was expected``, with the hint.

    Raises:
        RecordsError: always.
    """
    raise RecordsError(f"{path}:{line}: {found}", hint=hint, file=str(path), line=line)


def _at_least_one(path: Path, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise RecordsError(
            f"{path}: holds no record, at least one was expected", hint="name the file that holds the records", file=str(path)
        )


def _lines(path: Path, *, packed: bool) -> Iterator[tuple[int, str]]:
    """(line number, line with its ending), decoded strictly, a line at a time."""
    try:
        with cast(IO[bytes], gzip.open(path) if packed else path.open("rb")) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    refuse(path, number, f"a line of more than {MAX_LINE_BYTES} bytes", "end each record with a newline")
                yield number, _decoded(path, number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        refuse(
            path, number, f"byte {error.start + 1} of the line is not UTF-8", "convert the file to UTF-8, for example with iconv"
        )


def _jsonl(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Row]]:
    hint = 'write one JSON object per line, like {"text": "...", "label": "..."}'
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_distinct, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            refuse(path, number, f"not JSON at column {error.colno}: {error.msg}", hint)
        except (ValueError, RecursionError) as error:
            refuse(path, number, f"not usable JSON: {error}", hint)
        if not isinstance(row, dict):
            refuse(path, number, f"found a JSON {type(row).__name__}, expected an object", hint)
        yield number, row


def _distinct(pairs: list[tuple[str, object]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a field stands twice")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _csv(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Row]]:
    reader = csv.reader((line for _, line in lines), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            refuse(
                path,
                number,
                f"not CSV: {error}",
                'quote texts that hold commas, quotes or newlines, and double the quotes: "a ""b"" c"',
            )
        if not cells:
            continue
        if header is None:
            header = _header(path, number, cells)
        elif len(cells) != len(header):
            refuse(path, number, f"found {len(cells)} fields, the header names {len(header)}", "quote texts that hold commas")
        else:
            yield number, dict(zip(header, cells, strict=True))


def _header(path: Path, number: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names) or not all(names):
        refuse(
            path, number, f"the {len(names)} column names are not distinct, or one is empty", "begin the file with a header line"
        )
    return names


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RecordsError(
            f"{path}: reading Parquet needs pyarrow",
            hint="pip install 'siloquy[silo]', or write the records as JSONL",
            file=str(path),
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise RecordsError(f"{path}: two columns have one name", hint="rename one of them", file=str(path))
            yield from enumerate(_batches(file), start=1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _batches(file: Any) -> Iterator[Row]:  # noqa: ANN401 (pyarrow has no types)
    for batch in file.iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _unreadable(path: Path, error: Exception) -> RecordsError:
    reason = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else f"damaged or of another format ({type(error).__name__})"
    )
    return RecordsError(f"{path}: cannot be read: {reason}", hint="check the path and write the file again", file=str(path))
