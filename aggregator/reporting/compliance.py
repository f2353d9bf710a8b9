# SPDX-License-Identifier: Apache-2.0
"""The report's facts: from a contract and the rounds that the aggregator saw to one frozen ``Report``.

Every epsilon comes from ``reporting.figures``; this module chooses what is asked, never how it is answered. A silo is charged
for every round in which its upload arrived, void and open rounds too: one step in joint mode, ``steps_per_round`` in local mode.
That is the aggregator's count: a silo charges each attempt in its own ledger, which is the authority and may stand higher. What
nobody recorded has no field.

The schema is ``siloquy-report/1`` (docs/reference/report.md): fields are added, never renamed, under the same number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from aggregator.reporting import assumptions, figures, wording
from aggregator.reporting.assumptions import Assumption
from aggregator.reporting.figures import Curve, Figure, Natural
from aggregator.reporting.wording import Check, Fact, Item, Parameter
from privacy import federation
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import ConfigError
from privacy.federation import Accepted, Contract, Hex32
from privacy.identity import keys

Scalar = str | int | float | bool | None

SCHEMA: Literal["siloquy-report/1"] = "siloquy-report/1"
FALSE_POSITIVE_RATES = (0.001, 0.01)
PROFILE_DELTAS = (1e-5, 1e-4, 5e-4, 2e-3, 0.01, 0.03, 0.1, 0.2)
"""Where the (epsilon, delta) curve is taken beside the contract's delta; each point is a valid bound of its own."""

_BURN_DOWN_POINTS = 12
_LARGEST_EXPONENT = 700.0


class RoundFacts(Fact, frozen=True, kw_only=True):
    """One round as the aggregator stored it. Times are Unix seconds, digests hex, ``participants`` silos whose upload arrived.

    ``stood``: how many of them are in the sum, where that may be fewer than all.
    """

    number: Natural
    kind: Literal["result", "void", "annulled"]
    reason: str
    opened_at: int
    closed_at: int
    participants: tuple[int, ...]
    outcome_digest: Hex32
    state_digest: Hex32
    bytes_in: Natural
    stood: Natural | None = None


class Federation(Fact, frozen=True, kw_only=True):
    """Which federation, under which version of its contract, on which base model, with which model state now."""

    name: str
    version: int
    mode: str
    steps_per_round: Natural
    expires: str
    contract_digest: Hex32
    previous_digest: str
    model: str
    model_digest: Hex32
    state_digest: Hex32


class Adversary(Fact, frozen=True, kw_only=True):
    """What one adversary can learn: now and at the end of the plan. ``name`` is that of privacy.federation.adversaries."""

    name: Literal["outside", "insiders", "sum_broken"]
    who: str
    shares: int
    effective_noise_multiplier: float
    spent: Figure
    plan: Figure
    stood: float | None = None
    """Where silos may be away: what ``spent`` comes to with the noise that stood in each sum. Shown beside, never planned on."""


class Odds(Fact, frozen=True, kw_only=True):
    """The most an attacker's test can be right (true positives) when it is wrong at a given rate (false positives)."""

    false_positive_rate: float
    spent: float
    plan: float


class Guarantee(Fact, frozen=True, kw_only=True):
    """The statement: unit, relation, delta, three adversaries, and what it means for one unit."""

    unit: str
    relation: str
    delta: float
    adversaries: tuple[Adversary, ...]
    odds: tuple[Odds, ...]


class ProfilePoint(Fact, frozen=True, kw_only=True):
    """One point of the (epsilon, delta) curve against the insiders."""

    delta: float
    spent: float
    plan: float


class Accounting(Fact, frozen=True, kw_only=True):
    """The accountants side by side, and the event from which anybody can compute the figures again."""

    event: LatticeGaussian
    spent: Figure
    plan: Figure
    profile: tuple[ProfilePoint, ...]


class SiloBudget(Fact, frozen=True, kw_only=True):
    """One silo's budget by the aggregator's count. ``left`` is 0 when the limit is passed; rounds_left counts the declared plan."""

    silo: int
    name: str
    organisation: str
    fingerprint: str
    spent: Figure
    limit: float
    left: float
    rounds_left: Natural


class Traffic(Fact, frozen=True, kw_only=True):
    """What left each site. ``lora_bytes`` is what the same layers would send per silo and round as plain LoRA factors."""

    upload_bytes: Natural
    lora_bytes: Natural
    received_bytes: Natural
    left: tuple[Item, ...]
    stayed: tuple[str, ...]


class Report(Fact, frozen=True, kw_only=True):
    """The whole report; its JSON is the record."""

    format: Literal["siloquy-report/1"] = msgspec.field(name="schema")
    generated_at: int
    federation: Federation
    summary: tuple[str, ...]
    guarantee: Guarantee
    mechanism: tuple[Parameter, ...]
    accounting: Accounting
    silos: tuple[SiloBudget, ...]
    burn_down: tuple[Figure, ...]
    composition: tuple[str, ...]
    traffic: Traffic
    rounds: tuple[RoundFacts, ...]
    assumptions: tuple[Assumption, ...]
    software: dict[str, str]
    aggregator_fingerprint: str
    consents: tuple[str, ...]
    checks: tuple[Check, ...]
    extra: dict[str, Scalar]


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
) -> Report:
    """The report on ``rounds`` under the contract ``accepted``.

    Args:
        upload_bytes, lora_bytes: per silo and round; what is sent, and what plain LoRA would send.
        state_digest: hex digest of the model state after the last round.
        generated_at: Unix seconds.
        extra: scalars that the caller adds under its own responsibility; they are shown as such. Where ``simulated`` is true
            the words are those of a simulation.
        still_open: silos whose upload to a round that has not ended is here; it is charged, and not among ``rounds``.

    Formal guarantees: every epsilon equals ``accounting.certify`` of the contract's mechanism at the stated steps and shares;
    a silo's rounds are those, void ones and an open one included, that hold an upload of it.

    Raises:
        ConfigError: round numbers do not ascend, or a participant is no member or stands twice.
        NotCertified: the accountants give no agreed, finite figure.
    """
    terms = accepted.terms
    _check_rounds(terms, rounds)
    curve = Curve(terms)
    silos = tuple(_silo(curve, member, _charged(rounds, member.id) + (member.id in still_open)) for member in terms.member)
    simulated = (extra or {}).get("simulated") is True
    most = max(silo.spent.rounds for silo in silos)
    spent, plan = curve(most), curve(terms.training.rounds)
    profile = tuple(_profile_point(curve, delta, most) for delta in _deltas(terms))
    odds = tuple(_odds(rate, profile, most) for rate in FALSE_POSITIVE_RATES)
    return Report(
        format=SCHEMA,
        generated_at=generated_at,
        federation=_federation(accepted, state_digest),
        summary=wording.summary(
            terms,
            rounds=most,
            epsilon=spent.epsilon,
            rounds_left=min(silo.rounds_left for silo in silos),
            odds=(odds[0].false_positive_rate, odds[0].spent),
            upload_bytes=upload_bytes,
            simulated=simulated,
        ),
        guarantee=Guarantee(
            unit=wording.unit(terms),
            relation=wording.relation(terms),
            delta=terms.privacy.delta,
            adversaries=_adversaries(curve, most, _standing(rounds, silos)),
            odds=odds,
        ),
        mechanism=wording.parameters(terms, simulated=simulated),
        accounting=Accounting(event=federation.mechanism(terms), spent=spent, plan=plan, profile=profile),
        silos=silos,
        burn_down=tuple(curve(count) for count in _grid(most, terms.training.rounds)),
        composition=wording.composition(terms, simulated=simulated),
        traffic=_traffic(terms, rounds, upload_bytes, lora_bytes),
        rounds=tuple(rounds),
        assumptions=assumptions.of(terms, simulated=simulated),
        software=dict(software),
        aggregator_fingerprint=_coordinator(terms),
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


def _check_rounds(terms: Contract, rounds: Sequence[RoundFacts]) -> None:
    numbers = [each.number for each in rounds]
    if numbers != sorted(set(numbers)):
        raise ConfigError(f"round numbers must ascend, found {numbers}", hint="pass the rounds as stored", code="report-rounds")
    for each in rounds:
        for silo in each.participants:
            terms.by_id(silo)
        if len(set(each.participants)) != len(each.participants):
            raise ConfigError(
                f"round {each.number} names a silo twice: {list(each.participants)}",
                hint="pass each upload that counts once",
                code="report-rounds",
                round=each.number,
            )


def _charged(rounds: Sequence[RoundFacts], silo: int) -> int:
    return sum(silo in each.participants for each in rounds)


def _federation(accepted: Accepted, state_digest: str) -> Federation:
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


def _standing(rounds: Sequence[RoundFacts], silos: Sequence[SiloBudget]) -> list[int | None]:
    """For each round of the silo that is charged most: how many silos stood in its sum; None without a sum, or while it is open."""
    most = max(silos, key=lambda silo: silo.spent.rounds)
    found = [each.stood if each.kind == "result" else None for each in rounds if most.silo in each.participants]
    return [*found, *([None] * (most.spent.rounds - len(found)))]


def _adversaries(curve: Curve, rounds: int, standing: Sequence[int | None]) -> tuple[Adversary, ...]:
    terms = curve.terms
    seen = federation.adversaries(terms)
    stood = figures.stood(terms, standing) if terms.shared and not terms.is_local else {}
    return tuple(
        Adversary(
            name=name,
            who=wording.adversary(name, terms),
            shares=seen[name].shares,
            effective_noise_multiplier=seen[name].effective_noise_multiplier,
            spent=curve(rounds, shares=seen[name].shares),
            plan=curve(terms.training.rounds, shares=seen[name].shares),
            stood=stood.get(name),
        )
        for name in _ADVERSARIES
    )


_ADVERSARIES: tuple[Literal["outside", "insiders", "sum_broken"], ...] = ("outside", "insiders", "sum_broken")


def _deltas(terms: Contract) -> list[float]:
    return sorted({terms.privacy.delta, *PROFILE_DELTAS})


def _profile_point(curve: Curve, delta: float, rounds: int) -> ProfilePoint:
    plan = curve(curve.terms.training.rounds, delta=delta)
    return ProfilePoint(delta=delta, spent=curve(rounds, delta=delta).epsilon, plan=plan.epsilon)


def _odds(rate: float, profile: Sequence[ProfilePoint], rounds: int) -> Odds:
    spent = [(point.spent, point.delta) for point in profile] if rounds else [(0.0, 0.0)]
    plan = [(point.plan, point.delta) for point in profile]
    return Odds(false_positive_rate=rate, spent=true_positive_bound(rate, spent), plan=true_positive_bound(rate, plan))


def _silo(curve: Curve, member: federation.Member, rounds: int) -> SiloBudget:
    limit, spent = curve.terms.privacy.epsilon, curve(rounds)
    return SiloBudget(
        silo=member.id,
        name=member.name,
        organisation=member.organisation,
        fingerprint=keys.fingerprint(keys.stated(member)),
        spent=spent,
        limit=limit,
        left=max(0.0, limit - spent.epsilon),
        rounds_left=max(0, curve.rounds_within(limit) - rounds),
    )


def _coordinator(terms: Contract) -> str:
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
