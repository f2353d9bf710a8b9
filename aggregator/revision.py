# SPDX-License-Identifier: Apache-2.0
"""The next version of a signed contract: its draft, with members added, removed, or under new keys.

Promised: a draft of version v+1 starts from the exact bytes of v and names its digest; a member keeps its id and name when its key
is replaced; nobody else's entry is touched. Not promised: that the members agree: each countersigns the new version, and a version
that somebody does not sign can have no successor. Agree first, then sign.
"""

from __future__ import annotations

import re
from typing import Final

from aggregator import enrolment, versions
from aggregator.config import Home
from aggregator.draft import AUTO, CALIBRATE, entries, entry, quote
from aggregator.enrolment import open_draft, raw_terms, read_draft, stated
from aggregator.store import Store
from privacy import federation, files
from privacy.errors import ConfigError
from privacy.federation import Accepted, Contract, Member
from privacy.identity import keys
from privacy.identity.keys import Identity

_CALIBRATED: Final = 1e-3
"""A plan that costs nearly all of its epsilon was calibrated; one with spare epsilon had its noise stated."""


def revise(
    home: Home, identity: Identity, store: Store, *, rounds: int | None = None, expires: str = "", signatures: str = ""
) -> tuple[Accepted, int]:
    """Begin the draft of the next version from the newest one, which is returned with the new number. Safe to repeat.

    Args:
        rounds, expires, signatures: the new values; everything else is edited in the draft.

    Raises:
        ConfigError: no version is signed, the newest is not countersigned by all, or a draft of the next stands with other terms.
    """
    with home.locked():
        newest = versions.newest(store)
        if newest is None:
            raise ConfigError("no contract is signed yet", hint="edit the draft, then run `aggregator sign`", code="no-contract")
        enrolment.check_countersigned(store, newest)
        text = _begun(newest, identity, rounds, expires, signatures)
        version = newest.terms.version + 1
        if raw_terms(read_draft(home)).version == version and read_draft(home) != text:
            raise ConfigError(
                f"a draft of version {version} stands in {home.draft_path} with other terms",
                hint="edit it there, or move it away to begin again", code="draft-exists",
            )  # fmt: skip
        raw_terms(text)
        files.write_atomic(home.draft_path, text.encode())
        return newest, version


def replace(home: Home, name: str, public: bytes) -> Member:
    """The keys of an ``identity.pub`` in place of those that a member has in the draft; id and name stay.

    Raises:
        TrustError: malformed, a weak key, or no proof of possession.
        ConfigError: no such member, another name or organisation, or a key that another party has.
    """
    introduced = keys.read_public(public)
    with home.locked():
        text, terms = open_draft(home)
        before = _member(terms, name)
        if (introduced.name, introduced.organisation) != (before.name, before.organisation):
            raise ConfigError(
                f"{introduced.name} ({introduced.organisation}) cannot replace {before.name} ({before.organisation})",
                hint="a key is replaced under the same name and organisation; another silo is added, and this one removed",
                code="other-member",
            )  # fmt: skip
        after = stated(introduced, terms, before.id)
        for party in (terms.aggregator, *terms.member):
            if party.name != name and party.sign_key == after.sign_key:
                raise enrolment.duplicate(f"the key of {name} stands in the draft as {party.name}")
        if after != before:
            files.write_atomic(home.draft_path, _with_keys(text, name, after).encode())
        return after


def remove(home: Home, name: str) -> Member:
    """The member, which does not stand in the draft any more, nor does a guardian that was part of it. Raises ConfigError."""
    with home.locked():
        text, terms = open_draft(home)
        found = _member(terms, name)
        for start, end, _, party in reversed(entries(text)):
            if party == name:
                text = text[:start].rstrip("\n") + "\n\n" + text[end:]
        files.write_atomic(home.draft_path, (text.rstrip("\n") + "\n").encode())
        return found


def _begun(newest: Accepted, identity: Identity, rounds: int | None, expires: str, signatures: str) -> str:
    terms, text = newest.terms, newest.raw.decode()
    values = {
        "version": str(terms.version + 1), "previous": quote(newest.digest.hex()), "lattice_bits": quote(AUTO),
        **({"noise_multiplier": quote(CALIBRATE)} if _was_calibrated(terms) else {}),
        **({"rounds": str(rounds)} if rounds is not None else {}), **({"expires": quote(expires)} if expires else {}),
    }  # fmt: skip
    for key, value in values.items():
        text = _set(text, key, value)
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
    from privacy.dp import accounting

    spent = accounting.certify([federation.mechanism(terms)], terms.privacy.delta).epsilon
    return spent > (1 - _CALIBRATED) * terms.privacy.epsilon


def _with_keys(text: str, name: str, after: Member) -> str:
    """The text with new keys in every table of this name, the member's and that of a guardian which is part of the silo."""
    for start, end, kind, party in reversed(entries(text)):
        if party != name:
            continue
        block = entry(after).lstrip("\n")
        if kind == "guardian":
            number = re.search(r"(?m)^id[ \t]*=.*$", text[start:end])
            block = block.replace("[[member]]", "[[guardian]]").replace(f"id = {after.id}", number[0] if number else "")
        text = text[:start] + block + ("\n" if text[end:] else "") + text[end:]
    return text


def _member(terms: Contract, name: str) -> Member:
    found = next((member for member in terms.member if member.name == name), None)
    if found is None:
        names = ", ".join(member.name for member in terms.member)
        raise ConfigError(f"no member of the draft is called {name}", hint=f"the members are {names}", code="no-such-member")
    return found
