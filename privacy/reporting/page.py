# SPDX-License-Identifier: Apache-2.0
"""A document as one HTML page: self-contained, readable on a telephone and on paper, and by people who do not see it.

**Formal guarantees**

- *Escaped*: every text of the document is escaped; the only markup let through is the SVG of ``charts``, which escapes its own.
- *Closed*: no script, no form, no address of anything outside; the policy allows one style sheet, by its hash, and nothing else.
- *Seen*: no control character, direction mark or zero-width character is left of any text (``privacy.visible``).
- *Same bytes*: equal documents give equal pages. No clock, no machine, no chance.

The language is named, header, navigation, main and footer are landmarks, each table has a caption and each heading cell its scope,
each picture a title and a description. Not promised: how a browser breaks pages.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from pathlib import Path

from privacy.reporting.blocks import (
    Beside,
    Block,
    Bullets,
    Cell,
    Column,
    Document,
    Figure,
    Heading,
    Inline,
    Pair,
    Paragraph,
    Picture,
    Row,
    Section,
    Span,
    Table,
)
from privacy.visible import visible

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_POLICY = "default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
_N = ' class="n"'
_MARKS = {"key guessed", "key found", "key unseen"}


def render(document: Document) -> str:
    """The page, as one HTML document; see the module docstring."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    numbers = _numbers(document.sections)
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY.format(digest=digest)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(document.name)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        *_head(document),
        *_contents(document.sections, numbers),
        "<main>",
        *(line for section in document.sections for line in _section(section, numbers.get(section.key))),
        "</main>",
        "<footer>",
        f"<p>{_inline(document.footer)}</p>",
        "</footer>",
        "</body>",
        "</html>",
    ]
    return visible("\n".join(lines) + "\n")


def _numbers(sections: Iterable[Section]) -> dict[str, int]:
    return {section.key: number for number, section in enumerate((each for each in sections if each.numbered), start=1)}


def _head(document: Document) -> list[str]:
    cells = [
        f"<div><dt>{escape(each.label)}</dt><dd>{escape(each.value)}<small>{escape(each.small)}</small></dd></div>"
        for each in document.figures
    ]
    banner = [f'<p class="banner" role="note">{escape(document.banner)}</p>'] if document.banner else []
    return [
        *banner,
        "<header>",
        f'<p class="eyebrow">{escape(document.eyebrow)}</p>',
        f"<h1>{escape(document.title)}</h1>",
        f'<p class="lead">{escape(document.lead)}</p>',
        '<dl class="figures">',
        *cells,
        "</dl>",
        "</header>",
    ]


def _contents(sections: Iterable[Section], numbers: dict[str, int]) -> list[str]:
    entries = [
        f'<li><a href="#{section.key}"><span>{numbers[section.key]}</span>{escape(section.title)}</a></li>'
        for section in sections
        if section.key in numbers
    ]
    return ['<nav aria-label="Contents"><ol>', *entries, "</ol></nav>"]


def _section(section: Section, number: int | None) -> list[str]:
    before = "" if number is None else f"<span>{number}</span>"
    return [
        "",
        f'<section aria-labelledby="{section.key}">',
        f'<h2 id="{section.key}">{before}{escape(section.title)}</h2>',
        *(line for block in section.blocks for line in _block(block)),
        "</section>",
    ]


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        kind = ' class="note"' if block.note else ""
        return [f"<p{kind}>{_inline(block.text)}</p>"]
    if isinstance(block, Heading):
        return [f"<h3>{escape(block.text)}</h3>"]
    if isinstance(block, Bullets):
        return ['<ul class="plain">', *(f"<li>{_inline(item)}</li>" for item in block.items), "</ul>"]
    if isinstance(block, Table):
        return _table(block)
    return _drawn(block)


def _drawn(block: Figure | Pair | Beside) -> list[str]:
    if isinstance(block, Figure):
        return [_figure(block)]
    if isinstance(block, Pair):
        return ['<div class="pair">', *map(_figure, block.figures), "</div>"]
    return _beside(block)


def _beside(block: Beside) -> list[str]:
    text = [line for each in block.blocks for line in _block(each)]
    return ['<div class="beside">', _figure(block.figure), "<div>", *text, "</div>", "</div>"]


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    if figure.narrow is None:
        return f"<figure>{figure.picture.svg}{caption}</figure>"
    both = f'<div class="wide">{figure.picture.svg}</div><div class="narrow">{figure.narrow.svg}</div>'
    return f"<figure>{both}{caption}</figure>"


def _table(table: Table) -> list[str]:
    classes = " ".join(filter(None, ("stack" if table.stack else "", table.style)))
    kind = f' class="{classes}"' if classes else ""
    hidden = ' class="hidden"' if table.hide_caption else ""
    label = escape(_text(table.caption)[:80])
    region = f' role="region" aria-label="{label}" tabindex="0"'
    heads = "".join(f'<th scope="col"{_N if column.numeric else ""}>{_broken(column.title)}</th>' for column in table.columns)
    return [
        f'<div class="table{" tall" if table.tall else ""}"{region}><table{kind}>',
        f"<caption{hidden}>{_inline(table.caption)}</caption>",
        f"<thead><tr>{heads}</tr></thead>",
        "<tbody>",
        *(_row(table, row) for row in table.rows),
        "</tbody></table></div>",
    ]


def _row(table: Table, row: Row) -> str:
    cells = ""
    for place, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
        if place == 0 and table.headed:
            cells += f'<th scope="row"{_kind(column)}>{_cell(cell)}</th>'
            continue
        head = _head_of(column) if table.stack and "params" not in table.style and place else ""
        cells += f"<td{_kind(column, isinstance(cell, Picture))}{head}>{_cell(cell)}</td>"
    return f'<tr class="main">{cells}</tr>' if row.main else f"<tr>{cells}</tr>"


def _head_of(column: Column) -> str:
    """The column's heading for a cell that stands alone on a narrow screen."""
    title = escape(column.title.replace("\n", " "))
    return f' data-head="{title}:"'


def _kind(column: Column, wide: bool = False) -> str:
    names = " ".join(filter(None, ("n" if column.numeric else "", "wide-cell" if wide else "", column.style)))
    return f' class="{names}"' if names else ""


def _cell(cell: Cell) -> str:
    return cell.svg if isinstance(cell, Picture) else _inline(cell)


def _inline(text: Inline) -> str:
    return escape(text) if isinstance(text, str) else "".join(map(_span, text))


def _span(span: str | Span) -> str:
    if isinstance(span, str):
        return escape(span)
    text = escape(span.text)
    if span.style in _MARKS:
        return f'<span class="{span.style}"></span>{text}'
    tag = {"code": "code", "strong": "strong", "small": "small"}.get(span.style)
    return f"<{tag}>{text}</{tag}>" if tag else f'<span class="{span.style}">{text}</span>'


def _text(text: Inline) -> str:
    return text if isinstance(text, str) else "".join(each if isinstance(each, str) else each.text for each in text)


def _broken(title: str) -> str:
    return "<br>".join(escape(line) for line in title.split("\n"))
