# SPDX-License-Identifier: Apache-2.0
"""From an empty folder to a published contract: init, member, sign.

The coordinator owns ``federation.draft.toml``: a commented file, edited by hand until it is signed. Signing fills in what is
computed (``noise_multiplier = "calibrate"``, ``lattice_bits = "auto"``), checks the whole, keeps the exact bytes in
``contract/v<n>.toml`` and publishes them. Promised: a signed plan costs at most its own epsilon, by certified accounting; a
member's key was shown to be in its holder's possession; signing again after a crash publishes the same bytes. Not promised:
that a key belongs to the organisation it names: compare fingerprints over another channel. Version v+1 (aggregator.revision) is
signed once v is countersigned by all its members, or passes v over, and only if it follows (privacy.chain).
"""

from __future__ import annotations

import datetime
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from aggregator import basis_draft, blocks, guardians, versions
from aggregator.config import Config, Database, Home, Listen
from aggregator.draft import AUTO, CALIBRATE, Terms, draft, entry
from aggregator.store import Store
from privacy import chain, federation, files
from privacy.dp.mechanism import LatticeGaussian, Noised
from privacy.envelope import sign
from privacy.errors import BudgetExhausted, ConfigError
from privacy.federation import GUARDIANS_FROM, Accepted, Contract, Guardian, Member, Signer
from privacy.identity import keys
from privacy.identity.keys import Identity, PublicIdentity, PublicMember
from privacy.messages import AGGREGATOR
from privacy.task import check_task


def init(
    root: Path, *, name: str, organisation: str, terms: Terms, host: str, port: int, database_url: str = "",
    facts: Mapping[str, object] | None = None,
) -> tuple[Home, Identity]:  # fmt: skip
    """A new aggregator: its folder, identity, draft contract, and configuration. A half-made one is completed.

    Args:
        facts: what its reports say beside the contract.

    Raises:
        ConfigError: there is one already, or one half made with other terms; or a name or value cannot stand.
        MachineError: the folder cannot be written.
    """
    nobody = PublicIdentity(name=name, sign_key=bytes(32), seal_key=bytes(keys.SEAL_KEY_BYTES), ml_dsa_key=bytes(1952))
    text = draft(terms, nobody)  # refuses before anything is made
    check_task(raw_terms(text))
    home = Home.prepared(root)
    with home.locked():
        kept = home.identity_path.exists()
        identity = keys.load(home.identity_path) if kept else keys.create(home.identity_path, name=name, receives=True)
        keys.write_public(home.public_path, identity, organisation)
        _keep_draft(home, draft(terms, identity.public))
        files.write_atomic(home.facts_path, msgspec.json.encode(facts or {}) + b"\n")
        home.finish(Config(name=name, listen=Listen(host=host, port=port), database=Database(url=database_url)))
    return home, identity


def add_member(home: Home, public: bytes) -> Member:
    """The member that an ``identity.pub`` introduces, appended to the draft with the next free id, or found in it.

    Raises:
        TrustError: malformed, a weak key, or no proof of possession.
        ConfigError: the name or the key stands in the draft as another's, or the version of the draft is signed.
        MachineError: another process is at work in the home.
    """
    introduced = keys.read_public(public)
    with home.locked():
        return _added(home, introduced)


def _added(home: Home, introduced: PublicMember) -> Member:
    text, terms = open_draft(home)
    public = introduced.under(terms.signatures)
    same = (introduced.name, introduced.organisation, public.verify_key)
    for member in terms.member:
        if (member.name, member.organisation, member.verify_key) == same:
            return member
    _refuse_taken(introduced, [terms.aggregator, *terms.member])
    known = lineage(home, terms.version - 1)
    ever = [member for each in (known.every if known else ()) for member in each.terms.member]  # also in versions passed over
    ids = [member.id for member in (*terms.member, *ever) if member.id < GUARDIANS_FROM]
    member = stated(introduced, terms, (known.id_of(introduced.name) if known else None) or max(ids, default=0) + 1)
    files.write_atomic(home.draft_path, (text.rstrip("\n") + "\n" + entry(member)).encode())
    return member


def stated(introduced: PublicMember, terms: Contract, number: int) -> Member:
    """The member as a contract of these signatures states it. Raises ConfigError when its identity lacks a key of theirs."""
    public = introduced.under(terms.signatures)
    return Member(
        id=number, name=introduced.name, organisation=introduced.organisation, sign_key=public.sign_key.hex(),
        ml_dsa_key=(public.ml_dsa_key or b"").hex(),
    )  # fmt: skip


def _refuse_taken(introduced: PublicMember, parties: Sequence[Signer]) -> None:
    taken = {party.sign_key: party.name for party in parties}
    if introduced.sign_key.hex() in taken:
        raise duplicate(f"the key of {introduced.name} stands in the draft as {taken[introduced.sign_key.hex()]}")
    if introduced.name in taken.values():
        raise duplicate(f"another party of the draft is called {introduced.name}")


def open_draft(home: Home) -> tuple[str, Contract]:
    """The draft's text and its values, while its version is not signed.

    Raises:
        ConfigError: it is; or the draft does not parse.
    """
    text = read_draft(home)
    terms = raw_terms(text)
    if home.contract_path(terms.version).exists():
        raise _stands(home, terms.version)
    return text, terms


def lineage(home: Home, upto: int) -> chain.Lineage | None:
    """The chain of the signed versions up to ``upto``, from the bytes in ``contract/``; None when there is none."""
    found: chain.Lineage | None = None
    for version in range(1, upto + 1):
        accepted = federation.parse(home.contract_path(version).read_bytes())
        found = chain.Lineage.begin(accepted) if found is None else found.extended(accepted)
    return found


def add_guardian(home: Home, public: bytes) -> Guardian:
    """The guardian that an ``identity.pub`` introduces, appended to the draft, or found in it. Raises as ``add_member``."""
    met = keys.read_public(public)
    with home.locked():
        text, terms = open_draft(home)
        known = lineage(home, terms.version - 1)
        former = {guardian.name: guardian.id for each in (known.every if known else ()) for guardian in each.terms.guardian}
        guardian, table = guardians.introduced(met, terms, former)
        files.write_atomic(home.draft_path, (text.rstrip("\n") + "\n" + table).encode())
        return guardian


def sign_version(home: Home, identity: Identity, store: Store, *, now: float) -> Accepted:
    """The contract of the draft, completed, checked, kept in ``contract/v1.toml``, signed and published.

    Signed once: again it gives what stands, and when only publishing was interrupted, it is completed with the kept bytes.

    Raises:
        ConfigError: the version stands and the draft says other terms, contradicts itself, does not fit the ring, or names another
            aggregator; or the version before is not countersigned by all its members.
        TrustError: it does not follow the version before (privacy.chain); or the file of a public basis is not the one it pins.
        BudgetExhausted: the plan with its stated noise costs more than its epsilon.
        NotCertified: no noise reaches the epsilon.
    """
    with home.locked():
        return _signed(home, identity, store, now)


def _signed(home: Home, identity: Identity, store: Store, now: float) -> Accepted:
    text = read_draft(home)
    version = raw_terms(text).version
    kept = home.contract_path(version)
    if (stands := versions.published(store, version)) is not None:
        signed = stands.terms.privacy  # calibrating anew could give another last digit on another machine
        bits = 0 if stands.terms.basis is None else stands.terms.basis.lattice_bits
        text = basis_draft.filled(_with_guardians(text), bits)
        if _filled(text, signed.noise_multiplier, signed.lattice_bits).encode() != stands.raw:
            raise _stands(home, version)
        return stands
    accepted = federation.parse(kept.read_bytes() if kept.exists() else complete(text).encode())
    public, named = identity.public, accepted.terms.aggregator
    held = public.under(accepted.terms.signatures).verify_key
    if (held, (public.seal_key or b"").hex()) != (named.verify_key, named.seal_key):
        raise ConfigError(
            f"the key here is {public.sign_key.hex()[:16]}…, the draft names {named.sign_key[:16]}…",
            hint="put the keys of aggregator.pub into [aggregator] of the draft", code="identity",
        )  # fmt: skip
    _check_follows(store, accepted)
    _check_expiry(accepted.terms.expires, now)
    check_plan(accepted.terms)
    basis_draft.check_file(home.basis_path, accepted.terms)
    files.write_once(kept, accepted.raw)
    signer = identity.under(accepted.terms.signatures)
    raw = sign(signer, type="contract", context=accepted.digest, sender=AGGREGATOR, body=accepted.raw)
    store.put_once("contract", version, AGGREGATOR, raw, received_at=now)
    return versions.open_contract(raw)


def _check_follows(store: Store, accepted: Accepted) -> None:
    """Return if the contract is the first one, or follows the newest, which its members countersigned."""
    terms, newest = accepted.terms, versions.newest(store)
    expected = (1, "") if newest is None else (newest.terms.version + 1, newest.digest.hex())
    if (terms.version, terms.previous) != expected:
        raise ConfigError(
            f"the draft is version {terms.version} after {terms.previous[:16]!r}, wanted: {expected[0]} after {expected[1][:16]!r}",
            hint=f'write version = {expected[0]} and previous = "{expected[1]}"', code="contract",
        )  # fmt: skip
    if newest is None:
        return
    known = versions.lineage(store)
    if known is None:
        return
    before = known.extended(accepted).before
    check_countersigned(store, before or newest)
    if terms.in_force and versions.is_countersigned(store, newest):
        raise ConfigError(
            f"the draft says that version {newest.terms.version} never took effect, and all its members signed it",
            hint="begin the draft again: `aggregator revise`", code="in-force",
        )  # fmt: skip


def check_countersigned(store: Store, newest: Accepted) -> None:
    """Return if all members of a version signed it. Raises ConfigError that names the others."""
    if not versions.is_countersigned(store, newest):
        signed = store.parties("countersignature", newest.terms.version)
        missing = [member.name for member in newest.terms.member if member.id not in signed]
        raise ConfigError(
            f"version {newest.terms.version} is not countersigned by {', '.join(missing)}",
            hint="each runs `silo join`; or give the version up: `aggregator revise --give-up`", code="not-countersigned",
        )  # fmt: skip


def complete(text: str) -> str:
    """The draft with its guardians named, its noise multiplier calibrated, its lattice bits and blocks chosen; else as it stands.

    Raises:
        ConfigError: the draft does not parse, or no noise multiplier fits the ring.
        NotCertified: no noise reaches the epsilon.
    """
    terms = raw_terms(text)
    if terms.silos <= terms.privacy.colluders:
        raise ConfigError(
            f"the draft has {terms.silos} members and expects {terms.privacy.colluders} colluders",
            hint="add the silos first: `aggregator member`",
            code="contract",
        )
    text = basis_draft.completed(_with_guardians(text), terms)
    terms = raw_terms(text)
    calibrated = terms.is_private and _is_open(text, "noise_multiplier", CALIBRATE)
    chosen = _is_open(text, "lattice_bits", AUTO)
    sigma = _calibrated(terms, None if chosen else terms.privacy.lattice_bits) if calibrated else terms.privacy.noise_multiplier
    plan = federation.ring_plan_at(terms, noise_multiplier=sigma, lattice_bits=None if chosen else terms.privacy.lattice_bits)
    return _filled(text, sigma, plan.lattice_bits)


def _with_guardians(text: str) -> str:
    """The draft with everything that follows from its members: guardians, and blocks where they are open."""
    return blocks.completed(guardians.completed(text, raw_terms(text)), raw_terms(text))


def check_plan(terms: Contract) -> float:
    """The certified epsilon of the whole plan, at most the contract's own; infinite where it says that there is no privacy.

    Raises:
        BudgetExhausted: it is more.
        NotCertified: no bound exists for these terms.
    """
    from privacy.dp import unprotected

    if not terms.is_private:
        return math.inf
    spent = unprotected.certify(federation.whole_plan(terms), terms.privacy.delta).epsilon
    if spent > terms.privacy.epsilon:
        raise BudgetExhausted(
            f"{terms.training.rounds} rounds with noise multiplier {terms.privacy.noise_multiplier:g} cost epsilon {spent:.4g}, "
            f"the draft promises {terms.privacy.epsilon:g}",
            hint='write noise_multiplier = "calibrate", or plan fewer rounds', epsilon=spent, limit=terms.privacy.epsilon,
        )  # fmt: skip
    return spent


def _check_expiry(expires: str, now: float) -> None:
    today = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
    try:
        last = datetime.date.fromisoformat(expires)
    except ValueError as error:
        raise ConfigError(f"expires = {expires} is no date", hint="write the last day as YYYY-MM-DD", code="contract") from error
    if last < today:
        raise ConfigError(f"the draft expired on {last}, today is {today}", hint="set a later day", code="contract")


def _calibrated(terms: Contract, bits: int | None) -> float:
    from privacy.dp import accounting, unprotected

    def made(sigma: float) -> Noised:
        plan = federation.ring_plan_at(terms, noise_multiplier=sigma, lattice_bits=bits)
        once = LatticeGaussian(
            sampling_rate=terms.privacy.sampling_rate, lattice_bits=plan.lattice_bits, share_variance=plan.share_variance,
            shares=terms.shares, dimension=terms.dimension, steps=1,
        )  # fmt: skip
        return federation.exposure(terms, once)

    wanted = terms.privacy
    return accounting.calibrate(
        epsilon=wanted.epsilon, delta=wanted.delta, sampling_rate=wanted.sampling_rate, steps=terms.steps, make=made,
        beside=unprotected.noised(federation.before_training(terms)) or (),
    )  # fmt: skip


def raw_terms(text: str) -> Contract:
    """The draft's values, not yet checked against each other; open places read as 1."""
    text = basis_draft.stated(basis_draft.filled(text, 1), data_digest="0" * 64, digest="0" * 64)
    filled = blocks.filled(guardians.filled(_filled(text, 1.0, 1), 0), ())
    empty = "" if re.search(r"(?m)^\[\[member\]\]", text) else "member = []\n"
    try:
        return msgspec.toml.decode(empty + filled, type=Contract)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"federation.draft.toml: {error}", hint="mend that line; the comments say what each key is", code="contract"
        ) from error


def _filled(text: str, sigma: float, bits: int) -> str:
    text = re.sub(_open_place("noise_multiplier", CALIBRATE), lambda found: f"{found[1]}{sigma!r}", text)
    return re.sub(_open_place("lattice_bits", AUTO), lambda found: f"{found[1]}{bits}", text)


def _is_open(text: str, key: str, word: str) -> bool:
    return re.search(_open_place(key, word), text) is not None


def _open_place(key: str, word: str) -> str:
    return rf'(?m)^({key}[ \t]*=[ \t]*)"{word}"'


def read_draft(home: Home) -> str:
    """The draft as it stands. Raises ConfigError when it is missing or no text."""
    try:
        return home.draft_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {home.draft_path}: {error}", hint="run `aggregator init` first", code="no-draft") from error


def _keep_draft(home: Home, text: str) -> None:
    """Write a new home's draft. What stands there may have been edited and is not overwritten."""
    if home.draft_path.exists() and home.draft_path.read_bytes() != text.encode():
        raise ConfigError(
            f"{home.draft_path} stands with other terms than these, and no aggregator.toml beside it",
            hint="give the words with which it was begun, or choose another folder", code="home-exists",
        )  # fmt: skip
    files.write_atomic(home.draft_path, text.encode())


def _stands(home: Home, version: int) -> ConfigError:
    path = home.contract_path(version)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "unknown"
    return ConfigError(
        f"version {version} of the contract is signed and stands (digest {digest}…)",
        hint="silos countersign it with `silo join`; other terms or members need a new version: `aggregator revise`",
        code="signed",
    )  # fmt: skip


def duplicate(what: str) -> ConfigError:
    """The refusal of a name or key that is in already."""
    return ConfigError(
        what, hint="every silo has its own name and its own key; this one may be in already", code="duplicate-member"
    )
