# SPDX-License-Identifier: Apache-2.0
"""The report as files: ``report.json`` is the record, ``report.json.sig`` signs it; page, PDF and registry entry are views of it.

The JSON is deterministic: sorted keys, two spaces, one newline at the end; equal facts give equal bytes. The signature is
the contract's suite, in hex, over "siloquy report" NUL ‖ SHA-256(report.json). Each view follows from the record alone and names
its digest, so ``verify --report`` makes it again and compares the bytes. Not promised: that the facts are true.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from aggregator.reporting import document as documents
from aggregator.reporting import document_open, registry
from aggregator.reporting.no_guarantee import KEY, AnyReport, OpenReport
from aggregator.reporting.record import Report
from privacy import files
from privacy.audit.evidence import read_file
from privacy.errors import TrustError
from privacy.reporting import page, paper
from privacy.reporting.blocks import Document

JSON_NAME = "report.json"
SIGNATURE_NAME = "report.json.sig"
HTML_NAME = "report.html"
PDF_NAME = "report.pdf"
REGISTRY_NAME = "registry.yaml"
VIEWS = (HTML_NAME, PDF_NAME, REGISTRY_NAME)


def write(report: AnyReport, folder: Path, *, sign: Callable[[bytes], bytes]) -> tuple[Path, Path]:
    """Write record, signature and views into ``folder`` (made when missing); the paths of record and page.

    Each file is replaced whole, or stays as it was.

    Args:
        sign: bytes to their signature, in the contract's suite; it is given ``signing_input`` of the record.

    Raises:
        MachineError: the folder or a file cannot be written.
    """
    data, made = encode(report), views(report)
    signature = sign(signing_input(data)).hex().encode() + b"\n"
    files.make_folder(folder)
    for name in VIEWS:
        if name not in made:
            (folder / name).unlink(missing_ok=True)
    for name, content in {JSON_NAME: data, SIGNATURE_NAME: signature, **made}.items():
        files.sweep(folder / name)
        files.write_atomic(folder / name, content)
    return folder / JSON_NAME, folder / HTML_NAME


def read_views(record: Path) -> dict[str, bytes]:
    """The views that lie beside a record, by file name. Raises MachineError when one cannot be read."""
    beside = {name: record.with_name(name) for name in VIEWS}
    return {name: read_file(path) for name, path in beside.items() if path.is_file()}


def encode(report: AnyReport) -> bytes:
    """The record: the report as JSON, keys sorted, indented by two, UTF-8."""
    return msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=2) + b"\n"


def decode(data: bytes) -> AnyReport:
    """The report in ``data``, which must be exactly what ``encode`` writes. One without differential privacy begins by saying so.

    Raises:
        TrustError: not this schema, or another spelling of it.
    """
    try:
        is_open = data.startswith(b'{\n  "' + KEY.encode() + b'"')
        report: AnyReport = msgspec.json.decode(data, type=OpenReport) if is_open else msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"not a report: {error}", hint="ask the aggregator for report.json again", code="malformed") from error
    if encode(report) != data:
        raise TrustError("the report is not in its canonical form", hint="ask for report.json as it was written", code="malformed")
    return report


def signing_input(data: bytes) -> bytes:
    """What the signature of the record ``data`` covers: "siloquy report" NUL ‖ SHA-256(data)."""
    return b"siloquy report\0" + hashlib.sha256(data).digest()


def document(report: AnyReport) -> Document:
    """What page and PDF show."""
    digest = hashlib.sha256(encode(report)).hexdigest()
    return document_open.of(report, digest) if isinstance(report, OpenReport) else documents.of(report, digest)


def render(report: AnyReport) -> str:
    """The page, as one HTML document; ``privacy.reporting.page`` says what it promises."""
    return page.render(document(report))


def views(report: AnyReport) -> dict[str, bytes]:
    """Everything beside the record that follows from it alone, by file name: page, PDF, and the entry for the registry.

    Without differential privacy there is no entry.
    """
    shown = document(report)
    made = {HTML_NAME: page.render(shown).encode(), PDF_NAME: paper.render(shown)}
    if isinstance(report, OpenReport):
        return made
    return {**made, REGISTRY_NAME: registry.entry(report, hashlib.sha256(encode(report)).hexdigest())}
