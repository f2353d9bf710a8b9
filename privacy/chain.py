# SPDX-License-Identifier: Apache-2.0
"""The contract chain: version v+1 names the digest of v, and the members of both say so with their keys.

What may change from one version to the next: members, guardians, keys, expiry, deadlines, rounds, drop-outs, noise and every other
number, for every member of v+1 signs for the new terms as a whole. What stays: name, task, base model, adapter, mode, optimiser and
privacy unit (the model and the ledgers go on, so they must keep their meaning), whether there is differential privacy, and the
coordinator's name. ``signatures`` may be strengthened and never weakened.

**Formal guarantees** of a chain that ``walk`` accepts:

- *One past*: each version names its predecessor's digest, so the newest digest fixes all of them.
- *Agreed*: every member of every version signed that version, with the key that stands in it (proof of possession).
- *Carried*: of every version more than half of the members, and no fewer than a sum must have, stand in the next one as well, and
  more than half of them signed the next one with the key they had before: the same key, or a cross-signature by the old one.
- *Blocks stay*: without differential privacy a block of a version is a block of every other version, or has no silo in common with
  any: the difference of two versions' sums holds whole blocks, as each sum does.
- *Ids are not reused*: an id, a name and a key belong to one holder for ever; a key that was replaced never comes back.
- *What never took effect changes nothing*: a version that somebody did not sign may have a successor that says so: it names the
  version in force (``in_force``), and is held to every rule against that one: who stays, with which keys, who signed, and what
  changes in words. The versions in effect, taken alone, are a chain. One that all its members signed cannot be passed over.

Not promised: that a version is the only successor of the one before. Each member writes its one successor down before it signs
(silo.home), so two that are both carried need members that broke that promise. Nor that a name belongs to an organisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from privacy import envelope
from privacy.errors import SiloquyError, TrustError
from privacy.federation import Accepted, Contract, Guardian, Member
from privacy.identity import keys
from privacy.messages import Countersignature, decode, encode

_FIXED: Final = (
    "name", "task", "model", "adapter", "training.mode", "training.optimizer", "privacy.unit", "privacy.off", "aggregator.name",
    "privacy.max_silos_per_unit", "basis.shapes", "basis.width", "basis.attempts", "public_basis",
)  # fmt: skip
_KIND: Final = "countersignature"


@dataclass(frozen=True, kw_only=True)
class Version:
    """One link as it lies on a board: the signed contract, and its members' countersignatures by id."""

    document: bytes
    countersignatures: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A chain up to its newest version, and who ever held which id and which key.

    ``every`` are all versions; ``versions`` are those in effect, the newest among them: a version that its successor passed over
    is in the first alone.
    """

    every: tuple[Accepted, ...]
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
        return cls._of((first,))

    @classmethod
    def _of(cls, versions: Sequence[Accepted]) -> Lineage:
        """Versions that follow each other in effect."""
        found = cls(every=(), versions=(), holders={}, owners={}, retired=frozenset())
        for each in versions:
            found = found._with(each, every=(*found.every, each))
        return found

    @property
    def newest(self) -> Accepted:
        """The last version."""
        return self.versions[-1]

    @property
    def before(self) -> Accepted | None:
        """The version in effect before the newest, which the newest is held to."""
        return self.versions[-2] if len(self.versions) > 1 else None

    @property
    def passed_over(self) -> tuple[Accepted, ...]:
        """Versions that never took effect: a later one says so."""
        kept = {each.digest for each in self.versions}
        return tuple(each for each in self.every if each.digest not in kept)

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
        base = self._in_force(after)
        _check_fixed(base.newest.terms, new)
        _check_overlap(base.newest.terms, new)
        _check_blocks([each.terms for each in base.versions], new)
        return base._with(after, every=(*self.every, after))

    def _in_force(self, after: Accepted) -> Lineage:
        """The chain of what is in effect before ``after``, as it says itself."""
        stated, number = after.terms.in_force, after.terms.version
        if not stated:
            return self
        base = next((each for each in self.every[:-1] if each.digest.hex() == stated), None)
        if base is None:
            raise _refused(f"version {number} says that {stated[:16]} is in force, which is no version before {number - 1}",
                           "chain-in-force")  # fmt: skip
        return Lineage._of((*ancestors(base, self.every), base))

    def id_of(self, name: str) -> int | None:
        """The member id that a silo of this name has or had."""
        return next((party for party, (held, _) in self.holders.items() if held == name and party < 2**15), None)

    def _with(self, after: Accepted, *, every: tuple[Accepted, ...]) -> Lineage:
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
        return Lineage(every=every, versions=(*self.versions, after), holders=holders, owners=owners, retired=frozenset(retired))


def ancestors(accepted: Accepted, known: Iterable[Accepted]) -> tuple[Accepted, ...]:
    """The versions in effect before ``accepted``, ascending, as each names the one before it; those of them that are ``known``.

    Formal guarantees: a version that was passed over is none of them, so nothing signed with its keys counts anywhere.
    """
    by_digest, found = {each.digest.hex(): each for each in known}, list[Accepted]()
    before = by_digest.get(_named(accepted))
    while before is not None and before.terms.version < (found[-1] if found else accepted).terms.version:
        found.append(before)
        before = by_digest.get(_named(before))
    return tuple(reversed(found))


def _named(accepted: Accepted) -> str:
    """Digest of the version that this one is held to, in hex."""
    return accepted.terms.in_force or accepted.terms.previous


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
    """Every version in effect, from the first to the newest, verified; see the module docstring for what then holds.

    Args:
        pinned: what a person compared: the fingerprint of the first version's aggregator, or the digest of any version, in hex.

    Raises:
        TrustError: a version is malformed, does not follow, was not agreed to, or none is the pinned one.
        ConfigError: the terms of a version contradict each other.
    """
    lineage: Lineage | None = None
    signed: dict[bytes, Mapping[int, bytes]] = {}
    for version in versions:
        accepted = envelope.open_contract(version.document)
        lineage = Lineage.begin(accepted) if lineage is None else lineage.extended(accepted)
        signed[accepted.digest] = version.countersignatures
    if lineage is None:
        raise _refused("there is no contract", "chain-version")
    check_effect(lineage, signed)
    check_pinned(lineage.every, pinned)
    return lineage.versions


def check_effect(lineage: Lineage, countersignatures: Mapping[bytes, Mapping[int, bytes]], *, newest: bool = True) -> None:
    """Return if every version in effect was agreed to against the one in effect before it, and no other one was.

    Args:
        countersignatures: by digest of the version, then by member.
        newest: whether the newest version must be agreed to already.

    Raises:
        TrustError: as ``check_agreed``; or all members signed a version, and a later one says that it never took effect.
    """
    for before, after in zip((None, *lineage.versions), lineage.versions, strict=False):
        if newest or after is not lineage.newest:
            check_agreed(before, after, countersignatures.get(after.digest, {}))
    for each in lineage.passed_over:
        if took_effect(lineage, each, countersignatures.get(each.digest, {})):
            raise _refused(
                f"all members signed version {each.terms.version} ({each.digest.hex()[:16]}…), and version "
                f"{lineage.newest.terms.version} or one before it says that it never took effect", "chain-in-force",
            )  # fmt: skip


def took_effect(lineage: Lineage, version: Accepted, countersignatures: Mapping[int, bytes]) -> bool:
    """Whether all members of this version signed it, and enough of them with the keys that were in force before it."""
    before = ancestors(version, lineage.every)[-1:]
    try:
        check_agreed(before[0] if before else None, version, countersignatures)
    except SiloquyError:
        return False
    return True


def check_pinned(versions: Sequence[Accepted], pinned: str) -> None:
    """Return if ``pinned`` is the fingerprint of the first version's aggregator, or a version's digest in hex; blanks are free."""
    given = "".join(pinned.split()).replace(":", "").lower()
    first = versions[0].terms.aggregator
    known = {each.digest.hex() for each in versions}
    known.add(keys.fingerprint(keys.stated(first, bytes.fromhex(first.seal_key))).replace(" ", ""))
    if given not in known:
        raise _refused(f"no version of this chain, nor its aggregator, is the pinned {given[:16]}…", "fingerprint")


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


def _check_blocks(before: Sequence[Contract], after: Contract) -> None:
    """Return if no block of ``after`` cuts one of an earlier version: {1,2,3,4} and then {1,2,3} would give silo 4 away."""
    if after.is_private:
        return
    new = {frozenset(block) for block in after.sum.blocks}
    for terms in before:
        for old in map(frozenset, terms.sum.blocks):
            for cut in new:
                if old & cut and old != cut:
                    raise _refused(
                        f"block {sorted(old)} of version {terms.version} and block {sorted(cut)} share silos and are not the same: "
                        "without differential privacy the difference of their sums shows the others", "chain-blocks",
                    )  # fmt: skip


def _parties(terms: Contract) -> tuple[Member | Guardian, ...]:
    return (*terms.member, *terms.guardian)


def _halves(key: bytes) -> tuple[bytes, ...]:
    return (key[:32], key[32:]) if len(key) > 32 else (key,)


def _value(terms: Contract, path: str) -> object:
    found: object = terms
    for name in path.split("."):
        found = None if found is None else getattr(found, name)  # a table that only some contracts have
    return found


def _crossed_input(accepted: Accepted, member: int) -> bytes:
    body = encode(Countersignature(contract=accepted.digest, member=member))
    return keys.signing_input(type=_KIND, context=accepted.digest, sender=member, body=body)


def _refused(what: str, code: str) -> TrustError:
    return TrustError(what, hint="do not sign it: ask the coordinator, and the other members over another channel", code=code)
