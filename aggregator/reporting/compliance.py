# SPDX-License-Identifier: Apache-2.0
"""The report's facts: from a contract and the rounds that the aggregator saw to one frozen ``Report``.

Every epsilon comes from ``reporting.figures``; this module chooses what is asked, never how it is answered. A silo is charged
for every round in which its upload arrived, void and open rounds too: one step in joint mode, ``steps_per_round`` in local mode.
That is the aggregator's count: a silo charges each attempt in its own ledger, which is the authority and may stand higher. What
nobody recorded has no field.

Rounds of earlier versions of the contract are charged with those versions' own terms (privacy.spending).

The schema is ``siloquy-report/2`` (docs/reference/report.md): fields are added, never renamed, under the same number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from aggregator.reporting import assumptions, crosswalk, wording
from aggregator.reporting.counted import Counted
from aggregator.reporting.figures import Curve
from aggregator.reporting.record import (
    SCHEMA,
    Accounting,
    Adversary,
    Charge,
    Federation,
    Guarantee,
    Odds,
    ProfilePoint,
    Report,
    RoundFacts,
    Scalar,
    Seen,
    Several,
    SiloBudget,
    Traffic,
    Version,
)
from privacy import basis_round, chain, federation, spending
from privacy.changes import changes
from privacy.dp import groups
from privacy.errors import ConfigError
from privacy.federation import Accepted, Contract
from privacy.identity import keys
from privacy.spending import ADVERSARIES, Load

FALSE_POSITIVE_RATES = (0.001, 0.01)
PROFILE_DELTAS = (1e-5, 1e-4, 5e-4, 2e-3, 0.01, 0.03, 0.1, 0.2)
"""Where the (epsilon, delta) curve is taken beside the contract's delta; each point is a valid bound of its own."""

_BURN_DOWN_POINTS = 12
_LARGEST_EXPONENT = 700.0


def facts(
    accepted: Accepted,
    *,
    rounds: Sequence[RoundFacts],
    upload_bytes: int,
    lora_bytes: int,
    state_digest: str,
    generated_at: int,
    software: Mapping[str, str],
    extra: Mapping[str, Scalar] | None = None,
    still_open: Collection[int] = (),
    earlier: Sequence[Accepted] = (),
) -> Report:
    """The report on ``rounds`` under the contract ``accepted``, and under the versions before it.

    Args:
        earlier: every published version below ``accepted``, ascending; those that it says are not in effect too.
        upload_bytes, lora_bytes: per silo and round; what is sent, and what plain LoRA would send.
        state_digest: hex digest of the model state after the last round.
        generated_at: Unix seconds.
        extra: scalars that the caller adds under its own responsibility; they are shown as such. Where ``simulated`` is true
            the words are those of a simulation.
        still_open: silos whose upload to a round that has not ended is here; it is charged, and not among ``rounds``.

    Formal guarantees: every epsilon equals ``privacy.spending`` of the rounds under each version, and so, of one version,
    ``accounting.certify`` of its mechanism at the stated steps and shares; a silo's rounds are those, void ones and an open one
    included, that hold an upload of it.

    Raises:
        ConfigError: round numbers do not ascend, a round's version is not in effect, or a participant is no member or stands twice.
        NotCertified: the accountants give no agreed, finite figure.
    """
    terms = accepted.terms
    standing = (*chain.ancestors(accepted, earlier), accepted)
    check_rounds(terms, rounds, {each.terms.version: each.terms for each in standing})
    every = sorted({each.digest: each for each in (*earlier, accepted)}.values(), key=lambda each: each.terms.version)
    counted = Counted(Curve(standing, min((each.version for each in rounds), default=None)), standing, rounds, still_open)
    silos = tuple(_silo(counted, member) for member in counted.members)
    simulated = (extra or {}).get("simulated") is True
    made = _accounting(counted, counted.curve.spending.order if len(standing) > 1 and rounds else None)
    odds = tuple(_odds(rate, made.profile, made.spent.rounds) for rate in FALSE_POSITIVE_RATES)
    return Report(
        format=SCHEMA,
        generated_at=generated_at,
        federation=federation_facts(accepted, state_digest),
        versions=tuple(_version(each, every, standing, rounds) for each in every),
        summary=wording.summary(
            terms,
            rounds=made.spent.rounds,
            epsilon=made.spent.epsilon,
            rounds_left=min(silo.rounds_left for silo in silos if terms.version in silo.versions),
            odds=(odds[0].false_positive_rate, odds[0].spent),
            upload_bytes=upload_bytes,
            simulated=simulated,
        ),
        guarantee=Guarantee(
            unit=wording.unit(terms),
            relation=wording.relation(terms),
            delta=terms.privacy.delta,
            adversaries=_adversaries(counted),
            odds=odds,
            several=_several(counted),
        ),
        mechanism=wording.parameters(terms, simulated=simulated),
        accounting=made,
        silos=silos,
        burn_down=tuple(counted.curve(load) for load in counted.path(_grid(made.spent.rounds, made.plan.rounds))),
        composition=(*wording.composition(terms, simulated=simulated), *wording.of_versions(len(standing))),
        traffic=_traffic(terms, rounds, upload_bytes, lora_bytes),
        rounds=tuple(rounds),
        assumptions=assumptions.of(terms, simulated=simulated),
        crosswalk=crosswalk.of(terms, spent=made.spent, plan=made.plan, simulated=simulated),
        software=dict(software),
        aggregator_fingerprint=coordinator(terms),
        consents=wording.consents(terms, sum(each.kind == "result" for each in rounds)),
        checks=wording.checks(),
        extra=dict(extra or {}),
    )


def true_positive_bound(false_positive_rate: float, profile: Iterable[tuple[float, float]]) -> float:
    """The largest true-positive rate of any test at this false-positive rate, given (epsilon, delta) bounds that all hold.

    The smallest, over the bounds, of min(e^epsilon · FPR + delta, 1 − e^−epsilon · (1 − delta − FPR)) (Kairouz, Oh,
    Viswanath 2015, Theorem 2.1), and at most 1.

    Formal guarantees: each (epsilon, delta) bound alone implies the result; a further bound can only lower it.
    """
    rate = false_positive_rate
    bounds = [1.0]
    for epsilon, delta in profile:
        growth = math.exp(min(epsilon, _LARGEST_EXPONENT))
        bounds += [growth * rate + delta, 1 - (1 - delta - rate) / growth]
    return min(bounds)


def check_rounds(terms: Contract, rounds: Sequence[RoundFacts], versions: Mapping[int, Contract] | None = None) -> None:
    """Return if the rounds ascend and every participant is a member of its round's version, once. Raises ConfigError."""
    known = {terms.version: terms} if versions is None else versions
    numbers = [each.number for each in rounds]
    if numbers != sorted(set(numbers)):
        raise ConfigError(f"round numbers must ascend, found {numbers}", hint="pass the rounds as stored", code="report-rounds")
    for each in rounds:
        if each.version not in known:
            raise ConfigError(
                f"round {each.number} stands under version {each.version}, in effect are {sorted(known)}",
                hint="run `aggregator verify`", code="report-rounds",
            )  # fmt: skip
        for silo in each.participants:
            known[each.version].by_id(silo)
        if len(set(each.participants)) != len(each.participants):
            raise ConfigError(
                f"round {each.number} names a silo twice: {list(each.participants)}",
                hint="pass each upload that counts once",
                code="report-rounds",
                round=each.number,
            )


def federation_facts(accepted: Accepted, state_digest: str) -> Federation:
    """What a report says of the federation."""
    terms = accepted.terms
    return Federation(
        name=terms.name,
        version=terms.version,
        mode=terms.training.mode,
        steps_per_round=terms.training.steps_per_round,
        expires=terms.expires,
        contract_digest=accepted.digest.hex(),
        previous_digest=terms.previous,
        model=terms.model.name,
        model_digest=terms.model.digest,
        state_digest=state_digest,
    )


def _version(
    accepted: Accepted, every: Sequence[Accepted], standing: Sequence[Accepted], rounds: Sequence[RoundFacts]
) -> Version:
    terms = accepted.terms
    numbers = [each.number for each in rounds if each.version == terms.version]
    before = chain.ancestors(accepted, every)[-1:]
    return Version(
        version=terms.version,
        digest=accepted.digest.hex(),
        in_effect=accepted in standing,
        members=tuple(member.id for member in terms.member),
        rounds=len(numbers),
        first_round=min(numbers, default=None),
        last_round=max(numbers, default=None),
        changed=changes(before[0].terms, terms) if before else (),
        event=federation.exposure(terms, federation.mechanism(terms, rounds=1)),
        seen=tuple(_seen(terms, name) for name in ADVERSARIES),
        epsilon=terms.privacy.epsilon,
        delta=terms.privacy.delta,
    )


def _seen(terms: Contract, name: spending.Adversary) -> Seen:
    """One round, and one basis round, as an adversary faces them."""
    basis = None if terms.basis is None else spending.event_of(basis_round.terms_of(terms), name, 1)
    return Seen(name=name, event=spending.event_of(terms, name, 1), basis=basis)


def _accounting(counted: Counted, order: int | None) -> Accounting:
    curve, most, plan = counted.curve, counted.most, counted.plan
    profile = tuple(
        ProfilePoint(delta=delta, spent=curve(most, delta=delta).epsilon, plan=curve(plan, delta=delta).epsilon)
        for delta in sorted({curve.terms.privacy.delta, *PROFILE_DELTAS})
    )
    return Accounting(
        event=federation.exposures(curve.terms)["insiders"], order=order, charged=_charges(most), planned=_charges(plan),
        spent=curve(most), plan=curve(plan), profile=profile,
    )  # fmt: skip


def _charges(load: Load) -> tuple[Charge, ...]:
    return tuple(Charge(version=abs(place), rounds=rounds, basis=place < 0) for place, rounds in load if rounds)


def _adversaries(counted: Counted) -> tuple[Adversary, ...]:
    curve, terms = counted.curve, counted.curve.terms
    seen = federation.adversaries(terms)
    stood = curve.stood(counted.standing()) if terms.shared and not terms.is_local else {}
    return tuple(
        Adversary(
            name=name,
            who=wording.adversary(name, terms),
            shares=seen[name].shares,
            effective_noise_multiplier=seen[name].effective_noise_multiplier,
            spent=curve(curve.most(counted.loads, name), adversary=name),
            plan=curve(counted.plan, adversary=name),
            stood=stood.get(name),
        )
        for name in ADVERSARIES
    )


def _several(counted: Counted) -> tuple[Several, ...]:
    """What a unit in two silos has where the contract assumes one, and a person with several records where the unit is a record."""
    curve, plain = counted.curve, counted.curve.terms.privacy
    made = []
    if plain.max_silos_per_unit < groups.SILOS:
        spent, plan = (curve.exposed(load, silos=groups.SILOS) for load in (counted.everyone, counted.plan))
        made.append(Several(of="silos", count=groups.SILOS, spent=spent, plan=plan))
    for records in groups.RECORDS if plain.unit == "record" else ():
        spent, plan = (curve.exposed(load, records=records) for load in (counted.most, counted.plan))
        made.append(Several(of="records", count=records, spent=spent, plan=plan))
    return tuple(made)


def _odds(rate: float, profile: Sequence[ProfilePoint], rounds: int) -> Odds:
    spent = [(point.spent, point.delta) for point in profile] if rounds else [(0.0, 0.0)]
    plan = [(point.plan, point.delta) for point in profile]
    return Odds(false_positive_rate=rate, spent=true_positive_bound(rate, spent), plan=true_positive_bound(rate, plan))


def _silo(counted: Counted, member: federation.Member) -> SiloBudget:
    curve, load, versions = counted.curve, counted.load(member.id), counted.versions_of(member.id)
    limit, spent = curve.terms.privacy.epsilon, curve(load)
    planned = dict(counted.plan).get(curve.terms.version, 0) - dict(load).get(curve.terms.version, 0)
    stays = curve.terms.version in versions
    return SiloBudget(
        silo=member.id,
        versions=versions,
        charged=_charges(load),
        name=member.name,
        organisation=member.organisation,
        fingerprint=keys.fingerprint(keys.stated(member)),
        spent=spent,
        limit=limit,
        left=max(0.0, limit - spent.epsilon),
        rounds_left=curve.rounds_within(load, limit, planned) if stays else 0,
    )


def coordinator(terms: Contract) -> str:
    """The aggregator's fingerprint."""
    return keys.fingerprint(keys.stated(terms.aggregator, bytes.fromhex(terms.aggregator.seal_key)))


def _traffic(terms: Contract, rounds: Sequence[RoundFacts], upload_bytes: int, lora_bytes: int) -> Traffic:
    return Traffic(
        upload_bytes=upload_bytes,
        lora_bytes=lora_bytes,
        received_bytes=sum(each.bytes_in for each in rounds),
        left=wording.what_left(terms, upload_bytes),
        stayed=wording.what_stayed(terms),
    )


def _grid(spent: int, planned: int) -> list[int]:
    """Round counts for the burn-down: 0, now, the plan's end, and at most a dozen between them."""
    last = max(spent, planned)
    return sorted({0, min(1, last), spent, planned, *(round(last * k / _BURN_DOWN_POINTS) for k in range(_BURN_DOWN_POINTS + 1))})
