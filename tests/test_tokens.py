# SPDX-License-Identifier: Apache-2.0
"""Texts become token numbers: cut to the contract's length, never padded, each record by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from privacy.errors import ConfigError
from privacy.federation import Task
from silo.learning.records import Record, Unit
from silo.learning.tokens import EncodedUnit, encode

ONE = Task(labels=("no", "yes"), max_length=12)
TWO = Task(labels=("no", "yes"), max_length=12, text_pair=True)


def unit(name: str, *texts: tuple[str, ...], label: int = 1) -> Unit:
    return Unit(id=name, records=tuple(Record(texts=text, label=label) for text in texts))


def test_rows_keep_their_unit_order_and_label(minilm: Path) -> None:
    units = [unit("b", ("hello",), ("hello world",)), unit("a", ("world",), label=0), unit("none")]
    found = encode(units, minilm, ONE)
    assert [(each.id, [row[2] for row in each.rows]) for each in found] == [("b", [1, 1]), ("a", [0]), ("none", [])]
    assert found[0].rows[0] == ((101, 7592, 102), (0, 0, 0), 1)


def test_a_record_is_encoded_the_same_beside_any_others(minilm: Path) -> None:
    alone = encode([unit("a", ("short",))], minilm, ONE)
    crowd = encode([unit("z", ("long " * 500,)), unit("a", ("short",))], minilm, ONE)
    assert crowd[1:] == alone


@pytest.mark.parametrize("length", [4, 12, 300])
def test_long_texts_are_cut_and_nothing_is_padded(minilm: Path, length: int) -> None:
    # The packaged tokenizer.json carries truncation and padding of its own; the contract's length must win.
    task = Task(labels=("no", "yes"), max_length=length)
    long, short = encode([unit("a", ("word " * 1000,), ("word",))], minilm, task)[0].rows
    assert (len(long[0]), len(short[0])) == (length, 3)
    assert 0 not in short[0]


def test_two_texts_are_told_apart_and_share_the_length(minilm: Path) -> None:
    short, long = encode([unit("a", ("hello", "world"), ("hello " * 50, "world " * 50))], minilm, TWO)[0].rows
    assert short == ((101, 7592, 102, 2088, 102), (0, 0, 0, 1, 1), 1)
    assert len(long[0]) == len(long[1]) == 12
    assert {7592, 2088} <= set(long[0])


def test_a_tokenizer_without_token_types_gives_none(shared: Path) -> None:
    (row,) = encode([unit("a", ("Once upon a time",))], shared / "models" / "stories260K-hf", ONE)[0].rows
    assert row[1] is None
    assert 0 < len(row[0]) <= 12


def test_no_units_need_no_tokenizer(tmp_path: Path) -> None:
    assert encode([], tmp_path, ONE) == []


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    # transformers itself would make up an empty tokenizer from this configuration.
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"no tokenizer\.json") as caught:
        encode([unit("a", ("x",))], tmp_path, ONE)
    assert caught.value.hint
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        encode([unit("a", ("x",))], tmp_path, ONE)


def test_an_encoded_unit_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        EncodedUnit(id="a", rows=()).id = "b"  # type: ignore[misc]
