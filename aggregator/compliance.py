# SPDX-License-Identifier: Apache-2.0
"""The report's facts: from a contract and the rounds that the aggregator saw to one frozen ``Report``.

Every epsilon comes from ``privacy.accounting.certify``; this module chooses what is asked, never how it is answered. A silo
is charged one step for every round in which its upload arrived, void and open rounds too. That is the aggregator's count: a silo
charges each attempt in its own ledger, which is the authority and may stand higher. What nobody recorded has no field.

The schema is ``siloquy-report/1`` (docs/reference/report.md): fields are added, never renamed, under the same number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from aggregator import wording
from aggregator.wording import Assumption, Check, Fact, Item, Parameter
from privacy import accounting, federation, keys
from privacy.errors import ConfigError
from privacy.federation import Accepted, Contract, Hex32
from privacy.mechanism import LatticeGaussian, adversaries

Scalar = str | int | float | bool | None
Natural = Annotated[int, msgspec.Meta(ge=0)]

SCHEMA: Literal["siloquy-report/1"] = "siloquy-report/1"
FALSE_POSITIVE_RATES = (0.001, 0.01)
PROFILE_DELTAS = (1e-5, 1e-4, 5e-4, 2e-3, 0.01, 0.03, 0.1, 0.2)
"""Where the (epsilon, delta) curve is taken beside the contract's delta; each point is a valid bound of its own."""

_BURN_DOWN_POINTS = 12
_LARGEST_EXPONENT = 700.0


class RoundFacts(Fact, frozen=True, kw_only=True):
    """One round as the aggregator stored it. Times are Unix seconds, digests hex, ``participants`` silos whose upload arrived."""

    number: Natural
    kind: Literal["result", "void"]
    reason: str
    opened_at: int
    closed_at: int
    participants: tuple[int, ...]
    outcome_digest: Hex32
    state_digest: Hex32
    bytes_in: Natural


class Federation(Fact, frozen=True, kw_only=True):
    """Which federation, under which version of its contract, on which base model, with which model state now."""

    name: str
    version: int
    mode: str
    expires: str
    contract_digest: Hex32
    previous_digest: str
    model: str
    model_digest: Hex32
    state_digest: Hex32


class Figure(Fact, frozen=True, kw_only=True):
    """Epsilon after so many steps. ``epsilon`` is certified; ``epsilon_pld`` is null where no PLD was computed."""

    steps: Natural
    epsilon: float
    epsilon_pld: float | None
    epsilon_rdp: float


class Adversary(Fact, frozen=True, kw_only=True):
    """What one adversary can learn: now and at the end of the plan. ``name`` is that of privacy.mechanism.adversaries."""

    name: Literal["outside", "insiders", "sum_broken"]
    who: str
    shares: int
    effective_noise_multiplier: float
    spent: Figure
    plan: Figure


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
    a silo's steps are the number of rounds, void ones and an open one included, that hold an upload of it.

    Raises:
        ConfigError: round numbers do not ascend, or a participant is no member or stands twice.
        NotCertified: the accountants give no agreed, finite figure.
    """
    terms = accepted.terms
    _check_rounds(terms, rounds)
    curve = _Curve(terms)
    silos = tuple(_silo(curve, member, _steps(rounds, member.id) + (member.id in still_open)) for member in terms.member)
    simulated = (extra or {}).get("simulated") is True
    most = max(silo.spent.steps for silo in silos)
    spent, plan = curve(most), curve(terms.training.rounds)
    profile = tuple(_profile_point(curve, delta, most) for delta in _deltas(terms))
    odds = tuple(_odds(rate, profile, most) for rate in FALSE_POSITIVE_RATES)
    return Report(
        format=SCHEMA,
        generated_at=generated_at,
        federation=_federation(accepted, state_digest),
        summary=wording.summary(
            terms,
            steps=most,
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
            adversaries=_adversaries(curve, most),
            odds=odds,
        ),
        mechanism=wording.parameters(terms, simulated=simulated),
        accounting=Accounting(event=federation.mechanism(terms), spent=spent, plan=plan, profile=profile),
        silos=silos,
        burn_down=tuple(curve(steps) for steps in _grid(most, terms.training.rounds)),
        composition=wording.composition(terms, simulated=simulated),
        traffic=_traffic(terms, rounds, upload_bytes, lora_bytes),
        rounds=tuple(rounds),
        assumptions=wording.assumptions(terms, simulated=simulated),
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


class _Curve:
    """Figures of one contract's mechanism; each (delta, shares, steps) is certified once."""

    def __init__(self, terms: Contract) -> None:
        self.terms = terms
        self._known: dict[tuple[float, int, int], Figure] = {}

    def __call__(self, steps: int, *, delta: float | None = None, shares: int | None = None) -> Figure:
        """The figure after ``steps`` steps; by default at the contract's delta against the insiders."""
        key = (delta or self.terms.privacy.delta, shares or self.terms.shares, steps)
        if key not in self._known:
            self._known[key] = self._certified(*key)
        return self._known[key]

    def _certified(self, delta: float, shares: int, steps: int) -> Figure:
        if steps == 0:
            return Figure(steps=0, epsilon=0.0, epsilon_pld=0.0, epsilon_rdp=0.0)
        bound = accounting.certify([federation.mechanism(self.terms, shares=shares, steps=steps)], delta)
        pld = bound.epsilon_pld if math.isfinite(bound.epsilon_pld) else None
        return Figure(steps=steps, epsilon=bound.epsilon, epsilon_pld=pld, epsilon_rdp=bound.epsilon_rdp)

    def rounds_within(self, limit: float) -> int:
        """The largest number of steps of the declared plan whose epsilon is at most ``limit``."""
        low, high = 0, self.terms.training.rounds
        if self(high).epsilon <= limit:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self(middle).epsilon <= limit else (low, middle)
        return low


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


def _steps(rounds: Sequence[RoundFacts], silo: int) -> int:
    return sum(silo in each.participants for each in rounds)


def _federation(accepted: Accepted, state_digest: str) -> Federation:
    terms = accepted.terms
    return Federation(
        name=terms.name,
        version=terms.version,
        mode=terms.training.mode,
        expires=terms.expires,
        contract_digest=accepted.digest.hex(),
        previous_digest=terms.previous,
        model=terms.model.name,
        model_digest=terms.model.digest,
        state_digest=state_digest,
    )


def _adversaries(curve: _Curve, steps: int) -> tuple[Adversary, ...]:
    terms = curve.terms
    seen = adversaries(federation.mechanism(terms), silos=terms.silos, colluders=terms.privacy.colluders)
    return tuple(
        Adversary(
            name=name,
            who=wording.adversary(name, terms),
            shares=seen[name].shares,
            effective_noise_multiplier=seen[name].effective_noise_multiplier,
            spent=curve(steps, shares=seen[name].shares),
            plan=curve(terms.training.rounds, shares=seen[name].shares),
        )
        for name in _ADVERSARIES
    )


_ADVERSARIES: tuple[Literal["outside", "insiders", "sum_broken"], ...] = ("outside", "insiders", "sum_broken")


def _deltas(terms: Contract) -> list[float]:
    return sorted({terms.privacy.delta, *PROFILE_DELTAS})


def _profile_point(curve: _Curve, delta: float, steps: int) -> ProfilePoint:
    plan = curve(curve.terms.training.rounds, delta=delta)
    return ProfilePoint(delta=delta, spent=curve(steps, delta=delta).epsilon, plan=plan.epsilon)


def _odds(rate: float, profile: Sequence[ProfilePoint], steps: int) -> Odds:
    spent = [(point.spent, point.delta) for point in profile] if steps else [(0.0, 0.0)]
    plan = [(point.plan, point.delta) for point in profile]
    return Odds(false_positive_rate=rate, spent=true_positive_bound(rate, spent), plan=true_positive_bound(rate, plan))


def _silo(curve: _Curve, member: federation.Member, steps: int) -> SiloBudget:
    limit, spent = curve.terms.privacy.epsilon, curve(steps)
    public = keys.PublicIdentity(name=member.name, sign_key=bytes.fromhex(member.sign_key))
    return SiloBudget(
        silo=member.id,
        name=member.name,
        organisation=member.organisation,
        fingerprint=keys.fingerprint(public),
        spent=spent,
        limit=limit,
        left=max(0.0, limit - spent.epsilon),
        rounds_left=max(0, curve.rounds_within(limit) - steps),
    )


def _coordinator(terms: Contract) -> str:
    who = terms.aggregator
    return keys.fingerprint(
        keys.PublicIdentity(name=who.name, sign_key=bytes.fromhex(who.sign_key), seal_key=bytes.fromhex(who.seal_key))
    )


def _traffic(terms: Contract, rounds: Sequence[RoundFacts], upload_bytes: int, lora_bytes: int) -> Traffic:
    return Traffic(
        upload_bytes=upload_bytes,
        lora_bytes=lora_bytes,
        received_bytes=sum(each.bytes_in for each in rounds),
        left=wording.what_left(terms, upload_bytes),
        stayed=wording.what_stayed(),
    )


def _grid(spent: int, planned: int) -> list[int]:
    """Step counts for the burn-down: 0, now, the plan's end, and at most a dozen between them."""
    last = max(spent, planned)
    return sorted({0, min(1, last), spent, planned, *(round(last * k / _BURN_DOWN_POINTS) for k in range(_BURN_DOWN_POINTS + 1))})
