# SPDX-License-Identifier: Apache-2.0
"""Rows become units, and every bad row is refused with its place and without its text."""

from __future__ import annotations

import csv
import gzip
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import RecordsError
from privacy.federation import Privacy, Task
from privacy.rows import MAX_LINE_BYTES, read_rows
from silo.learning.records import Record, Unit, check_enough, load

KEY = bytes(range(32))
TASK = Task(labels=("no", "yes"), max_length=16)
SECRET = "Ms Okafor has a rare illness"
GOOD = {"text": "one", "label": "yes"}


def terms(**changes: Any) -> Privacy:
    values = {
        "unit": "record", "units": 100, "max_records_per_unit": 1, "sampling_rate": 0.1, "max_grad_norm": 1.0,
        "noise_multiplier": 1.0, "epsilon": 8.0, "delta": 1e-5, "lattice_bits": 10,
    }  # fmt: skip
    return Privacy(**{**values, **changes})


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, task: Task = TASK, key: bytes = KEY, **changes: Any) -> tuple[Unit, ...]:
    return load(path, task, terms(**changes), selection_key=key)


def test_every_row_is_its_own_unit_without_a_unit_column(tmp_path: Path) -> None:
    units = read(jsonl(tmp_path / "r.jsonl", [GOOD, "", {"text": "two", "label": "no"}, GOOD]))
    assert [unit.id for unit in units] == ["1", "3", "4"]
    assert [unit.records for unit in units] == [(Record(texts=(t,), label=k),) for t, k in (("one", 1), ("two", 0), ("one", 1))]


def test_all_formats_give_the_same_units(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": 'a "quoted",\nlong text', "text_pair": "é", "label": "1", "patient": str(p)} for p in (7, 8, 7)]
    jsonl(tmp_path / "r.jsonl", rows)
    with (tmp_path / "r.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**r, "label": 1, "patient": int(r["patient"])} for r in rows]), tmp_path / "r.parquet"
    )
    for name in ("r.jsonl", "r.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    task = Task(labels=("0", "1"), text_pair=True, max_length=16)
    found = [
        read(tmp_path / f"r.{end}", task, unit="patient", max_records_per_unit=2)
        for end in ("jsonl", "jsonl.gz", "csv", "csv.gz", "parquet")
    ]
    assert [unit.id for unit in found[0]] == ["7", "8"]
    assert [len(unit.records) for unit in found[0]] == [2, 1]
    assert all(units == found[0] for units in found)


def test_a_csv_row_is_placed_at_the_line_it_starts_on(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b'text,label\r\n"a\r\nb",yes\r\n\r\nc,no\r\n')
    assert list(read_rows(tmp_path / "r.csv")) == [(2, {"text": "a\r\nb", "label": "yes"}), (5, {"text": "c", "label": "no"})]


def test_a_label_may_be_an_integer_or_its_text(tmp_path: Path) -> None:
    task = Task(labels=("3", "5"), max_length=16)
    units = read(jsonl(tmp_path / "r.jsonl", [{"text": "a", "label": 5}, {"text": "a", "label": "5"}]), task)
    assert [unit.records[0].label for unit in units] == [1, 1]


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read(tmp_path / "r.jsonl")) == 1


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (f'{{"text": "{SECRET}", "label": yes}}', "not JSON at column"),
        (f'{{"text": "{SECRET}"', "not JSON"),
        (f'{{"text": "{SECRET}", "text": "x", "label": "yes"}}', "twice"),
        (f'{{"text": "{SECRET}", "label": NaN}}', "NaN"),
        (f'["{SECRET}"]', "expected an object"),
        ("[" * 100_000, "not usable JSON"),
        ({SECRET: "x", "label": "yes"}, '"text" is missing'),
        ({"text": SECRET}, '"label" is missing'),
        ({"text": None, "label": "yes"}, '"text" is null'),
        ({"text": [SECRET], "label": "yes"}, '"text" is list, expected text'),
        ({"text": 12, "label": "yes"}, '"text" is int'),
        ({"text": " \n", "label": "yes"}, '"text" is empty'),
        ('{"text": "\\ud800", "label": "yes"}', "half a character"),
        ({"text": "x", "label": SECRET}, "none of the contract's 2: no, yes"),
        ({"text": "x", "label": True}, '"label" is bool'),
        ({"text": "x", "label": 1.0}, '"label" is float'),
    ],
)
def test_a_bad_row_is_refused_with_its_place_and_without_its_text(tmp_path: Path, bad: Any, says: str) -> None:
    path = jsonl(tmp_path / "r.jsonl", [GOOD, bad, GOOD])
    with pytest.raises(RecordsError) as caught:
        read(path)
    error = caught.value
    assert error.message.startswith(f"{path}:2: ")
    assert says in error.message
    assert error.hint
    assert error.facts["line"] == 2
    assert SECRET not in json.dumps(error.as_json())


@pytest.mark.parametrize("value", [None, "", "  ", 1.5, True, ["a"]])
def test_a_row_without_a_usable_unit_is_refused(tmp_path: Path, value: Any) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{**GOOD, "patient": "a"}, {**GOOD, "patient": value}])
    with pytest.raises(RecordsError, match=r":2: .*patient"):
        read(path, unit="patient")


def test_a_missing_second_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="text_pair"):
        read(jsonl(tmp_path / "r.jsonl", [GOOD]), Task(labels=("no", "yes"), text_pair=True, max_length=16))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("r.jsonl", b"", "holds no record"),
        ("r.csv", b"text,label\n", "holds no record"),
        ("r.jsonl", b'{"text": "a", "label": "yes"}\n{"text": "\xff"}\n', ":2: byte 11 of the line is not UTF-8"),
        ("r.csv", b"text,label\n\xe9,yes\n", ":2: byte 1"),
        ("r.csv", b"text,label\na,b,yes\n", ":2: found 3 fields, the header names 2"),
        ("r.csv", b'text,label\n"a"b,yes\n', ":2: not CSV"),
        ("r.csv", b'text,label\n"a,yes\n', ":2: not CSV"),
        ("r.csv", b"text,text\na,yes\n", ":1: .*not distinct"),
        ("r.jsonl.gz", b"not gzip", "cannot be read"),
        ("r.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 9, mtime=0)[:-9], "cannot be read"),
        ("r.parquet", b"not parquet", "cannot be read"),
        ("r.txt", b"a", "cannot tell the format"),
        ("r.parquet.gz", b"a", "cannot tell the format"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RecordsError, match=says) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv.gz", "gone.parquet", "folder.jsonl"])
def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(RecordsError, match="cannot be read"):
        read(tmp_path / name)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b" " * (MAX_LINE_BYTES + 1))
    with pytest.raises(RecordsError, match="a line of more than"):
        read(tmp_path / "r.jsonl")


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(RecordsError, match="two columns"):
        read(tmp_path / "r.parquet")


ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", "z", "xy"]), st.sampled_from(["no", "yes"])),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, most=st.integers(1, 4), data=st.data())
def test_what_is_kept_depends_on_the_units_own_records_and_the_key_alone(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], most: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("kept")

    def kept(those: list[tuple[str, str, str]]) -> dict[str, tuple[Record, ...]]:
        path = jsonl(folder / "r.jsonl", [{"p": p, "text": t, "label": k} for p, t, k in those])
        return {unit.id: unit.records for unit in read(path, unit="p", max_records_per_unit=most)}

    whole = kept(rows)
    assert kept(data.draw(st.permutations(rows))) == whole
    for unit, records in whole.items():
        own = [row for row in rows if row[0] == unit]
        assert kept(own) == {unit: records}
        assert len(records) == min(most, len(own))


def test_another_key_keeps_other_records(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"p": 1, "text": f"t{n}", "label": "yes"} for n in range(64)])
    kept = {read(path, key=secrets.token_bytes(32), unit="p", max_records_per_unit=4)[0].records for _ in range(4)}
    assert len(kept) == 4


def test_equal_records_of_a_unit_count_as_often_as_they_stand_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"p": 1, **GOOD}] * 3)
    assert read(path, unit="p", max_records_per_unit=2)[0].records == (Record(texts=("one",), label=1),) * 2


def test_a_short_selection_key_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        read(tmp_path / "r.jsonl", key=b"short")


def test_fewer_units_than_a_batch_are_refused() -> None:
    units = [Unit(id=str(n), records=()) for n in range(11)]
    check_enough(units, terms(units=101, sampling_rate=0.1))
    with pytest.raises(RecordsError, match=r"10 privacy units.*expects 11") as caught:
        check_enough(units[:10], terms(units=101, sampling_rate=0.1))
    assert caught.value.exit_code == 3


def test_more_units_than_the_contract_is_for_are_refused_and_not_counted_aloud() -> None:
    """δ ≤ 1/(10 · all units) rests on the contract's figure being an upper bound."""
    units = [Unit(id=str(n), records=()) for n in range(4321)]
    check_enough(units, terms(units=4321))
    with pytest.raises(RecordsError, match="do not fit the contract") as caught:
        check_enough(units, terms(units=4320))
    said = caught.value.message + (caught.value.hint or "") + str(caught.value.facts)
    assert "4321" not in said
    assert "larger `units`" in (caught.value.hint or "")
    assert caught.value.exit_code == 3
