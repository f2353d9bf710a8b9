# SPDX-License-Identifier: Apache-2.0
"""The report on a federation without differential privacy: that there is none, and what was seen in the clear instead.

Same schema, same places: where a report with noise has an epsilon or a delta, this one has null, and ``reason`` beside it.
``NO_DIFFERENTIAL_PRIVACY`` is the first key of the record. What is left to count is counted: who stood in which sum, and the
rank of the participation matrix (rounds × silos, 1 where a silo stood), for sums may be added and subtracted by whoever has them.

**Formal guarantees**

- *No figure*: no accountant is asked, and no number stands where an epsilon would.
- *Whole blocks*: every set that is counted is a union of the contract's blocks, or there is no report; so every combination of
  the opened sums has one factor for all silos of a block, and the rank is at most the number of blocks.

Not promised: that a sum of so many silos hides anything about a record. It may not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import msgspec

from aggregator.reporting import compliance, crosswalk, wording
from aggregator.reporting.assumptions import Assumption
from aggregator.reporting.crosswalk import Crossing
from aggregator.reporting.figures import Natural
from aggregator.reporting.record import SCHEMA, Federation, Report, RoundFacts, Scalar, Traffic
from aggregator.reporting.wording import Check, Fact, Item, Parameter
from privacy import federation
from privacy.dp import unprotected
from privacy.dp.mechanism import Mechanism
from privacy.errors import ConfigError
from privacy.federation import Accepted, Contract, Member
from privacy.identity import keys
from privacy.reporting.numbers import counted, size
from privacy.secure_sum import blocks

SENTENCE = (
    "No differential privacy. No noise was added: everybody who took part saw the exact sum of each block of silos, and records "
    "can be reconstructed from such sums."
)
KEY = "NO_DIFFERENTIAL_PRIVACY"


class NoFigure(Fact, frozen=True, kw_only=True):
    """Where an epsilon would stand: null, and why."""

    rounds: Natural
    steps: Natural
    epsilon: None = None
    epsilon_pld: None = None
    epsilon_rdp: None = None
    reason: str = unprotected.IN_WORDS


class Seer(Fact, frozen=True, kw_only=True):
    """One of the three adversaries of a report: what it sees, without a figure."""

    name: Literal["outside", "insiders", "sum_broken"]
    who: str
    spent: NoFigure
    plan: NoFigure


class NoGuarantee(Fact, frozen=True, kw_only=True):
    """The place of the guarantee. ``unit`` is what is clipped together; it is not hidden."""

    unit: str
    relation: None = None
    delta: None = None
    adversaries: tuple[Seer, ...]
    odds: tuple[str, ...] = ()
    reason: str = unprotected.IN_WORDS


class NoAccounting(Fact, frozen=True, kw_only=True):
    """The place of the accountants: the event as a silo's ledger has it, which none of them takes."""

    event: Mechanism
    spent: NoFigure
    plan: NoFigure
    reason: str = unprotected.IN_WORDS


class Exposed(Fact, frozen=True, kw_only=True):
    """One silo: how many rounds it is charged for, by the aggregator's count, and in how many opened sums it stood."""

    silo: int
    name: str
    organisation: str
    fingerprint: str
    spent: NoFigure
    limit: None = None
    left: None = None
    stood: Natural


class Participation(Fact, frozen=True, kw_only=True):
    """Who stood in the opened sums. ``rank``: of the matrix rounds × silos. ``least``: the fewest silos that a combination has."""

    sums: Natural
    silos: Natural
    rank: Natural
    least: Natural
    blocks: tuple[tuple[int, ...], ...]
    sets: tuple[tuple[int, ...], ...]


class OpenReport(Fact, frozen=True, kw_only=True):
    """The whole report without differential privacy; its JSON is the record."""

    warning: str = msgspec.field(name=KEY)
    format: Literal["siloquy-report/2"] = msgspec.field(name="schema")
    generated_at: int
    federation: Federation
    summary: tuple[str, ...]
    guarantee: NoGuarantee
    mechanism: tuple[Parameter, ...]
    accounting: NoAccounting
    silos: tuple[Exposed, ...]
    participation: Participation
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


AnyReport = Report | OpenReport


def facts(
    accepted: Accepted,
    *,
    rounds: Sequence[RoundFacts],
    sets: Mapping[int, tuple[int, ...]],
    upload_bytes: int,
    lora_bytes: int,
    state_digest: str,
    generated_at: int,
    software: Mapping[str, str],
    extra: Mapping[str, Scalar] | None = None,
    still_open: Collection[int] = (),
) -> OpenReport:
    """The report on ``rounds`` under a contract without differential privacy; arguments as ``compliance.facts``.

    Args:
        sets: by round with a result, the silos in its sum.

    Raises:
        ConfigError: round numbers do not ascend, a participant is no member, or a set is no union of whole blocks.
    """
    terms = accepted.terms
    compliance.check_rounds(terms, rounds)
    silos = tuple(_exposed(terms, member, rounds, sets, still_open) for member in terms.member)
    seen = participation(terms, [sets[each.number] for each in rounds if each.kind == "result"])
    most = max(silo.spent.rounds for silo in silos)
    spent, plan = _none(terms, most), _none(terms, terms.training.rounds)
    return OpenReport(
        warning=SENTENCE,
        format=SCHEMA,
        generated_at=generated_at,
        federation=compliance.federation_facts(accepted, state_digest),
        summary=_summary(terms, seen, upload_bytes, simulated=(extra or {}).get("simulated") is True),
        guarantee=NoGuarantee(unit=wording.unit(terms), adversaries=_seers(terms, spent, plan)),
        mechanism=wording.parameters(terms, simulated=(extra or {}).get("simulated") is True),
        accounting=NoAccounting(event=federation.event(terms), spent=spent, plan=plan),
        silos=silos,
        participation=seen,
        composition=_COMPOSITION,
        traffic=Traffic(
            upload_bytes=upload_bytes, lora_bytes=lora_bytes, received_bytes=sum(each.bytes_in for each in rounds),
            left=_left(terms, upload_bytes), stayed=_STAYED,
        ),
        rounds=tuple(rounds),
        assumptions=_assumptions(terms),
        crosswalk=crosswalk.of_open(terms),
        software=dict(software),
        aggregator_fingerprint=compliance.coordinator(terms),
        consents=wording.consents(terms, sum(each.kind == "result" for each in rounds)),
        checks=wording.checks(),
        extra=dict(extra or {}),
    )  # fmt: skip


def participation(terms: Contract, sets: Sequence[tuple[int, ...]]) -> Participation:
    """Rank and least combination of these sets; see the module docstring.

    Raises:
        ConfigError: a set is no union of whole blocks of the contract.
    """
    for chosen in sets:
        if not blocks.is_whole(chosen, terms.sum.blocks):
            raise ConfigError(
                f"a sum over silos {sorted(chosen)} is no union of whole blocks",
                hint="without differential privacy such a sum may never be opened: keep the evidence, run `aggregator verify`",
                code="report-rounds",
            )
    return Participation(
        sums=len(sets), silos=terms.silos, rank=blocks.rank(sets), least=blocks.least(sets, terms.sum.blocks),
        blocks=terms.sum.blocks, sets=tuple(sorted({tuple(sorted(chosen)) for chosen in sets})),
    )  # fmt: skip


def _none(terms: Contract, rounds: int) -> NoFigure:
    return NoFigure(rounds=rounds, steps=rounds * terms.training.steps_per_round)


def _exposed(
    terms: Contract, member: Member, rounds: Sequence[RoundFacts], sets: Mapping[int, tuple[int, ...]], still_open: Collection[int]
) -> Exposed:
    charged = sum(member.id in each.participants for each in rounds) + (member.id in still_open)
    return Exposed(
        silo=member.id, name=member.name, organisation=member.organisation, fingerprint=keys.fingerprint(keys.stated(member)),
        spent=_none(terms, charged), stood=sum(member.id in chosen for chosen in sets.values()),
    )  # fmt: skip


def _seers(terms: Contract, spent: NoFigure, plan: NoFigure) -> tuple[Seer, ...]:
    who: tuple[tuple[Literal["outside", "insiders", "sum_broken"], str], ...] = (
        ("outside", "Someone outside, who sees every model that was released: two of them in a row give the sum between them"),
        ("insiders", f"{wording.insiders(terms).capitalize()}, who subtract what they sent: the exact sum of the others is left"),
        ("sum_broken", "Someone for whom the secure sum is broken: one silo’s exact contribution"),
    )
    return tuple(Seer(name=name, who=words, spent=spent, plan=plan) for name, words in who)


def _summary(terms: Contract, seen: Participation, upload_bytes: int, *, simulated: bool) -> tuple[str, ...]:
    lines = (
        SENTENCE,
        f"There is no ε: nothing bounds what is revealed about {wording.one(terms)}. On each silo’s ledger the charge is infinite "
        "and stays: no later run over the same records can have a finite ε for them.",
        f"{counted(seen.sums, 'sum')} opened, of {seen.silos} silos and over whole blocks only. The participation matrix "
        f"has rank {seen.rank}: however the sums are added and subtracted, "
        + (f"no fewer than {seen.least} silos are left in what remains." if seen.sums else "there is nothing to learn yet."),
        f"In a round each silo sends {size(upload_bytes)}, masked so that only the sum can be read. "
        "The protocol has no message that carries records, single gradients, losses or counts of records.",
    )
    return (*lines, f"This is a simulation. {wording.TAKEN}") if simulated else lines


_COMPOSITION = (
    "Nothing adds up here: one round without noise is enough, and more rounds, or another run over the same records, show more.",
    "Not known here: other federations over the same records. A sum of theirs, less one of these, may be a sum of fewer silos "
    "than any block has.",
)

_STAYED = (
    "records, texts, labels of single records, and unit ids",
    "the silo’s own sum without masks",
    "which units were drawn, and how many",
    "losses, accuracies, gradient norms and clipping counts",
    "the masks, and private keys",
)


def _left(terms: Contract, upload_bytes: int) -> tuple[Item, ...]:
    what = "what the silo’s steps changed of the model" if terms.is_local else "clipped gradients, summed over the units drawn"
    vector = Item(
        what=f"one vector of {terms.dimension:,} integers: {what}, exactly, WITHOUT NOISE",
        form=f"masked, sealed, signed; {size(upload_bytes)}, the same in every round",
        reader="nobody alone; everybody reads the exact sum over each set of blocks",
    )
    ledger = Item(
        what="how many entries its ledger has, so how often it tried; a crash may depend on records",
        form="a number in the signed header of the vector",
        reader="the aggregator and the other members",
    )
    return (vector, *wording.what_left(terms, upload_bytes)[1:-1], ledger)


def _assumptions(terms: Contract) -> tuple[Assumption, ...]:
    rows: tuple[tuple[Literal["guarantee", "figure", "scope"], str, str], ...] = (
        (
            "guarantee",
            "The secure sum holds: key agreement, encryption and hash functions are not broken, and private keys stay private.",
            "each silo’s own exact sum can be read",
        ),
        (
            "guarantee",
            f"At most {counted(terms.privacy.colluders, 'silo')} work with the aggregator, and fingerprints were compared.",
            "the silos of a block that do not work together are fewer than the block has",
        ),
        ("scope", "What the exact sum of a block reveals is not bounded by anything.", "records can be reconstructed from it"),
        (
            "scope",
            "Other federations and releases over the same records are not covered.",
            "the difference of their sums may hold fewer silos than a block",
        ),
    )
    return tuple(
        Assumption(id=f"A{number}", severity=severity, text=text, if_wrong=wrong)
        for number, (severity, text, wrong) in enumerate(rows, start=1)
    )
