# SPDX-License-Identifier: Apache-2.0
"""The report's words: what each parameter means, what left a site, what the figures rest on, how to check them.

Plain text from the contract and from figures that were computed elsewhere; nothing is computed here but rounding, and every
bound is rounded up, every remainder down. The text calls records, people and laws by no verdict: it is evidence for an
expert. What the project does not record is not mentioned as done.
"""

from __future__ import annotations

import math

import msgspec

from aggregator.reporting import basis_words
from privacy import federation
from privacy.federation import Contract
from privacy.reporting.numbers import counted, scientific, size, superscript, up

HEAD_MODELS = 3
"""How many heads a simulation's comparison trains (evaluation.HEAD_RATES): each would cost the plan's epsilon once more."""


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


class Check(Fact, frozen=True, kw_only=True):
    """A command, where to run it, and what it lets a reader compare."""

    command: str
    where: str
    shows: str


def unit(terms: Contract) -> str:
    """The privacy unit in a sentence."""
    return "one record" if terms.privacy.unit == "record" else f"one value of “{terms.privacy.unit}” with all of its records"


def known_to(terms: Contract) -> str:
    """How many silos a unit may be in."""
    silos = terms.privacy.max_silos_per_unit
    return "in one silo" if silos == 1 else f"in up to {silos} silos"


def one(terms: Contract) -> str:
    """The privacy unit in short, for a sentence that goes on."""
    return "a single record" if terms.privacy.unit == "record" else f"a single “{terms.privacy.unit}”"


def relation(terms: Contract) -> str:
    """The neighbouring relation in a sentence."""
    m = terms.privacy.max_silos_per_unit
    where = "one silo" if m == 1 else f"up to {m} silos that know it"
    return f"Two data sets are neighbours when they differ by {unit(terms)}, added to or removed from the records of {where}."


def insiders(terms: Contract) -> str:
    """The coalition that the guarantee is stated against."""
    others = terms.privacy.colluders
    return f"the aggregator acting together with any {'one silo' if others == 1 else f'{others} silos'}"


def whom(terms: Contract) -> str:
    """Against whom the guarantee is stated."""
    return "everyone" if is_local(terms) else insiders(terms)


def is_local(terms: Contract) -> bool:
    """Whether each silo trains alone, with noise in full."""
    return terms.training.mode == "local"


def adversary(name: str, terms: Contract) -> str:
    """Who the named adversary of privacy.federation.adversaries is, in words."""
    doing = "who know nothing of another silo’s noise" if is_local(terms) else "who subtract their own noise"
    return {
        "outside": "Someone outside, who sees every sum and every model that was released",
        "insiders": f"{insiders(terms).capitalize()}, {doing}: the guarantee of this report",
        "sum_broken": "Someone for whom the secure sum is broken and who reads one silo’s upload in the clear",
    }[name]


def summary(
    terms: Contract,
    *,
    rounds: int,
    epsilon: float,
    rounds_left: int,
    odds: tuple[float, float],
    upload_bytes: int,
    simulated: bool = False,
) -> tuple[str, ...]:
    """The report in plain words; its first sentence stands alone. ``odds`` is (false, true) positive rate."""
    lines = (
        _headline(terms, rounds, epsilon),
        f"The contract declares {declared(terms)}; {counted(rounds_left, 'more round')} of that plan "
        f"{'fits' if rounds_left == 1 else 'fit'} under the limit.",
        f"Whoever tries to tell whether {one(terms)} took part, and is wrong about {per_thousand(odds[0])} that did not, "
        f"is right about at most {per_thousand(odds[1], bound=True)} that did. Guessing gives {per_thousand(odds[0])}.",
        f"In a round each silo sends {size(upload_bytes)}, masked so that only the sum over all {terms.silos} silos can be read. "
        "The protocol has no message that carries records, single gradients, losses or counts of records."
        + (f" {_ALONE}" if is_local(terms) else ""),
        "The figures count uploads that arrived. Each silo’s own ledger is the authority: it charges every attempt, "
        "and may stand higher. Both rest on the assumptions below.",
    )
    return (*lines, f"This is a simulation. {TAKEN} {HEADS}") if simulated else lines


_ALONE = (
    "Each silo’s upload holds that silo’s own noise in full: ε is the same for whoever reads a single upload, the sum, or the "
    "model, and rests on no other party. The masks hide whose change was which."
)
TAKEN = (
    "The machine that holds all records took the figure for units from them, and the labels too where data were given; "
    "members of a real federation agree on both without looking."
)
HEADS = (
    f"The comparison with a head alone trained {HEAD_MODELS} more models on the same records, which no ledger charges: "
    "a real federation would have to charge each of them."
)


def declared(terms: Contract) -> str:
    """The plan in short: "16 rounds", "4 rounds of 4 private steps in each silo"."""
    rounds, steps = counted(terms.training.rounds, "round"), counted(terms.training.steps_per_round, "private step")
    return f"{rounds} of {steps} in each silo" if is_local(terms) else rounds


def _headline(terms: Contract, rounds: int, epsilon: float) -> str:
    limit, delta = f"{terms.privacy.epsilon:g}", scientific(terms.privacy.delta)
    if rounds == 0:
        return f"No upload has reached the aggregator, so by its count nothing of the limit ε = {limit} at δ = {delta} is spent."
    share = up(100 * epsilon / terms.privacy.epsilon, 0)
    return (
        f"All that was released so far reveals whether {one(terms)} took part by no more than ε = {up(epsilon)} at δ = {delta}, "
        f"against {whom(terms)}: {share}\u00a0% of the limit ε = {limit}, after {counted(rounds, 'charged round')}."
    )


def per_thousand(rate: float, *, bound: bool = False) -> str:
    """A rate as "n in 1,000"; a bound is rounded up."""
    shown = math.ceil(1000 * rate - 1e-9) if bound else round(1000 * rate)
    return f"{shown:,} in 1,000"


def parameters(terms: Contract, *, simulated: bool = False) -> tuple[Parameter, ...]:
    """Every parameter of the mechanism and of the training around it, from the contract and its integer plan."""
    plan, p, training = federation.ring_plan(terms), terms.privacy, terms.training
    say = _LOCAL if is_local(terms) else _JOINT
    effective = federation.mechanism(terms).effective_noise_multiplier if terms.is_private else 0.0
    layers, trained = counted(len(terms.adapter.modules), "layer"), "trains" if terms.task.is_causal else "and the head train"
    rows: list[tuple[str, str, int | float | str, str]] = [
        (
            "sampling",
            "",
            "Poisson",
            f"each unit enters a {say['turn']} by its own coin, fresh each time; nobody knows who was drawn",
        ),
        ("sampling rate", "q", p.sampling_rate, f"the probability with which a unit enters a {say['turn']}"),
        ("units per silo", "", p.units, _UNITS[simulated]),
        ("records per unit", "", p.max_records_per_unit, "at most so many records of one unit are used"),
        ("silos per unit", "m", p.max_silos_per_unit, "so many silos may know one unit; every ε is for such a unit"),
        ("max grad norm", "C", p.max_grad_norm, f"a unit’s whole contribution to a {say['turn']} is clipped to this length"),
        ("lattice bits", "p", plan.lattice_bits, "C is 2ᵖ steps of the integer lattice on which clipping is proved"),
        ("noise", "", "discrete Gaussian", "integer noise, drawn exactly, in every coordinate of every silo’s sum"),
        ("noise multiplier", "σ", p.noise_multiplier, say["noise multiplier"]),
        ("effective noise multiplier", "σ′", effective, "what the accountants are given: σ less the smoothing of the proof"),
        ("noise of one silo", "s²", plan.share_variance, say["noise of one silo"]),
        ("colluding silos", "t", p.colluders, say["colluding silos"]),
        ("noise shares counted on", "h", terms.shares, say["noise shares counted on"]),
        ("rounds declared", "T", training.rounds, "the plan; stopping earlier costs less"),
        ("steps per round", "", training.steps_per_round, say["steps per round"]),
        ("failure probability", "δ", p.delta, "the part of the probability that ε does not speak about"),
        ("trainable numbers", "d", terms.dimension, "the length of what a silo sends"),
        ("ring", "", f"2{superscript(terms.sum.ring_bits)}", "sums are taken modulo this, so that masks hide them"),
        ("clamp", "Q", plan.clamp, "a silo’s sum is held to ±Q before its noise is added"),
        ("noise head-room", "H", plan.headroom, say["noise head-room"]),
        ("secure sum", "", terms.sum.protocol, "every silo signs for every sum that holds its vector"),
        ("mean taken over", "D", terms.divisor, "the public expected number of sampled units; never a count"),
        ("update rule", "", training.optimizer, say["update rule"]),
        ("learning rate", "", training.learning_rate, "part of the update rule"),
        *([("update bound", "", training.update_bound, say["update bound"])] if is_local(terms) else []),
        ("adapter", "r", terms.adapter.rank, f"LoRA-SB rank, on {layers}; only R {trained}"),
        *([("heads", "h", terms.adapter.heads, "cores of that rank on each layer")] if terms.adapter.heads > 1 else []),
        *basis_words.rows(terms),
        *([("records", "", terms.task.format, "what is learned of them is the next token")] if terms.task.is_causal else []),
        ("longest text", "", terms.task.max_length, "tokens; a public constant"),
    ]
    if not terms.is_private:
        rows = [row for row in rows if row[0] not in _OF_NOISE]
        rows.insert(0, ("noise", "", "none", "NO DIFFERENTIAL PRIVACY: nothing is added to a sum"))
    return tuple(Parameter(name=name, symbol=symbol, value=value, meaning=meaning) for name, symbol, value, meaning in rows)


_OF_NOISE = {
    "noise", "noise multiplier", "effective noise multiplier", "noise of one silo", "noise shares counted on", "noise head-room",
    "failure probability",
}  # fmt: skip


_JOINT = {
    "turn": "round",
    "noise multiplier": "the planned noise of a sum, in units of C, without the colluders’ shares",
    "noise of one silo": "variance parameter of one silo’s share, in lattice steps squared",
    "colluding silos": "so many silos may work with the aggregator",
    "noise shares counted on": "silos whose noise nobody else knows: all but the colluders",
    "steps per round": "a round is one private step on the records of all silos",
    "noise head-room": "room kept in the ring for the noise of all silos",
    "update rule": "applied to the noisy sum; it costs no privacy",
}
_LOCAL = {
    "turn": "step",
    "noise multiplier": "the noise of each step of each silo, in units of C",
    "noise of one silo": "variance parameter of a silo’s noise in one step, in lattice steps squared",
    "colluding silos": "so many silos may work with the aggregator; ε does not depend on it",
    "noise shares counted on": "the silo’s own, in full; none is counted that another silo adds",
    "steps per round": "private steps that each silo takes alone in a round; each is charged",
    "noise head-room": "room kept in the ring for the noise of a silo’s sum",
    "update rule": "applied by each silo to its own noisy sums, with moments that stay there; it costs no privacy",
    "update bound": "a number that changed by more in a round is cut to this before it is sent; it costs no privacy",
}
_UNITS = {
    False: "a rounded public figure that the members agreed on, not a count; no silo holds more",
    True: "of this simulation: the largest silo’s count, rounded up by the machine that holds all records",
}


def composition(terms: Contract, *, simulated: bool = False) -> tuple[str, ...]:
    """What is added up here and what this report cannot know."""
    lines = (
        "Counted here: every round of this federation in which a silo’s upload arrived, void rounds too, and one that is still "
        f"open, each as {counted(terms.training.steps_per_round, 'step')} of the mechanism.",
        "Not known here: attempts whose upload never arrived, and other training, evaluation or statistics on the same "
        "records. They add to the same ε. They stand in each silo’s own ledger, as far as they went through it.",
        f"{basis_words.in_composition(terms)}"
        "Trial runs on the same records, made to choose learning rate, rank or C, would spend; none is recorded here. Each silo’s "
        "ledger counts and composes its own, and tells nobody how many.",
        "The figures are for parameters fixed before the first round. More rounds than declared, or other noise, "
        "chosen after results were seen, need the ledger’s stricter count.",
    )
    return (*lines, f"Not counted: {HEADS[0].lower()}{HEADS[1:]}") if simulated else lines


def of_versions(count: int) -> tuple[str, ...]:
    """What several versions of the contract do to the figures."""
    if count == 1:
        return ()
    return (
        f"{counted(count, 'version')} of the contract were in effect one after the other. Each round is charged with the terms of "
        "its own version. Since later terms may have been chosen after earlier results were seen, rounds of several versions are "
        "composed by a filter whose order was fixed by the first version’s limit; it gives a little more than one plan would.",
    )


def what_left(terms: Contract, upload_bytes: int) -> tuple[Item, ...]:
    """What the protocol sends out of a site, in one round."""
    return (
        Item(
            what=f"one vector of {terms.dimension:,} integers: {_CHANGE if is_local(terms) else _SUM}",
            form=f"masked, sealed, signed; {size(upload_bytes)}, the same in every round",
            reader="nobody alone; the aggregator reads the sum over all silos",
        ),
        *(Item(what=what, form=form, reader=reader) for what, form, reader in basis_words.left(terms)),
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
        Item(
            what="how many entries its ledger has, so how often it tried; a crash may depend on records, and ε does not cover it",
            form="a number in the signed header of the vector; ε of all attempts stands on the card of an exported adapter",
            reader="the aggregator and the other members; whoever gets the adapter",
        ),
    )


_SUM = "clipped gradients, summed over the units drawn, plus noise"
_CHANGE = "what the silo’s own private steps changed of the model, each step with its noise in full"


def what_stayed(terms: Contract) -> tuple[str, ...]:
    """What has no message in the protocol, and so stays where it is."""
    own = "change of the model without masks, its steps and its optimiser" if is_local(terms) else "sum without masks"
    return (
        "records, texts, labels of single records, and unit ids",
        f"gradients of single units, and the silo’s own {own}",
        "which units were drawn, and how many",
        "losses, accuracies, gradient norms and clipping counts",
        "the noise, the masks, and private keys",
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
        (
            "silo verify --report report.json",
            "at a silo, or with a copy of the evidence",
            "signature, place in the log, every figure computed again, and page, PDF and registry entry byte for byte",
        ),
        ("silo budget", "at each silo", "what its own ledger has charged, its limit, and what is left; it may be higher than here"),
        ("silo status", "at each silo", "the contract and the state as this silo knows them; compare the digests"),
        ("aggregator report", "at the aggregator", "this report, made again from the stored rounds; the figures must not change"),
        ("sha256sum report.json", "anywhere", "the digest of the record, which stands at the foot of page and PDF"),
    )
    return tuple(Check(command=command, where=where, shows=shows) for command, where, shows in rows)
