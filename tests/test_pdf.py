# SPDX-License-Identifier: Apache-2.0
"""The report on paper and for readers who do not see it: PDF/A and PDF/UA, the same bytes every time, no name is markup."""

from __future__ import annotations

import functools
import re
import unicodedata
import xml.etree.ElementTree as ET
import zlib
from itertools import pairwise

import msgspec
import pytest
import typst
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.reporting import report
from privacy.errors import MachineError
from privacy.reporting import page, paper
from privacy.reporting.blocks import Document, Paragraph, Section, Table, column, row
from tests.sample_report import contract, make, run, sample
from tests.test_report import Page

INJECTIONS = (
    '#panic("out")',
    '#read("/etc/passwd")',
    "$ x $",
    "*bold* _it_ `raw` <label> @ref",
    "#{1+1}",
    '")#panic("',
    "\\#",
    "]#[",
    "// no",
    "/* no",
)


@functools.cache
def pdf() -> bytes:
    return paper.render(report.document(sample()))


def one(text: str, **changes) -> Document:
    """A document in which one text stands at every place."""
    table = Table(caption=text, columns=(column(text), column(text, numeric=True)), rows=(row(text, text),))
    section = Section(key="a", title=text, blocks=(Paragraph(text=text), table))
    given = {
        "name": text or "x", "eyebrow": text, "title": text or "x", "lead": text, "figures": (), "sections": (section,),
        "footer": text, "created": 1_800_000_000, "author": text, "stamp": text, "banner": text,
    }  # fmt: skip
    return Document(**{**given, **changes})


def metadata(data: bytes) -> dict[str, str]:
    """The XMP metadata, by tag without its namespace."""
    packet = data[data.index(b"<x:xmpmeta") : data.index(b"</x:xmpmeta>") + len(b"</x:xmpmeta>")]
    return {each.tag.split("}")[1]: (each.text or "") for each in ET.fromstring(packet).iter()}


def streams(data: bytes) -> bytes:
    """All that is compressed in the file, unpacked."""
    found = b""
    for start in re.finditer(rb"stream\r?\n", data):
        try:
            found += zlib.decompressobj().decompress(data[start.end() :])
        except zlib.error:
            continue
    return data + found


# --- the file ------------------------------------------------------------------------------------------------------------


def test_it_says_that_it_is_pdf_a_2a_and_pdf_ua():
    said = metadata(pdf())
    assert (said["part"], said["conformance"]) in {("1", "A"), ("2", "A")}
    packet = pdf().decode("latin-1")
    assert "<pdfaid:part>2</pdfaid:part>" in packet
    assert "<pdfaid:conformance>A</pdfaid:conformance>" in packet
    assert "<pdfuaid:part>1</pdfuaid:part>" in packet
    assert paper.STANDARDS == ("a-2a", "ua-1")


def test_equal_records_give_equal_bytes_and_dates_are_the_records(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    again = make(contract(), run(24, void=(7,)), extra={"accuracy before": 0.512, "accuracy after": 0.831})
    assert paper.render(report.document(again)) == pdf()
    assert metadata(pdf())["CreateDate"].startswith("2027-01-15T09:00:00")
    later = msgspec.structs.replace(sample(), generated_at=sample().generated_at + 1)
    assert paper.render(report.document(later)) != pdf()


def test_title_language_tags_and_pages_are_there():
    said, everything = metadata(pdf()), streams(pdf())
    assert "Privacy report: chest-reports" in pdf().decode("utf-8", "replace")
    assert said["NPages"].isdigit()
    assert 5 < int(said["NPages"]) < 14
    assert b"/MarkInfo" in everything
    assert b"/Lang(en)" in everything or b"/Lang (en)" in everything
    for tag in (b"/Table", b"/TH", b"/TD", b"/Figure", b"/H1", b"/H2", b"/Alt"):
        assert tag in everything, tag


def test_the_typefaces_are_inside_and_are_typsts_own():
    names = set(re.findall(rb"/FontName ?/[A-Z]{6}\+([A-Za-z]+)", streams(pdf())))
    assert names
    assert all(name.startswith((b"Libertinus", b"DejaVu")) for name in names), names
    assert pdf().count(b"/FontFile") + streams(pdf()).count(b"/FontFile") > 0


def test_every_character_that_is_let_through_can_be_set():
    chars = [chr(code) for first, last in paper._KNOWN for code in range(first, last + 1)]
    chars = [char for char in chars if unicodedata.category(char) != "Cn"]
    assert paper.render(one(" ".join(chars)))


@pytest.mark.parametrize(
    "text", ["東京大学病院", "مستشفى", "🏥", "a\u202eb", "\x00\x01", "\ue000", "e\u0301", "\ufeff", "\n\n", ""]
)
def test_what_no_typeface_has_is_a_box_and_the_file_stays_whole(text):
    shown = paper.shown(text)
    assert all(paper._has(char) for char in shown)
    assert paper.render(one(text)).startswith(b"%PDF-1.7")
    assert (paper.MISSING in shown) == (text in {"東京大学病院", "مستشفى", "🏥", "a\u202eb", "\x00\x01", "\ue000", "\ufeff"})


def test_a_very_long_word_gets_places_to_break():
    assert paper.shown("x" * 60).replace("\u200b", "") == "x" * 60
    assert max(map(len, paper.shown("x" * 60).split("\u200b"))) <= 12
    assert paper.shown("short words stay") == "short words stay"


# --- text is text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", INJECTIONS)
def test_markup_in_a_name_is_set_as_text(text):
    plain = one("plain")
    assert paper.render(one(text)).startswith(b"%PDF-")
    assert len(paper.pictures(one(text))) == len(paper.pictures(plain)), "it takes the place of a text, and no other"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_any_text_at_any_place_gives_a_whole_file(text):
    data = paper.render(one(text))
    assert data.startswith(b"%PDF-1.7")
    assert data.rstrip().endswith(b"%%EOF")


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_texts_come_out_of_typst_as_they_went_in(text):
    """What the template evaluates a text to is that text: nothing in it was read as markup."""
    query = b"#let d = json(bytes(sys.inputs.document))\n#metadata(d.title) <found>"
    prepared = paper._prepared(one(text, title=text))
    inputs = {"document": msgspec.json.encode(prepared).decode()}
    found = typst.Compiler(query, font_paths=paper._fonts(), sys_inputs=inputs).query("<found>", field="value", one=True)
    assert msgspec.json.decode(found) == prepared["title"]


def test_a_document_that_typst_refuses_is_named(monkeypatch):
    monkeypatch.setattr(paper, "shown", lambda text: text)
    with pytest.raises(MachineError, match="the PDF cannot be made"):
        paper.render(one("\ue000"))


def test_names_of_organisations_can_be_anything_in_every_view():
    silos = tuple(
        msgspec.structs.replace(silo, organisation=text)
        for silo, text in zip(sample().silos, ('#panic("x")', "東京", "A" * 200), strict=True)
    )
    made = report.views(msgspec.structs.replace(sample(), silos=silos))
    assert set(made) == {"report.html", "report.pdf", "registry.yaml"}


# --- the page, for readers who do not see it and for printers -------------------------------------------------------------


def test_landmarks_language_and_headings():
    text = report.render(sample())
    tree = Page(text)
    assert tree.named("html") == [{"lang": "en"}]
    for tag in ("header", "nav", "main", "footer"):
        assert len(tree.named(tag)) == 1, tag
    assert len(tree.named("h1")) == 1
    assert all("aria-labelledby" in attrs for attrs in tree.named("section"))
    assert all(
        attrs.get("role") == "region" and attrs.get("aria-label")
        for attrs in tree.named("div")
        if "table" in attrs.get("class", "").split()
    )


def test_every_picture_is_named_and_described():
    tree = Page(report.render(sample()))
    ids = {attrs["id"] for _, attrs in tree.tags if "id" in attrs}
    for svg in tree.named("svg"):
        assert svg["role"] == "img"
        assert {svg["aria-labelledby"], svg["aria-describedby"]} <= ids


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    """The colours of the page in light, in dark, and on paper."""
    found = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", page._STYLE, re.DOTALL)
    ]
    full = [
        {name: "#" + 2 * value[1] + 2 * value[2] + 2 * value[3] if len(value) == 4 else value for name, value in each.items()}
        for each in found
    ]
    assert len(full) == 3
    return full


@pytest.mark.parametrize("place", range(3))
def test_text_has_the_contrast_of_aa(place):
    theme = themes()[place]
    for text in ("ink", "muted", "first", "second", "over"):
        for ground in ("paper", "raised"):
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)


def test_pictures_can_be_read_in_grey():
    grey = sorted(luminance(colour) for colour in ("#15171a", "#2a7ac0", "#e4e1d8"))
    assert all(later / max(earlier, 0.01) > 2 for earlier, later in pairwise(grey))
    assert ".guessed{fill:#15171a}.found{fill:#2a7ac0}" in paper._STYLE
    assert "path.second{stroke:#b4500a;stroke-dasharray" in paper._STYLE, "lines differ by dash"


def test_the_page_prints():
    style = page._STYLE[page._STYLE.index("@media print") :]
    for rule in ("break-inside: avoid", "break-after: avoid", "table-header-group", "nav { display: none; }"):
        assert rule in style
    assert "@page { margin" in page._STYLE
