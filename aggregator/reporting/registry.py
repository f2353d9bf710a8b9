# SPDX-License-Identifier: Apache-2.0
"""The report as an entry for the OpenDP Deployments Registry: YAML of tier 3, as ``docs/reference/registry.md`` has its fields.

Promised: every fact is the record's; equal records give equal bytes; text is quoted so that no name can leave its place, and what
Markdown or LaTeX would read as markup is escaped. What the record does not know, the entry says is to be filled in: a person does
that, and the members agree on it, before anybody sends it. Nothing is sent from here.
"""

from __future__ import annotations

import datetime
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from decimal import Decimal

from aggregator.reporting.record import Report
from privacy.reporting.numbers import counted, groups, scientific, up

Value = str | float | tuple[str, ...] | Mapping[str, "Value"]
OPEN = "To be filled in by the members: the record of the report does not say it."


def entry(report: Report, digest: str) -> bytes:
    """The entry of a record with this hex SHA-256, as YAML in UTF-8."""
    head = (
        "# An entry for the OpenDP Deployments Registry (github.com/opendp/deployments-registry-data), tier 3.\n"
        f"# A view of report.json with SHA-256 {groups(digest)}.\n"
        "# Draft: read it, fill in what is marked, and let the members agree before anybody sends it.\n"
    )
    tree: Mapping[str, Value] = {
        "url_slug": _slug(report.federation.name),
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": _basic(report),
            "dp_variant": _variant(report),
            "privacy_loss": _loss(report),
            "deployment_model": _model(report),
            "accounting": _accounting(report),
            "implementation": _implementation(report),
            "administrative": _administrative(report, digest),
        },
    }
    return (head + "".join(line + "\n" for line in _lines(tree))).encode()


def _basic(report: Report) -> Mapping[str, Value]:
    f = report.federation
    released = [each.closed_at for each in report.rounds if each.kind == "result"]
    first = datetime.datetime.fromtimestamp(min(released, default=report.generated_at), tz=datetime.UTC)
    curators = {_text(each.organisation): None for each in report.silos if f.version in each.versions}
    return {
        "name": f"{_text(f.name)}: an adapter for {_text(f.model)}",
        "data_curators": tuple(curators),
        "description": f"{counted(len(curators), 'organisation')} trained a small adapter for a language model together, on "
        "texts that "
        f"each keeps at its own site, in {counted(len(report.rounds), 'round')} so far.",
        "intended_use": OPEN,
        "data_product_type": "Machine learning model",
        "data_product_region": OPEN,
        "publication_date": first.strftime("%Y-%m-%d"),
    }


def _variant(report: Report) -> Mapping[str, Value]:
    return {
        "variant_name": "Approximate DP",
        "data_domain": "Records of text with a label out of a public list, grouped by the privacy unit, at several silos. "
        + _text(report.guarantee.relation),
        "unprotected_quantities": "Who takes part, when, and how often each silo tried; how long messages take. Public "
        "constants: the "
        "labels, the bound on units per silo, sampling rate, clipping norm, rounds, base model and tokenizer.",
    }


def _loss(report: Report) -> Mapping[str, Value]:
    spent, plan, delta = report.accounting.spent, report.accounting.plan, report.guarantee.delta
    others = "; ".join(
        f"{each.who}: {up(each.spent.epsilon)} now, {up(each.plan.epsilon)} plan" for each in report.guarantee.adversaries
    )
    return {
        "privacy_unit": _text(report.guarantee.unit),
        "privacy_unit_details": _text(report.guarantee.relation),
        "privacy_parameters": {"epsilon": spent.epsilon, "delta": delta},
        "privacy_parameters_details": f"Certified after {counted(spent.rounds, 'charged round')}: ε ≤ {up(spent.epsilon)} at "
        f"δ = {scientific(delta)}; for the whole declared plan ε ≤ {up(plan.epsilon)}; the limit of the contract is "
        f"{report.silos[0].limit:g}. By adversary: {_text(others)}.",
    }


def _model(report: Report) -> Mapping[str, Value]:
    actors = "; ".join(f"{each.who} ({each.name})" for each in report.guarantee.adversaries)
    return {
        "model_name": "Federated",
        "model_name_details": "Each silo clips and adds noise to its own sums before anything leaves; only the sum over "
        "silos can be "
        f"opened ({_text(report.federation.mode)} mode).",
        "actors": f"{counted(len(report.silos), 'silo')}, an aggregator that holds no record, and whoever gets the model. "
        "Adversaries "
        f"that the figures are for: {_text(actors)}. What is assumed of them stands in report.json under assumptions.",
        "release_type": "Many releases",
        "release_type_details": "One model after each round. The plan is declared before the first; the budget is never "
        "reset, and a "
        "round beyond a silo's own limit is refused before a record is read.",
        "data_source_type": "Static",
        "data_source_type_details": "A new extract at a silo composes with everything before it, on that silo's ledger.",
        "access_type": "Non-interactive",
        "access_type_details": "Nobody can send a query; the rounds are fixed in the signed contract.",
    }


def _accounting(report: Report) -> Mapping[str, Value]:
    return {
        "post_processing": "The next model is computed from the noisy sum by public arithmetic (the update rule of the contract).",
        "composition": _text(" ".join(report.composition))
        + " Accountants: privacy loss distributions (PLD) and Renyi differential privacy (RDP), side by side; the smaller bound is "
        "certified.",
    }


def _implementation(report: Report) -> Mapping[str, Value]:
    by_name = {each.name: each.value for each in report.mechanism}
    version = report.software.get("siloquy", "of unknown version")
    return {
        "preprocessing_and_hyperparameter_tuning": "Nothing is fitted, counted or chosen from the records by this software "
        "but what is listed under composition. "
        "Trial runs "
        "on the same records would spend privacy; none is recorded in this report.",
        "mechanisms": f"Poisson subsampling at rate {by_name.get('sampling rate')}; clipping to norm "
        f"{by_name.get('max grad norm')}, proved "
        f"on an integer lattice; exact discrete Gaussian noise (noise multiplier {by_name.get('noise multiplier')}) from the "
        "operating "
        f"system's randomness; secure summation. Siloquy {_text(str(version))}. After clipping there are integers only, so "
        "no rounding "
        "of floats. Message lengths are constant; their timing is not padded. Records never leave their site.",
        "justification": "The parameters stand in a contract that all members signed. The continuous accountants bound the "
        "discrete "
        "mechanism by a proof in the project's documentation. Assumptions, by severity, are listed in report.json; `silo "
        "selftest` and "
        "`silo audit` test the mechanism on each installation.",
    }


def _administrative(report: Report, digest: str) -> Mapping[str, Value]:
    return {
        "sources": f"report.json of this federation, SHA-256 {digest}, in its transparency log",
        "notes": "Made from the record by software. " + ("It is a simulation. " if report.extra.get("simulated") is True else "")
        + "It is evidence, and no verdict on any law.",
        "registry_authors": (f"the aggregator of {_text(report.federation.name)}",),
    }  # fmt: skip


_MARKUP = re.compile(r"([`*_{}\[\]<>#|$~])")


def _text(text: str) -> str:
    """Plain text as Markdown that shows it: what is markup is escaped, white space and what cannot be seen become blanks."""
    seen = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    return _MARKUP.sub(r"\\\1", seen.replace("\\", "∖"))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "federation"


def _lines(tree: Mapping[str, Value], depth: int = 0) -> Iterator[str]:
    """YAML: nested maps, lists of texts, texts in double quotes as JSON writes them, numbers without an exponent."""
    margin = "  " * depth
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{margin}{key}:"
            yield from _lines(value, depth + 1)
        elif isinstance(value, tuple):
            yield f"{margin}{key}:"
            yield from (f"{margin}  - {json.dumps(each, ensure_ascii=False)}" for each in value)
        else:
            yield f"{margin}{key}: {_scalar(value)}"


def _scalar(value: str | float) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else format(Decimal(repr(value)), "f")
