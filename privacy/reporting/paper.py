# SPDX-License-Identifier: Apache-2.0
"""A document as a PDF for archives and for readers who do not see it: PDF/A-2a and PDF/UA-1, set by typst.

**Formal guarantees**

- *Text is text*: texts reach typst as JSON values inside its input and are set as they are; the template, which is a constant, is
  all that is read as markup. So no name can run code, open a file or leave its place.
- *Same bytes*: equal documents give equal files with one release of typst. The dates in the file are the record's; the typefaces
  are those inside typst, never the machine's; there is no clock and no chance.
- *Whole*: there is no character without a glyph: typst refuses to write such a file, and every character that these typefaces
  are not known to have is set as □ beforehand, with a line that says so.

Not promised: equal bytes over releases of typst (the record names the release), or scripts other than Latin, Greek and Cyrillic.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import typst

from privacy.errors import MachineError
from privacy.reporting.blocks import Document
from privacy.visible import MISSING

STANDARDS: tuple[typst.PDFStandard, ...] = ("a-2a", "ua-1")

_TEMPLATE = Path(__file__).parent / "paper.typ"
_KNOWN = (
    (0x20, 0x7E), (0xA0, 0xAC), (0xAE, 0x2AF), (0x384, 0x386), (0x388, 0x38A), (0x38C, 0x38C), (0x38E, 0x3A1), (0x3A3, 0x3FF),
    (0x400, 0x482), (0x48A, 0x4FF), (0x1E00, 0x1EFF), (0x2010, 0x2027), (0x2030, 0x2040), (0x2070, 0x2071), (0x2074, 0x208E),
    (0x2090, 0x209C), (0x20A0, 0x20BF), (0x2116, 0x2116), (0x2122, 0x2122), (0x2190, 0x22FF), (0x2308, 0x230B), (0x25A0, 0x25FF),
    (0x2713, 0x2718), (0x200B, 0x200B), (0x1D56, 0x1D56),
)  # fmt: skip
"""Characters that the typefaces inside typst have (tests/test_pdf.py sets each of them)."""

_LONGEST, _STEP = 24, 12
_LONG = re.compile(rf"[^\s\u200b]{{{_LONGEST},}}")
_STYLE = """<style>
svg text{fill:#000;font-family:'Libertinus Serif';font-size:14px}.strong{font-weight:bold}.label{font-weight:bold}
.track{fill:#e4e1d8}.fill{fill:#0a5fa3}.over .fill{fill:#a8231a}.tick{stroke:#000;stroke-width:.7}
.grid,.axis,.now{fill:none;stroke:#cfccc3}.axis{stroke:#4a4d52}.now{stroke:#4a4d52;stroke-dasharray:1 4;stroke-width:1.5}
.line{fill:none;stroke-linejoin:round;stroke-width:2.25}path.first{stroke:#0a5fa3}path.second{stroke:#b4500a;stroke-dasharray:7 4}
path.limit{stroke:#000;stroke-dasharray:2 3;stroke-width:1.5}.ahead{opacity:.55;stroke-width:1.5}
circle.first{fill:#0a5fa3}circle.second{fill:#b4500a}.site{fill:#f5f4ef;stroke:#0a5fa3;stroke-width:1.5}
.hub{fill:#f5f4ef;stroke:#4a4d52}.open{fill:none;stroke:#4a4d52;stroke-dasharray:4 3}.paper{fill:#fff}
.arrow{fill:none;stroke:#4a4d52;stroke-width:1.5}.head{fill:#4a4d52}.unseen{fill:#e4e1d8}.guessed{fill:#15171a}.found{fill:#2a7ac0}
.result{fill:#0a5fa3}.void{fill:none;stroke:#b4500a;stroke-width:1.5}
</style>"""
"""The page's colours for print; typst knows no variables."""


def render(document: Document) -> bytes:
    """The PDF; see the module docstring.

    Raises:
        MachineError: typst refuses the document.
    """
    return _compiled(document, "pdf")[0]


def pictures(document: Document, *, ppi: float = 80.0) -> list[bytes]:
    """Each page as PNG, to be looked at. Raises MachineError as ``render``."""
    return _compiled(document, "png", ppi=ppi)


def shown(text: str) -> str:
    """``text`` as it can be set: composed, white space as blanks, □ for what no typeface has, long words with places to break."""
    composed = unicodedata.normalize("NFC", text)
    kept = "".join(" " if char.isspace() and char not in "\n\u00a0" else _set(char) for char in composed)
    return _LONG.sub(lambda found: "\u200b".join(_pieces(found[0])), kept)


def _set(char: str) -> str:
    """The character as it is set; one without a width hides what it parts, so it is none of a text's own."""
    return char if _has(char) and char != "\u200b" else MISSING


def _pieces(word: str) -> list[str]:
    return [word[start : start + _STEP] for start in range(0, len(word), _STEP)]


@functools.lru_cache(maxsize=4096)
def _has(char: str) -> bool:
    return char == "\n" or any(first <= ord(char) <= last for first, last in _KNOWN)


def _compiled(document: Document, kind: typst.OutputFormat, *, ppi: float | None = None) -> list[bytes]:
    tree = _prepared(document)
    try:
        made = typst.Compiler(_TEMPLATE, root=_TEMPLATE.parent, font_paths=_fonts()).compile(
            format=kind, ppi=ppi, sys_inputs={"document": json.dumps(tree)}, timestamp=document.created,
            pdf_standards=list(STANDARDS) if kind == "pdf" else [],
        )  # fmt: skip
    except typst.TypstError as error:
        raise MachineError(
            f"the PDF cannot be made: {error.message}", hint="report.json and report.html are whole; report this", code="pdf"
        ) from error
    return made if isinstance(made, list) else [made] if made is not None else []


@functools.cache
def _fonts() -> typst.Fonts:
    return typst.Fonts(include_system_fonts=False)


def _prepared(document: Document) -> dict[str, Any]:
    """The document as plain JSON values with texts that can be set, sections numbered, and the record's moment."""
    tree: dict[str, Any] = _walk(msgspec.to_builtins(document))
    number = 0
    for section in tree["sections"]:
        number += bool(section["numbered"])
        section["number"] = number if section["numbered"] else 0
    when = datetime.datetime.fromtimestamp(document.created, tz=datetime.UTC)
    tree["date"] = [when.year, when.month, when.day, when.hour, when.minute, when.second]
    tree["keywords"] = [tree["stamp"]]
    tree["replaced"] = MISSING in json.dumps(tree, ensure_ascii=False)
    return tree


def _walk(value: Any, key: str = "") -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {name: _walk(each, name) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(each) for each in value]
    if isinstance(value, str):
        return _drawn(value) if key == "svg" else value if key in ("type", "style", "key") else shown(value)
    return value


def _drawn(svg: str) -> str:
    """An SVG of ``charts`` that stands alone: with its namespace, the print colours, and characters that can be set."""
    kept = "".join(char if _has(char) else MISSING for char in unicodedata.normalize("NFC", svg))
    head, tail = kept.split(">", 1)
    return head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + ">" + _STYLE + tail
