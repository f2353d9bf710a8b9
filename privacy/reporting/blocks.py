# SPDX-License-Identifier: Apache-2.0
"""What a report is made of, before it is HTML or PDF: headings, paragraphs, lists, tables and pictures, as frozen values.

Every text is plain text: a view escapes it, and no text is ever read as markup. Pictures are SVG that ``charts`` drew.
Promised: nothing but structure. What a text says, and whether it is true, is the caller's.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything in a document."""


class Span(Part, frozen=True, kw_only=True):
    """A piece of text in a style of its own. ``small`` stands on a line below."""

    text: str
    style: Literal["code", "strong", "small", "symbol", "warn", "note", "key guessed", "key found", "key unseen"]


Inline = str | tuple[str | Span, ...]


class Picture(Part, frozen=True, kw_only=True, tag="picture"):
    """One SVG of ``charts``, and what it shows in words. ``bar``: it is stretched to its place."""

    svg: str
    alt: str
    bar: bool = False


Cell = Inline | Picture


class Column(Part, frozen=True, kw_only=True):
    """A column's heading; a newline breaks it. ``share``: of the width on paper that is left; 0 takes what it needs."""

    title: str
    numeric: bool = False
    share: float = 1.0
    style: str = ""


class Row(Part, frozen=True, kw_only=True):
    """The cells of a row; ``main`` marks the one that counts."""

    cells: tuple[Cell, ...]
    main: bool = False


class Paragraph(Part, frozen=True, kw_only=True, tag="paragraph"):
    """A paragraph; a note is set smaller."""

    text: Inline
    note: bool = False


class Heading(Part, frozen=True, kw_only=True, tag="heading"):
    """A heading inside a section."""

    text: str


class Bullets(Part, frozen=True, kw_only=True, tag="bullets"):
    """A list."""

    items: tuple[Inline, ...]


class Table(Part, frozen=True, kw_only=True, tag="table"):
    """A table with a caption; the first cell of a row is its heading.

    ``stack``: on a narrow screen its cells stand below each other. ``tall``: it scrolls. ``style``: further classes of the page.
    """

    caption: Inline
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    stack: bool = False
    tall: bool = False
    hide_caption: bool = False
    headed: bool = True
    style: str = ""


class Figure(Part, frozen=True, kw_only=True, tag="figure"):
    """A picture with a caption. ``narrow`` takes its place on a narrow screen; ``share``: of the width on paper."""

    picture: Picture
    caption: Inline = ""
    narrow: Picture | None = None
    share: float = 1.0


class Pair(Part, frozen=True, kw_only=True, tag="pair"):
    """Figures beside each other."""

    figures: tuple[Figure, ...]


class Beside(Part, frozen=True, kw_only=True, tag="beside"):
    """A figure, and text at its side."""

    figure: Figure
    blocks: tuple[Paragraph | Heading | Bullets, ...]


Block = Paragraph | Heading | Bullets | Table | Figure | Pair | Beside


class Section(Part, frozen=True, kw_only=True):
    """A section; ``key`` names it in links, lower-case letters and hyphens. An appendix has no number."""

    key: str
    title: str
    blocks: tuple[Block, ...]
    numbered: bool = True


class Headline(Part, frozen=True, kw_only=True):
    """One of the few large figures on top."""

    label: str
    value: str
    small: str


class Document(Part, frozen=True, kw_only=True):
    """A whole report.

    ``name`` is for the title bar and the file's own title; ``banner`` stands on every page, ``stamp`` at the foot of every page;
    ``created``: Unix seconds, of the record, never of a clock.
    """

    name: str
    eyebrow: str
    title: str
    lead: str
    figures: tuple[Headline, ...]
    sections: tuple[Section, ...]
    footer: Inline
    created: int
    author: str
    stamp: str
    banner: str = ""


def code(text: str) -> Span:
    """Text in a fixed-width face."""
    return Span(text=text, style="code")


def strong(text: str) -> Span:
    """Text that stands out."""
    return Span(text=text, style="strong")


def small(text: str) -> Span:
    """A smaller line below."""
    return Span(text=text, style="small")


def note(text: str) -> Paragraph:
    """A paragraph in small print."""
    return Paragraph(text=text, note=True)


def paragraphs(*texts: str) -> tuple[Paragraph, ...]:
    """Each text as a paragraph."""
    return tuple(Paragraph(text=text) for text in texts)


def row(*cells: Cell, main: bool = False) -> Row:
    """A row of these cells."""
    return Row(cells=cells, main=main)


def column(title: str, share: float = 1.0, *, numeric: bool = False, style: str = "") -> Column:
    """A column of this heading; a numeric one takes the width it needs."""
    return Column(title=title, numeric=numeric, share=0.0 if numeric else share, style=style)
