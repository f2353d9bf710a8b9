# SPDX-License-Identifier: Apache-2.0
"""Which slot a document belongs to, by what it says of itself: an index for a folder of evidence that has lost its own.

A document names its kind and sender on its envelope and its number in its body; documents of a round name its manifest by digest.
Where two documents claim one slot, only those count that are signed with a key of the contract; if that leaves two, the second is
kept apart and named: its author said two things.

Promised: what is placed says itself that it belongs there. Not promised: that it is genuine (audit.whole), or that it was ever
stored on a board.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from privacy.audit import check_log
from privacy.audit.evidence import Entry, Evidence, is_digest, names, read_file
from privacy.audit.findings import Slot
from privacy.errors import ConfigError, TrustError
from privacy.federation import Contract, parse
from privacy.identity import keys
from privacy.messages import (
    AGGREGATOR,
    NOTE_KINDS,
    Acknowledgement,
    Audit,
    Certificate,
    Close,
    Confirmation,
    Consent,
    Countersignature,
    Endorsement,
    EpochCall,
    EpochNote,
    Freeze,
    GuardianNote,
    Header,
    Listing,
    Manifest,
    Outcome,
    PairSeeds,
    Release,
    Roster,
    SegmentVerdict,
    Shares,
    Signed,
    SumClaim,
    Upload,
    Vector,
    Wire,
    decode,
)
from privacy.transparency import log, notes
from privacy.transparency.notices import Refusal, ReportDigest

_BY_NUMBER: dict[str, tuple[type[Wire], str]] = {
    "epoch": (EpochCall, "epoch"), "epoch-note": (EpochNote, "epoch"), "guardian-note": (GuardianNote, "epoch"),
    "roster": (Roster, "epoch"), "pair-seeds": (PairSeeds, "epoch"), "confirmation": (Confirmation, "epoch"),
    "manifest": (Manifest, "round"), "outcome": (Outcome, "round"),
    "refusal": (Refusal, "serial"), "report": (ReportDigest, "serial"),
}  # fmt: skip
"""Kinds that state their number, and in which field."""
_BY_DIGEST: dict[str, tuple[type[Wire], str]] = {
    "countersignature": (Countersignature, "contract"), "list": (Listing, "round_ctx"), "freeze": (Freeze, "round_ctx"),
    "consent": (Consent, "round_ctx"), "endorsement": (Endorsement, "round_ctx"), "certificate": (Certificate, "round_ctx"),
    "release": (Release, "round_ctx"), "shares": (Shares, "round_ctx"), "close": (Close, "round_ctx"),
    "acknowledgement": (Acknowledgement, "round_ctx"), "claim": (SumClaim, "round_ctx"), "verdict": (SegmentVerdict, "round_ctx"),
    "audit": (Audit, "round_ctx"),
}  # fmt: skip
"""Kinds that name the contract or manifest they belong to by digest, and in which field."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a document says of its place: a number, or the digest of the contract or manifest that gives it one.

    A note about the log says which head it is of, and its only signer's name in the place of an id.
    """

    kind: str
    party: int
    number: int | None
    rests_on: bytes = b""
    signer: str = ""


@dataclass(kw_only=True)
class _Known:
    """Numbers by digest, as the documents themselves state them."""

    versions: dict[bytes, int] = field(default_factory=dict)
    rounds: dict[bytes, int] = field(default_factory=dict)
    signers: dict[str, int] = field(default_factory=dict)
    last: int = 0
    contracts: list[Contract] = field(default_factory=list)


def by_content(folder: Path) -> Evidence:
    """The folder under the index that its own documents give.

    A file whose name is not its digest is placed where it says it belongs, and so found to be damaged; one that says nothing any
    more is spare.

    Raises:
        MachineError: the folder or a file in it cannot be read.
    """
    known, spare, broken = _Known(), {}, {}
    whole: dict[str, Claim] = {}
    damaged: dict[str, Claim] = {}
    for name in names(folder):
        if not is_digest(name):
            spare[name] = "its name is not that of a document"
            continue
        data = _read_or_nothing(folder / name)
        found, is_whole = claim(data), hashlib.sha256(data).hexdigest() == name
        if found is not None:
            (whole if is_whole else damaged)[name] = found
            _learn(known, found, data)
        elif is_whole:
            spare[name] = "it is no document of a federation"
        else:
            broken[name] = "the file is damaged, and does not say any more what it was"
    placed: dict[Slot, list[str]] = defaultdict(list)
    for name, found in whole.items():
        slot = _slot(found, known)
        if slot is None:
            spare[name] = f"a {found.kind} of party {found.signer or found.party}, of a round or contract that is not here"
        else:
            placed[slot].append(name)
    entries = {slot: _chosen(folder, slot, each, known, spare) for slot, each in sorted(placed.items())}
    for name, found in damaged.items():
        slot = _slot(found, known)
        if slot is None or slot in entries or slot.kind in NOTE_KINDS:
            broken[name] = f"the file is damaged; it says now that it is a {found.kind}"
        else:
            entries[slot] = Entry(slot=slot, digest=bytes.fromhex(name))
    return Evidence(folder=folder, entries=entries, spare=spare, broken=broken)


def offline(folder: Path) -> tuple[Evidence, check_log.Fetch, list[Entry]]:
    """A copied folder: its evidence under the best index it has, how to read its log, and what that log's leaves say.

    ``folder`` is ``evidence/`` or the folder that has it; ``log/`` lies beside it. The leaves of the log are the index; what was
    stored after its head is placed by content.

    Raises:
        MachineError: the folder or a file in it cannot be read.
    """
    files = folder / "evidence" if (folder / "evidence").is_dir() else folder
    fetch = reader(files.parent / "log")
    found = by_content(files)
    try:
        index = check_log.leaves(fetch)
    except TrustError:
        return found, fetch, []
    stated, named = {entry.slot: entry for entry in index}, {entry.name for entry in index}
    more = {slot: entry for slot, entry in found.entries.items() if slot not in stated and entry.name not in named}
    for slot, entry in found.entries.items():
        if slot in stated and entry.name not in named:
            found.spare[entry.name] = f"it claims to be {slot}, the log has another document there"
    found.entries = {**stated, **more}
    found.spare = {name: why for name, why in found.spare.items() if name not in named}
    found.broken = {name: why for name, why in found.broken.items() if name not in named}
    return found, fetch, index


def reader(folder: Path) -> check_log.Fetch:
    """How to read the log whose files lie in ``folder``."""

    def fetch(path: str) -> bytes | None:
        if not log.is_resource(path):
            return None
        try:
            return read_file(folder / path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    return fetch


def claim(data: bytes) -> Claim | None:
    """What a document says of its place, or None when it is none. No signature is checked."""
    with contextlib.suppress(TrustError, ConfigError):
        return _claim(decode(data, Signed))
    with contextlib.suppress(TrustError):
        vector = decode(data, Vector)
        return Claim(kind="vector", party=vector.silo, number=None, rests_on=vector.round_ctx)
    with contextlib.suppress(TrustError, ConfigError):
        return _claim_of_note(data)
    return None


def _claim(signed: Signed) -> Claim | None:
    kind, party = signed.type, signed.sender
    if kind == "contract":
        return Claim(kind=kind, party=party, number=parse(signed.body).terms.version)
    if kind == "upload":
        header = decode(decode(decode(signed.body, Upload).header, Signed).body, Header)
        return Claim(kind=kind, party=party, number=None, rests_on=header.round_ctx)
    if kind in _BY_NUMBER:
        body, field_name = _BY_NUMBER[kind]
        return Claim(kind=kind, party=party, number=getattr(decode(signed.body, body), field_name))
    if kind in _BY_DIGEST:
        body, field_name = _BY_DIGEST[kind]
        return Claim(kind=kind, party=party, number=None, rests_on=getattr(decode(signed.body, body), field_name))
    return None


def _claim_of_note(data: bytes) -> Claim:
    """A note about the log: the aggregator's checkpoint, one party's cosignature of it, or the head that both make."""
    note = notes.parse(data)
    head, signers = notes.checkpoint(note.text), [line.name for line in note.lines]
    place = _place_of(head.size, head.root)
    if signers == [head.origin]:
        return Claim(kind="checkpoint", party=AGGREGATOR, number=None, rests_on=place)
    if head.origin in signers:
        return Claim(kind="head", party=AGGREGATOR, number=None, rests_on=place)
    if len(signers) != 1:
        raise TrustError(f"a note of {signers}", hint="no protocol step makes it", code="malformed")
    return Claim(kind="cosignature", party=-1, number=None, rests_on=place, signer=signers[0])


def _place_of(size: int, root: bytes) -> bytes:
    return b"log head" + size.to_bytes(8, "big") + root


def _learn(known: _Known, found: Claim, data: bytes) -> None:
    """Note which number a digest stands for."""
    if found.kind not in ("contract", "manifest", "outcome"):
        return
    body = decode(data, Signed).body
    digest = hashlib.sha256(body).digest()
    if found.kind == "contract" and found.number is not None:
        known.versions[digest] = found.number
        terms = parse(body).terms
        known.contracts.append(terms)
        known.signers.update({log.cosigner_name(terms, party): number for number, party in log.cosigners(terms).items()})
    elif found.kind == "manifest" and found.number is not None:
        stated = decode(body, Manifest)
        known.rounds[digest] = known.rounds[_place_of(stated.log_size, stated.log_root)] = found.number
        known.last = max(known.last, found.number)
    elif found.kind == "outcome" and found.number is not None:
        known.rounds.setdefault(decode(body, Outcome).round_ctx, found.number)


def _slot(found: Claim, known: _Known) -> Slot | None:
    """Where a document belongs, or None when that rests on one which is not here."""
    number = found.number
    if number is None:
        number = known.versions.get(found.rests_on, known.rounds.get(found.rests_on))
    if number is None and found.kind in NOTE_KINDS:
        number = known.last + 1  # the head that no manifest names yet is the one on which the next round will be opened
    party = known.signers.get(found.signer, found.party)
    return None if number is None or party < AGGREGATOR else Slot(found.kind, number, party)


def _chosen(folder: Path, slot: Slot, claimants: list[str], known: _Known, spare: dict[str, str]) -> Entry:
    """The one document of a slot: the only one that is signed, or else the first; the others are spare, and say why."""
    genuine = [name for name in claimants if len(claimants) > 1 and _is_signed(read_file(folder / name), known)]
    best = (genuine or claimants)[0]
    for name in claimants:
        if name in genuine[1:]:
            spare[name] = f"a second {slot}, signed like the first: its author said two things"
        elif name != best:
            spare[name] = f"it claims to be {slot}, which another file is"
    return Entry(slot=slot, digest=bytes.fromhex(best))


def _is_signed(data: bytes, known: _Known) -> bool:
    """Whether a document is signed by a key that a contract here gives its sender."""
    try:
        signed = decode(data, Signed)
    except TrustError:
        return False
    raw = keys.signing_input(type=signed.type, context=signed.context, sender=signed.sender, body=signed.body)
    for key in _keys_of(signed.sender, known.contracts):
        try:
            keys.verify_signature(key, raw, signed.signature)
        except TrustError:
            continue
        return True
    return False


def _read_or_nothing(path: Path) -> bytes:
    """The bytes of a file; of what is no regular file, none."""
    try:
        return read_file(path)
    except TrustError:
        return b""


def _keys_of(sender: int, contracts: Iterable[Contract]) -> list[bytes]:
    found = []
    for terms in contracts:
        silos = {each.id: each.verify_key for each in terms.member}
        guardians = {each.id: each.verify_key for each in terms.guardian}
        parties = {AGGREGATOR: terms.aggregator.verify_key, **silos, **guardians}
        if sender in parties:
            found.append(parties[sender])
    return found
