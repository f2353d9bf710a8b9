# SPDX-License-Identifier: Apache-2.0
"""Verification of what was spent: epsilon after each round against all three adversaries, computed again, and a report's figures.

A silo is charged for every round in which its upload is recorded, whatever became of the round. The figures are those of the silo
that is charged most. Rounds under more than one contract version compose by the RDP filter, as in a silo's own ledger: the later
terms may have been chosen after the first results were seen. Its order follows from the first version's limits alone. Not here: a
silo's own ledger, which may stand higher (it charges every attempt); silo.verify asks that.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from privacy import federation, update_rule
from privacy.audit.check_epoch import refused
from privacy.audit.check_round import RoundFacts
from privacy.audit.findings import Findings, Slot
from privacy.dp import accounting
from privacy.dp.budget import Limits
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import TrustError
from privacy.federation import Accepted
from privacy.identity import keys

Adversary = Literal["outside", "insiders", "sum_broken"]
ADVERSARIES: tuple[Adversary, ...] = ("outside", "insiders", "sum_broken")
CLOSE = 1e-6
"""How far two figures may lie apart, relatively: other versions of the accountant's libraries round otherwise."""


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Epsilon, at the contract's delta, that the silo charged most has spent after a round."""

    round: int
    rounds_charged: int
    delta: float
    outside: float
    insiders: float
    sum_broken: float


def spent(rounds: Sequence[RoundFacts]) -> list[Spent]:
    """The figures after each round, ascending; a round whose contract is not known ends the list: nothing after it is certain.

    Raises:
        NotCertified: the accountants give no agreed, finite figure.
    """
    charged: dict[int, Counter[bytes]] = {}
    by_digest: dict[bytes, Accepted] = {}
    done: list[Spent] = []
    for each in rounds:
        if each.accepted is None:
            break
        by_digest[each.accepted.digest] = each.accepted
        for silo in each.charged:
            charged.setdefault(silo, Counter())[each.accepted.digest] += 1
        delta = each.accepted.terms.privacy.delta
        loads = {tuple(sorted(count.items())) for count in charged.values()}
        figures = {name: max((_certified(load, by_digest, name, delta) for load in loads), default=0.0) for name in ADVERSARIES}
        most = max((sum(count.values()) for count in charged.values()), default=0)
        done.append(Spent(round=each.number, rounds_charged=most, delta=delta, **figures))
    return done


def _certified(load: tuple[tuple[bytes, int], ...], by_digest: Mapping[bytes, Accepted], name: Adversary, delta: float) -> float:
    plan = next(iter(by_digest.values())).terms.privacy
    order = Limits(epsilon=plan.epsilon, delta=plan.delta).filter_order if len(load) > 1 else None
    return _epsilon(tuple(_event(by_digest[digest], name, rounds) for digest, rounds in load), delta, order)


@functools.lru_cache(maxsize=4096)
def _epsilon(events: tuple[LatticeGaussian, ...], delta: float, order: int | None) -> float:
    if order is None:
        return accounting.certify(list(events), delta).epsilon
    return accounting.certify_adaptive(list(events), delta, order=order).epsilon


def _event(accepted: Accepted, name: Adversary, rounds: int) -> LatticeGaussian:
    shares = federation.adversaries(accepted.terms)[name].shares
    return federation.mechanism(accepted.terms, shares=shares, rounds=rounds)


def compare_report(
    found: Findings,
    report: bytes,
    signature: bytes | None,
    *,
    accepted: Accepted,
    figures: Sequence[Spent],
    rounds: Sequence[RoundFacts],
) -> None:
    """Hold a report's record (``report.json``) and its signature to what was recomputed."""
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
        ("delta", _at(stated, "guarantee", "delta"), accepted.terms.privacy.delta),
        ("rounds", len(listed) if isinstance(listed, list) else None, len(ended)),
        ("state", _at(stated, "federation", "state_digest"), states[-1] or None),
    ]
    found.expect(slot, "contents", pairs)
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
    try:
        raw = bytes.fromhex(signature.decode().strip())
    except ValueError:
        raise refused("its signature is not hex") from None
    keys.verify_signature(accepted.terms.aggregator.verify_key, signed, raw)  # the contract says which suite, not the signature


def _parsed(report: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(report, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise TrustError(f"not a report: {error}", hint="ask for report.json as it was written", code="malformed") from error


def _check_figure(said: object, name: str, wanted: float) -> None:
    is_number = type(said) is float or (type(said) is int and abs(said) < 2**53)
    if not is_number or not math.isclose(said, wanted, rel_tol=CLOSE, abs_tol=CLOSE):  # type: ignore[arg-type]
        raise refused(f"it says epsilon {str(said)[:40]} against {name}, computed again it is {wanted}")


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
