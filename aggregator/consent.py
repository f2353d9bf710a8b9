# SPDX-License-Identifier: Apache-2.0
"""An open round of consent mode, brought to its end: every silo uploads, signs for the set of all, and releases its seed.

Promised: no silo is asked for consent before all vectors open and match their headers; the same documents give the same end. Not
promised: an end before the silos answer or a deadline passes.
"""

from __future__ import annotations

from aggregator import audits, rounds
from aggregator.desk import Desk, Vectors
from aggregator.rounds import Round
from privacy.messages import AGGREGATOR, Outcome
from privacy.secure_sum import guardian_sum
from privacy.secure_sum.guardian_sum import Certified, Frozen
from privacy.update_rule import State


def summed(desk: Desk, opened: Round, state: State, seal_seed: bytes) -> tuple[Outcome, State] | str:
    """The round's result and the state after it, or why there is none ("absent").

    Raises:
        TrustError: a silo's document is faulty; the message names it.
    """
    number = opened.number
    if desk.collect("upload", number, shown=number, deadline_at=opened.manifest.deadline_at):
        return rounds.ABSENT
    frozen = _freeze(desk, opened, seal_seed)
    if desk.collect("consent", number, shown=number, deadline_at=desk.deadline_after("freeze", number)):
        return rounds.ABSENT
    certificate, certified = rounds.certificate(desk.accepted, opened, frozen, desk.all("consent", number, opened.silos))
    desk.publish("certificate", number, opened.context, certificate)
    if desk.collect("release", number, shown=number, deadline_at=desk.deadline_after("certificate", number)):
        return rounds.ABSENT
    seeds = _seeds(desk, opened, certified, seal_seed)
    vectors = Vectors(desk, frozen.headers, seal_seed, opened)
    total = guardian_sum.unmask(vectors, seeds, certified)
    return audits.result(desk, opened, state, certified, total, vectors, seeds)


def _freeze(desk: Desk, opened: Round, seal_seed: bytes) -> Frozen:
    headers = {silo: desk.upload(opened, silo).header for silo in opened.silos}
    freeze, frozen = rounds.freeze(desk.accepted, opened, headers)
    if desk.store.entry("freeze", opened.number, AGGREGATOR) is None:
        Vectors(desk, frozen.headers, seal_seed, opened).check()  # while nobody has consented yet
    desk.publish("freeze", opened.number, opened.context, freeze)
    return frozen


def _seeds(desk: Desk, opened: Round, certified: Certified, seal_seed: bytes) -> dict[int, bytes]:
    releases = desk.all("release", opened.number, opened.silos)
    return {
        member.id: guardian_sum.open_release(
            releases[member.id], certified, member=member, epoch_ctx=opened.context, seal_seed=seal_seed
        )
        for member in desk.accepted.terms.member
    }
