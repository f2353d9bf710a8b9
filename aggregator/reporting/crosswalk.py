# SPDX-License-Identifier: Apache-2.0
"""The report by the blocks and hazards of NIST SP 800-226 (Guidelines for Evaluating Differential Privacy Guarantees, 2025).

The guidelines draw a pyramid: ε and the unit on top, then algorithms, utility and bias, then all that a guarantee stands on; and
they name hazards. They number neither: the ids P1 … and H1 … are this project's. Each row has a value, where its evidence stands,
and what remains. Evidence is a path in this record, or a command of this project. Where nothing was recorded, the row says so.

Words from the contract and from figures that were computed elsewhere. Not promised: that an expert sees it the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from aggregator.reporting import wording
from aggregator.reporting.figures import Figure
from aggregator.reporting.wording import Fact
from privacy.federation import Contract
from privacy.reporting.numbers import counted, scientific, up

Line = tuple[str, str, str, tuple[str, ...], str]
"""Id, title, value, evidence, residual risk."""


class Crossing(Fact, frozen=True, kw_only=True):
    """One block of the pyramid (``layer`` is top, middle or base), or one hazard: value, evidence, and the risk that remains."""

    id: str
    layer: Literal["top", "middle", "base", "hazard"]
    title: str
    value: str
    evidence: tuple[str, ...]
    residual: str


Layer = Literal["top", "middle", "base", "hazard"]
SELFTEST, AUDIT, EVALUATION, LEDGER = "silo selftest", "silo audit", "silo eval", "silo budget"


def of(terms: Contract, *, spent: Figure, plan: Figure, simulated: bool = False) -> tuple[Crossing, ...]:
    """The rows of a federation with differential privacy, whose figures against the insiders are ``spent`` and ``plan``."""
    bound = f"ε ≤ {up(spent.epsilon)} now, ≤ {up(plan.epsilon)} for the plan, at δ = {scientific(terms.privacy.delta)}"
    return _rows(
        ("top", _top(terms, bound)),
        ("middle", _middle(terms, simulated)),
        ("base", _base(terms)),
        ("hazard", (*_of_figures(terms, bound), *_of_units(terms), *_of_learning(terms), *_of_trust(terms))),
    )


def of_open(terms: Contract) -> tuple[Crossing, ...]:
    """The rows of a federation without differential privacy: the pyramid has no top."""
    none = "none: no differential privacy"
    top = (
        ("P1", "ε and δ", none, ("NO_DIFFERENTIAL_PRIVACY",), "nothing bounds what is learned about anybody"),
        ("P2", "Unit of privacy", f"none: {wording.unit(terms)} is clipped together, and not hidden", ("guarantee.unit",), _NOBODY),
    )
    hazards = (
        (
            "H1",
            "All hazards of a differential privacy guarantee",
            "there is no guarantee that they could weaken",
            ("guarantee",),
            _NOBODY,
        ),
    )
    return _rows(
        ("top", top), ("middle", _middle(terms, False)[1:]), ("base", _base(terms)), ("hazard", hazards)
    )  # fmt: skip


_NOBODY = "records can be reconstructed from exact sums"


def _rows(*groups: tuple[Layer, Sequence[Line]]) -> tuple[Crossing, ...]:
    """The pyramid from its top, then the hazards, each by its number."""
    found = [
        Crossing(id=key, layer=layer, title=title, value=value, evidence=evidence, residual=residual)
        for layer, lines in groups
        for key, title, value, evidence, residual in lines
    ]
    return tuple(sorted(found, key=lambda each: (each.id[0] == "H", int(each.id[1:]))))


def _top(terms: Contract, bound: str) -> tuple[Line, ...]:
    return (
        ("P1", "ε and δ", f"{bound}, against {wording.whom(terms)}", ("accounting.spent", "accounting.plan",
         "guarantee.adversaries"),
         "an upper bound on what the releases reveal of one unit; it measures no harm, and grows with every further release"),
        ("P2", "Unit of privacy", f"{wording.unit(terms)}, {wording.known_to(terms)}", ("guarantee.unit", "guarantee.relation"),
         "what is no difference of one unit is not protected; that a unit is known to so many silos only is assumed"),
    )  # fmt: skip


def _middle(terms: Contract, simulated: bool) -> tuple[Line, ...]:
    steps = "each silo’s own steps" if wording.is_local(terms) else "a sum over all silos"
    utility = "accuracies of a simulation, under “Also recorded”" if simulated else "not recorded: no accuracy leaves a silo"
    return (
        ("P3", "Algorithms and correctness",
         f"Poisson sampling, clipping proved on integers, exact discrete Gaussian noise in {steps}; PLD and RDP side by side",
         ("mechanism", "accounting.event", "versions", SELFTEST, AUDIT),
         "proof and software had no outside audit; the self-test and the empirical audit see large errors only"),
        ("P4", "Utility", utility, ("extra", EVALUATION), "each silo must measure on its own held-out records whether the "
         "model serves it"),
        ("P5", "Bias", "not measured here", (EVALUATION,),
         "clipping and noise cost rare groups the most: compare groups on held-out records before use"),
    )  # fmt: skip


def _base(terms: Contract) -> tuple[Line, ...]:
    against = f"the guarantee is stated against {wording.whom(terms)}" if terms.is_private else "none of them faces any noise"
    return (
        ("P6", "Side channels", "integers only after clipping; constant length of uploads; no counts, losses or error texts leave",
         ("traffic.left", "traffic.stayed"), "the time of a message is not padded, and the number of attempts is seen"),
        ("P7", "Security", f"signatures {terms.signatures}, sealed and masked uploads, a transparency log",
         ("aggregator_fingerprint", "silos", "rounds"), "keys and machines at each site are in that site’s care"),
        ("P8", "Access control", "no party but a silo can open its records; only the sum over silos can be opened",
         ("traffic.left", "consents"), "who may use the released model is for the members to rule"),
        ("P9", "Query model", f"no queries: {counted(terms.training.rounds, 'declared round')}, fixed before the first",
         ("accounting.plan", "composition"), "further runs on the same records add up; each silo’s ledger counts them"),
        ("P10", "Threat model", f"three adversaries; {against}",
         ("guarantee.adversaries", "assumptions"), "more colluding silos than the contract says, or a broken secure sum"),
        ("P11", "Exposure at collection", "records stay where they were collected; nothing is gathered in one place",
         ("traffic.stayed",), "each site holds its records in the clear, and this protects nobody from the site itself"),
    )  # fmt: skip


def _of_figures(terms: Contract, bound: str) -> tuple[Line, ...]:
    everybody = terms.silos * terms.privacy.units
    return (
        ("H1", "A large ε may mean little", f"{bound}; the contract’s limit is {terms.privacy.epsilon:g}",
         ("accounting.spent", "guarantee.odds"), "above 1 an ε is no conservative choice: read the test rates, not the "
          "number alone"),
        ("H2", "A δ above one over the units permits a catastrophe",
         f"δ = {scientific(terms.privacy.delta)}; at most {everybody:,} units, at least ten times fewer than 1/δ",
         ("guarantee.delta", "accounting.profile"), "δ bounds the probability that ε says nothing"),
        ("H5", "Figures at different δ cannot be compared", "the curve is printed at further δ, 10⁻⁵ among them",
         ("accounting.profile",), "compare with others at one δ only"),
        ("H7", "A large δ in a conversion makes ε look small",
         "RDP and PLD are converted at the contract’s δ; the events are printed",
         ("accounting.event", "versions"), "none that is known: anybody can convert again"),
    )  # fmt: skip


def _of_units(terms: Contract) -> tuple[Line, ...]:
    alone = terms.privacy.unit == "record"
    level = "one record: a row, not a person" if alone else f"all records with one value of “{terms.privacy.unit}”"
    left = "a person with several records is protected less" if alone else "a person under two such values counts as two"
    return (
        ("H3", "What the unit does not cover is not protected", wording.relation(terms), ("guarantee.relation",),
         "facts about many people at once, such as how common a finding is, are learned: that is the purpose"),
        ("H4", "Protection of rows is not protection of people", level,
         ("guarantee.unit", "guarantee.several", "assumptions"), left),
        ("H6", "Figures for different units cannot be compared", f"the unit is named wherever ε stands: {wording.unit(terms)}",
         ("guarantee.unit", "summary"), "another report’s ε may be for another unit"),
        ("H10", "Bounding contributions costs accuracy", f"at most {counted(terms.privacy.max_records_per_unit, 'record')} "
         "of a unit; "
         f"clipped to C = {terms.privacy.max_grad_norm:g}", ("mechanism",), "records beyond the cap do not count"),
        ("H13", "In free text a unit may be hard to name", "the unit is a column, or a record; the text is not searched for people",
         ("guarantee.unit",), "somebody named in another person’s text is protected as part of that record only"),
    )  # fmt: skip


def _of_learning(terms: Contract) -> tuple[Line, ...]:
    return (
        ("H8", "Other releases from the same data are not mitigated", "what went through each silo’s ledger is counted there",
         ("composition", LEDGER), "statistics, papers and models made outside it add up unseen"),
        ("H9", "Bias: systemic, human, statistical", "not measured here", (EVALUATION,), "a private model can be unfair"),
        ("H11", "Categories taken from the data leak", _categories(terms),
         ("mechanism", "assumptions"), "assumed: they were agreed on without looking at records"),
        ("H12", "Learning protects nothing by itself", "noise is added to every step; the basis " + _basis(terms), ("mechanism",),
         "the base model may have memorised its own training data"),
    )  # fmt: skip


def _categories(terms: Contract) -> str:
    if terms.task.is_causal:
        return "no labels: the base model’s own vocabulary, public"
    return f"{counted(len(terms.task.labels), 'label')}, public constants of the contract"


def _of_trust(terms: Contract) -> tuple[Line, ...]:
    return (
        ("H14", "Interactive use needs budgets and protection",
         "not interactive; each silo’s limit refuses a round before it starts",
         ("accounting.charged", LEDGER), "none in the protocol"),
        ("H15", "Assumptions on trust must hold in reality", "listed by severity, with what follows if one is wrong",
         ("assumptions",), "people must compare fingerprints, and choose partners who do not collude"),
        ("H16", "Implementations leak: floats, time, errors", "exact integer noise from the operating system’s randomness; "
         "one word on failure",
         ("mechanism", SELFTEST), "time is not padded; hardware is not covered"),
        ("H17", "Lost data security voids the guarantee", "keys and records lie at the silos only", ("traffic.stayed",),
         "a break-in at a site shows its records, with or without this"),
    )  # fmt: skip


def _basis(terms: Contract) -> str:
    return f"“{terms.adapter.basis}” is listed with its cost under “What adds up”"
