# SPDX-License-Identifier: Apache-2.0
"""From one version of the contract to the next: what a silo checks and keeps, and under which version it works.

A silo that joins fetches the whole chain (privacy.chain), from the first version to the newest, verifies it, keeps it, and writes
down for every version its one successor before it signs the newest. It goes on under the version it has until the aggregator calls
an epoch under the new one; model state, round numbers and ledger go on over both.

Promised: a second successor of a version is refused by its name (Equivocation), also after a crash; a state is only carried over
to a version whose chain contains the one it was reached under; a version that all its members signed is not passed over, and one
that was passed over is not worked under, whatever its members sign later. Not promised: that the newest version was shown: the
aggregator may withhold one, and then everybody goes on with the one before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from privacy import chain, envelope
from privacy.chain import Lineage, Version
from privacy.changes import changes
from privacy.errors import ConfigError, Equivocation, RoundError, SiloquyError, TrustError
from privacy.federation import Accepted, Guardian, Member
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Signed, decode
from silo import keyring, session
from silo.home import Home
from silo.session import Superseded
from silo.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A chain as it stands on the board: verified, all versions in effect but the newest countersigned by all their members.

    ``documents`` are all versions, also those that were passed over. ``crossed``: members of the newest with another key than
    before, whose old key signed for it.
    """

    lineage: Lineage
    documents: tuple[Version, ...]
    crossed: frozenset[int] = frozenset()

    @property
    def newest(self) -> Accepted:
        """The version to be joined."""
        return self.lineage.newest

    @property
    def before(self) -> Accepted | None:
        """The version in effect before it, if there is one."""
        return self.lineage.before


def fetch(transport: Transport, pinned: str, *, home: Home | None = None) -> Fetched:
    """The chain on the board, from the fingerprint or digest that a person compared, and the same that is kept in ``home``.

    A chain of one version is not held to the fingerprint here: silo.membership does that, in better words.

    Raises:
        RoundError: no contract is published yet.
        TrustError: a version is not the aggregator's, does not follow, or its members did not agree; or none is the pinned one.
        Equivocation: it is another chain than the one this silo has joined.
    """
    raw: list[bytes] = []
    while (document := transport.get("contract", len(raw) + 1, AGGREGATOR, wait_s=0)) is not None:
        raw.append(document)
    if not raw:
        raise RoundError(
            "the aggregator has published no contract", hint="ask the coordinator to run `aggregator sign`, then join again",
            code="no-contract",
        )  # fmt: skip
    lineage = Lineage.begin(envelope.open_contract(raw[0]))
    for document in raw[1:]:
        lineage = lineage.extended(envelope.open_contract(document))
    signed = {each.digest: _countersignatures(transport, each) for each in lineage.every[:-1]}
    if home is not None:
        _check_same_chain(home, lineage)
        for each in lineage.passed_over:  # what this silo saw is not unseen because the board shows it no more
            signed[each.digest] = {**signed[each.digest], **_kept_countersignatures(home, each)}
    chain.check_effect(lineage, signed, newest=False)
    found = [
        Version(document=document, countersignatures=signed.get(each.digest, {}))
        for document, each in zip(raw, lineage.every, strict=True)
    ]
    if len(lineage.every) > 1:
        _check_pinned(lineage, pinned)
    return Fetched(lineage=lineage, documents=tuple(found), crossed=frozenset(_crossed(transport, lineage)))


def kept_pin(home: Home) -> str:
    """The digest of the newest contract that this silo has, in hex: what a chain must contain; "" before it has one."""
    kept = home.contract()
    return "" if kept is None else envelope.open_contract(kept[1]).digest.hex()


def keep(home: Home, fetched: Fetched) -> None:
    """Keep every version before the newest, and promise each its one successor: the last writes before the newest is signed.

    Raises:
        Equivocation: another version or successor was kept here.
    """
    versions = fetched.lineage.every
    for accepted, document, after in zip(versions[:-1], fetched.documents, versions[1:], strict=False):
        number = accepted.terms.version
        home.keep_contract(number, document.document)
        for member, raw in document.countersignatures.items():
            if home.countersignature(number, member) is None:  # a member may send the same statement signed anew
                home.keep_countersignature(number, member, raw)
        home.promise_successor(number, after.digest)


def in_words(fetched: Fetched) -> list[str]:
    """What changes against the version before, and which new keys their old ones have not signed for yet."""
    before, after = fetched.before, fetched.newest
    if before is None:
        return []
    said = changes(before.terms, after.terms)
    lines = [
        f"version {each.terms.version}, {each.digest.hex()[:16]}…, never took effect: not all of its members signed it"
        for each in fetched.lineage.passed_over
    ]
    lines.append(f"follows version {before.terms.version}, {before.digest.hex()[:16]}…; what changes:")
    lines += [f"  {each}" for each in said]
    for party in _with_new_keys(before, after):
        stated = f"the old key of {party.name} ({party.id})"
        lines.append(
            f"{stated} signed for the new one" if party.id in fetched.crossed else
            f"{stated} has NOT signed for the new one: if it was lost or taken, call {party.organisation} before you agree"
        )  # fmt: skip
    return lines


def ancestors(home: Home, accepted: Accepted) -> dict[bytes, Accepted]:
    """The kept versions in effect before ``accepted``, by digest, ascending; every kept one is named by the one after it."""
    wanted, known = accepted.terms.previous, list[Accepted]()
    for version, raw in reversed(home.contracts()):
        if version < accepted.terms.version and wanted:
            kept = envelope.open_contract(raw)
            if kept.digest.hex() != wanted:
                raise TrustError(
                    f"version {version} kept here is {kept.digest.hex()[:16]}…, the next one names {wanted[:16]}…",
                    hint="restore the silo from its backup", code="chain-previous",
                )  # fmt: skip
            known.append(kept)
            wanted = kept.terms.previous
    return {each.digest: each for each in chain.ancestors(accepted, known)}


def at_work(home: Home, transport: Transport | None = None) -> tuple[Accepted, Member, keys.Identity]:
    """The version this silo works under, as which member, with which key.

    That of the newest epoch whose call it sees, once no round of an older one needs settling. Before any epoch, or while the newest
    is of a version from before this silo came, the newest version that all members countersigned. Without a transport that of its
    state; before its first round the newest it countersigned.

    Raises:
        ConfigError: the silo has joined none.
        TrustError: what is kept is damaged, or was not countersigned by this silo's keys.
        Superseded: the newest epoch is called under a version that this silo has not countersigned.
    """
    joined = {each.digest: each for each in _joined(home)}
    if not joined:
        kept = home.contract()
        if kept is not None:
            keyring.under(home, envelope.open_contract(kept[1]))  # says so when no key of this silo is in it
        raise ConfigError("this silo has joined no federation", hint="run `silo join` first", code="not-joined")
    progress = home.progress()
    chosen = joined.get(progress.contract if progress is not None else b"", list(joined.values())[-1])
    if transport is not None:
        called = newest_call(home, transport)
        own = list(joined.values())[-1]
        if called is None or (called[1] not in joined and called[1] in ancestors(home, own)):  # it came later: its epoch will come
            chosen = next((each for each in reversed(joined.values()) if _is_agreed(home, transport, each)), chosen)
        elif called[1] in joined:
            chosen = joined[called[1]]
        else:
            raise Superseded.by(*called)
    identity = keyring.under(home, chosen)
    return chosen, keyring.member_of(chosen, identity), identity


def if_joined(home: Home) -> Accepted | None:
    """The version of ``at_work`` without a transport; None where this silo has joined no federation. Raises as ``at_work``."""
    try:
        return at_work(home)[0]
    except ConfigError as error:
        if error.code != "not-joined":
            raise
        return None


def _joined(home: Home) -> list[Accepted]:
    """The kept versions in effect that this silo countersigned, ascending, each countersignature verified again."""
    kept, found = [envelope.open_contract(raw) for _, raw in home.contracts()], []
    for accepted in (*chain.ancestors(kept[-1], kept), kept[-1]) if kept else ():
        version = accepted.terms.version
        try:
            identity = keyring.under(home, accepted)
        except TrustError:
            continue  # a version from before this silo, or of a key that was retired
        member = keyring.find_member(accepted, identity)
        signed = None if member is None else home.countersignature(version, member.id)
        if member is not None and signed is not None:
            chain.open_countersignature(signed, accepted, member)
            found.append(accepted)
    return found


def opened_rounds(home: Home, transport: Transport) -> int:
    """How many rounds were opened so far, under whatever version."""
    progress = home.progress()
    number = 0 if progress is None else progress.round
    while transport.get("manifest", number + 1, AGGREGATOR, wait_s=0) is not None:
        number += 1
    return number


def newest_call(home: Home, transport: Transport) -> tuple[int, bytes] | None:
    """(number, contract) of the epoch to be in: the one on this disk while a round of it is open, else the newest called one."""
    here = session.current(home)
    number = 0 if here is None else here.number
    found = _call(transport, number) if number else None
    if here is not None and found is not None and _is_open(home, transport, here.context):
        return found
    while (next_one := _call(transport, (found or (number, b""))[0] + 1)) is not None:
        found = next_one
    return found


def _is_agreed(home: Home, transport: Transport, accepted: Accepted) -> bool:
    """Whether every member's countersignature is here or on the board; whether each holds is checked where it counts."""
    version = accepted.terms.version
    return all(
        home.countersignature(version, member.id) or transport.get("countersignature", version, member.id, wait_s=0)
        for member in accepted.terms.member
    )


def _is_open(home: Home, transport: Transport, context: bytes) -> bool:
    """Whether the next round was opened in this epoch, so that it must be settled with its keys and under its contract."""
    progress = home.progress()
    manifest = transport.get("manifest", (0 if progress is None else progress.round) + 1, AGGREGATOR, wait_s=0)
    return manifest is not None and decode(manifest, Signed).context == context


def _call(transport: Transport, number: int) -> tuple[int, bytes] | None:
    raw = transport.get("epoch", number, AGGREGATOR, wait_s=0)
    return None if raw is None else (number, decode(raw, Signed).context)


def _with_new_keys(before: Accepted, after: Accepted) -> Iterator[Member | Guardian]:
    """Who stands in both and does not sign with the key it had. A guardian that is no silo countersigns nothing."""
    old: dict[int, Member | Guardian] = {member.id: member for member in before.terms.member}
    old |= {guardian.id: guardian for guardian in before.terms.guardian}
    parts = after.terms.silo_guardians.values()
    now: list[Member | Guardian] = [*after.terms.member, *(each for each in after.terms.guardian if each not in parts)]
    for party in now:
        had = old.get(party.id, party)
        if party.sign_key != had.sign_key or had.ml_dsa_key not in ("", party.ml_dsa_key):
            yield party


def _crossed(transport: Transport, lineage: Lineage) -> Iterator[int]:
    """Members with a new key whose countersignature of the newest version is there, and has their old key's signature too."""
    if lineage.before is None:
        return
    for party in _with_new_keys(lineage.before, lineage.newest):
        raw = transport.get("countersignature", lineage.newest.terms.version, party.id, wait_s=0)
        if raw is not None and isinstance(party, Member):
            with contextlib.suppress(SiloquyError):
                if chain.open_countersignature(raw, lineage.newest, party, before=lineage.before):
                    yield party.id


def _countersignatures(transport: Transport, accepted: Accepted) -> Mapping[int, bytes]:
    version = accepted.terms.version
    found = ((member.id, transport.get("countersignature", version, member.id, wait_s=0)) for member in accepted.terms.member)
    return {member: raw for member, raw in found if raw is not None}


def _kept_countersignatures(home: Home, accepted: Accepted) -> Mapping[int, bytes]:
    found = ((member.id, home.countersignature(accepted.terms.version, member.id)) for member in accepted.terms.member)
    return {member: raw for member, raw in found if raw is not None}


def _check_same_chain(home: Home, lineage: Lineage) -> None:
    for version, raw in home.contracts():
        kept, shown = envelope.open_contract(raw), lineage.every[version - 1 : version]
        if not shown or shown[0].digest != kept.digest:
            raise Equivocation(
                f"version {version} that this silo has is {kept.digest.hex()[:16]}…, the board shows "
                f"{shown[0].digest.hex()[:16] + '…' if shown else 'none'}",
                hint="stop, and show both documents to the other members", code="contract-changed",
            )  # fmt: skip


def _check_pinned(lineage: Lineage, pinned: str) -> None:
    """The pin holds for the chain; where the coordinator's Ed25519 key was replaced, only the new one's, or the newest digest."""
    first, newest = lineage.every[0].terms.aggregator, lineage.newest.terms.aggregator
    versions = lineage.every if first.sign_key == newest.sign_key else lineage.every[-1:]
    try:
        chain.check_pinned(versions, pinned)
    except TrustError:
        chain.check_pinned(lineage.every[-1:], pinned)
