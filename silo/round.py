# SPDX-License-Identifier: Apache-2.0
"""One round of a silo, resumable at every write: reserve, promise, train, mask, persist, send; then consent, release, verify.

**The order of writes** is what the guarantees rest on:

1. the gate admits the attempt: its cost is reserved in the ledger, fsynced, before any record is read;
2. round → manifest is promised on disk; a second manifest for this or an earlier number is refused;
3. records are read, the step is computed (in local mode: all of them), noise is added, the vector is masked;
4. the whole upload lies in one private file together with its self-mask seed, in one atomic write;
5. only then the first byte leaves.

**Formal guarantees**

- *Never understated*: every vector that left was reserved before; a crash can only leave a reservation that was not used.
- *Same bytes again*: if the file of (4) exists after a crash, exactly its bytes are sent; if it does not, nothing had left, and
  a new attempt has a new id, seed, sample, noise and reservation.
- *One consent*: round → set is on disk before the consent leaves; no seed is released without every member's consent to that set.
- *Own optimiser*: in local mode its moments go on from the last result this silo was part of; they never leave.
- *Own arithmetic*: the next state comes from the sum by this silo's own update rule; another digest stops the silo.
- *A round that ended leaves no secrets*: upload, seed and release are deleted, and the pair chain has moved on.

Not promised: that a round completes (one silent silo closes it), or that its time does not depend on the records.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from privacy import basis_round, envelope, files
from privacy.errors import Equivocation, Replay, RoundError, TrustError
from privacy.identity import keys
from privacy.messages import (
    AGGREGATOR,
    Acknowledgement,
    Certificate,
    Consent,
    Manifest,
    Outcome,
    Signed,
    Wire,
    decode,
    encode,
)
from privacy.secure_sum import guardian_sum
from privacy.secure_sum.audits import Claimed
from privacy.update_rule import State
from silo import fixed_basis
from silo.auditing import Auditor, chosen, coin, complained, kept
from silo.catching_up import agreed_set
from silo.home import Progress
from silo.learning import local
from silo.parts import Parts, Settled
from silo.session import Epoch
from silo.settlement import Words, load_progress, refuse_to_go_on, shown
from silo.transport import vectors_of
from silo.upload import Persisted, masked, noisy
from silo.watch import Watch, expect
from silo.witness import Judged, Stage, Witness

POLL_S = 5.0
HEAD_WAIT_S = 3.0
"""How long a settled round waits for the head that covers it; where it comes later, the next round's start reads it."""
ID_BYTES = 16
_PAUSE_S = 0.2

class Rounds:
    """This silo's rounds in one confirmed epoch; see the module docstring.

    Args:
        parts: what it works with.
        epoch: the epoch, confirmed (silo.session.establish).
    """

    def __init__(self, parts: Parts, epoch: Epoch) -> None:
        self._parts = parts
        self._epoch = epoch
        self._terms = parts.accepted.terms
        self._finished, self._looked = -1, b""
        self._witness = Witness(accepted=parts.accepted, epoch=epoch, silo=parts.member.id)
        self._watch = Watch(
            home=parts.home, transport=parts.transport, identity=parts.identity, accepted=parts.accepted, clock=parts.clock
        )

    def take_part(self, *, wait_s: float) -> Settled | None:
        """Take part in the next round, or settle one that was left open; None when none is opened within ``wait_s`` seconds.

        Raises:
            PrivacyRefusal: the gate refused; no record was read.
            TrustError: a document does not hold, or the aggregator's state is not this silo's.
            RoundError: the round did not end in time (run again to settle it), or too many in a row were void or rejected.
            MachineError: the trained matrices did not move, the disk is full, or the aggregator cannot be reached.
        """
        progress = load_progress(self._parts.home, self._parts.accepted)
        self._finish(progress)
        refuse_to_go_on(progress, self._terms)
        accepted = self._parts.accepted.at(progress.state.basis)  # a basis round has its own vectors and noise
        self._terms, self._witness = accepted.terms, dataclasses.replace(self._witness, accepted=accepted)
        number = progress.round + 1
        if not self._watch.follow(number, wait_s=wait_s):  # log: the head on which the round will be opened
            return None
        document = self._parts.transport.get("manifest", number, AGGREGATOR, wait_s=wait_s)
        if document is None:
            return None
        if self._terms.shared and decode(document, Signed).context != self._epoch.context:
            return None  # of a newer epoch, which is entered first
        manifest, round_ctx = self._witness.manifest(document, progress, self._watch.head(number))
        self._check_promised(manifest, round_ctx)
        persisted = self._persisted(number, round_ctx)
        if self._outcome(number) is None:  # after a restart the round may be over: nothing is promised or sent any more
            if persisted is None and self._may_attempt(manifest):
                persisted = self._attempt(manifest, round_ctx, progress)
            if persisted is not None:
                self._agree(manifest, persisted)
                self._audit(manifest, persisted)
        outcome = self._await_outcome(manifest)
        settled = self._settle(outcome, round_ctx, progress, persisted)
        refuse_to_go_on(load_progress(self._parts.home, self._parts.accepted), self._terms)
        return settled

    def _check_promised(self, manifest: Manifest, round_ctx: bytes) -> None:
        promised = self._parts.home.promised_manifest(manifest.round)
        if promised not in (None, round_ctx):  # before the gate: a second manifest must not cost a reservation
            raise Equivocation(
                f"a second manifest for round {manifest.round}: {shown(round_ctx)}, promised was {shown(promised)}",
                hint="stop, and show both documents to the other members",
                round=manifest.round,
            )

    def _may_attempt(self, manifest: Manifest) -> bool:
        """Whether an upload could still be part of the sum."""
        if self._epoch.folder is None or self._parts.clock() >= manifest.deadline_at:
            return False
        return not self._terms.shared or self._parts.transport.get("freeze", manifest.round, AGGREGATOR, wait_s=0) is None

    def _attempt(self, manifest: Manifest, round_ctx: bytes, progress: Progress) -> Persisted:
        """Writes (1) to (4) for a fresh attempt."""
        parts = self._parts
        latest = parts.home.latest_promise()
        if latest is not None and latest > manifest.round:
            raise Replay(
                f"round {manifest.round} is opened, this silo took part in round {latest}", hint="the aggregator must go on"
            )
        # Whatever can fail without a record is done first: a failure after the gate is charged.
        pair_keys = self._epoch.round_keys(round_ctx, after=manifest.round - 1)
        seal_key = bytes.fromhex(self._terms.aggregator.seal_key)
        keys.load_seal_key(seal_key)
        attempt = parts.os_random(ID_BYTES)
        basis = basis_round.is_one(self._terms)
        counter = parts.gate.admit(manifest.round, attempt, basis=True) if basis else parts.gate.admit(manifest.round, attempt)
        parts.home.promise_manifest(manifest.round, round_ctx)
        x, own = self._computed(progress)
        upload = masked(
            x,
            round_number=manifest.round,
            round_ctx=round_ctx,
            silo=parts.member.id,
            attempt=attempt,
            ledger_counter=counter,
            pair_keys=pair_keys,
            install_secret=parts.home.install_secret,
            os_random=parts.os_random(32),
            seal_key=seal_key,
            guardian_keys=self._epoch.guardian_keys,
            terms=self._terms,
            sign=self._sign,
        )
        persisted = msgspec.structs.replace(upload, own=b"" if own is None else own.to_bytes())
        files.write_once(self._folder / "attempt", persisted.to_bytes(), mode=files.PRIVATE)
        return persisted

    def _computed(self, progress: Progress) -> tuple[Words, State | None]:
        """This attempt's vector (d,), and in local mode the silo's own optimiser after it."""
        parts = self._parts
        if self._terms.training.mode == "joint":
            return noisy(parts.contribute(progress.state), self._terms, parts.randomness()), None
        return local.trained(progress.state, progress.own, self._terms, contribute=parts.contribute, randomness=parts.randomness)

    def _agree(self, manifest: Manifest, own: Persisted) -> None:
        """Send, consent and release; returns early when an outcome stands already. In share mode the upload says it all."""
        parts = self._parts
        expect(parts.home, "upload", manifest.round, parts.member.id, own.upload, due=manifest.round + 1)
        if not self._post("upload", manifest.round, own.upload) or self._terms.shared:
            return
        freeze = self._await("freeze", manifest)
        if freeze is None:
            return
        frozen = self._witness.frozen(freeze, own.round_ctx, own.header)
        parts.home.promise_consent(manifest.round, frozen.digest)
        consent = Consent(round_ctx=own.round_ctx, silo=parts.member.id, frozen=frozen.digest)
        if not self._post("consent", manifest.round, self._sign("consent", consent)):
            return
        certificate = self._await("certificate", manifest)
        if certificate is None:
            return
        certified = guardian_sum.check_certificate(
            decode(self._witness.open(certificate, "certificate"), Certificate),
            frozen,
            accepted=self._witness.accepted,
            epoch_ctx=self._epoch.context,
        )
        self._post("release", manifest.round, self._release(certified, own))

    def _audit(self, manifest: Manifest, own: Persisted) -> None:
        """Where slices are audited: sum this silo's slices again, and say what it found, before there is an outcome."""
        number, parts = manifest.round, self._parts
        if not self._terms.sliced or self._outcome(number) is not None or (claim := self._await("claim", manifest)) is None:
            return
        get, until = self._getting(number), parts.clock() + self._terms.sum.deadline_s / 2
        frozen = self._witness.frozen(get("freeze") or b"", own.round_ctx, own.header)
        if parts.member.id not in frozen.headers:
            return
        auditor = Auditor(
            silo=parts.member.id, number=number, folder=self._folder, evidence=parts.home.log_folder,
            random=self._coin(own.round_ctx), fetch=vectors_of(parts.transport, number, wait_s=1.0),
            sign=lambda made: self._sign("verdict", made),
            over=lambda: parts.clock() >= until or self._outcome(number) is not None,
        )  # fmt: skip
        claimed = self._witness.claimed(frozen, get)
        document = auditor.verdict(claim, claimed)
        self._looked = claimed.digest
        # Once the outcome stands the verdict is refused, and the log says so: worth it for a complaint only.
        if document is not None and (complained(self._folder, own.round_ctx) or self._outcome(number) is None):
            self._post("verdict", number, document)

    def _coin(self, round_ctx: bytes) -> Callable[[int], bytes]:
        return coin(self._parts.home.install_secret, round_ctx)

    def _unseen(self, claimed: Claimed, took_part: bool) -> frozenset[int]:
        """What this silo sums before it applies a round: the segments of which it complained; and, where it took part and has not
        looked at this very claim before the outcome came, those of its own choice.
        """
        folder, round_ctx = self._epoch.folder, claimed.claim.round_ctx
        said, found = None if folder is None else kept(folder, round_ctx), complained(folder, round_ctx)
        if not took_part or claimed.digest in (self._looked, None if said is None else said[1].claim):
            return found
        return found.union(chosen(self._coin(round_ctx), claimed.dimension))

    def _getting(self, number: int) -> Callable[[Stage], bytes | None]:
        return lambda kind: self._parts.transport.get(kind, number, AGGREGATOR, wait_s=0)

    def _release(self, certified: guardian_sum.Certified, own: Persisted) -> bytes:
        """The signed release; sealing draws new randomness, so its bytes are kept before they leave."""
        path = self._folder / "release"
        if path.is_file():
            return path.read_bytes()
        seal_key = bytes.fromhex(self._terms.aggregator.seal_key)
        release = guardian_sum.seal_release(certified, silo=self._parts.member.id, self_seed=own.self_seed, seal_key=seal_key)
        document = self._sign("release", release)
        files.write_once(path, document, mode=files.PRIVATE)
        return document

    def _settle(self, document: bytes, round_ctx: bytes, before: Progress, own: Persisted | None) -> Settled:
        """Verify the outcome, apply it by own arithmetic, compare digests, save, and clean up."""
        number = before.round + 1
        judged = self._judged(document, round_ctx, before, own)
        moved = judged.kind == "result" and own is not None and own.own and judged.stood != 0
        after = Progress(
            contract=self._parts.accepted.digest,
            epoch=self._epoch.number,
            round=number,
            manifest=round_ctx,
            outcome=judged.digest,
            voids=0 if judged.kind == "result" else before.voids + 1,
            state=judged.state,
            stood=judged.stood,
            own=State.from_bytes(own.own) if moved and own is not None else before.own,
        )
        expect(self._parts.home, "outcome", number, AGGREGATOR, document, due=number + 1)
        if judged.state.basis and not before.state.basis:
            fixed_basis.keep(self._parts.home, decode(self._witness.open(document, "outcome"), Outcome), self._terms)
        self._parts.home.save_progress(after)
        self._finish(after)
        return Settled(
            round=number, kind=judged.kind, reason=judged.reason, state=judged.state, upload_bytes=len(own.upload) if own else 0,
            stood=judged.stood,
        )  # fmt: skip

    def _judged(self, document: bytes, round_ctx: bytes, before: Progress, own: Persisted | None) -> Judged:
        """The outcome, verified. Pieces to be summed again that are not here, or not whole, are waited for half a deadline."""
        parts, number = self._parts, before.round + 1
        get, until = self._getting(number), parts.clock() + self._terms.sum.deadline_s / 2
        agreed = parts.home.promised_consent(number)
        if agreed is None and self._epoch.folder is None and not self._terms.shared:  # restored: every silo's signature is there
            agreed = agreed_set(self._witness, round_ctx, get)
        while True:
            try:
                return self._witness.judged(
                    document, before, round_ctx, own_header=own.header if own else None, consented=agreed, get=get,
                    fetch=vectors_of(parts.transport, number, wait_s=POLL_S),
                    unseen=lambda claimed: self._unseen(claimed, own is not None),
                )  # fmt: skip
            except TrustError as error:
                if error.code != "withheld" or parts.clock() >= until:
                    raise
            parts.pulse()
            time.sleep(_PAUSE_S)

    def _finish(self, progress: Progress) -> None:
        """What follows a saved state: chain, ledger, secrets, acknowledgement. Repeatable, so a crash between them is harmless."""
        if progress.round in (0, self._finished):
            return
        self._parts.gate.settle(progress.round, "void" if progress.voids else "result", silos=progress.stood)
        self._finished = progress.round
        if progress.epoch != self._epoch.number or self._epoch.folder is None:
            return
        self._epoch.settle(progress.round)
        self._forget(progress.round)
        self._watch.follow(progress.round + 1, wait_s=HEAD_WAIT_S)  # log: the outcome is in it; then this silo's last word
        said = Acknowledgement(
            round_ctx=progress.manifest, silo=self._parts.member.id, outcome=progress.outcome, state=progress.state.digest
        )
        self._parts.transport.put("acknowledgement", progress.round, self._parts.member.id, self._sign("acknowledgement", said))

    def _forget(self, settled: int) -> None:
        """Delete the secrets of a settled round. Those of a later one, which a crash left open, stay: they must be sent again."""
        path = self._folder / "attempt"
        if path.is_file() and Persisted.from_bytes(path.read_bytes()).round > settled:
            return
        for name in ("attempt", "release", "verdict"):
            (self._folder / name).unlink(missing_ok=True)
            files.sweep(self._folder / name)

    def _persisted(self, number: int, round_ctx: bytes) -> Persisted | None:
        if self._epoch.folder is None or not (path := self._folder / "attempt").is_file():
            return None
        found = Persisted.from_bytes(path.read_bytes())
        if (found.round, found.round_ctx) != (number, round_ctx):
            raise TrustError(
                f"an upload for round {found.round} lies in epoch/, the open round is {number}",
                hint="the home was restored or shared; start a new epoch",
                code="stale-upload",
            )
        return found

    def _await(self, kind: Literal["freeze", "certificate", "claim"], manifest: Manifest) -> bytes | None:
        """The document, or None as soon as the round's outcome stands instead (a void round needs no freeze)."""
        while True:
            document = self._parts.transport.get(kind, manifest.round, AGGREGATOR, wait_s=POLL_S)
            if document is not None or self._outcome(manifest.round) is not None:
                return document
            self._check_time(kind, manifest)

    def _await_outcome(self, manifest: Manifest) -> bytes:
        while (document := self._parts.transport.get("outcome", manifest.round, AGGREGATOR, wait_s=POLL_S)) is None:
            self._check_time("outcome", manifest)
        return document

    def _check_time(self, kind: str, manifest: Manifest) -> None:
        # Consents and releases may take a deadline each; lists, endorsements, shares and the guardians' closes likewise.
        grace_s = ((6 if self._terms.shared else 3) + self._terms.sliced) * self._terms.sum.deadline_s
        self._parts.pulse()
        if self._parts.clock() >= manifest.deadline_at + grace_s:
            raise RoundError(
                f"round {manifest.round} has no {kind}, {grace_s} s after its deadline",
                hint="run the same command again: it settles the round when the aggregator closes it",
                code="no-outcome",
            )

    def _outcome(self, number: int) -> bytes | None:
        return self._parts.transport.get("outcome", number, AGGREGATOR, wait_s=0)

    def _post(self, kind: Literal["upload", "consent", "release", "verdict"], number: int, document: bytes) -> bool:
        """Put a document; False when it was refused because the round has ended."""
        try:
            self._parts.transport.put(kind, number, self._parts.member.id, document)
        except (RoundError, Replay):
            late = self._terms.shared and self._parts.transport.get("freeze", number, AGGREGATOR, wait_s=0) is not None
            if self._outcome(number) is None and not late:  # a set stands without this silo: it follows the round to its end
                raise
            return False
        return True

    @property
    def _folder(self) -> Path:
        if self._epoch.folder is None:
            number = self._epoch.number
            raise TrustError(f"this silo has no part in epoch {number}", hint="it enters the next one", code="not-in-epoch")
        return self._epoch.folder

    def _sign(self, kind: Literal["header", "upload", "consent", "release", "verdict", "acknowledgement"], message: Wire) -> bytes:
        parts = self._parts
        return envelope.sign(parts.identity, type=kind, context=self._epoch.context, sender=parts.member.id, body=encode(message))
