# SPDX-License-Identifier: Apache-2.0
"""The contract chain: version v+1 names the digest of v, and the members of both say so with their keys.

What may change from one version to the next: members, guardians, keys, expiry, deadlines, rounds, drop-outs, noise and every other
number, for every member of v+1 signs for the new terms as a whole. What stays: name, task, base model, adapter, mode, optimiser and
privacy unit (the model and the ledgers go on, so they must keep their meaning) and the coordinator's name. ``signatures`` may be
strengthened and never weakened.

**Formal guarantees** of a chain that ``walk`` accepts:

- *One past*: each version names its predecessor's digest, so the newest digest fixes all of them.
- *Agreed*: every member of every version signed that version, with the key that stands in it (proof of possession).
- *Carried*: of every version more than half of the members, and no fewer than a sum must have, stand in the next one as well, and
  more than half of them signed the next one with the key they had before: the same key, or a cross-signature by the old one.
- *Ids are not reused*: an id, a name and a key belong to one holder for ever; a key that was replaced never comes back.

Not promised: that a version is the only successor of the one before. Each member writes its one successor down before it signs
(silo.home), so two that are both carried need members that broke that promise. Nor that a name belongs to an organisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Accepted, Contract, Guardian, Member
from privacy.identity import keys
from privacy.messages import Countersignature, decode, encode

_FIXED: Final = (
    "name", "task", "model", "adapter", "training.mode", "training.optimizer", "privacy.unit", "aggregator.name",
)  # fmt: skip
_KIND: Final = "countersignature"


@dataclass(frozen=True, kw_only=True)
class Version:
    """One link as it lies on a board: the signed contract, and its members' countersignatures by id."""

    document: bytes
    countersignatures: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A chain up to its newest version, and who ever held which id and which key."""

    versions: tuple[Accepted, ...]
    holders: Mapping[int, tuple[str, str]]
    owners: Mapping[bytes, str]
    retired: frozenset[bytes]

    @classmethod
    def begin(cls, first: Accepted) -> Lineage:
        """A chain of one version. Raises TrustError when it is not the first."""
        terms = first.terms
        if (terms.version, terms.previous) != (1, ""):
            raise _refused(
                f"the chain begins with version {terms.version} after {terms.previous[:16]!r}, not with 1 after ''", "chain-version"
            )
        return cls(versions=(), holders={}, owners={}, retired=frozenset())._with(first)

    @property
    def newest(self) -> Accepted:
        """The last version."""
        return self.versions[-1]

    def extended(self, after: Accepted) -> Lineage:
        """The chain with one more version, by every rule that needs no signature.

        Raises:
            TrustError: it does not follow; the message says what stands against it.
        """
        before, new = self.newest.terms, after.terms
        if new.version != before.version + 1:
            raise _refused(f"version {new.version} cannot follow version {before.version}", "chain-version")
        if new.previous != self.newest.digest.hex():
            raise _refused(
                f"version {new.version} names {new.previous[:16]!r} before it, version {before.version} is "
                f"{self.newest.digest.hex()[:16]}", "chain-previous",
            )  # fmt: skip
        _check_fixed(before, new)
        _check_overlap(before, new)
        return self._with(after)

    def id_of(self, name: str) -> int | None:
        """The member id that a silo of this name has or had."""
        return next((party for party, (held, _) in self.holders.items() if held == name and party < 2**15), None)

    def _with(self, after: Accepted) -> Lineage:
        holders, owners, retired = dict(self.holders), dict(self.owners), set(self.retired)
        names = {name: {party for party, (held, _) in holders.items() if held == name} for name, _ in holders.values()}
        # The last keys of everybody who ever stood in the chain: also of one that left and comes back, and of the coordinator.
        before = {party.id: party.verify_key for each in self.versions for party in _parties(each.terms)}
        hub, hubs = after.terms.aggregator, [each.terms.aggregator.verify_key for each in self.versions[-1:]]
        for half in _halves(hub.verify_key):
            if owners.setdefault(half, hub.name) != hub.name or half in self.retired:
                raise _refused(f"the key {half.hex()[:16]}… of {hub.name} is or was {owners[half]}'s, or was replaced", "chain-key")
        retired |= {half for key in hubs for half in _halves(key)} - set(_halves(hub.verify_key))
        for party in _parties(after.terms):
            known = holders.setdefault(party.id, (party.name, party.organisation))
            if known != (party.name, party.organisation):
                raise _refused(f"id {party.id} is {known[0]} ({known[1]}) and cannot become {party.name} "
                               f"({party.organisation})", "chain-id")  # fmt: skip
            others = {each for each in names.get(party.name, set()) if (each < 2**15) == (party.id < 2**15)} - {party.id}
            if others:
                raise _refused(f"{party.name} has id {min(others)} and cannot have {party.id} as well", "chain-id")
            for half in _halves(party.verify_key):
                if owners.setdefault(half, party.name) != party.name:
                    raise _refused(f"the key {half.hex()[:16]}… of {party.name} is or was {owners[half]}'s", "chain-key")
                if half in self.retired:
                    raise _refused(f"the key {half.hex()[:16]}… of {party.name} was replaced in an earlier version", "chain-key")
            if party.id in before:
                retired |= set(_halves(before[party.id])) - set(_halves(party.verify_key))
        return Lineage(versions=(*self.versions, after), holders=holders, owners=owners, retired=frozenset(retired))


def countersignature(
    identity: keys.Identity, accepted: Accepted, member: int, *, former: keys.Identity | None = None, suite_before: str = ""
) -> bytes:
    """A member's signed agreement to a version.

    Args:
        former: the identity it had in the version before, if it rotated its key and still has the old one.
        suite_before: that version's ``signatures``.
    """
    stated = Countersignature(contract=accepted.digest, member=member)
    if former is not None:
        crossed = former.under(suite_before).sign(_crossed_input(accepted, member))
        stated = Countersignature(contract=accepted.digest, member=member, former=crossed)
    signer = identity.under(accepted.terms.signatures)
    return envelope.sign(signer, type=_KIND, context=accepted.digest, sender=member, body=encode(stated))


def open_countersignature(raw: bytes, accepted: Accepted, member: Member, *, before: Accepted | None = None) -> bool:
    """Whether the member carries the version before on: it signs with the key it had there, or the old key signed too.

    Args:
        before: the version before; None where nobody asks.

    Raises:
        TrustError: not the member's agreement to exactly this version, or a cross-signature that is not by its old key.
    """
    body = envelope.open_signed(raw, type=_KIND, context=accepted.digest, sender=member.id, key=member.verify_key)
    stated = decode(body, Countersignature)
    if (stated.contract, stated.member) != (accepted.digest, member.id):
        raise TrustError(
            f"the countersignature of {member.name} is for another contract or member", hint="that silo must join again",
            code="wrong-silo" if stated.contract == accepted.digest else "wrong-contract",
        )  # fmt: skip
    old = None if before is None else next((each for each in before.terms.member if each.id == member.id), None)
    if old is None:
        return False
    if stated.former:
        keys.verify_signature(old.verify_key, _crossed_input(accepted, member.id), stated.former)
        return True
    return member.sign_key == old.sign_key and old.ml_dsa_key in ("", member.ml_dsa_key)


def check_agreed(before: Accepted | None, after: Accepted, countersignatures: Mapping[int, bytes]) -> None:
    """Return if every member agreed to ``after``, and enough of them are still those that ``before`` named.

    Raises:
        TrustError: a countersignature is missing or is not its member's, or too few carry the version before on.
    """
    carried = 0
    for member in after.terms.member:
        if member.id not in countersignatures:
            raise _refused(f"{member.name} ({member.id}) has not countersigned version {after.terms.version}", "not-countersigned")
        carried += open_countersignature(countersignatures[member.id], after, member, before=before)
    if before is not None and 2 * carried <= before.terms.silos:
        raise _refused(
            f"{carried} of the {before.terms.silos} members of version {before.terms.version} signed version "
            f"{after.terms.version} with the keys they had, more than half must", "chain-continuity",
        )  # fmt: skip


def walk(versions: Sequence[Version], *, pinned: str) -> tuple[Accepted, ...]:
    """Every version from the first to the newest, verified; see the module docstring for what then holds.

    Args:
        pinned: what a person compared: the fingerprint of the first version's aggregator, or the digest of any version, in hex.

    Raises:
        TrustError: a version is malformed, does not follow, was not agreed to, or none is the pinned one.
        ConfigError: the terms of a version contradict each other.
    """
    lineage: Lineage | None = None
    for version in versions:
        accepted = envelope.open_contract(version.document)
        before = None if lineage is None else lineage.newest
        lineage = Lineage.begin(accepted) if lineage is None else lineage.extended(accepted)
        check_agreed(before, accepted, version.countersignatures)
    if lineage is None:
        raise _refused("there is no contract", "chain-version")
    check_pinned(lineage.versions, pinned)
    return lineage.versions


def check_pinned(versions: Sequence[Accepted], pinned: str) -> None:
    """Return if ``pinned`` is the fingerprint of the first version's aggregator, or a version's digest in hex; blanks are free."""
    given = "".join(pinned.split()).replace(":", "").lower()
    first = versions[0].terms.aggregator
    known = {each.digest.hex() for each in versions}
    known.add(keys.fingerprint(keys.stated(first, bytes.fromhex(first.seal_key))).replace(" ", ""))
    if given not in known:
        raise _refused(f"no version of this chain, nor its aggregator, is the pinned {given[:16]}…", "fingerprint")


def changes(before: Contract, after: Contract) -> tuple[str, ...]:
    """What is another in ``after``, for people: one sentence for each party and each value."""
    return (*_parties_in_words(before, after), *_values_in_words(before, after))


def _parties_in_words(before: Contract, after: Contract) -> Iterator[str]:
    old, new = ({party.id: party for party in _parties(terms)} for terms in (before, after))
    for number in sorted(old.keys() | new.keys()):
        what = "silo" if number < 2**15 else "guardian"
        if number not in new:
            yield f"{what} {number}, {old[number].name} ({old[number].organisation}) leaves"
        elif number not in old:
            yield f"{what} {number}, {new[number].name} ({new[number].organisation}) joins: {_shown(new[number])}"
        elif new[number].verify_key != old[number].verify_key:
            yield f"{what} {number}, {new[number].name} ({new[number].organisation}) has a new key: {_shown(new[number])}"


def _values_in_words(before: Contract, after: Contract) -> Iterator[str]:
    for table in ("training", "privacy", "sum"):
        old, new = getattr(before, table), getattr(after, table)
        for field in old.__struct_fields__:
            if getattr(old, field) != getattr(new, field):
                yield f"{table}.{field}: {getattr(old, field)} becomes {getattr(new, field)}"
    for field in ("expires", "signatures"):
        if getattr(before, field) != getattr(after, field):
            yield f"{field}: {getattr(before, field)} becomes {getattr(after, field)}"
    if before.aggregator != after.aggregator:
        yield f"aggregator {after.aggregator.name} has other keys: {_shown(after.aggregator, after.aggregator.seal_key)}"


def _shown(party: keys.Party, seal_key: str = "") -> str:
    return keys.fingerprint(keys.stated(party, bytes.fromhex(seal_key) or None))


def _check_fixed(before: Contract, after: Contract) -> None:
    for path in _FIXED:
        old, new = _value(before, path), _value(after, path)
        if old != new:
            raise _refused(f"{path} may not change in a chain: it was {str(old)[:80]}, now it is {str(new)[:80]}", "chain-fixed")
    if before.signatures == keys.HYBRID != after.signatures:
        raise _refused(f"signatures were {before.signatures} and cannot become {after.signatures}", "chain-suite")


def _check_overlap(before: Contract, after: Contract) -> None:
    common = len({member.id for member in before.member} & {member.id for member in after.member})
    # In consent mode every silo stands in every sum, which would forbid every removal: what counts there is what hides a silo.
    floor = before.fewest if before.shared else min(3, before.silos)
    if 2 * common <= before.silos or common < floor:
        raise _refused(
            f"{common} of the {before.silos} members of version {before.version} stay, it must be over half and at least {floor}",
            "chain-overlap",
        )


def _parties(terms: Contract) -> tuple[Member | Guardian, ...]:
    return (*terms.member, *terms.guardian)


def _halves(key: bytes) -> tuple[bytes, ...]:
    return (key[:32], key[32:]) if len(key) > 32 else (key,)


def _value(terms: Contract, path: str) -> object:
    found: object = terms
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _crossed_input(accepted: Accepted, member: int) -> bytes:
    body = encode(Countersignature(contract=accepted.digest, member=member))
    return keys.signing_input(type=_KIND, context=accepted.digest, sender=member, body=body)


def _refused(what: str, code: str) -> TrustError:
    return TrustError(what, hint="do not sign it: ask the coordinator, and the other members over another channel", code=code)
