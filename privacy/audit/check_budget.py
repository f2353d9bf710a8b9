# SPDX-License-Identifier: Apache-2.0
"""Verification of what was spent: epsilon after each round against all three adversaries, computed again, and a report's figures.

A silo is charged for every round in which its upload is recorded, whatever became of the round. The figures are those of the silo
that is charged most; where a unit may be in several silos, each silo is charged for every round. Rounds under more than one
contract version compose as privacy.spending says. Not here: a silo's own ledger, which may stand higher (it charges every
attempt); silo.verify asks that.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from privacy import update_rule
from privacy.audit.check_epoch import refused
from privacy.audit.check_round import RoundFacts
from privacy.audit.findings import Findings, Slot
from privacy.dp import unprotected
from privacy.errors import TrustError
from privacy.federation import Accepted
from privacy.identity import keys
from privacy.secure_sum import blocks
from privacy.spending import ADVERSARIES, Spending, is_shared, load_of, place_of

SCHEMA = "siloquy-report/2"
CLOSE = 1e-6
"""How far two figures may lie apart, relatively: other versions of the accountant's libraries round otherwise."""


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Epsilon, at the contract's delta, that the silo charged most has spent after a round; None without differential privacy."""

    round: int
    rounds_charged: int
    delta: float | None
    outside: float | None
    insiders: float | None
    sum_broken: float | None


def spent(rounds: Sequence[RoundFacts]) -> list[Spent]:
    """The figures after each round, ascending; a round whose contract is not known ends the list: nothing after it is certain.

    Raises:
        NotCertified: the accountants give no agreed, finite figure.
    """
    charged: dict[int, list[int]] = {}
    versions: dict[int, Accepted] = {}
    done: list[Spent] = []
    for each in rounds:
        if each.accepted is None:
            break
        number = each.accepted.terms.version
        versions[number] = each.accepted
        # A unit that several silos may know is exposed whoever of them took part: every silo is charged what all are.
        for silo in ((0,) if each.charged and is_shared([each.accepted]) else each.charged):
            charged.setdefault(silo, []).append(place_of(number, basis=each.basis))
        delta = each.accepted.terms.privacy.delta
        spending = Spending(versions=versions, first=next(iter(versions)))
        loads = [load_of(listed) for listed in charged.values()]
        figures = {name: unprotected.figure(spending.epsilon(loads, name, delta)) for name in ADVERSARIES}
        most = max((len(listed) for listed in charged.values()), default=0)
        done.append(Spent(round=each.number, rounds_charged=most, delta=delta or None, **figures))
    return done


def compare_report(
    found: Findings,
    report: bytes,
    signature: bytes | None,
    *,
    accepted: Accepted,
    figures: Sequence[Spent],
    rounds: Sequence[RoundFacts],
    again: Callable[[Findings, Slot, bytes], None] | None = None,
) -> None:
    """Hold a report's record (``report.json``) and its signature to what was recomputed.

    Args:
        accepted: the version in force.
        again: makes the whole report again and names each place that differs; asked of a record of ``SCHEMA``.
    """
    slot = Slot("report", accepted.terms.version, 0)
    if signature is None:
        found.add(slot, "signature", "note", "no signature lies beside the report")
    else:
        found.hold(slot, "signature", _check_signature, report, signature, accepted)
    stated = found.test(slot, "contents", _parsed, report)
    if stated is None:
        return
    listed, ended = _at(stated, "rounds"), [each for each in rounds if each.how != "open"]
    states = [update_rule.initial(accepted.terms).digest.hex(), *(each.state for each in ended)]
    pairs: list[tuple[str, object, object]] = [
        ("contract", _at(stated, "federation", "contract_digest"), accepted.digest.hex()),
        ("delta", _or_none(_at(stated, "guarantee", "delta")), _or_none(accepted.terms.privacy.delta or None)),
        ("rounds", len(listed) if isinstance(listed, list) else None, len(ended)),
        ("state", _at(stated, "federation", "state_digest"), states[-1] or None),
    ]
    found.expect(slot, "contents", pairs)
    if not accepted.terms.is_private:
        found.hold(slot, "no differential privacy", _check_says_none, stated)
        sets = [each.stood for each in ended if each.stood]
        rank = _at(stated, "participation", "rank")
        found.expect(slot, "contents", [("rank of participation", rank, blocks.rank(sets))])
    else:
        _check_figures(found, slot, stated, figures)
    if again is not None and _at(stated, "schema") == SCHEMA:
        again(found, slot, report)
    else:
        why = f"of a record of {SCHEMA} everything can be compared, here only the figures above"
        found.add(slot, "every figure", "note" if again is None else "open", why)


def _check_figures(found: Findings, slot: Slot, stated: dict[str, Any], figures: Sequence[Spent]) -> None:
    """Epsilon against each adversary, wherever the record says it."""
    last = figures[-1] if figures else None
    for name in ADVERSARIES:
        said = _at(_rows(stated), name, "spent", "epsilon")
        wanted = 0.0 if last is None else getattr(last, name)
        found.hold(slot, f"epsilon {name}", functools.partial(_check_figure, said, name, wanted))  # None is a fault, not open
    said = [_at(stated, "accounting", "spent", "epsilon"), *_most_of_silos(stated)]
    for each in said:  # the same figure, where else it stands
        wanted = 0.0 if last is None else last.insiders
        found.hold(slot, "epsilon insiders", functools.partial(_check_figure, each, "insiders", wanted))


def _check_signature(report: bytes, signature: bytes, accepted: Accepted) -> None:
    signed = b"siloquy report\0" + hashlib.sha256(report).digest()
    if not re.fullmatch(rb"([0-9a-f]{2})+\n?", signature):
        raise refused("its signature is not one line of hex")
    raw = bytes.fromhex(signature.decode("ascii"))
    keys.verify_signature(accepted.terms.aggregator.verify_key, signed, raw)  # the contract says which suite, not the signature


def _parsed(report: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(report, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"not a report: {error}", hint="ask for report.json as it was written", code="malformed") from error


def _check_figure(said: object, name: str, wanted: float | None) -> None:
    number = said if type(said) is float or (type(said) is int and abs(said) < 2**53) else None
    if wanted is None or number is None or not math.isclose(number, wanted, rel_tol=CLOSE, abs_tol=CLOSE):
        raise refused(f"it says epsilon {str(said)[:40]} against {name}, computed again it is {wanted}")


def _or_none(delta: object) -> object:
    """A delta as it is compared: what is None would stay open."""
    return "none" if delta is None else delta


def _check_says_none(stated: dict[str, Any]) -> None:
    """Return if the report says first that there is no differential privacy, and null with the reason in place of an epsilon."""
    places = [_at(stated, "accounting", "spent"), _at(stated, "accounting", "plan")]
    places += [_at(_rows(stated), name, when) for name in ADVERSARIES for when in ("spent", "plan")]
    listed = _at(stated, "silos")
    places += [_at(row, "spent") for row in listed] if isinstance(listed, list) else [None]
    for place in places:
        kept = [place.get(name, 0) for name in ("epsilon", "epsilon_pld", "epsilon_rdp")] if isinstance(place, dict) else []
        if kept != [None, None, None] or _at(place, "reason") != unprotected.IN_WORDS:
            raise refused(f"it has a figure where there is none: {str(place)[:80]}")
    if next(iter(stated), "") != "NO_DIFFERENTIAL_PRIVACY" or not stated["NO_DIFFERENTIAL_PRIVACY"]:
        raise refused("it does not begin by saying that there is no differential privacy")


def _rows(stated: dict[str, Any]) -> dict[str, object]:
    """What it says of each adversary; nothing when one is named twice."""
    listed = _at(stated, "guarantee", "adversaries")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    named = {str(row.get("name")): row for row in rows}
    return dict(named) if len(named) == len(rows) else {}


def _most_of_silos(stated: dict[str, Any]) -> list[object]:
    """The largest epsilon that it says of a silo; None when one of them is no number."""
    listed = _at(stated, "silos")
    said = [_at(row, "spent", "epsilon") for row in listed] if isinstance(listed, list) else []
    numbers = [each for each in said if isinstance(each, int | float)]
    return [max(numbers) if numbers and len(numbers) == len(said) else None]


def _at(tree: object, *path: str) -> object:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
