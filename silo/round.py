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

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from privacy import envelope, files, guardian_sum, keys
from privacy.errors import Equivocation, Replay, RoundError, TrustError
from privacy.federation import Accepted, Member, ring_plan
from privacy.messages import (
    AGGREGATOR,
    Acknowledgement,
    Certificate,
    Consent,
    Freeze,
    Manifest,
    Outcome,
    Wire,
    decode,
    encode,
)
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import local
from silo.home import Home, Progress
from silo.session import Epoch
from silo.settlement import Integers, Words, load_progress, next_state, refuse_to_go_on, shown, verified_total
from silo.transport import Transport
from silo.upload import Persisted, masked, noisy

POLL_S = 5.0
ID_BYTES = 16

Contribute = Callable[[State], Integers]
"""The clamped, noiseless integer sum (d,) of one private step at this state, from a fresh sample."""


class Gate(Protocol):
    """What a round needs of privacy.budget.Gate."""

    def admit(self, round: int, attempt: bytes) -> int:
        """Reserve the attempt's cost in the ledger, on disk, and give its counter; or refuse before any record is read."""
        ...

    def settle(self, round: int, outcome: Literal["result", "void"]) -> None:
        """Note how the round ended, once; nothing is given back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settled:
    """How a round ended for this silo. ``kind`` is "rejected" for a sum beyond the bounds: the state did not move."""

    round: int
    kind: Literal["result", "rejected", "void"]
    reason: str
    state: State
    upload_bytes: int


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a silo's rounds are made of. ``clock`` gives Unix seconds; ``randomness`` and ``os_random`` are fresh at every call."""

    home: Home
    transport: Transport
    identity: keys.Identity
    accepted: Accepted
    member: Member
    gate: Gate
    contribute: Contribute
    clock: Callable[[], float]
    randomness: Callable[[], Randomness] = Randomness.from_os
    os_random: Callable[[int], bytes] = os.urandom


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
        self._finished = -1

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
        number = progress.round + 1
        document = self._parts.transport.get("manifest", number, AGGREGATOR, wait_s=wait_s)
        if document is None:
            return None
        manifest, round_ctx = self._check_manifest(document, progress)
        persisted = self._persisted(number, round_ctx)
        if self._outcome(number) is None:  # after a restart the round may be over: nothing is promised or sent any more
            if persisted is None and self._parts.clock() < manifest.deadline_at:
                persisted = self._attempt(manifest, round_ctx, progress)
            if persisted is not None:
                self._agree(manifest, persisted)
        outcome = self._await_outcome(manifest)
        settled = self._settle(outcome, round_ctx, progress, persisted)
        refuse_to_go_on(load_progress(self._parts.home, self._parts.accepted), self._terms)
        return settled

    def _check_manifest(self, document: bytes, progress: Progress) -> tuple[Manifest, bytes]:
        """The manifest and round_ctx, if it continues exactly what this silo has computed itself under the contract."""
        body = self._open(document, "manifest")
        manifest, plan = decode(body, Manifest), ring_plan(self._terms)
        expected: dict[str, object] = {
            "epoch_ctx": self._epoch.context,
            "epoch": self._epoch.number,
            "round": progress.round + 1,
            "previous": progress.outcome,
            "base_state": progress.state.digest,
            "dimension": self._terms.dimension,
            "lattice_bits": plan.lattice_bits,
            "clamp": plan.clamp,
            "deadline_at": manifest.opened_at + self._terms.sum.deadline_s,
        }
        for field, wanted in expected.items():
            found = getattr(manifest, field)
            if found != wanted:
                raise TrustError(
                    f"the manifest of round {progress.round + 1} says {field} = {shown(found)}, this silo has {shown(wanted)}",
                    hint="nothing was sent; the aggregator and this silo do not stand at the same place",
                    code=f"manifest-{field}".replace("_", "-"),
                )
        round_ctx = guardian_sum.round_ctx(body)
        promised = self._parts.home.promised_manifest(manifest.round)
        if promised not in (None, round_ctx):  # before the gate: a second manifest must not cost a reservation
            raise Equivocation(
                f"a second manifest for round {manifest.round}: {shown(round_ctx)}, promised was {shown(promised)}",
                hint="stop, and show both documents to the other members",
                round=manifest.round,
            )
        return manifest, round_ctx

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
        counter = parts.gate.admit(manifest.round, attempt)
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
            sign=self._sign,
        )
        persisted = msgspec.structs.replace(upload, own=b"" if own is None else own.to_bytes())
        files.write_once(self._epoch.folder / "attempt", persisted.to_bytes(), mode=files.PRIVATE)
        return persisted

    def _computed(self, progress: Progress) -> tuple[Words, State | None]:
        """This attempt's vector (d,), and in local mode the silo's own optimiser after it."""
        parts = self._parts
        if self._terms.training.mode == "joint":
            return noisy(parts.contribute(progress.state), self._terms, parts.randomness()), None
        return local.trained(progress.state, progress.own, self._terms, contribute=parts.contribute, randomness=parts.randomness)

    def _agree(self, manifest: Manifest, own: Persisted) -> None:
        """Send, consent and release; returns early when an outcome stands already."""
        parts = self._parts
        if not self._post("upload", manifest.round, own.upload):
            return
        freeze = self._await("freeze", manifest)
        if freeze is None:
            return
        frozen = self._frozen(freeze, own.round_ctx, own)
        parts.home.promise_consent(manifest.round, frozen.digest)
        consent = Consent(round_ctx=own.round_ctx, silo=parts.member.id, frozen=frozen.digest)
        if not self._post("consent", manifest.round, self._sign("consent", consent)):
            return
        certificate = self._await("certificate", manifest)
        if certificate is None:
            return
        certified = guardian_sum.check_certificate(
            decode(self._open(certificate, "certificate"), Certificate),
            frozen,
            accepted=parts.accepted,
            epoch_ctx=self._epoch.context,
        )
        self._post("release", manifest.round, self._release(certified, own))

    def _release(self, certified: guardian_sum.Certified, own: Persisted) -> bytes:
        """The signed release; sealing draws new randomness, so its bytes are kept before they leave."""
        path = self._epoch.folder / "release"
        if path.is_file():
            return path.read_bytes()
        seal_key = bytes.fromhex(self._terms.aggregator.seal_key)
        release = guardian_sum.seal_release(certified, silo=self._parts.member.id, self_seed=own.self_seed, seal_key=seal_key)
        document = self._sign("release", release)
        files.write_once(path, document, mode=files.PRIVATE)
        return document

    def _settle(self, document: bytes, round_ctx: bytes, before: Progress, own: Persisted | None) -> Settled:
        """Verify the outcome, apply it by own arithmetic, compare digests, save, and clean up."""
        body = self._open(document, "outcome")
        outcome = decode(body, Outcome)
        number = before.round + 1
        if (outcome.round, outcome.round_ctx) != (number, round_ctx):
            raise TrustError(
                f"the outcome stored for round {number} is for round {outcome.round}",
                hint="the aggregator is faulty",
                code="wrong-round",
            )
        state = before.state
        kind: Literal["result", "rejected", "void"] = "void"
        if outcome.kind == "result":
            state = next_state(before.state, self._total(outcome, own), self._terms)
            kind = "rejected" if state is before.state else "result"
        if outcome.next_state != state.digest:
            raise TrustError(
                f"after round {number} the aggregator has {shown(outcome.next_state)}, this silo computed {shown(state.digest)}",
                hint="keep both machines as they are and compare: one of them is faulty",
                code="state-differs",
                round=number,
            )
        after = Progress(
            contract=self._parts.accepted.digest,
            epoch=self._epoch.number,
            round=number,
            manifest=round_ctx,
            outcome=hashlib.sha256(body).digest(),
            voids=0 if kind == "result" else before.voids + 1,
            state=state,
            own=State.from_bytes(own.own) if kind == "result" and own is not None and own.own else before.own,
        )
        self._parts.home.save_progress(after)
        self._finish(after)
        return Settled(round=number, kind=kind, reason=outcome.reason, state=state, upload_bytes=len(own.upload) if own else 0)

    def _total(self, outcome: Outcome, own: Persisted | None) -> Integers:
        """The lifted sum of a result, verified against the set this silo consented to."""
        parts, number = self._parts, outcome.round
        freeze = parts.transport.get("freeze", number, AGGREGATOR, wait_s=0)
        if freeze is None:
            raise TrustError(f"round {number} has a result and no freeze", hint="the aggregator is faulty", code="no-freeze")
        frozen = self._frozen(freeze, outcome.round_ctx, own)
        return verified_total(outcome, frozen, consented=parts.home.promised_consent(number), terms=self._terms)

    def _frozen(self, document: bytes, round_ctx: bytes, own: Persisted | None) -> guardian_sum.Frozen:
        return guardian_sum.check_freeze(
            decode(self._open(document, "freeze"), Freeze),
            accepted=self._parts.accepted,
            epoch_ctx=self._epoch.context,
            round_ctx=round_ctx,
            own_header=own.header if own else None,
        )

    def _finish(self, progress: Progress) -> None:
        """What follows a saved state: chain, ledger, secrets, acknowledgement. Repeatable, so a crash between them is harmless."""
        if progress.round in (0, self._finished):
            return
        self._parts.gate.settle(progress.round, "void" if progress.voids else "result")
        self._finished = progress.round
        if progress.epoch != self._epoch.number:
            return
        self._epoch.settle(progress.round)
        self._forget(progress.round)
        said = Acknowledgement(
            round_ctx=progress.manifest, silo=self._parts.member.id, outcome=progress.outcome, state=progress.state.digest
        )
        self._parts.transport.put("acknowledgement", progress.round, self._parts.member.id, self._sign("acknowledgement", said))

    def _forget(self, settled: int) -> None:
        """Delete the secrets of a settled round. Those of a later one, which a crash left open, stay: they must be sent again."""
        path = self._epoch.folder / "attempt"
        if path.is_file() and Persisted.from_bytes(path.read_bytes()).round > settled:
            return
        for name in ("attempt", "release"):
            (self._epoch.folder / name).unlink(missing_ok=True)
            files.sweep(self._epoch.folder / name)

    def _persisted(self, number: int, round_ctx: bytes) -> Persisted | None:
        path = self._epoch.folder / "attempt"
        if not path.is_file():
            return None
        found = Persisted.from_bytes(path.read_bytes())
        if (found.round, found.round_ctx) != (number, round_ctx):
            raise TrustError(
                f"an upload for round {found.round} lies in epoch/, the open round is {number}",
                hint="the home was restored or shared; start a new epoch",
                code="stale-upload",
            )
        return found

    def _await(self, kind: Literal["freeze", "certificate"], manifest: Manifest) -> bytes | None:
        """The document, or None as soon as the round's outcome stands instead (a void round needs no freeze)."""
        while True:
            document = self._parts.transport.get(kind, manifest.round, AGGREGATOR, wait_s=POLL_S)
            if document is not None or self._outcome(manifest.round) is not None:
                return document
            self._check_time(kind, manifest)

    def _await_outcome(self, manifest: Manifest) -> bytes:
        while True:
            document = self._parts.transport.get("outcome", manifest.round, AGGREGATOR, wait_s=POLL_S)
            if document is not None:
                return document
            self._check_time("outcome", manifest)

    def _check_time(self, kind: str, manifest: Manifest) -> None:
        grace_s = 3 * self._terms.sum.deadline_s  # consents and releases may take a deadline each
        if self._parts.clock() >= manifest.deadline_at + grace_s:
            raise RoundError(
                f"round {manifest.round} has no {kind}, {grace_s} s after its deadline",
                hint="run the same command again: it settles the round when the aggregator closes it",
                code="no-outcome",
            )

    def _outcome(self, number: int) -> bytes | None:
        return self._parts.transport.get("outcome", number, AGGREGATOR, wait_s=0)

    def _post(self, kind: Literal["upload", "consent", "release"], number: int, document: bytes) -> bool:
        """Put a document; False when it was refused because the round has ended."""
        try:
            self._parts.transport.put(kind, number, self._parts.member.id, document)
        except (RoundError, Replay):
            if self._outcome(number) is None:
                raise
            return False
        return True

    def _open(self, document: bytes, kind: Literal["manifest", "freeze", "certificate", "outcome"]) -> bytes:
        key = self._terms.aggregator.verify_key
        return envelope.open_signed(document, type=kind, context=self._epoch.context, sender=AGGREGATOR, key=key)

    def _sign(self, kind: Literal["header", "upload", "consent", "release", "acknowledgement"], message: Wire) -> bytes:
        parts = self._parts
        return envelope.sign(parts.identity, type=kind, context=self._epoch.context, sender=parts.member.id, body=encode(message))
