# SPDX-License-Identifier: Apache-2.0
"""Where a silo stands, and what a round's outcome makes of it: pure checks and this silo's own arithmetic.

Promised: a sum is applied only if the set it is over is the one this silo consented to and every released seed matches its
silo's header; the sum is computed again here, or, where slices are audited, by t_c + 1 silos for each of them; the next state is
computed here and never taken from the aggregator. Not promised: that anybody who looked later has the masked vectors still.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privacy import update_rule
from privacy.dp import ring
from privacy.errors import MachineError, RoundError, TrustError
from privacy.federation import Accepted, Contract
from privacy.messages import Audit, Outcome
from privacy.secure_sum import audits, guardian_sum
from privacy.secure_sum.audits import Claimed, Fetch
from privacy.secure_sum.guardian_sum import Frozen
from privacy.update_rule import State
from silo.home import Home, Progress
from silo.succession import ancestors

Integers = NDArray[np.int64]
Words = NDArray[np.uint32]


def load_progress(home: Home, accepted: Accepted) -> Progress:
    """Where the silo stands under this contract, or under a version before it; before its first round, the public initial state.

    ``outcome`` is the digest that the next manifest must name as ``previous``: of the last outcome, or of the contract.

    Raises:
        TrustError: the state on disk belongs to another contract, or is damaged.
    """
    found = home.progress()
    if found is None:
        nothing = bytes(32)
        state = update_rule.initial(accepted.terms)
        return Progress(contract=accepted.digest, epoch=0, round=0, manifest=nothing, outcome=accepted.digest, voids=0, state=state)
    if found.contract != accepted.digest and found.contract not in ancestors(home, accepted):
        raise TrustError(
            f"the state is of contract {shown(found.contract)}, joined is {shown(accepted.digest)}",
            hint="one silo directory holds one federation; its ledger must be counted into any other run on these records",
            code="contract-changed",
        )
    return found


def next_state(state: State, total: Integers, terms: Contract, *, silos: int | None = None) -> State:
    """The state after a result over so many silos (None: all); the very same object when the sum is beyond its bounds or the
    update is not finite.
    """
    if not update_rule.accepts(total, terms, silos=silos):
        return state
    try:
        return update_rule.advance(state, total, terms, silos=silos)
    except RoundError:
        return state


def refuse_to_go_on(progress: Progress, terms: Contract) -> None:
    """Return if another round may be tried.

    Raises:
        MachineError: results were applied and the trained matrices stand where they started: budget would buy nothing.
        RoundError: as many rounds in a row moved nothing, void or rejected, as the contract allows.
    """
    start = update_rule.initial(terms).theta
    matrices = len(terms.adapter.modules) * terms.adapter.core or terms.dimension
    # R has no gradient while the head is zero. Noise moves it at once; without noise the head must have moved in a round before.
    unmoved = 0 if terms.is_private else 1
    if progress.state.applied > unmoved and np.array_equal(progress.state.theta[:matrices], start[:matrices]):
        raise MachineError(
            f"after {progress.state.applied} applied rounds R has not moved from its start",
            hint="stop spending: check learning_rate and adapter.modules in the contract",
            code="not-moved",
        )
    if progress.voids >= max(1, terms.sum.max_void_rounds):
        raise RoundError(
            f"{progress.voids} rounds in a row were void or rejected, the contract allows {terms.sum.max_void_rounds}",
            hint="each of them spends budget; find out which silo is missing or spoils the sum before a new epoch",
            code="too-many-voids",
        )


def verified_total(outcome: Outcome, frozen: Frozen, *, consented: bytes | None, terms: Contract) -> Integers:
    """The lifted sum (d,) of a result, if this silo consented to its set and finds the same sum itself.

    It is computed again from every silo's masked vector and released seed, and the keys of its pairs with silos outside the set,
    each held to the headers in the set.

    Args:
        frozen: the round's set as check_freeze returned it.
        consented: the digest this silo promised on disk, in share mode the one that q guardians certified; or None.

    Raises:
        TrustError: another set, a vector or seed that contradicts its header, or another sum than theirs.
    """
    check_agreed(outcome, frozen, consented)
    for what, shown_of in (("seeds", outcome.seeds), ("vectors", outcome.vectors)):
        if [silo for silo, _ in shown_of] != list(frozen.headers):
            raise _faulty(
                f"round {outcome.round} shows {what} of {[silo for silo, _ in shown_of]} for a set of {list(frozen.headers)}"
            )
    if len(outcome.total) != 4 * terms.dimension:
        raise _faulty(f"round {outcome.round} has a sum of {len(outcome.total)} bytes, wanted {4 * terms.dimension}")
    wrong = [silo for silo, raw in outcome.vectors if len(raw) != 4 * terms.dimension]
    if wrong:
        raise _faulty(f"round {outcome.round} has vectors of silos {wrong} of another length than {4 * terms.dimension} bytes")
    total = np.frombuffer(outcome.total, dtype="<u4")
    vectors = {silo: np.frombuffer(raw, dtype="<u4") for silo, raw in outcome.vectors}
    pair_keys = {(i, j): key for i, j, key in outcome.pair_keys}
    guardian_sum.check_total(total, vectors, dict(outcome.seeds), frozen, pair_keys)
    return ring.lift(total)


def check_agreed(outcome: Outcome, frozen: Frozen, consented: bytes | None) -> None:
    """Return if an outcome is over the set to which this silo, or q guardians, consented. Raises TrustError."""
    if not consented == frozen.digest == outcome.frozen:
        raise TrustError(
            f"round {outcome.round} sums the set {shown(outcome.frozen)}, this silo consented to {shown(consented)}",
            hint="stop, and show the outcome to the other members",
            code="no-consent",
            round=outcome.round,
        )


def audited_total(
    outcome: Outcome, audit: Audit, claimed: Claimed, *, accepted: Accepted, epoch_ctx: bytes, fetch: Fetch,
    unseen: frozenset[int],
) -> Integers:  # fmt: skip
    """The lifted sum (d,) of a result whose slices were audited: of every segment t_c + 1 of its auditors say that it is right.

    Segments of which anybody complained, and ``unseen`` ones, are summed again here.

    Raises:
        TrustError: too few say so, the outcome is not what they audited, or a complaint is right.
    """
    again = audits.check_audit(audit, claimed, accepted=accepted, epoch_ctx=epoch_ctx) | unseen
    audits.check_total(outcome, claimed)
    audits.check_again(sorted(again), claimed, fetch)
    return ring.lift(np.frombuffer(outcome.total, dtype="<u4"))


def shown(value: object) -> str:
    """A value for a message: the first 8 bytes of a digest, in hex."""
    return value.hex()[:16] if isinstance(value, bytes) else str(value)


def _faulty(what: str) -> TrustError:
    return TrustError(what, hint="keep the outcome as evidence: the aggregator is faulty", code="outcome-refused")
