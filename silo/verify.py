# SPDX-License-Identifier: Apache-2.0
"""``silo verify``: a federation checked again from its documents, over the silo's own way to the aggregator or from a copy.

In a silo's home the check is bound to the contract this silo countersigned, and goes on to what only this silo has: its ledger and
its own state. An auditor without a home names a folder and a fingerprint. Nothing in the home changes, and no secret is used: the
private key is read only for the public one that the ledger's newest lines are signed with.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from privacy import envelope
from privacy.audit import placing, whole
from privacy.audit.check_epoch import refused
from privacy.audit.check_ledger import check_ledger
from privacy.audit.check_log import Fetch, check_log
from privacy.audit.check_round import RoundFacts
from privacy.audit.evidence import Entry, read_report
from privacy.audit.findings import Check, Findings, Slot, Source
from privacy.audit.whole import Verdict
from privacy.errors import ConfigError
from privacy.federation import Accepted
from privacy.identity import keys
from privacy.messages import AGGREGATOR
from privacy.transparency import notes
from privacy.transparency.notes import Checkpoint
from silo import config, keyring
from silo.folder import FolderTransport
from silo.home import Home, Progress
from silo.transport import HttpTransport, Transport

_SMALL = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a silo has of its own to hold the documents to."""

    home: Home
    accepted: Accepted
    silo: int
    progress: Progress | None


@dataclass(kw_only=True)
class BoardSource:
    """A board over a transport; audit.findings.Source. Small documents are fetched once, of the large ones the last is kept.

    ``known``: the last round that this silo settled: the board must reach it.
    """

    transport: Transport
    known: int = 0
    _small: dict[Slot, bytes | None] = field(default_factory=dict)
    _large: tuple[Slot, bytes] | None = None

    def get(self, kind: str, number: int, party: int) -> bytes | None:
        """The document, or None when it is not on the board."""
        slot = Slot(kind, number, party)
        if self._large is not None and self._large[0] == slot:
            return self._large[1]
        if slot not in self._small:
            raw = self.transport.get(kind, number, party, wait_s=0)
            if raw is not None and len(raw) > _SMALL:
                self._large = (slot, raw)
                return raw
            self._small[slot] = raw
        return self._small[slot]

    def has(self, kind: str, number: int, party: int) -> bool:
        """Whether it is on the board."""
        return self.get(kind, number, party) is not None

    def latest(self, kind: str) -> int:
        """The highest number without a gap; for rounds at least the one that this silo settled."""
        number = self.known if kind == "manifest" else 0
        while self.has(kind, number + 1, AGGREGATOR):
            number += 1
        return number

    def digest(self, kind: str, number: int, party: int) -> bytes | None:
        """Of the document as it came."""
        raw = self.get(kind, number, party)
        return None if raw is None else hashlib.sha256(raw).digest()

    def file(self, kind: str, number: int, party: int) -> str:
        """Documents of a board lie in no file here."""
        return ""

    def remnant(self, kind: str, number: int, party: int) -> bytes | None:
        """A board has whole documents only."""
        return None


def verify(
    root: Path,
    *,
    url: str = "",
    folder: Path | None = None,
    fingerprint: str = "",
    rounds: Collection[int] | None = None,
    report: Path | None = None,
    again: whole.Again | None = None,
    at_least: int = 0,
) -> Verdict:
    """Check everything that can be reached from here.

    Args:
        root: the silo's home; it may be none when a folder is given.
        url: another address than silo.toml's.
        folder: instead of an address a shared folder (with ``board/``), or a copy of an aggregator's evidence (``evidence/``).
        fingerprint: the aggregator's, or the contract's digest; the silo's own contract counts when it has one.
        report: the record of a report, whose figures are compared, and whose digest must be in the log.
        again: makes the report again from what was walked; see privacy.audit.whole.
        at_least: so many rounds must have ended; the silo's own last round counts whatever is said here.

    Raises:
        ConfigError: there is neither a home nor a folder, or the report cannot be read.
        MachineError, NotCertified: see privacy.audit.whole.
    """
    home = Home(root)
    own = _own(home)
    if own is None and folder is None and not url and not home.config_path.exists():
        raise ConfigError(
            f"there is no silo in {root}", hint="name its directory, or a folder of evidence with --folder", code="no-home"
        )
    pinned = [fingerprint or (own.accepted.digest.hex() if own is not None else _configured(home))]
    papers = None if report is None else read_report(report)
    with _source(home, own, url=url, folder=folder) as (source, fetch, before, entries):
        record = None if papers is None else papers[0]
        also = functools.partial(_also, home=home, own=own, fetch=fetch, entries=entries, report=record)
        return whole.audit(
            source, pinned=pinned, rounds=rounds, before=before, also=also, report=papers, again=again, at_least=at_least
        )


@contextmanager
def _source(
    home: Home, own: Own | None, *, url: str, folder: Path | None
) -> Iterator[tuple[Source, Fetch, Sequence[Check], Sequence[Entry]]]:
    known = 0 if own is None or own.progress is None else own.progress.round
    if folder is not None and not (folder / "board").is_dir():
        evidence, fetch, entries = placing.offline(folder)
        yield evidence, fetch, list(evidence.integrity()), entries
        return
    settings = config.load(home.config_path) if home.config_path.exists() else None
    at = None if settings is None else settings.aggregator
    if folder is None and not url and at is not None and at.folder:
        folder = Path(at.folder)
    if folder is not None:
        transport: HttpTransport | FolderTransport = FolderTransport(folder)
    else:
        transport = HttpTransport(url or ("" if at is None else at.url), insecure_http=at is not None and at.insecure_http)
    try:
        yield BoardSource(transport=transport, known=known), transport.fetch, [], []
    finally:
        transport.close()


def _own(home: Home) -> Own | None:
    """What the silo has, or None before it joined."""
    kept = home.contract()
    if kept is None:
        return None
    accepted = envelope.open_contract(kept[1])
    # A key that waits for its contract stands in none yet: the silo is whoever held one of its former keys.
    papers = (home.public_path, *sorted(home.former_folder.glob("*.pub")))
    held = {keys.read_public(path.read_bytes()).sign_key.hex() for path in papers}
    mine = [
        member.id
        for _, raw in home.contracts()
        for member in envelope.open_contract(raw).terms.member
        if member.sign_key in held
    ]
    return Own(home=home, accepted=accepted, silo=mine[-1], progress=home.progress()) if mine else None


def _configured(home: Home) -> str:
    return config.load(home.config_path).aggregator.fingerprint if home.config_path.exists() else ""


def _also(
    found: Findings,
    versions: Mapping[bytes, Accepted],
    rounds: Sequence[RoundFacts],
    *,
    home: Home,
    own: Own | None,
    fetch: Fetch,
    entries: Sequence[Entry],
    report: bytes | None,
) -> None:
    known = None if own is None else _own_head(own.home)
    check_log(found, versions, rounds, fetch=fetch, entries=entries, report=report, known=known)
    if own is None:
        took_part = home.ledger_path.is_file() and home.ledger_path.read_bytes().count(b"\n") > 1
        why = "a ledger is here, and no contract with a key of this silo" if took_part else "no silo's home was given"
        found.add(Slot("ledger", 0, 0), "chain", "open" if took_part else "note", f"{why}: no ledger was checked")
        return
    found.hold(Slot("contract", own.accepted.terms.version, AGGREGATOR), "joined", _check_joined, own.accepted, versions)
    check_ledger(found, rounds, path=own.home.ledger_path, verify=keyring.verifier(own.home), silo=own.silo)
    if own.progress is not None:
        settled = next((each for each in rounds if each.number == own.progress.round), None)
        unknown = settled is not None and settled.how != "open" and not settled.state  # something before it failed, by its name
        held = None if unknown else own.progress
        found.hold(Slot("state", own.progress.round, own.silo), "own state", _check_progress, held, rounds)


def _own_head(home: Home) -> Checkpoint | None:
    """The newest head that this silo checked and wrote down: the log may only go on from it."""
    path = home.log_folder / "head"
    return notes.checkpoint(notes.parse(path.read_bytes()).text) if path.is_file() else None


def _check_joined(accepted: Accepted, versions: Mapping[bytes, Accepted]) -> None:
    """Whatever fingerprint was given: the contract that this silo has is one of these."""
    if accepted.digest not in versions:
        raise refused(f"this silo has {accepted.digest.hex()[:16]}…, the documents have another contract in its place")


def _check_progress(progress: Progress, rounds: Sequence[RoundFacts]) -> None:
    """The state this silo reached is the one that the documents give after the same round, which ended for this silo."""
    states = {each.number: each.state for each in rounds if each.how != "open"}
    if progress.round and progress.round not in states:
        raise refused(f"this silo settled round {progress.round}, the documents end with {max(states, default=0)}")
    reached = states.get(progress.round, "")
    if progress.round and reached != progress.state.digest.hex():
        raise refused(
            f"this silo has {progress.state.digest.hex()[:16]}… after round {progress.round}, the documents give {reached[:16]}…"
        )
