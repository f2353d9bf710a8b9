# SPDX-License-Identifier: Apache-2.0
"""One open round of a guardian: list, endorse, release, and close; see ``silo.guardians.guardian`` for what is promised.

Every document is made once, kept, and sent with the same bytes. Whatever binds lies in ``Vows``; what is here can be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from privacy import envelope
from privacy.errors import Replay, RoundError, TrustError
from privacy.federation import Accepted, Guardian
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Certificate, Freeze, Kind, Listing, Manifest, Signed, Upload, Wire, decode, encode
from privacy.secure_sum import freeze, guardian_sum, shares
from privacy.secure_sum.epoch import GuardianSecrets
from privacy.secure_sum.guardian_sum import Certified, Frozen
from privacy.secure_sum.shares import Received
from silo.guardians.vows import NONE, Vows
from silo.transport import Transport

Slot = tuple[Kind, int, int]
Waiting = tuple[Slot, float]
"""A document to wait for, and until when, in Unix seconds."""
OwnKind = Literal["guardian-note", "list", "endorsement", "shares", "close"]
NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class Post:
    """A guardian's way to the board: what it signs lies on the disk first.

    ``told`` is told in words what the guardian does, and why it does not.
    """

    transport: Transport
    identity: keys.Identity
    accepted: Accepted
    party: Guardian
    vows: Vows
    told: Callable[[str], None]
    said: set[Slot] = field(default_factory=set)

    def get(self, kind: Kind, number: int, party: int = AGGREGATOR) -> bytes | None:
        """The document, if it is there now."""
        return self.transport.get(kind, number, party, wait_s=0.0)

    def open(self, document: bytes, kind: Kind, context: bytes) -> bytes:
        """The body of one of the aggregator's documents. Raises TrustError when it is not the aggregator's."""
        key = self.accepted.terms.aggregator.verify_key
        return envelope.open_signed(document, type=kind, context=context, sender=AGGREGATOR, key=key)

    def say(self, kind: OwnKind, number: int, make: Callable[[], Wire], *, epoch: int, context: bytes) -> None:
        """Send a document with the bytes that lie on the disk; made, signed and kept there the first time.

        Raises:
            RoundError, Replay: the board takes it no more, or not yet.
            Equivocation: the board holds other bytes of this guardian.
        """
        slot = (kind, number, self.party.id)
        if slot in self.said:
            return
        kept = self.vows.document(epoch, kind, number)
        if kept is None:
            kept = envelope.sign(self.identity, type=kind, context=context, sender=self.party.id, body=encode(make()))
            self.vows.keep_document(epoch, kind, number, kept)
        self.transport.put(kind, number, self.party.id, kept)
        self.said.add(slot)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch in which this guardian may act: its roster holds the note whose secrets lie here."""

    number: int
    context: bytes
    silos: tuple[int, ...]
    secrets: GuardianSecrets


class Round:
    """See the module docstring.

    Args:
        manifest: verified, and promised.
        ctx: its round_ctx.
        clock: Unix seconds.
    """

    def __init__(self, post: Post, epoch: Epoch, manifest: Manifest, ctx: bytes, clock: Callable[[], float]) -> None:
        self._post, self._epoch, self._manifest, self._ctx, self._clock = post, epoch, manifest, ctx, clock
        self._accepted = post.accepted.in_round(manifest.dimension)
        self._terms, self._own, self._vows = post.accepted.terms, post.party.id, post.vows
        self._received: dict[int, Received] = {}
        self._headers: dict[int, bytes] = {}
        self._lists: dict[int, bytes] = {}
        self._frozen: Frozen | None = None
        self._certified: Certified | None = None
        self._refused = False

    @property
    def number(self) -> int:
        """The round's number."""
        return self._manifest.round

    def step(self) -> Waiting:
        """Go through the round's steps as far as they lead; a step that is overdue closes the round here."""
        over: Slot = ("checkpoint", self.number + 1, AGGREGATOR)
        if self._vows.promised("close", self.number) is None:
            for step in (self._list, self._endorse, self._release):
                slot, until = step() or (over, NEVER)
                if slot != over or until != NEVER:
                    break
            else:
                until = self._due(4 if self._terms.sliced else 3)
            if until > self._clock():
                return slot, until
        self._close()
        return over, NEVER

    def _list(self) -> Waiting | None:
        """Receive uploads until all are here or the deadline; then say which this guardian can answer for."""
        for silo in self._epoch.silos:
            if silo not in self._received:
                self._receive(silo)
        if self._vows.document(self._epoch.number, "list", self.number) is None:
            missing = [silo for silo in self._epoch.silos if silo not in self._received]
            if missing and self._clock() < self._manifest.deadline_at:
                return ("upload", self.number, missing[0]), self._manifest.deadline_at
        self._answer("list", lambda: shares.listing(self._received.values(), round_ctx=self._ctx, guardian=self._own))
        return None

    def _receive(self, silo: int) -> None:
        """What an upload holds for this guardian; an upload that is not its silo's own is as good as none."""
        document, member = self._post.get("upload", self.number, silo), self._terms.by_id(silo)
        if document is None:
            return
        try:
            body = envelope.open_signed(
                document, type="upload", context=self._epoch.context, sender=silo, key=member.verify_key
            )
            upload = decode(body, Upload)
            header = guardian_sum.check_header(
                upload.header, member, accepted=self._accepted, epoch_ctx=self._epoch.context, round_ctx=self._ctx,
                silos=self._epoch.silos,
            )  # fmt: skip
        except TrustError as error:
            self._post.told(f"round {self.number}: the upload of silo {silo} is refused: {error.message}")
            return
        self._received[silo] = shares.receive(upload, header, guardian=self._own, seal_seed=self._epoch.secrets.seal_seed)
        self._headers[silo] = upload.header

    def _endorse(self) -> Waiting | None:
        """Check the proposed set, promise it, and sign for it."""
        if self._frozen is None and not self._refused:
            document = self._post.get("freeze", self.number)
            if document is None:
                return ("freeze", self.number, AGGREGATOR), self._due(1) if self._may_come() else 0.0
            try:
                self._frozen = guardian_sum.check_freeze(
                    decode(self._post.open(document, "freeze", self._epoch.context), Freeze), accepted=self._accepted,
                    epoch_ctx=self._epoch.context, round_ctx=self._ctx, own_header=None, silos=self._epoch.silos,
                    seen=self._seen(),
                )  # fmt: skip
            except TrustError as error:
                self._refused = True
                self._post.told(f"round {self.number}: the proposed set is refused: {error.message}")
        if self._frozen is None:
            return ("checkpoint", self.number + 1, AGGREGATOR), self._due(2)
        self._vows.promise("set", self.number, self._frozen.digest)
        made = freeze.endorsement(self._frozen, guardian=self._own)
        self._answer("endorsement", lambda: made)
        return None

    def _seen(self) -> list[int]:
        """The silos that this guardian's own list names: of them nobody may say that they sent nothing."""
        kept = self._vows.document(self._epoch.number, "list", self.number)
        listing = None if kept is None else decode(decode(kept, Signed).body, Listing)
        return [] if listing is None else [silo for silo, _ in (*listing.headers, *listing.disputes)]

    def _may_come(self) -> bool:
        """Whether a set may still be proposed: not when all guardians' lists are here and give none."""
        for guardian in self._terms.guardian:
            if guardian.id not in self._lists:
                found = self._post.get("list", self.number, guardian.id)
                if found is None:
                    return True
                self._lists[guardian.id] = found
        chosen = freeze.choose(
            self._headers, self._lists, accepted=self._accepted, epoch_ctx=self._epoch.context, round_ctx=self._ctx,
            silos=self._epoch.silos,
        )  # fmt: skip
        return chosen is not None

    def _release(self) -> Waiting | None:
        """Against a certificate for the promised set, give out the shares that its sum needs."""
        if self._frozen is None:
            return None
        if self._certified is None:
            document = self._post.get("certificate", self.number)
            if document is None:
                return ("certificate", self.number, AGGREGATOR), self._due(2)
            certificate = decode(self._post.open(document, "certificate", self._epoch.context), Certificate)
            self._certified = guardian_sum.check_certificate(
                certificate, self._frozen, accepted=self._accepted, epoch_ctx=self._epoch.context
            )
        certified, seal_key = self._certified, bytes.fromhex(self._terms.aggregator.seal_key)

        def make() -> Wire:
            made = shares.release(certified, self._received, guardian=self._own, seal_key=seal_key)
            self._vows.promise("release", self.number, certified.frozen.digest)
            return made

        try:
            self._answer("shares", make)
        except TrustError as error:
            if error.code != "no-bundle":
                raise
            self._post.told(f"round {self.number}: no shares of guardian {self._own}: {error.message}")
        return None

    def _close(self) -> None:
        """The last word in this round."""
        frozen = self._vows.promised("set", self.number)
        released = self._vows.promised("release", self.number) is not None
        self._vows.promise("close", self.number, NONE if frozen is None else frozen)
        made = freeze.close(round_ctx=self._ctx, guardian=self._own, frozen=frozen or b"", released=released)
        self._answer("close", lambda: made)

    def _due(self, step: int) -> float:
        """When a step after the uploads must have come: set, certificate, (audit,) outcome; each has a deadline."""
        return float(self._manifest.deadline_at + step * self._terms.sum.deadline_s)

    def _answer(self, kind: OwnKind, make: Callable[[], Wire]) -> None:
        """Say something; that the round is over meanwhile, or past this step, is no fault."""
        try:
            self._post.say(kind, self.number, make, epoch=self._epoch.number, context=self._epoch.context)
        except Replay as error:
            self._post.said.add((kind, self.number, self._own))
            self._post.told(f"round {self.number}: the {kind} came too late: {error.message}")
        except RoundError as error:
            self._post.told(f"round {self.number}: the {kind} was not taken: {error.message}")
