# SPDX-License-Identifier: Apache-2.0
"""What a silo believes of the aggregator's documents in a round: the manifest, the set, and how the round ended. No I/O of its own.

Promised: a document is believed only with the aggregator's signature in the epoch's context, and only if it continues what this
silo has computed itself. A sum is applied only if it is over a set that this silo consented to; in share mode, over one that q
guardians certified, by the lists of which everybody finds the same set. The next state is this silo's own arithmetic. Nothing here
needs a secret, so a silo that was away follows the rounds it missed in the same way. Not promised: that the aggregator shows the
same to all (the log and the other silos' acknowledgements do that).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Accepted, ring_plan
from privacy.messages import AGGREGATOR, Audit, Certificate, Freeze, Manifest, Outcome, Signed, decode
from privacy.secure_sum import audits, freeze, guardian_sum
from privacy.secure_sum.audits import UNAUDITED, Claimed, Fetch
from privacy.secure_sum.guardian_sum import Frozen
from privacy.transparency.notes import Checkpoint
from privacy.update_rule import State
from silo.home import Progress
from silo.session import Epoch
from silo.settlement import Integers, audited_total, check_agreed, next_state, shown, verified_total

Stage = Literal["manifest", "freeze", "certificate", "claim", "audit", "outcome"]
Ending = Literal["result", "rejected", "void", "annulled"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An outcome that holds: how the round ended, this silo's own next state, and the digest of the outcome's body.

    ``stood``: as in silo.home.Progress.
    """

    kind: Ending
    reason: str
    state: State
    digest: bytes
    stood: int | None


@dataclass(frozen=True, kw_only=True)
class Witness:
    """A silo's judgement in one epoch; see the module docstring."""

    accepted: Accepted
    epoch: Epoch
    silo: int

    def open(self, document: bytes, kind: Stage) -> bytes:
        """The body of one of the aggregator's documents. Raises TrustError when it is not the aggregator's in this epoch."""
        key = self.accepted.terms.aggregator.verify_key
        return envelope.open_signed(document, type=kind, context=self.epoch.context, sender=AGGREGATOR, key=key)

    def manifest(self, document: bytes, progress: Progress, head: Checkpoint) -> tuple[Manifest, bytes]:
        """The manifest and round_ctx, if it continues exactly what this silo has computed itself under the contract.

        Args:
            head: the head of the log on which the round must be opened.

        Raises:
            TrustError: it does not; the code names the field.
        """
        body, terms = self.open(document, "manifest"), self.accepted.terms  # of this round: Accepted.at
        manifest, plan = decode(body, Manifest), ring_plan(terms)
        expected: dict[str, object] = {
            "epoch_ctx": self.epoch.context,
            "epoch": self.epoch.number,
            "round": progress.round + 1,
            "previous": progress.outcome,
            "base_state": progress.state.digest,
            "dimension": terms.dimension,
            "lattice_bits": plan.lattice_bits,
            "clamp": plan.clamp,
            "deadline_at": manifest.opened_at + terms.sum.deadline_s,
            "log_size": head.size,
            "log_root": head.root,
        }
        for field, wanted in expected.items():
            found = getattr(manifest, field)
            if found != wanted:
                raise TrustError(
                    f"the manifest of round {progress.round + 1} says {field} = {shown(found)}, this silo has {shown(wanted)}",
                    hint="nothing was sent; the aggregator and this silo do not stand at the same place",
                    code=f"manifest-{field}".replace("_", "-"),
                )
        return manifest, guardian_sum.round_ctx(body)

    def frozen(self, document: bytes, round_ctx: bytes, own_header: bytes | None) -> Frozen:
        """The round's set. Where this silo is in it, it is with ``own_header``; in share mode it may be left out.

        Raises:
            TrustError: the set does not hold.
        """
        made = decode(self.open(document, "freeze"), Freeze)
        if self.accepted.terms.shared and self.silo not in [decode(raw, Signed).sender for raw in made.headers]:
            own_header = None  # whether the reason stands is the guardians' to see: they had the upload before their eyes
        return guardian_sum.check_freeze(
            made, accepted=self.accepted, epoch_ctx=self.epoch.context, round_ctx=round_ctx, own_header=own_header,
            silos=self.epoch.silos,
        )  # fmt: skip

    def judged(
        self, document: bytes, before: Progress, round_ctx: bytes, *, own_header: bytes | None, consented: bytes | None,
        get: Callable[[Stage], bytes | None], fetch: Fetch,
        unseen: Callable[[Claimed], frozenset[int]] = lambda _: frozenset(),
    ) -> Judged:  # fmt: skip
        """How the round after ``before`` ended, verified, and what follows from it by this silo's own arithmetic.

        Args:
            own_header: this silo's signed header, if it has sent one.
            consented: the digest of the set it consented to, in consent mode.
            get: the round's other documents of the aggregator.
            fetch: bytes of the silos' published vectors, where slices are audited.
            unseen: the segments of the claim that this silo must sum itself before it applies anything: those it found wrong or
                withheld, and those at which it has not looked yet.

        Raises:
            TrustError: the outcome is of another round, does not hold, or names another state than this silo computes.
        """
        body, number, terms = self.open(document, "outcome"), before.round + 1, self.accepted.terms
        outcome = decode(body, Outcome)
        if (outcome.round, outcome.round_ctx) != (number, round_ctx):
            raise TrustError(
                f"the outcome stored for round {number} is for round {outcome.round}",
                hint="the aggregator is faulty",
                code="wrong-round",
            )
        state, kind, stood = before.state, self._ended(outcome, round_ctx), 0 if terms.shared else None
        if kind == "result":
            frozen = self._set(round_ctx, number, own_header, get)
            if terms.shared:
                consented = self._certified(frozen, get)
                stood = len(frozen.headers) if self.silo in frozen.headers else 0
            total = self._total(outcome, frozen, consented, get, fetch, unseen)
            if total is not None:
                state = next_state(before.state, total, terms, silos=len(frozen.headers))
            kind = "rejected" if state is before.state else "result"
        if outcome.next_state != state.digest:
            raise TrustError(
                f"after round {number} the aggregator has {shown(outcome.next_state)}, this silo computed {shown(state.digest)}",
                hint="keep both machines as they are and compare: one of them is faulty",
                code="state-differs",
                round=number,
            )
        return Judged(kind=kind, reason=outcome.reason, state=state, digest=hashlib.sha256(body).digest(), stood=stood)

    def claimed(self, frozen: Frozen, get: Callable[[Stage], bytes | None]) -> Claimed:
        """What the aggregator claims of the sum over the set, and whom the certificate, which is verified, picks to audit it.

        Raises:
            TrustError: there is no claim, or it or the certificate does not hold.
        """
        certificate, document = get("certificate"), get("claim")
        if certificate is None or document is None:
            raise TrustError("a round has a result and no claim of its sum", hint="the aggregator is faulty", code="no-claim")
        picks = self.open(certificate, "certificate")
        stated = decode(picks, Certificate)
        guardian_sum.check_certificate(stated, frozen, accepted=self.accepted, epoch_ctx=self.epoch.context)
        digest = hashlib.sha256(picks).digest()
        return audits.check_claim(self.open(document, "claim"), frozen, certificate=digest, terms=self.accepted.terms)

    def _total(
        self, outcome: Outcome, frozen: Frozen, consented: bytes | None, get: Callable[[Stage], bytes | None], fetch: Fetch,
        unseen: Callable[[Claimed], frozenset[int]],
    ) -> Integers | None:  # fmt: skip
        """The sum of a result, verified; None where slices are audited and too few auditors bore it out: then nothing moves."""
        if not self.accepted.terms.sliced:
            return verified_total(outcome, frozen, consented=consented, terms=self.accepted.terms)
        check_agreed(outcome, frozen, consented)
        if outcome.reason == UNAUDITED:
            return None
        document = get("audit")
        if document is None:
            raise TrustError("a round has a result and no audit", hint="the aggregator is faulty", code="no-audit")
        claimed = self.claimed(frozen, get)
        return audited_total(
            outcome, decode(self.open(document, "audit"), Audit), claimed, accepted=self.accepted,
            epoch_ctx=self.epoch.context, fetch=fetch, unseen=unseen(claimed),
        )  # fmt: skip

    def _ended(self, outcome: Outcome, round_ctx: bytes) -> Ending:
        """The outcome's kind; in share mode one without a sum must be what q guardians' closes say."""
        if outcome.kind == "result":
            return "result"
        found: Ending = "void"
        if self.accepted.terms.shared:
            found = freeze.ended(outcome.closes, accepted=self.accepted, epoch_ctx=self.epoch.context, round_ctx=round_ctx)
        if found != outcome.kind:
            raise TrustError(
                f"round {outcome.round} is said to be {outcome.kind}, it is {found}", hint="the aggregator is faulty",
                code="outcome-refused",
            )  # fmt: skip
        return found

    def _set(self, round_ctx: bytes, number: int, own_header: bytes | None, get: Callable[[Stage], bytes | None]) -> Frozen:
        document = get("freeze")
        if document is None:
            raise TrustError(f"round {number} has a result and no freeze", hint="the aggregator is faulty", code="no-freeze")
        return self.frozen(document, round_ctx, own_header)

    def _certified(self, frozen: Frozen, get: Callable[[Stage], bytes | None]) -> bytes:
        """The digest of the set, once q guardians' endorsements of it are verified."""
        document = get("certificate")
        if document is None:
            raise TrustError("a round has a result and no certificate", hint="the aggregator is faulty", code="no-certificate")
        certificate = decode(self.open(document, "certificate"), Certificate)
        guardian_sum.check_certificate(certificate, frozen, accepted=self.accepted, epoch_ctx=self.epoch.context)
        return frozen.digest
