# SPDX-License-Identifier: Apache-2.0
"""What the figures of a report rest on, the gravest first, and what follows where it fails.

Words from the contract alone. In local mode a silo's figure rests on its own noise only: what protects the others' shares of
the noise in joint mode is then outside epsilon, and is said there.
"""

from __future__ import annotations

from typing import Literal

from aggregator.reporting import wording
from aggregator.reporting.wording import Fact
from privacy.federation import Contract
from privacy.reporting.numbers import counted

Row = tuple[str, str]
"""A text, and what is so if it is wrong."""


class Assumption(Fact, frozen=True, kw_only=True):
    """Something the figures rest on. ``guarantee``: without it there is none; ``figure``: it grows; ``scope``: not covered."""

    id: str
    severity: Literal["guarantee", "figure", "scope"]
    text: str
    if_wrong: str


def of(terms: Contract, *, simulated: bool = False) -> tuple[Assumption, ...]:
    """What the figures rest on, the gravest first, numbered A1 and on."""
    is_local = wording.is_local(terms)
    groups: tuple[tuple[Literal["guarantee", "figure", "scope"], tuple[Row, ...]], ...] = (
        ("guarantee", _must_hold_alone(simulated) if is_local else _must_hold(terms, simulated)),
        ("figure", _should_hold(terms, simulated)),
        ("scope", (*_HIDING, *_NOT_COVERED) if is_local else _NOT_COVERED),
    )
    rows = [(severity, text, wrong) for severity, group in groups for text, wrong in group]
    return tuple(
        Assumption(id=f"A{number}", severity=severity, text=text, if_wrong=wrong)
        for number, (severity, text, wrong) in enumerate(rows, start=1)
    )


_BATCH_MATES: Row = (
    "A unit’s clipped gradient does not depend on which other units share its batch. "
    "This can be tested, not proved; no test result is recorded in this report.",
    "one unit could move a sum by more than C",
)
_RANDOM: Row = (
    "The operating system’s random numbers are unpredictable, and noise is never drawn twice for one sample. Noise and samples "
    "are expanded from them by AES-256 as a pseudo-random function: ε is against bounded computing power, even where no secure "
    "sum is counted on.",
    "noise could be guessed or averaged away",
)
_RIGHT: Row = (
    "The protocol, its proof and this software are right; they have had no outside audit.",
    "an error may be waiting to be found",
)
_ONE_MACHINE: Row = (
    "This is a simulation: one machine plays every party, and nobody compared fingerprints. The figures are those of "
    "members that are apart.",
    "whoever controls this machine reads every record",
)


def _must_hold(terms: Contract, simulated: bool) -> tuple[Row, ...]:
    return (
        _BATCH_MATES,
        (
            f"At least {counted(terms.shares, 'silo')} of {terms.silos} run this software unaltered and add the noise "
            f"they owe; at most {terms.privacy.colluders} work with the aggregator.",
            "the noise is smaller than the figures say",
        ),
        (
            "The secure sum holds: key agreement, encryption and hash functions are not broken, and private keys "
            "stay private. This is security against computing power, not a theorem without conditions.",
            "the third row of the table of adversaries applies",
        ),
        _ONE_MACHINE
        if simulated
        else (
            "The members are who they say they are: fingerprints were compared by people, over another channel.",
            "one party could play several silos and subtract their noise",
        ),
        _RANDOM,
        _RIGHT,
    )


def _must_hold_alone(simulated: bool) -> tuple[Row, ...]:
    """Local mode: what one silo's figure rests on; no other party is among it."""
    own: Row = (
        "A silo runs this software unaltered and adds its own noise in full to every step. "
        "The aggregator and the other silos can take none of it away.",
        "that silo’s noise is smaller than its figure says",
    )
    return (_BATCH_MATES, own, *((_ONE_MACHINE,) if simulated else ()), _RANDOM, _RIGHT)


_HIDING: tuple[Row, ...] = (
    (
        "Which silo changed the model in which way is hidden by the secure sum, by the silos that do not work together against "
        "one, and by members who are who they say they are. ε rests on none of these.",
        "one silo’s own noisy change of the model can be told from the others’; its ε stays as stated",
    ),
)


def _should_hold(terms: Contract, simulated: bool) -> tuple[Row, ...]:
    rows = (
        _known_to(terms.privacy.max_silos_per_unit),
        (
            f"The aggregator saw every upload that left a silo. {wording.HEADS} "
            "The simulation’s accuracies are exact and outside ε.",
            "the figures are for the federation’s own model alone",
        )
        if simulated
        else (
            "The aggregator saw every upload that left a silo, and no other work on the records spends budget.",
            "the silo’s own ledger shows the higher figure",
        ),
        (
            f"{wording.TAKEN} Lengths, rates and the other constants were not chosen from these records."
            if simulated
            else "Units, labels, lengths and every other constant of the contract were chosen without looking at the records.",
            "the choice itself reveals something, outside ε",
        ),
    )
    several = (
        "The unit is one record. A person with several records is protected less, the less the more records there are: "
        "what one with 2, 4 and 8 records in a silo has stands beside the guarantee.",
        "for a person with k records ε grows about k-fold or more",
    )
    return (several, *rows) if terms.privacy.unit == "record" else rows


def _known_to(silos: int) -> Row:
    """How many silos know one unit, as the contract assumes."""
    if silos == 1:
        return (
            "A unit is in the records of one silo only. Nothing here checks it; what a unit in two silos has stands beside the "
            "guarantee.",
            "a unit in several silos is exposed more than the figures say",
        )
    return (
        f"A unit is in the records of at most {silos} silos, each of which draws it by a coin of its own. Nothing here checks it.",
        "a unit in more silos is exposed more than the figures say",
    )


_NOT_COVERED = (
    (
        "Timing is not covered: a silo’s messages leave when they are ready, not in padded slots.",
        "the time of an upload may hint at the amount of work done in a round",
    ),
    (
        "The base model’s own training data are not covered.",
        "the base model may reveal what it was trained on, with or without this",
    ),
    (
        "What silos do with their copies of the model, and what is published beside it, is not covered.",
        "anything computed from the records elsewhere adds to what is revealed",
    ),
)
