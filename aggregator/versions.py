# SPDX-License-Identifier: Apache-2.0
"""Which version of the contract a document belongs to: every epoch is called under one, and its rounds stand in that epoch.

The contract is a chain (privacy.chain): a newer version may be published while rounds still run under the one before. Promised: an
epoch's contract is the one whose digest its call is signed in; the *standing* version is the newest that all its members
countersigned and that no later one passes over. Not promised: that a published version ever stands.
"""

from __future__ import annotations

import functools
from typing import Protocol

from privacy import chain, envelope
from privacy.errors import TrustError
from privacy.federation import Accepted
from privacy.messages import AGGREGATOR, Manifest, Signed, decode


class Documents(Protocol):
    """Read access to the board; aggregator.store.Store is one, a dictionary in the tests another."""

    def get(self, kind: str, number: int, party: int) -> bytes | None:
        """The document in this slot, or None."""
        ...

    def parties(self, kind: str, number: int) -> tuple[int, ...]:
        """Who wrote one of this kind and number, ascending."""
        ...

    def latest(self, kind: str) -> int | None:
        """The highest number of this kind, or None."""
        ...


@functools.lru_cache(maxsize=64)
def open_contract(raw: bytes) -> Accepted:
    """``privacy.envelope.open_contract``, once for the same bytes: every document that comes in asks for it."""
    return envelope.open_contract(raw)


def published(documents: Documents, version: int) -> Accepted | None:
    """This version as the aggregator signed it, or None."""
    raw = documents.get("contract", version, AGGREGATOR)
    return None if raw is None else open_contract(raw)


def newest(documents: Documents) -> Accepted | None:
    """The newest published version, countersigned or not, or None before the first."""
    version = documents.latest("contract")
    return None if version is None else published(documents, version)


def standing(documents: Documents) -> Accepted | None:
    """The newest version that all its members countersigned; the first one while none is; None before it is published."""
    last = newest(documents)
    for found in () if last is None else (last, *reversed(before(documents, last))):
        if is_countersigned(documents, found):
            return found
    return published(documents, 1)


def before(documents: Documents, accepted: Accepted) -> tuple[Accepted, ...]:
    """The versions in effect before this one, ascending, as it says itself."""
    known = (published(documents, version) for version in range(1, accepted.terms.version))
    return chain.ancestors(accepted, [each for each in known if each is not None])


def is_passed_over(documents: Documents, accepted: Accepted) -> bool:
    """Whether the newest version says that this one never took effect."""
    last = newest(documents)
    return last is not None and accepted.digest not in {last.digest, *(each.digest for each in before(documents, last))}


def is_countersigned(documents: Documents, accepted: Accepted) -> bool:
    """Whether every member's countersignature stands; each was verified when it came in."""
    members = {member.id for member in accepted.terms.member}
    return members <= set(documents.parties("countersignature", accepted.terms.version))


def of_epoch(documents: Documents, number: int) -> Accepted | None:
    """The version under which this epoch was called, or None while it is not.

    Raises:
        TrustError: its call is in the context of no published version.
    """
    raw = documents.get("epoch", number, AGGREGATOR)
    if raw is None:
        return None
    context = decode(raw, Signed).context
    for version in range(documents.latest("contract") or 0, 0, -1):
        found = published(documents, version)
        if found is not None and found.digest == context:
            return found
    raise TrustError(
        f"epoch {number} was called under contract {context.hex()[:16]}…, which is not on the board", code="wrong-context",
        hint="restore the folder evidence/ from a backup",
    )  # fmt: skip


def of_round(documents: Documents, number: int) -> Accepted | None:
    """The version under which this round was opened, or None while it is not."""
    raw = documents.get("manifest", number, AGGREGATOR)
    return None if raw is None else of_epoch(documents, decode(decode(raw, Signed).body, Manifest).epoch)


def _in_round(documents: Documents, number: int) -> Accepted | None:
    """The same as it governs this round, which may be a basis round (privacy.basis_round)."""
    raw, found = documents.get("manifest", number, AGGREGATOR), of_round(documents, number)
    if raw is None or found is None:
        return None
    return found.in_round(decode(decode(raw, Signed).body, Manifest).dimension)


def in_force(documents: Documents) -> Accepted | None:
    """What a coordinator goes on with: the version of the round that is open, else the standing one."""
    latest = documents.latest("manifest") or 0
    if latest and AGGREGATOR not in documents.parties("outcome", latest):
        return of_round(documents, latest)
    return standing(documents)


def governing(documents: Documents, kind: str, number: int) -> Accepted | None:
    """The version by which a member's document of this kind and number is judged; None before the first is published."""
    if kind == "countersignature":
        return published(documents, number) or newest(documents)
    if kind in ("epoch-note", "guardian-note", "pair-seeds", "confirmation"):
        return of_epoch(documents, number) or in_force(documents)
    if kind == "cosignature":  # of a head, which may be shown before the round is opened: by the epoch of that moment
        return of_epoch(documents, documents.latest("epoch") or 0) or in_force(documents)
    return _in_round(documents, number) or in_force(documents)


def lineage(documents: Documents, upto: int | None = None) -> chain.Lineage | None:
    """The chain of published versions up to ``upto``, or the newest, by every rule that needs no signature; None without one.

    Raises:
        TrustError: a version does not follow the one before.
    """
    found: chain.Lineage | None = None
    for version in range(1, (upto or documents.latest("contract") or 0) + 1):
        accepted = published(documents, version)
        if accepted is None:
            break
        found = chain.Lineage.begin(accepted) if found is None else found.extended(accepted)
    return found
