# SPDX-License-Identifier: Apache-2.0
"""The next version of a signed contract: its draft, with members added, removed, or under new keys.

Promised: a draft of version v+1 starts from the exact bytes of v and names its digest; a member keeps its id and name when its key
is replaced; nobody else's entry is touched. A version that somebody does not sign is passed over only when the coordinator says so
(``give_up``); its successor then names the version in force, and is held to that one. Not promised: that the members agree: each
countersigns the new version.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from aggregator import basis_draft, enrolment, versions
from aggregator.config import Home
from aggregator.draft import AUTO, CALIBRATE, entries, entry, quote
from aggregator.enrolment import open_draft, raw_terms, read_draft, stated
from aggregator.store import Store
from privacy import federation, files
from privacy.errors import ConfigError
from privacy.federation import Accepted, Contract, Guardian, Member
from privacy.identity import keys
from privacy.identity.keys import Identity, PublicMember

_CALIBRATED: Final = 1e-3
"""A plan that costs nearly all of its epsilon was calibrated; one with spare epsilon had its noise stated."""


def revise(
    home: Home, identity: Identity, store: Store, *, rounds: int | None = None, expires: str = "", signatures: str = "",
    give_up: bool = False,
) -> tuple[Accepted, int]:
    """Begin the draft of the next version from the newest one, which is returned with the new number. Safe to repeat.

    Args:
        rounds, expires, signatures: the new values; everything else is edited in the draft.
        give_up: the newest version, which not all of its members signed, shall never take effect.

    Raises:
        ConfigError: no version is signed; the newest is not countersigned by all, or, with ``give_up``, is; or a draft of the next
            stands with other terms.
    """
    with home.locked():
        newest = versions.newest(store)
        if newest is None:
            raise ConfigError("no contract is signed yet", hint="edit the draft, then run `aggregator sign`", code="no-contract")
        in_force = _given_up(store, newest) if give_up else ""
        if not give_up:
            enrolment.check_countersigned(store, newest)
        text = _begun(newest, in_force, identity, rounds, expires, signatures)
        version = newest.terms.version + 1
        if raw_terms(read_draft(home)).version == version and read_draft(home) != text:
            raise ConfigError(
                f"a draft of version {version} stands in {home.draft_path} with other terms",
                hint="edit it there, or move it away to begin again", code="draft-exists",
            )  # fmt: skip
        raw_terms(text)
        files.write_atomic(home.draft_path, text.encode())
        return newest, version


def replace(home: Home, name: str, public: bytes) -> Member | Guardian:
    """The keys of an ``identity.pub`` in place of those that a member, or a guardian, has in the draft; id and name stay.

    Raises:
        TrustError: malformed, a weak key, or no proof of possession.
        ConfigError: no such member, another name or organisation, or a key that another party has.
    """
    introduced = keys.read_public(public)
    with home.locked():
        text, terms = open_draft(home)
        before = _party(terms, name)
        if (introduced.name, introduced.organisation) != (before.name, before.organisation):
            raise ConfigError(
                f"{introduced.name} ({introduced.organisation}) cannot replace {before.name} ({before.organisation})",
                hint="a key is replaced under the same name and organisation; another silo is added, and this one removed",
                code="other-member",
            )  # fmt: skip
        after = msgspec.structs.replace(before, **_keys(introduced, terms))
        for party in (terms.aggregator, *terms.member, *terms.guardian):
            if party.name != name and party.sign_key == after.sign_key:
                raise enrolment.duplicate(f"the key of {name} stands in the draft as {party.name}")
        if after != before:
            files.write_atomic(home.draft_path, _with_keys(text, name, after).encode())
        return after


def remove(home: Home, name: str) -> Member | Guardian:
    """Who does not stand in the draft any more: a member, with the guardian that it was, or a guardian. Raises ConfigError."""
    with home.locked():
        text, terms = open_draft(home)
        found = _party(terms, name)
        for start, end, _, party in reversed(entries(text)):
            if party == name:
                text = text[:start].rstrip("\n") + "\n\n" + text[end:]
        files.write_atomic(home.draft_path, (text.rstrip("\n") + "\n").encode())
        return found


def _given_up(store: Store, newest: Accepted) -> str:
    """Digest of the version in force below the newest one, which is given up."""
    standing = versions.standing(store)
    if standing is None or standing.digest == newest.digest or not versions.is_countersigned(store, standing):
        raise ConfigError(
            f"version {newest.terms.version} cannot be given up: "
            + ("it is the first" if newest.terms.version == 1 else "all its members signed it"),
            hint="run `aggregator revise` without --give-up", code="in-force",
        )  # fmt: skip
    return standing.digest.hex()


def _begun(newest: Accepted, in_force: str, identity: Identity, rounds: int | None, expires: str, signatures: str) -> str:
    terms, text = newest.terms, re.sub(r"(?m)^in_force[ \t]*=.*\n", "", newest.raw.decode(), count=1)
    values = {
        "version": str(terms.version + 1), "previous": quote(newest.digest.hex()), "lattice_bits": quote(AUTO),
        **({"noise_multiplier": quote(CALIBRATE)} if _was_calibrated(terms) else {}),
        **({"rounds": str(rounds)} if rounds is not None else {}), **({"expires": quote(expires)} if expires else {}),
    }  # fmt: skip
    for key, value in values.items():
        text = _set(text, key, value)
    text = basis_draft.reopened(text)
    if in_force:
        text = re.sub(r"(?m)^(previous[ \t]*=.*\n)", lambda found: f"{found[1]}in_force = {quote(in_force)}\n", text, count=1)
    if signatures and signatures != terms.signatures:
        text = _set(text, "signatures", quote(signatures))
        second = identity.public.under(signatures).ml_dsa_key or b""
        head, table, tail = text.partition("\n[aggregator]\n")
        text = head + table + _set(tail, "ml_dsa_key", quote(second.hex()))
    return text


def _set(text: str, key: str, value: str) -> str:
    """The text with the first line of this key changed. Raises ConfigError when it has none."""
    changed, count = re.subn(rf"(?m)^{key}[ \t]*=.*$", lambda _: f"{key} = {value}", text, count=1)
    if count != 1:
        raise ConfigError(f"the contract has no line for {key}", hint="add it to the draft by hand", code="contract")
    return changed


def _was_calibrated(terms: Contract) -> bool:
    from privacy.dp import unprotected

    if not terms.is_private:
        return False
    spent = unprotected.certify(federation.whole_plan(terms), terms.privacy.delta).epsilon
    return spent > (1 - _CALIBRATED) * terms.privacy.epsilon


def _keys(introduced: PublicMember, terms: Contract) -> dict[str, str]:
    made = stated(introduced, terms, 1)
    return {"sign_key": made.sign_key, "ml_dsa_key": made.ml_dsa_key}


def _with_keys(text: str, name: str, after: Member | Guardian) -> str:
    """The text with new keys in every table of this name, the member's and that of a guardian which is part of the silo."""
    for start, end, kind, party in reversed(entries(text)):
        if party != name:
            continue
        keys_of = {"sign_key": after.sign_key, "ml_dsa_key": after.ml_dsa_key}
        block = entry(Member(id=after.id, name=after.name, organisation=after.organisation, **keys_of)).lstrip("\n")
        if kind == "guardian":
            number = re.search(r"(?m)^id[ \t]*=.*$", text[start:end])
            block = block.replace("[[member]]", "[[guardian]]").replace(f"id = {after.id}", number[0] if number else "")
        text = text[:start] + block + ("\n" if text[end:] else "") + text[end:]
    return text


def _party(terms: Contract, name: str) -> Member | Guardian:
    """The member of this name; without one the guardian."""
    parties: tuple[Member | Guardian, ...] = (*terms.member, *terms.guardian)
    found = next((party for party in parties if party.name == name), None)
    if found is None:
        names = ", ".join(dict.fromkeys(party.name for party in parties))
        raise ConfigError(f"no member of the draft is called {name}", hint=f"the members are {names}", code="no-such-member")
    return found
