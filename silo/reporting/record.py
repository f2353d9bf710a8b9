# SPDX-License-Identifier: Apache-2.0
"""The parts of a silo's own record, ``siloquy-silo-report/1`` (docs/reference/silo-report.md). Nothing is computed here.

It may hold what never leaves: true counts, accuracy on records, every run. The first key of the record says that it stays.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from privacy.errors import TrustError

SCHEMA: Literal["siloquy-silo-report/1"] = "siloquy-silo-report/1"
KEY = "DOES_NOT_LEAVE_THIS_SITE"
SENTENCE = (
    "This report does not leave this site. It holds true counts and accuracies on records, which are exact: no noise protects them "
    "and no ledger charges them."
)
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Fact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in the record: frozen, by keyword, unknown keys refused."""


class Silo(Fact, frozen=True, kw_only=True):
    """Whose report it is."""

    name: str
    organisation: str
    fingerprint: str


class Place(Fact, frozen=True, kw_only=True):
    """Where the silo stands in its federation."""

    name: str
    version: int
    member: int
    mode: str
    expires: str
    contract_digest: Digest
    round: Natural
    rounds_planned: Natural
    state_digest: Digest


class Records(Fact, frozen=True, kw_only=True):
    """True counts. ``kept``: records that may be drawn, after the cap per unit; ``most_units``: the contract's public bound."""

    unit: str
    units: Natural
    records: Natural
    kept: Natural
    most_units: Natural


class HeldOut(Fact, frozen=True, kw_only=True):
    """Accuracy on a file of the silo's own that it did not train on, by its own word."""

    file: str
    digest: Digest
    records: Natural
    accuracy_before: float
    accuracy_after: float


class Budget(Fact, frozen=True, kw_only=True):
    """What the ledger has charged. Where a run had no noise, there is no figure, and ``reason`` says so."""

    epsilon: float | None
    epsilon_pld: float | None
    epsilon_rdp: float | None
    delta: float | None
    reason: str
    limit: float
    left: float
    steps_left: Natural
    rounds_left: Natural


class Run(Fact, frozen=True, kw_only=True):
    """One contract's charge on the ledger. Runs of one ``part`` may share units, and compose."""

    contract: str
    run: str
    attempts: Natural
    released: Natural
    void: Natural
    epsilon: float | None
    part: Natural


class Several(Fact, frozen=True, kw_only=True):
    """Epsilon of whoever has more to hide than one unit, of everything on the ledger; null where no finite figure holds.

    ``of``: a unit that so many ``silos`` know, where the contract assumes one; or a person with so many ``records`` in each silo
    that knows one of them, where the unit is one record. What other silos did without this one is not in it.
    """

    of: Literal["silos", "records"]
    count: Natural
    epsilon: float | None


class Ahead(Fact, frozen=True, kw_only=True):
    """What so many more rounds would bring epsilon to; ``refused``: by what, where they would be."""

    rounds: Natural
    epsilon: float | None
    refused: str | None


class LedgerHead(Fact, frozen=True, kw_only=True):
    """The ledger that the figures are of: how many entries, and the digest of the last."""

    entries: Natural
    head: Digest


class SiloReport(Fact, frozen=True, kw_only=True):
    """The whole report; its JSON is the record."""

    warning: str = msgspec.field(name=KEY)
    format: Literal["siloquy-silo-report/1"] = msgspec.field(name="schema")
    generated_at: int
    silo: Silo
    federation: Place
    records: Records
    held_out: HeldOut | None
    budget: Budget
    several: tuple[Several, ...] | msgspec.UnsetType = msgspec.UNSET
    """Left out by releases that did not have it: their records stay what they were, byte for byte."""
    runs: tuple[Run, ...]
    forecast: tuple[Ahead, ...]
    ledger: LedgerHead
    software: dict[str, str]


def encode(report: SiloReport) -> bytes:
    """The record: JSON, keys sorted, indented by two, UTF-8."""
    return msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=2) + b"\n"


def decode(data: bytes) -> SiloReport:
    """The report in ``data``, which must be exactly what ``encode`` writes. Raises TrustError when it is not."""
    try:
        report = msgspec.json.decode(data, type=SiloReport)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"not a silo's report: {error}", hint="run `silo report` again", code="malformed") from error
    if encode(report) != data:
        raise TrustError("the report is not in its canonical form", hint="run `silo report` again", code="malformed")
    return report


def is_one(data: bytes) -> bool:
    """Whether these bytes begin as a silo's own record."""
    return data.startswith(b'{\n  "' + KEY.encode() + b'"')
