# SPDX-License-Identifier: Apache-2.0
"""Joining a federation: fetch the contract, check it, say in words what it means, and countersign it.

Promised: nothing is signed before the contract is the one whose fingerprint a person compared, is not expired, names this
silo's key, stays within this silo's own limits, and fits its model and records. Each silo verifies every member's
signature itself, at every start. Not promised: that the other members exist. The protocol does not detect a coordinator that
invents all of them; ``terms_in_words`` prints names and fingerprints so that people can compare over another channel.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from privacy import base_model, basis_round, chain
from privacy.dp import budget, unprotected
from privacy.envelope import open_contract
from privacy.errors import BudgetExhausted, ConfigError, RoundError, TrustError
from privacy.federation import Accepted, Contract, Member, whole_plan
from privacy.identity import keys
from privacy.messages import AGGREGATOR
from privacy.task import in_words
from silo import keyring, succession
from silo.config import Config, Limits
from silo.home import Home
from silo.learning import records, tokens
from silo.succession import Fetched
from silo.transport import Transport

UTC = datetime.UTC


def fetch(transport: Transport, fingerprint: str, *, home: Home | None = None) -> Fetched:
    """The newest contract on the board and its chain, verified against the fingerprint that a person typed or compared.

    Args:
        fingerprint: the aggregator's fingerprint (identity.keys.fingerprint, spaces are free) or a contract's digest in hex.
        home: the chain must be the one that this silo has.

    Raises:
        RoundError: no contract is published yet.
        TrustError: it is not signed by the aggregator's key in it, does not follow the one before, or the fingerprint is another's.
        Equivocation: it is another chain than the one this silo has joined.
        ConfigError: its terms contradict each other.
    """
    found = succession.fetch(transport, fingerprint, home=home)
    if found.before is None:
        _check_fingerprint(found.newest, fingerprint)
    return found


def terms_in_words(accepted: Accepted) -> list[str]:
    """What this silo agrees to by countersigning, one sentence a line, names and fingerprints last."""
    terms = accepted.terms
    return [
        *_loud(terms),
        f"federation {terms.name}, contract version {terms.version}, expires {terms.expires}",
        f"contract digest {_grouped(accepted.digest.hex())}",
        f"task: {in_words(terms.task)}",
        f"base model: {terms.model.name}, digest {terms.model.digest[:16]}…",
        f"trained: {terms.dimension} numbers, rank {terms.adapter.rank}{_heads(terms)}",
        f"privacy unit: {_unit(terms)}; {_hidden(terms)}",
        *_basis_in_words(terms),
        *_rounds_in_words(terms),
        f"what leaves this silo: one masked vector of {4 * terms.dimension} bytes a round, and signed protocol messages",
        "what never leaves: records, labels, counts, losses, and any unmasked vector",
        *_sum_in_words(terms),
        f"aggregator {terms.aggregator.name}: {keys.fingerprint(aggregator_identity(terms))}",
        *(f"silo {m.id}, {m.name} ({m.organisation}): {keys.fingerprint(keys.stated(m))}" for m in terms.member),
        *(f"guardian {g.id}, {g.name} ({g.organisation}): {keys.fingerprint(keys.stated(g))}" for g in terms.guardian),
    ]


def _heads(terms: Contract) -> str:
    return f" in {terms.adapter.heads} heads" if terms.adapter.heads > 1 else ""


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
    all rounds, from nothing spent. The gate composes it with what the ledger holds already. Infinite without differential privacy,
    for which this silo must have given its word.

    Raises:
        PrivacyRefusal: the contract has no differential privacy, and this silo did not say that it may.
        BudgetExhausted: the plan's epsilon, or its delta, is above the limit.
        NotCertified: no bound exists for these terms.
    """
    terms = accepted.terms
    if not terms.is_private:
        budget.require_word(limits.without_privacy)
        return math.inf
    if terms.privacy.delta > limits.delta:
        raise BudgetExhausted(
            f"the contract's delta is {terms.privacy.delta:g}, this silo's limit is {limits.delta:g}",
            hint="do not join, or raise [limits] delta after your data protection officer agrees",
            limit=limits.delta,
        )
    spent = unprotected.certify(whole_plan(terms), terms.privacy.delta).epsilon
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


def check_fit(accepted: Accepted, *, config: Config, home: Home) -> tuple[str, ...]:
    """The ids of the units here, if the base model is the contract's and the records can be used under it.

    What is found in the records stays here: to the others, a silo that does not fit is a silo that does not join.

    Raises:
        ConfigError: another model, or none.
        RecordsError: a record cannot be used, a label is not the contract's, a prompt is too long, or there are too few units.
    """
    folder, terms = base_folder(accepted.terms, config.model.path), accepted.terms
    units = _usable(terms, config=config, home=home)
    if terms.task.is_causal:  # only the tokenizer knows whether a prompt leaves room for its response
        tokens.encode(units, folder, terms.task)
    return tuple(unit.id for unit in units)


def unit_ids(terms: Contract, *, config: Config, home: Home) -> tuple[str, ...]:
    """The ids of the units here, which can be used under the contract. Raises RecordsError as ``check_fit``."""
    return tuple(unit.id for unit in _usable(terms, config=config, home=home))


def _usable(terms: Contract, *, config: Config, home: Home) -> tuple[records.Unit, ...]:
    units = records.load(Path(config.records.path), terms.task, terms.privacy, selection_key=home.selection_key)
    records.check_enough(units, terms.privacy)
    return units


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
    fetched: Fetched | None = None,
) -> Member:
    """Sign the contract as the member that this silo is, and post the signature; safe to repeat.

    Args:
        identity: whose key stands in the contract: after a rotation the new one.
        fetched: the chain that ends with ``accepted``: it is kept, and each version's one successor promised, before the signature.
        check_local: raises when this silo's model or records do not fit the contract: ``check_fit`` with two arguments given.

    Raises:
        TrustError: not a member, expired, or the board now shows another contract of this version.
        BudgetExhausted: the plan does not fit the silo's limits; nothing was signed.
        Equivocation: another contract of this version was signed before.
        ConfigError: the model or the records do not fit; nothing was signed.
    """
    member = keyring.member_of(accepted, identity)
    check_expiry(accepted, now)
    check_limits(accepted, limits)
    check_local(accepted)
    version = accepted.terms.version
    document = transport.get("contract", version, AGGREGATOR, wait_s=0)
    if document is None or open_contract(document).digest != accepted.digest:
        raise TrustError(
            f"the board no longer shows contract {accepted.digest.hex()[:16]}", hint="join again", code="contract-changed"
        )
    before = None if fetched is None else fetched.before
    if fetched is not None:
        succession.keep(home, fetched)
    home.keep_contract(version, document)
    signed = home.countersignature(version, member.id)
    if signed is None:  # an ML-DSA signature is another one each time: what was signed once is sent again
        former = None if before is None else keyring.former(home, accepted)
        suite = "" if before is None else before.terms.signatures
        signed = chain.countersignature(identity, accepted, member.id, former=former, suite_before=suite)
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
    version, missing, agreed = accepted.terms.version, [], dict[int, bytes]()
    for member in accepted.terms.member:
        kept = home.countersignature(version, member.id)
        signed = kept or transport.get("countersignature", version, member.id, wait_s=wait_s)
        if signed is None:
            missing.append(f"{member.name} ({member.id})")
            continue
        chain.open_countersignature(signed, accepted, member)
        if kept is None:
            home.keep_countersignature(version, member.id, signed)
        agreed[member.id] = signed
    if missing:
        raise RoundError(
            f"{len(missing)} of {accepted.terms.silos} members have not countersigned: {', '.join(missing)}",
            hint="each runs `silo join`; then run this again",
            code="not-countersigned",
        )
    if version > 1:
        chain.check_agreed(next(reversed(succession.ancestors(home, accepted).values()), None), accepted, agreed)
    return tuple(member.id for member in accepted.terms.member)


def joined(home: Home, *, now: datetime.datetime, transport: Transport | None = None) -> tuple[Accepted, Member, keys.Identity]:
    """The contract under which this silo may train, which member it is, and with which key: ``at_work``, and not expired.

    Raises:
        ConfigError: the silo has joined none.
        TrustError: the contract expired, or as ``silo.succession.at_work``.
    """
    found = succession.at_work(home, transport)
    check_expiry(found[0], now)
    return found


def aggregator_identity(terms: Contract) -> keys.PublicIdentity:
    """The aggregator's public identity as the contract states it."""
    return keys.stated(terms.aggregator, bytes.fromhex(terms.aggregator.seal_key))


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


def _unit(terms: Contract) -> str:
    plan = terms.privacy
    records = "" if plan.unit == "record" else f", at most {plan.max_records_per_unit} records each"
    known = "" if plan.max_silos_per_unit == 1 else f", in up to {plan.max_silos_per_unit} silos"
    return ("one record" if plan.unit == "record" else f"one value of {plan.unit}") + records + known


def _loud(terms: Contract) -> list[str]:
    """What comes first where there is no differential privacy: one sentence that nobody can read past."""
    if terms.is_private:
        return []
    least = min(map(len, terms.sum.blocks))
    what = "changes of the model" if terms.is_local else "gradients"
    return [
        f"NO DIFFERENTIAL PRIVACY: no noise is added. In each round everybody sees the exact sum of at least {least} silos' {what} "
        "in the clear, and records of this silo can be reconstructed from such sums; masks hide only which silo added what"
    ]


def _hidden(terms: Contract) -> str:
    plan = terms.privacy
    if not terms.is_private:
        return "adding or removing one is NOT hidden: epsilon is infinite, here and on this silo's ledger for good"
    return f"adding or removing one is hidden up to epsilon {plan.epsilon:g} at delta {plan.delta:g}"


def _blocks(terms: Contract) -> str:
    return ", ".join("{" + ", ".join(map(str, block)) + "}" for block in terms.sum.blocks)


def _basis_in_words(terms: Contract) -> list[str]:
    """What the rounds before the training rounds release, where the basis is made from records; and where a public one is from."""
    basis, public = terms.basis, terms.public_basis
    if public is not None:
        return [
            f"basis: public, made by the coordinator from the data set {public.data}, digest {public.data_digest[:16]}…; it costs "
            f"nothing; its factors have the digest {public.digest[:16]}… and `silo basis --check` makes them again"
        ]
    if basis is None:
        return []
    numbers = basis_round.terms_of(terms).dimension
    first = f"first a basis round, at most {basis.attempts} times: every unit enters, clipped at norm {basis.max_grad_norm:g}"
    sent = f"a sketch of the gradients in {numbers} numbers, whose sum over the silos fixes what the adapter can learn"
    if not terms.is_private:
        return [f"{first}, NO NOISE; {sent}", "RAW BASIS: everybody sees that exact sum, and records can be reconstructed from it"]
    return [f"{first}, noise multiplier {basis.noise_multiplier:g}; {sent}; it is part of the epsilon above"]


def _rounds_in_words(terms: Contract) -> list[str]:
    """What a round is, against whom epsilon holds, and whose noise it rests on."""
    plan, training = terms.privacy, terms.training
    if not terms.is_private:
        return [
            f"over {training.rounds} rounds of {training.steps_per_round} steps; nothing holds against anyone who sees a sum",
            f"each step samples units at rate {plan.sampling_rate:g} and clips at norm {plan.max_grad_norm:g}, which hides nothing",
            f"no noise; a sum is over whole blocks of silos, which are {_blocks(terms)}",
        ]
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


def _sum_in_words(terms: Contract) -> list[str]:
    """Who must agree before a sum is opened, whose absence a sum survives, and who sums again before it is applied."""
    if not terms.shared:
        two = "ONLY TWO SILOS: each takes its own vector off the sum and sees the other's; only that one's noise hides its records"
        return [
            *([two] if terms.sum.two_silos_see_each_other else []),
            "a sum is opened only when every silo has signed for exactly that sum", _again_in_words(terms),
        ]  # fmt: skip
    every, corrupt = len(terms.guardian), terms.sum.corrupt_guardians
    return [
        f"a sum may be without {terms.sum.dropouts} of the {terms.silos} silos; of fewer than {terms.fewest} none is ever opened",
        f"a sum is opened only when {terms.quorum} of the {every} guardians have signed for exactly it; an upload agrees to that",
        f"{corrupt} guardians together with the aggregator learn nothing more; {terms.quorum} would read every upload",
        _again_in_words(terms),
    ]


def _again_in_words(terms: Contract) -> str:
    if not terms.sliced:
        return "a sum is applied only when this silo has added up all masked vectors again itself"
    at_least, colluders = terms.privacy.colluders + 1, terms.privacy.colluders
    return (
        f"a sum is applied only when {at_least} silos have added up every MiB of it again; this silo does its share of it, "
        f"and a wrong sum is caught while at most {colluders} silos lie"
    )


def _grouped(text: str) -> str:
    return " ".join(_fours(text))


def _fours(text: str) -> Iterator[str]:
    return (text[start : start + 4] for start in range(0, len(text), 4))
