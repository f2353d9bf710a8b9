# SPDX-License-Identifier: Apache-2.0
"""What a report rests on, from the documents in the aggregator's store: the rounds as they ended, and under which version.

Promised: a round's version is the one under which its epoch was called. Nothing is verified here (``aggregator verify`` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from aggregator import rounds, versions
from aggregator.reporting.record import RoundFacts
from aggregator.store import Store
from privacy import basis_round, chain, update_rule
from privacy.errors import ConfigError
from privacy.federation import Accepted
from privacy.messages import AGGREGATOR

SENT_IN_A_ROUND = (
    "cosignature", "upload", "list", "consent", "endorsement", "release", "shares", "verdict", "close", "acknowledgement",
)  # fmt: skip


def settled(store: Store) -> list[RoundFacts]:
    """Every round that has an outcome, ascending."""
    found = []
    for number in range(1, (store.latest("outcome") or 0) + 1):
        accepted, entry = versions.of_round(store, number), store.entry("outcome", number, AGGREGATOR)
        opened = None if accepted is None else rounds.round_in(store, accepted, number)
        ended = None if opened is None or accepted is None else rounds.outcome_in(store, accepted, opened)
        if accepted is None or opened is None or ended is None or entry is None:
            continue
        body, outcome = ended
        found.append(
            RoundFacts(
                number=number,
                version=accepted.terms.version,
                kind=outcome.kind,
                reason=outcome.reason,
                opened_at=opened.manifest.opened_at,
                closed_at=entry.received_at,
                participants=store.parties("upload", number),
                outcome_digest=hashlib.sha256(body).hexdigest(),
                state_digest=outcome.next_state.hex(),
                bytes_in=_bytes_in(store, number),
                stood=len(outcome.seeds) if accepted.terms.shared else None,
                basis=basis_round.is_one(accepted.in_round(opened.manifest.dimension).terms),
            )
        )
    return found


def sets(store: Store, ended: Sequence[RoundFacts]) -> dict[int, tuple[int, ...]]:
    """By round with a result, the silos in its sum."""
    found = {}
    for each in ended:
        accepted = versions.of_round(store, each.number)
        opened = None if accepted is None else rounds.round_in(store, accepted, each.number)
        outcome = None if opened is None or accepted is None else rounds.outcome_in(store, accepted, opened)
        if outcome is not None and each.kind == "result":
            found[each.number] = tuple(silo for silo, _ in outcome[1].seeds)
    return found


def still_open(store: Store) -> tuple[int, ...]:
    """Silos whose upload to the round that has not ended is here."""
    number = store.latest("upload") or 0
    return store.parties("upload", number) if number > (store.latest("outcome") or 0) else ()


def earlier(store: Store, accepted: Accepted) -> tuple[Accepted, ...]:
    """Every published version below this one, ascending."""
    known = (versions.published(store, version) for version in range(1, accepted.terms.version))
    return tuple(each for each in known if each is not None)


def initial_state(accepted: Accepted, before: Sequence[Accepted]) -> str:
    """Hex digest of the state before round 1."""
    first = (*chain.ancestors(accepted, before), accepted)[0]
    return update_rule.initial(first.terms).digest.hex()


def check_one_version(accepted: Accepted, ended: Sequence[RoundFacts]) -> None:
    """Return if all rounds stand under this version: what was opened without noise is counted under one alone."""
    other = next((each for each in ended if each.version != accepted.terms.version), None)
    if other is not None:
        raise ConfigError(
            f"round {other.number} stands under version {other.version} of the contract, in force is {accepted.terms.version}",
            hint="there is no epsilon in either; `aggregator verify` lists the sets of every round", code="report-versions",
        )  # fmt: skip


def bytes_per_silo_and_round(ended: Sequence[RoundFacts]) -> int:
    """What one silo sent in one round, all its documents together: the mean over silos and complete rounds, rounded up."""
    sent = [each.bytes_in / len(each.participants) for each in ended if each.kind == "result"]
    return -int(-sum(sent) // len(sent)) if sent else 0


def _bytes_in(store: Store, number: int) -> int:
    entries = (store.entry(kind, number, silo) for kind in SENT_IN_A_ROUND for silo in store.parties(kind, number))
    return sum(entry.size for entry in entries if entry is not None)
