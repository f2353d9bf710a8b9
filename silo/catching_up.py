# SPDX-License-Identifier: Apache-2.0
"""A silo that joined late, or was away while the contract changed, follows the rounds of earlier versions to where others stand.

Promised: every round is verified as its own silos verify it (silo.witness), from the public documents alone: manifest, set,
certificate, masked vectors, seeds; the state is this silo's own arithmetic under that round's contract. Nothing is charged: this
silo took no part. Its own optimiser (local mode) stays as it was after the last result that it was part of: what others did
does not move it. Not promised: that the aggregator still has the vectors of every round.
"""

from __future__ import annotations

from collections.abc import Callable

from privacy.errors import TrustError
from privacy.federation import Accepted, Contract
from privacy.messages import AGGREGATOR, Certificate, Manifest, Signed, decode
from privacy.secure_sum import guardian_sum
from privacy.transparency import log, notes
from silo import session
from silo.home import Home, Progress
from silo.settlement import load_progress
from silo.succession import ancestors
from silo.transport import Transport, vectors_of
from silo.witness import Stage, Witness

_NOBODY = 0


def catch_up(home: Home, transport: Transport, accepted: Accepted) -> int:
    """Follow what was settled under versions before ``accepted``, but for rounds of an epoch that this silo is in; how many.

    Raises:
        TrustError: a document does not hold.
        RoundError: one that is needed is not there.
    """
    former, here, followed = ancestors(home, accepted), session.current(home), 0
    while former:
        progress = load_progress(home, accepted)
        number = progress.round + 1
        manifest = transport.get("manifest", number, AGGREGATOR, wait_s=0)
        if manifest is None:
            break
        stated = decode(decode(manifest, Signed).body, Manifest)
        call = transport.get("epoch", stated.epoch, AGGREGATOR, wait_s=0)
        under = None if call is None else former.get(decode(call, Signed).context)
        outcome = transport.get("outcome", number, AGGREGATOR, wait_s=0)
        if under is None or outcome is None or (here is not None and here.context == stated.epoch_ctx):
            break
        earlier = tuple(each.terms for each in former.values() if each.terms.version < under.terms.version)
        at = under.at(progress.state.basis)
        seen = Witness(accepted=at, epoch=session.public(transport, under, stated.epoch), silo=_NOBODY)
        home.save_progress(_followed(transport, seen, progress, manifest, outcome, earlier))
        followed += 1
    return followed


def _followed(
    transport: Transport, seen: Witness, before: Progress, document: bytes, outcome: bytes, earlier: tuple[Contract, ...]
) -> Progress:
    number = before.round + 1
    if number == 1:  # the first manifest names the contract that stood then
        before = Progress(
            contract=seen.accepted.digest, epoch=0, round=0, manifest=before.manifest, outcome=seen.accepted.digest, voids=0,
            state=before.state,
        )  # fmt: skip
    raw = transport.get("head", number, AGGREGATOR, wait_s=0)
    if raw is None:
        raise TrustError(f"round {number} has a manifest and no cosigned head", hint="the aggregator is faulty", code="log-no-head")
    head = log.open_head(notes.parse(raw), seen.accepted.terms, earlier)
    manifest, round_ctx = seen.manifest(document, before, head)

    def get(kind: Stage) -> bytes | None:
        return transport.get(kind, number, AGGREGATOR, wait_s=0)

    judged = seen.judged(
        outcome, before, round_ctx, own_header=None, consented=agreed_set(seen, round_ctx, get), get=get,
        fetch=vectors_of(transport, number),
    )  # fmt: skip
    return Progress(
        contract=seen.accepted.digest, epoch=manifest.epoch, round=number, manifest=round_ctx, outcome=judged.digest,
        voids=0 if judged.kind == "result" else before.voids + 1, state=judged.state, stood=judged.stood, own=before.own,
    )  # fmt: skip


def agreed_set(seen: Witness, round_ctx: bytes, get: Callable[[Stage], bytes | None]) -> bytes | None:
    """The digest of the set that every silo of a round consented to, by its certificate; None where there is none."""
    document, certificate = get("freeze"), get("certificate")
    if document is None or certificate is None:
        return None
    frozen = seen.frozen(document, round_ctx, None)
    stated = decode(seen.open(certificate, "certificate"), Certificate)
    guardian_sum.check_certificate(stated, frozen, accepted=seen.accepted, epoch_ctx=seen.epoch.context)
    return frozen.digest
