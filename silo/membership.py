# SPDX-License-Identifier: Apache-2.0
"""Joining a federation: fetch the contract, check it, say in words what it means, and countersign it.

Promised: nothing is signed before the contract is the one whose fingerprint a person compared, is not expired, names this
silo's key, stays within this silo's own limits, and fits its model and records. Each silo verifies every member's
signature itself, at every start. Not promised: that the other members exist. The protocol does not detect a coordinator that
invents all of them; ``terms_in_words`` prints names and fingerprints so that people can compare over another channel.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

from privacy import accounting, base_model, envelope, keys
from privacy.envelope import open_contract
from privacy.errors import BudgetExhausted, ConfigError, RoundError, TrustError
from privacy.federation import Accepted, Contract, Member, mechanism
from privacy.messages import AGGREGATOR, Countersignature, decode, encode
from silo import records
from silo.config import Config, Limits
from silo.home import Home
from silo.transport import Transport

UTC = datetime.UTC


def fetch_contract(transport: Transport, fingerprint: str) -> Accepted:
    """The newest contract on the board, verified against the fingerprint that a person typed or compared.

    Args:
        fingerprint: the aggregator's fingerprint (privacy.keys.fingerprint, spaces are free) or the contract's digest in hex.

    Raises:
        RoundError: no contract is published yet.
        TrustError: it is not signed by the aggregator's key in it, or the fingerprint is another's.
        ConfigError: its terms contradict each other.
    """
    document = None
    for version in range(1, 2**31):
        newer = transport.get("contract", version, AGGREGATOR, wait_s=0)
        if newer is None:
            break
        document = newer
    if document is None:
        raise RoundError(
            "the aggregator has published no contract",
            hint="ask the coordinator to run `aggregator sign`, then join again",
            code="no-contract",
        )
    accepted = open_contract(document)
    _check_fingerprint(accepted, fingerprint)
    return accepted


def terms_in_words(accepted: Accepted) -> list[str]:
    """What this silo agrees to by countersigning, one sentence a line, names and fingerprints last."""
    terms = accepted.terms
    plan = terms.privacy
    return [
        f"federation {terms.name}, contract version {terms.version}, expires {terms.expires}",
        f"contract digest {_grouped(accepted.digest.hex())}",
        f"task: {terms.task.kind} into {len(terms.task.labels)} labels: {_some(terms.task.labels)}",
        f"base model: {terms.model.name}, digest {terms.model.digest[:16]}…",
        f"trained: {terms.dimension} numbers, rank {terms.adapter.rank}",
        f"privacy unit: {_unit(terms)}; adding or removing one is hidden up to epsilon {plan.epsilon:g} at delta {plan.delta:g}",
        *_rounds_in_words(terms),
        f"what leaves this silo: one masked vector of {4 * terms.dimension} bytes a round, and signed protocol messages",
        "what never leaves: records, labels, counts, losses, and any unmasked vector",
        "a sum is opened only when every silo has signed for exactly that sum",
        f"aggregator {terms.aggregator.name}: {keys.fingerprint(aggregator_identity(terms))}",
        *(f"silo {m.id}, {m.name} ({m.organisation}): {keys.fingerprint(_member_identity(m))}" for m in terms.member),
    ]


def own_member(accepted: Accepted, identity: keys.Identity) -> Member:
    """The member of the contract that holds this identity's key. Raises TrustError when none does."""
    own = identity.public.sign_key.hex()
    for member in accepted.terms.member:
        if member.sign_key == own:
            return member
    raise TrustError(
        f"no member of {accepted.terms.name} has this silo's key {own[:16]}…",
        hint="send identity.pub to the coordinator, who adds it with `aggregator member`",
        code="not-a-member",
    )


def check_expiry(accepted: Accepted, now: datetime.datetime) -> None:
    """Return while the contract is valid: through the whole UTC day on which it expires. Raises TrustError after."""
    try:
        last = datetime.date.fromisoformat(accepted.terms.expires)
    except ValueError as error:
        raise ConfigError(
            f"the contract expires on {accepted.terms.expires}, which is no date", hint="have it mended", code="contract"
        ) from error
    if now.astimezone(UTC).date() > last:
        raise TrustError(
            f"the contract expired on {last}, today is {now.astimezone(UTC).date()}", hint="sign a new version", code="expired"
        )


def check_limits(accepted: Accepted, limits: Limits) -> float:
    """The declared plan's certified epsilon at the contract's delta, refused when it is above the silo's limit.

    The figure is the one the plan guarantees: against the aggregator and ``colluders`` silos (in local mode: against everyone),
    all rounds, from nothing spent. The gate composes it with what the ledger holds already.

    Raises:
        BudgetExhausted: the plan's epsilon, or its delta, is above the limit.
        NotCertified: no bound exists for these terms.
    """
    terms = accepted.terms
    if terms.privacy.delta > limits.delta:
        raise BudgetExhausted(
            f"the contract's delta is {terms.privacy.delta:g}, this silo's limit is {limits.delta:g}",
            hint="do not join, or raise [limits] delta after your data protection officer agrees",
            limit=limits.delta,
        )
    spent = accounting.certify([mechanism(terms)], terms.privacy.delta).epsilon
    if spent > terms.privacy.epsilon:
        raise BudgetExhausted(
            f"the contract promises epsilon {terms.privacy.epsilon:g}, its {terms.training.rounds} rounds cost {spent:.4g}",
            hint="do not join: ask the coordinator for a contract whose noise fits what it says",
            epsilon=spent,
            limit=terms.privacy.epsilon,
        )
    if spent > limits.epsilon:
        raise BudgetExhausted(
            f"the plan of {terms.training.rounds} rounds costs epsilon {spent:.4g}, this silo's limit is {limits.epsilon:g}",
            hint="do not join, or raise [limits] epsilon after your data protection officer agrees",
            epsilon=spent,
            limit=limits.epsilon,
        )
    return spent


def check_fit(accepted: Accepted, *, config: Config, home: Home) -> None:
    """Return if the base model here is the contract's, and the records here can be used under it.

    What is found in the records stays here: to the others, a silo that does not fit is a silo that does not join.

    Raises:
        ConfigError: another model, or none.
        RecordsError: a record cannot be used, a label is not the contract's, or there are too few units.
    """
    terms = accepted.terms
    base_folder(terms, config.model.path)
    units = records.load(Path(config.records.path), terms.task, terms.privacy, selection_key=home.selection_key)
    records.check_enough(units, terms.privacy)


def base_folder(terms: Contract, local: str = "") -> Path:
    """The folder of the contract's base model: ``local``, or found by the contract's name; its digest is the contract's.

    Raises:
        ConfigError: there is none, or it holds other bytes than the contract pins.
    """
    folder = base_model.locate(local or terms.model.name)
    found = base_model.digest(folder)
    if found != terms.model.digest:
        raise ConfigError(
            f"the base model in {folder} has digest {found[:16]}, the contract says {terms.model.digest[:16]}",
            hint="fetch the version the contract names, and give its folder in [model] path",
            code="model-digest",
            found=found,
        )
    return folder


def countersign(
    home: Home,
    transport: Transport,
    identity: keys.Identity,
    accepted: Accepted,
    *,
    limits: Limits,
    now: datetime.datetime,
    check_local: Callable[[Accepted], None],
) -> Member:
    """Sign the contract as the member that this silo is, and post the signature; safe to repeat.

    Args:
        check_local: raises when this silo's model or records do not fit the contract: ``check_fit`` with two arguments given.

    Raises:
        TrustError: not a member, expired, or the board now shows another contract of this version.
        BudgetExhausted: the plan does not fit the silo's limits; nothing was signed.
        Equivocation: another contract of this version was signed before.
        ConfigError: the model or the records do not fit; nothing was signed.
    """
    member = own_member(accepted, identity)
    check_expiry(accepted, now)
    check_limits(accepted, limits)
    check_local(accepted)
    version = accepted.terms.version
    document = transport.get("contract", version, AGGREGATOR, wait_s=0)
    if document is None or open_contract(document).digest != accepted.digest:
        raise TrustError(
            f"the board no longer shows contract {accepted.digest.hex()[:16]}", hint="join again", code="contract-changed"
        )
    home.keep_contract(version, document)
    body = encode(Countersignature(contract=accepted.digest, member=member.id))
    signed = envelope.sign(identity, type="countersignature", context=accepted.digest, sender=member.id, body=body)
    home.keep_countersignature(version, member.id, signed)
    transport.put("countersignature", version, member.id, signed)
    return member


def verify_all_countersigned(transport: Transport, accepted: Accepted, *, home: Home, wait_s: float = 0.0) -> tuple[int, ...]:
    """The ids of all members, each of whose countersignatures this silo has now verified itself, and keeps.

    A kept signature is verified again and not fetched; a missing one is waited for, ``wait_s`` seconds in all for each.

    Raises:
        RoundError: members have not signed yet; the message names them.
        TrustError: a signature is not its member's, or over another contract.
    """
    version, missing = accepted.terms.version, []
    for member in accepted.terms.member:
        kept = home.countersignature(version, member.id)
        signed = kept or transport.get("countersignature", version, member.id, wait_s=wait_s)
        if signed is None:
            missing.append(f"{member.name} ({member.id})")
            continue
        _check_countersignature(signed, accepted, member)
        if kept is None:
            home.keep_countersignature(version, member.id, signed)
    if missing:
        raise RoundError(
            f"{len(missing)} of {accepted.terms.silos} members have not countersigned: {', '.join(missing)}",
            hint="each runs `silo join`; then run this again",
            code="not-countersigned",
        )
    return tuple(member.id for member in accepted.terms.member)


def joined(home: Home, identity: keys.Identity, *, now: datetime.datetime) -> tuple[Accepted, Member]:
    """The contract under which this silo may train, and which member it is: ``countersigned``, and not expired.

    Raises:
        ConfigError: the silo has joined none.
        TrustError: the contract expired, or as ``countersigned``.
    """
    accepted, member = countersigned(home, identity)
    check_expiry(accepted, now)
    return accepted, member


def countersigned(home: Home, identity: keys.Identity) -> tuple[Accepted, Member]:
    """The contract this silo countersigned, verified again from the kept bytes, and which member it is.

    Also after it expired: that is enough to read what the silo has. To train it must be ``joined``.

    Raises:
        ConfigError: the silo has joined none.
        TrustError: the kept bytes are damaged, or the countersignature is not this silo's.
    """
    kept = home.contract()
    if kept is None:
        raise ConfigError("this silo has joined no federation", hint="run `silo join` first", code="not-joined")
    accepted = open_contract(kept[1])
    member = own_member(accepted, identity)
    signed = home.countersignature(accepted.terms.version, member.id)
    if signed is None:
        raise ConfigError(f"contract version {kept[0]} is not countersigned here", hint="run `silo join` again", code="not-joined")
    _check_countersignature(signed, accepted, member)
    return accepted, member


def aggregator_identity(terms: Contract) -> keys.PublicIdentity:
    """The aggregator's public identity as the contract states it."""
    stated = terms.aggregator
    return keys.PublicIdentity(name=stated.name, sign_key=bytes.fromhex(stated.sign_key), seal_key=bytes.fromhex(stated.seal_key))


def _check_countersignature(signed: bytes, accepted: Accepted, member: Member) -> None:
    key = member.verify_key
    body = envelope.open_signed(signed, type="countersignature", context=accepted.digest, sender=member.id, key=key)
    wanted = Countersignature(contract=accepted.digest, member=member.id)
    if decode(body, Countersignature) != wanted:
        raise TrustError(
            f"the countersignature of {member.name} is for another contract or member", hint="that silo must join again"
        )


def _check_fingerprint(accepted: Accepted, fingerprint: str) -> None:
    given = "".join(fingerprint.split()).replace(":", "").lower()
    of_key = keys.fingerprint(aggregator_identity(accepted.terms)).replace(" ", "")
    if given not in (of_key, accepted.digest.hex()):
        raise TrustError(
            f"the fingerprint in silo.toml is {_grouped(given)[:24]}…, the aggregator's is {_grouped(of_key)[:24]}…",
            hint="ask the coordinator, over another channel, to read the fingerprint aloud",
            code="fingerprint",
            given=given,
            aggregator=of_key,
            contract=accepted.digest.hex(),
        )


def _member_identity(member: Member) -> keys.PublicIdentity:
    return keys.PublicIdentity(name=member.name, sign_key=bytes.fromhex(member.sign_key))


def _unit(terms: Contract) -> str:
    plan = terms.privacy
    records = "" if plan.unit == "record" else f", at most {plan.max_records_per_unit} records each"
    return ("one record" if plan.unit == "record" else f"one value of {plan.unit}") + records


def _rounds_in_words(terms: Contract) -> list[str]:
    """What a round is, against whom epsilon holds, and whose noise it rests on."""
    plan, training = terms.privacy, terms.training
    if training.mode == "local":
        return [
            f"over {training.rounds} rounds of {training.steps_per_round} steps that this silo takes alone, against everyone",
            f"each step samples units at rate {plan.sampling_rate:g} and clips at norm {plan.max_grad_norm:g}",
            f"noise multiplier {plan.noise_multiplier:g}, in full by this silo at each step; the silos' changes are averaged",
        ]
    return [
        f"over {training.rounds} rounds, against the aggregator together with {plan.colluders} of the {terms.silos} silos",
        f"each round samples units at rate {plan.sampling_rate:g} and clips at norm {plan.max_grad_norm:g}",
        f"noise multiplier {plan.noise_multiplier:g}, shared among the silos",
    ]


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:6]) + (", …" if len(labels) > 6 else "")


def _grouped(text: str) -> str:
    return " ".join(_fours(text))


def _fours(text: str) -> Iterator[str]:
    return (text[start : start + 4] for start in range(0, len(text), 4))
