# SPDX-License-Identifier: Apache-2.0
"""The parts of a report's record, ``siloquy-report/2`` (docs/reference/report.md): fields are added under one number, none renamed.

Nothing is computed here. What nobody recorded has no field.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from aggregator.reporting.assumptions import Assumption
from aggregator.reporting.crosswalk import Crossing
from aggregator.reporting.figures import Figure, Natural
from aggregator.reporting.wording import Check, Fact, Item, Parameter
from privacy.dp.mechanism import Noised
from privacy.federation import Hex32
from privacy.spending import place_of

Scalar = str | int | float | bool | None

SCHEMA: Literal["siloquy-report/2"] = "siloquy-report/2"


class RoundFacts(Fact, frozen=True, kw_only=True):
    """One round as the aggregator stored it. Times are Unix seconds, digests hex, ``participants`` silos whose upload arrived.

    ``version``: of the contract, under which it was opened. ``stood``: how many of them are in the sum, where that may be fewer
    than all. ``basis``: whether it is a basis round, which comes before the rounds that the contract declares.
    """

    number: Natural
    version: Natural = 1
    kind: Literal["result", "void", "annulled"]
    reason: str
    opened_at: int
    closed_at: int
    participants: tuple[int, ...]
    outcome_digest: Hex32
    state_digest: Hex32
    bytes_in: Natural
    stood: Natural | None = None
    basis: bool = False

    @property
    def place(self) -> int:
        """Where it stands in a load (privacy.spending)."""
        return place_of(self.version, basis=self.basis)


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


class Seen(Fact, frozen=True, kw_only=True):
    """One round of a version as one adversary faces it; ``basis``: one basis round, null where the version has none."""

    name: Literal["outside", "insiders", "sum_broken"]
    event: Noised
    basis: Noised | None = None


class Version(Fact, frozen=True, kw_only=True):
    """One version of the contract, and what stands under it. ``changed``: against the version in effect before it, in words.

    ``in_effect`` is false where a later version passed it over. ``event``: one round of it as the insiders see it. ``seen``: as
    each adversary does; every epsilon of the record follows from these events. ``epsilon`` and ``delta`` are the contract's limits;
    the filter's order follows from those of the first version that has rounds.
    """

    version: Natural
    digest: Hex32
    in_effect: bool
    members: tuple[int, ...]
    rounds: Natural
    first_round: Natural | None
    last_round: Natural | None
    changed: tuple[str, ...]
    event: Noised
    seen: tuple[Seen, ...]
    epsilon: float
    delta: float


class Charge(Fact, frozen=True, kw_only=True):
    """So many rounds under one version; ``basis``: basis rounds."""

    version: Natural
    rounds: Natural
    basis: bool = False


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


class Several(Fact, frozen=True, kw_only=True):
    """Epsilon against the insiders of whoever has more to hide than one unit; null where no finite figure holds.

    ``of``: a unit that so many ``silos`` know, where the contract assumes fewer; or a person with so many ``records`` in each silo
    that knows one of them, where the unit is one record.
    """

    of: Literal["silos", "records"]
    count: Natural
    spent: float | None
    plan: float | None


class Guarantee(Fact, frozen=True, kw_only=True):
    """The statement: unit, relation, delta, three adversaries, what it means for one unit, and what ``several`` of them have."""

    unit: str
    relation: str
    delta: float
    adversaries: tuple[Adversary, ...]
    odds: tuple[Odds, ...]
    several: tuple[Several, ...] = ()


class ProfilePoint(Fact, frozen=True, kw_only=True):
    """One point of the (epsilon, delta) curve against the insiders."""

    delta: float
    spent: float
    plan: float


class Accounting(Fact, frozen=True, kw_only=True):
    """The accountants side by side, and the events from which anybody can compute the figures again.

    ``order``: of the filter that composes rounds of several versions; null where all stand under one.
    """

    event: Noised
    order: Natural | None
    charged: tuple[Charge, ...]
    planned: tuple[Charge, ...]
    spent: Figure
    plan: Figure
    profile: tuple[ProfilePoint, ...]


class SiloBudget(Fact, frozen=True, kw_only=True):
    """One silo's budget by the aggregator's count. ``left`` is 0 when the limit is passed; rounds_left counts the declared plan.

    ``versions``: in which it is a member; a silo that is in none after them has left, and has no rounds left.
    """

    silo: int
    versions: tuple[int, ...]
    charged: tuple[Charge, ...]
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

    format: Literal["siloquy-report/2"] = msgspec.field(name="schema")
    generated_at: int
    federation: Federation
    versions: tuple[Version, ...]
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
    crosswalk: tuple[Crossing, ...]
    software: dict[str, str]
    aggregator_fingerprint: str
    consents: tuple[str, ...]
    checks: tuple[Check, ...]
    extra: dict[str, Scalar]
