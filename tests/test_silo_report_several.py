# SPDX-License-Identifier: Apache-2.0
"""Whoever has more to hide than one unit stands in a silo's own report too; an older record says what it said, byte for byte."""

from __future__ import annotations

import msgspec
import pytest

from privacy.errors import TrustError
from privacy.reporting import page, paper
from silo import reading
from silo.reporting import document, own
from silo.reporting.record import Several, decode, encode
from tests.test_report import Page
from tests.test_silo_report import answers, made, trained  # noqa: F401  (fixtures)

ROWS = (
    Several(of="silos", count=2, epsilon=3.2101), Several(of="records", count=2, epsilon=4.5),
    Several(of="records", count=8, epsilon=None),
)  # fmt: skip


def shown(report):
    return Page(page.render(document.of(report, "ab" * 32))).text


def test_the_rows_are_the_ledgers_and_those_of_silo_budget(made, trained):  # noqa: F811
    (row,) = made.several
    (stated,) = reading.budget(trained.root, 0)["several"]
    assert (row.of, row.count, row.epsilon) == ("silos", 2, stated["epsilon"])
    assert row.epsilon > made.budget.epsilon
    text = shown(made)
    assert "A unit that 2 silos know" in text
    assert "Whoever has more to hide than one unit is protected less." in text


def test_every_row_is_shown_rounded_up_and_one_without_a_figure_says_so(made):  # noqa: F811
    report = msgspec.structs.replace(made, several=ROWS)
    text = shown(report)
    for words in ("A unit that 2 silos know", "A person with 8 records in each silo that knows them", "3.22", "4.50", "no figure"):
        assert words in text, words
    assert decode(encode(report)) == report
    several, none = (document.of(msgspec.structs.replace(made, several=rows), "ab" * 32) for rows in (ROWS, ()))
    assert len(paper.render(several)) > len(paper.render(none))


def test_a_record_from_before_these_rows_is_read_shown_and_verified_as_it_was(made, trained, tmp_path):  # noqa: F811
    old = msgspec.structs.replace(made, several=msgspec.UNSET)
    data = encode(old)
    assert b'"several"' not in data
    assert decode(data) == old
    assert "Whoever has more" not in shown(old)
    assert own.views(old) == own.views(decode(data)), "the same bytes every time"
    assert set(answers(own.verify(trained.root, own.write(trained.root, tmp_path / "old", old))).values()) == {"ok"}
    with pytest.raises(TrustError, match="not a silo's report"):
        decode(data.replace(b'"runs": [', b'"several": null,\n  "runs": [', 1))


def test_a_changed_row_fails_by_name(made, trained, tmp_path):  # noqa: F811
    written = own.write(trained.root, tmp_path / "own", made)
    data = written.read_bytes()
    written.write_bytes(data.replace(b'"count": 2', b'"count": 3', 1))
    found = answers(own.verify(trained.root, written))
    assert (found["signature"], found["several"]) == ("failed", "failed")
