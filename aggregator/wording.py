# SPDX-License-Identifier: Apache-2.0
"""The report's words: what each parameter means, what left a site, what the figures rest on, how to check them.

Plain text from the contract and from figures that were computed elsewhere; nothing is computed here but rounding, and every
bound is rounded up, every remainder down. The text calls records, people and laws by no verdict: it is evidence for an
expert. What the project does not record is not mentioned as done.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Literal

import msgspec

from privacy import federation
from privacy.federation import Contract

HEAD_MODELS = 3
"""How many heads a simulation's comparison trains (silo.evaluation.HEAD_RATES): each would cost the plan's epsilon once more."""


class Fact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a report: frozen, by keyword, unknown keys refused."""


class Parameter(Fact, frozen=True, kw_only=True):
    """One parameter of the mechanism, its symbol in the papers, its value, and what it does."""

    name: str
    symbol: str
    value: int | float | str
    meaning: str


class Item(Fact, frozen=True, kw_only=True):
    """Something that left a site: what, in which form, and who can read it."""

    what: str
    form: str
    reader: str


class Assumption(Fact, frozen=True, kw_only=True):
    """Something the figures rest on. ``guarantee``: without it there is none; ``figure``: it grows; ``scope``: not covered."""

    id: str
    severity: Literal["guarantee", "figure", "scope"]
    text: str
    if_wrong: str


class Check(Fact, frozen=True, kw_only=True):
    """A command, where to run it, and what it lets a reader compare."""

    command: str
    where: str
    shows: str


def up(value: float, digits: int = 2) -> str:
    """``value`` with ``digits`` decimals, never below it: for bounds and for what is spent."""
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def down(value: float, digits: int = 2) -> str:
    """``value`` with ``digits`` decimals, never above it: for what is left."""
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


def scientific(value: float) -> str:
    """A small number as it is printed: 1e-06 gives "10⁻⁶", 8.3e-06 gives "8.3 × 10⁻⁶"."""
    mantissa, exponent = f"{value:.3e}".split("e")
    power = f"10{_superscript(int(exponent))}"
    digits = mantissa.rstrip("0").rstrip(".")
    return power if digits == "1" else f"{digits} × {power}"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def size(count: float) -> str:
    """A number of bytes for people, in decimal units: 15368 gives "15.4 kB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"


def counted(number: int, word: str) -> str:
    """A number and its word, in the plural where it needs one: "1 round", "1,200 rounds"."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def unit(terms: Contract) -> str:
    """The privacy unit in a sentence."""
    return "one record" if terms.privacy.unit == "record" else f"one value of “{terms.privacy.unit}” with all of its records"


def one(terms: Contract) -> str:
    """The privacy unit in short, for a sentence that goes on."""
    return "a single record" if terms.privacy.unit == "record" else f"a single “{terms.privacy.unit}”"


def relation(terms: Contract) -> str:
    """The neighbouring relation in a sentence."""
    return f"Two data sets are neighbours when they differ by {unit(terms)}, added to or removed from the records of one silo."


def insiders(terms: Contract) -> str:
    """The coalition that the guarantee is stated against."""
    others = terms.privacy.colluders
    return f"the aggregator acting together with any {'one silo' if others == 1 else f'{others} silos'}"


def adversary(name: str, terms: Contract) -> str:
    """Who the named adversary of privacy.mechanism.adversaries is, in words."""
    return {
        "outside": "Someone outside, who sees every sum and every model that was released",
        "insiders": insiders(terms).capitalize() + ", who subtract their own noise: the guarantee of this report",
        "sum_broken": "Someone for whom the secure sum is broken and who reads one silo’s upload in the clear",
    }[name]


def summary(
    terms: Contract,
    *,
    steps: int,
    epsilon: float,
    rounds_left: int,
    odds: tuple[float, float],
    upload_bytes: int,
    simulated: bool = False,
) -> tuple[str, ...]:
    """The report in plain words; its first sentence stands alone. ``odds`` is (false, true) positive rate."""
    lines = (
        _headline(terms, steps, epsilon),
        f"The contract declares {counted(terms.training.rounds, 'round')}; {counted(rounds_left, 'more round')} of that plan "
        f"{'fits' if rounds_left == 1 else 'fit'} under the limit.",
        f"Whoever tries to tell whether {one(terms)} took part, and is wrong about {per_thousand(odds[0])} that did not, "
        f"is right about at most {per_thousand(odds[1], bound=True)} that did. Guessing gives {per_thousand(odds[0])}.",
        f"In a round each silo sends {size(upload_bytes)}, masked so that only the sum over all {terms.silos} silos can be read. "
        "The protocol has no message that carries records, single gradients, losses or counts.",
        "The figures count uploads that arrived. Each silo’s own ledger is the authority: it charges every attempt, "
        "and may stand higher. Both rest on the assumptions below.",
    )
    return (*lines, f"This is a simulation. {_TAKEN} {_HEADS}") if simulated else lines


_TAKEN = (
    "The machine that holds all records took the figure for units from them, and the labels too where data were given; "
    "members of a real federation agree on both without looking."
)
_HEADS = (
    f"The comparison with a head alone trained {HEAD_MODELS} more models on the same records, which no ledger charges: "
    "a real federation would have to charge each of them."
)


def _headline(terms: Contract, steps: int, epsilon: float) -> str:
    limit, delta = f"{terms.privacy.epsilon:g}", scientific(terms.privacy.delta)
    if steps == 0:
        return f"No upload has reached the aggregator, so by its count nothing of the limit ε = {limit} at δ = {delta} is spent."
    share = up(100 * epsilon / terms.privacy.epsilon, 0)
    return (
        f"All that was released so far reveals whether {one(terms)} took part by no more than ε = {up(epsilon)} at δ = {delta}, "
        f"against {insiders(terms)}: {share}\u00a0% of the limit ε = {limit}, after {counted(steps, 'charged round')}."
    )


def per_thousand(rate: float, *, bound: bool = False) -> str:
    """A rate as "n in 1,000"; a bound is rounded up."""
    shown = math.ceil(1000 * rate - 1e-9) if bound else round(1000 * rate)
    return f"{shown:,} in 1,000"


def parameters(terms: Contract, *, simulated: bool = False) -> tuple[Parameter, ...]:
    """Every parameter of the mechanism and of the training around it, from the contract and its integer plan."""
    plan, p = federation.ring_plan(terms), terms.privacy
    effective, layers = federation.mechanism(terms).effective_noise_multiplier, counted(len(terms.adapter.modules), "layer")
    rows: list[tuple[str, str, int | float | str, str]] = [
        ("sampling", "", "Poisson", "each unit enters a round by its own coin, fresh each time; nobody knows who was drawn"),
        ("sampling rate", "q", p.sampling_rate, "the probability with which a unit enters a round"),
        ("units per silo", "", p.units, _UNITS[simulated]),
        ("records per unit", "", p.max_records_per_unit, "at most so many records of one unit are used"),
        ("max grad norm", "C", p.max_grad_norm, "a unit’s whole contribution to a round is clipped to this length"),
        ("lattice bits", "p", plan.lattice_bits, "C is 2ᵖ steps of the integer lattice on which clipping is proved"),
        ("noise", "", "discrete Gaussian", "integer noise, drawn exactly, in every coordinate of every silo’s sum"),
        ("noise multiplier", "σ", p.noise_multiplier, "the planned noise of a sum, in units of C, without the colluders’ shares"),
        ("effective noise multiplier", "σ′", effective, "what the accountants are given: σ less the smoothing of the proof"),
        ("noise of one silo", "s²", plan.share_variance, "variance parameter of one silo’s share, in lattice steps squared"),
        ("colluding silos", "t", p.colluders, "so many silos may work with the aggregator"),
        ("noise shares counted on", "h", terms.shares, "silos whose noise nobody else knows: all but the colluders"),
        ("rounds declared", "T", terms.training.rounds, "the plan; stopping earlier costs less"),
        ("failure probability", "δ", p.delta, "the part of the probability that ε does not speak about"),
        ("trainable numbers", "d", terms.dimension, "the length of what a silo sends"),
        ("ring", "", f"2{_superscript(terms.sum.ring_bits)}", "sums are taken modulo this, so that masks hide them"),
        ("clamp", "Q", plan.clamp, "a silo’s sum is held to ±Q before its noise is added"),
        ("noise head-room", "H", plan.headroom, "room kept in the ring for the noise of all silos"),
        ("secure sum", "", terms.sum.protocol, "every silo signs for every sum that holds its vector"),
        ("mean taken over", "D", terms.divisor, "the public expected number of sampled units; never a count"),
        ("update rule", "", terms.training.optimizer, "applied to the noisy sum; it costs no privacy"),
        ("learning rate", "", terms.training.learning_rate, "part of the update rule"),
        ("adapter", "r", terms.adapter.rank, f"LoRA-SB rank, on {layers}; only R and the head train"),
        ("basis", "", terms.adapter.basis, "computed from the public base model alone; it costs no privacy"),
        ("longest text", "", terms.task.max_length, "tokens; a public constant"),
    ]
    return tuple(Parameter(name=name, symbol=symbol, value=value, meaning=meaning) for name, symbol, value, meaning in rows)


_UNITS = {
    False: "a rounded public figure that the members agreed on, not a count; no silo holds more",
    True: "of this simulation: the largest silo’s count, rounded up by the machine that holds all records",
}


def composition(terms: Contract, *, simulated: bool = False) -> tuple[str, ...]:
    """What is added up here and what this report cannot know."""
    lines = (
        "Counted here: every round of this federation in which a silo’s upload arrived, void rounds too, and one that is still "
        "open, each as one step of the mechanism.",
        "Not known here: attempts whose upload never arrived, and other training, evaluation or statistics on the same "
        "records. They add to the same ε. They stand in each silo’s own ledger, as far as they went through it.",
        f"The basis “{terms.adapter.basis}” comes from the base model and spends nothing. "
        "Trial runs on the same records, made to choose learning rate, rank or C, would spend; none is recorded here.",
        "The figures are for parameters fixed before the first round. More rounds than declared, or other noise, "
        "chosen after results were seen, need the ledger’s stricter count.",
    )
    return (*lines, f"Not counted: {_HEADS[0].lower()}{_HEADS[1:]}") if simulated else lines


def what_left(terms: Contract, upload_bytes: int) -> tuple[Item, ...]:
    """What the protocol sends out of a site, in one round."""
    return (
        Item(
            what=f"one vector of {terms.dimension:,} integers: clipped gradients, summed over the units drawn, plus noise",
            form=f"masked, sealed, signed; {size(upload_bytes)}, the same in every round",
            reader="nobody alone; the aggregator reads the sum over all silos",
        ),
        Item(
            what="key material for the masks, commitments, and signatures of consent",
            form="signed; keys are fresh in each epoch",
            reader="the aggregator and the other members",
        ),
        Item(
            what="the digest of the model state that the silo computed itself",
            form="32 bytes, signed",
            reader="the aggregator and the other members",
        ),
        Item(what="that the silo takes part, and when", form="the fact and the time of a message", reader="the aggregator"),
    )


def what_stayed() -> tuple[str, ...]:
    """What has no message in the protocol, and so stays where it is."""
    return (
        "records, texts, labels of single records, and unit ids",
        "gradients of single units, and the silo’s own sum without masks",
        "which units were drawn, and how many",
        "losses, accuracies, gradient norms and clipping counts",
        "the noise, the masks, and private keys",
    )


def assumptions(terms: Contract, *, simulated: bool = False) -> tuple[Assumption, ...]:
    """What the figures rest on, the gravest first, numbered A1 and on."""
    groups: tuple[tuple[Literal["guarantee", "figure", "scope"], tuple[tuple[str, str], ...]], ...] = (
        ("guarantee", _must_hold(terms, simulated)),
        ("figure", _should_hold(terms, simulated)),
        ("scope", _NOT_COVERED),
    )
    rows = [(severity, text, wrong) for severity, group in groups for text, wrong in group]
    return tuple(
        Assumption(id=f"A{number}", severity=severity, text=text, if_wrong=wrong)
        for number, (severity, text, wrong) in enumerate(rows, start=1)
    )


def _must_hold(terms: Contract, simulated: bool) -> tuple[tuple[str, str], ...]:
    return (
        (
            "A unit’s clipped gradient does not depend on which other units share its batch. "
            "This can be tested, not proved; no test result is recorded in this report.",
            "one unit could move a sum by more than C",
        ),
        (
            f"At least {counted(terms.shares, 'silo')} of {terms.silos} run this software unaltered and add the noise they owe; "
            f"at most {terms.privacy.colluders} work with the aggregator.",
            "the noise is smaller than the figures say",
        ),
        (
            "The secure sum holds: key agreement, encryption and hash functions are not broken, and private keys "
            "stay private. This is security against computing power, not a theorem without conditions.",
            "the third row of the table of adversaries applies",
        ),
        (
            "This is a simulation: one machine plays every party, and nobody compared fingerprints. The figures are those of "
            "members that are apart.",
            "whoever controls this machine reads every record",
        )
        if simulated
        else (
            "The members are who they say they are: fingerprints were compared by people, over another channel.",
            "one party could play several silos and subtract their noise",
        ),
        (
            "The operating system’s random numbers are unpredictable, and noise is never drawn twice for one sample.",
            "noise could be guessed or averaged away",
        ),
        (
            "The protocol, its proof and this software are right; they have had no outside audit.",
            "an error may be waiting to be found",
        ),
    )


def _should_hold(terms: Contract, simulated: bool) -> tuple[tuple[str, str], ...]:
    rows = (
        (
            "A unit is in the records of one silo only. Nothing here checks it, and the figure for a unit in two silos "
            "is not computed.",
            "a unit in several silos is exposed more than the figures say",
        ),
        (
            f"The aggregator saw every upload that left a silo. {_HEADS} The simulation’s accuracies are exact and outside ε.",
            "the figures are for the federation’s own model alone",
        )
        if simulated
        else (
            "The aggregator saw every upload that left a silo, and no other work on the records spends budget.",
            "the silo’s own ledger shows the higher figure",
        ),
        (
            f"{_TAKEN} Lengths, rates and the other constants were not chosen from these records."
            if simulated
            else "Units, labels, lengths and every other constant of the contract were chosen without looking at the records.",
            "the choice itself reveals something, outside ε",
        ),
    )
    several = (
        "The unit is one record. A person with several records is protected less, the less the more records there are.",
        "for a person with k records ε grows about k-fold or more",
    )
    return (several, *rows) if terms.privacy.unit == "record" else rows


_NOT_COVERED = (
    ("The time at which messages are sent is not padded.", "it may hint at the amount of work done in a round"),
    (
        "The base model’s own training data are not covered.",
        "the base model may reveal what it was trained on, with or without this",
    ),
    (
        "What silos do with their copies of the model, and what is published beside it, is not covered.",
        "anything computed from the records elsewhere adds to what is revealed",
    ),
)


def consents(terms: Contract, results: int) -> tuple[str, ...]:
    """What was signed, by whom, according to the protocol."""
    return (
        f"The contract takes effect when all {counted(terms.silos, 'member')} have countersigned its exact bytes, "
        "which the digest names.",
        f"A sum is opened only after every silo signed for exactly that set of uploads. {counted(results, 'round')} "
        f"ended with such a sum; the signatures lie with the outcomes whose digests stand under “Rounds”.",
    )


def checks() -> tuple[Check, ...]:
    """Commands that exist, and what each lets a reader compare."""
    rows = (
        ("silo budget", "at each silo", "what its own ledger has charged, its limit, and what is left; it may be higher than here"),
        ("silo status", "at each silo", "the contract and the state as this silo knows them; compare the digests"),
        ("aggregator report", "at the aggregator", "this report, made again from the stored rounds; the figures must not change"),
        ("sha256sum report.json", "anywhere", "the digest of the record, which stands at the foot of this page"),
    )
    return tuple(Check(command=command, where=where, shows=shows) for command, where, shows in rows)
