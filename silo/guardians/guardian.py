# SPDX-License-Identifier: Apache-2.0
"""A guardian: it keeps shares of what unmasks a sum, and gives them out for one set a round, against q guardians' signatures.

``Guardian.step`` does whatever can be done now and names the document it waits for; the caller waits. In a round it lists the
uploads it can answer for, endorses the one set that follows from the lists, and releases its shares once q guardians endorsed that
set. Where a step does not come within the contract's deadline, it closes the round, and does nothing more in it.

**Formal guarantees**

- *One set per round*: (round → manifest) and (round → digest of U) lie on the disk before an endorsement or a share leaves, and are
  never made a second time with other content; a share leaves only for that set, only against a certificate.
- *A close is the last word*: it lies on the disk before it leaves; nothing is endorsed or released in that round afterwards.
- *In order*: nothing is said in a round whose manifest does not name the outcome before it, or a log head that q parties cosigned.
- *Refuses when put back*: a document of this guardian on the board, without the promise behind it on this disk, ends its work in
  that epoch.

Not promised: that it notices a rollback which the aggregator hides, nor anything against more than T guardians that work together.
A late or silent guardian is one that is down: the others' shares do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, MutableMapping

from privacy import chain, envelope
from privacy.errors import Replay, TrustError
from privacy.federation import Accepted
from privacy.federation import Guardian as Party
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Kind, Manifest, Roster, Signed, decode
from privacy.secure_sum import epoch as epochs
from privacy.secure_sum import guardian_sum
from privacy.transparency import log, notes
from silo.guardians.guardian_round import NEVER, Epoch, Post, Round, Waiting
from silo.guardians.vows import Vows
from silo.home import Home
from silo.session import Superseded, called
from silo.transport import Transport
from silo.watch import Watch


class Guardian:
    """One guardian's work in a federation; see the module docstring.

    Args:
        party: which guardian of the contract this is.
        clock: Unix seconds.
        former: digests of the contract's earlier versions.
        outcomes: SHA-256 of outcomes' bodies by round, where somebody else in this process has verified them.
        watch: its eye on the log, by which it cosigns; None where the silo in this process has one.
        told: is told in words what it does, and why it does not.
    """

    def __init__(
        self, *, home: Home, transport: Transport, identity: keys.Identity, accepted: Accepted, party: Party,
        clock: Callable[[], float], former: Container[bytes] = (), outcomes: MutableMapping[int, bytes] | None = None,
        watch: Watch | None = None, told: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.superseded: Superseded | None = None
        """Why it acts in no newer epoch: that is called under a contract which is not known here."""
        self.finished = 0
        """Rounds with an outcome in which it acted since it was made."""
        self._former, self._watch = former, watch
        kept = chain.ancestors(accepted, [envelope.open_contract(raw) for _, raw in home.contracts()])
        self._earlier = tuple(each.terms for each in kept)  # whose keys signed what came before this version
        self._accepted, self._clock, self._vows = accepted, clock, Vows(home)
        self._post = Post(transport=transport, identity=identity, accepted=accepted, party=party, vows=self._vows, told=told)
        self._outcomes: MutableMapping[int, bytes] = {} if outcomes is None else outcomes
        self._called = 0
        self._given_up = home.restored_epoch()
        self._epoch: Epoch | None = None
        self._number = max(1, self._vows.latest)
        self._round: Round | None = None

    def step(self) -> Waiting:
        """Do what can be done now; which document to wait for, and until when at most (Unix seconds).

        Raises:
            TrustError: a document of the aggregator's does not hold; nothing was said on it.
            Equivocation: the board holds other bytes of this guardian than it sends.
            MachineError: the disk, or the way to the board.
        """
        waiting = self._set_up()
        if self._epoch is None:
            return waiting
        if self._round is None or self._over(self._round.number):
            self._leave_round(self._epoch)
            waiting = self._enter_round(self._epoch)
        return waiting if self._round is None else self._round.step()

    # --- Epoch -----------------------------------------------------------------------------------------------------------

    def _set_up(self) -> Waiting:
        """Post a note for the newest call, and enter its epoch once the roster stands; what to wait for while there is none."""
        if self.superseded is None:
            try:
                newest = called(self._post.transport, self._accepted, after=self._called, former=self._former)
                self._called = self._called if newest is None else newest
            except Superseded as error:
                self.superseded = error
        number = self._called
        if number > self._given_up and (self._epoch is None or self._epoch.number != number):
            self._post_note(number)
            document = self._post.get("roster", number)
            if number > self._given_up:
                if document is None:
                    return ("roster", number, AGGREGATOR), NEVER
                self._enter(number, self._post.open(document, "roster", self._accepted.digest))
        return ("epoch", number + 1, AGGREGATOR), NEVER

    def _post_note(self, number: int) -> None:
        secrets, own = self._vows.secrets(number), self._post.party.id
        if secrets is None:
            if self._post.get("guardian-note", number, own) is not None:
                self._give_up(number, "its note stands on the board, and the secrets behind it are not here")
                return
            secrets, _ = epochs.new_guardian_note(self._accepted.digest, number, own)
            self._vows.keep_secrets(secrets)
        note = epochs.guardian_note_of(secrets)
        try:
            self._post.say("guardian-note", number, lambda: note, epoch=number, context=self._accepted.digest)
        except Replay:
            self._give_up(number, "it came after the roster was made")

    def _enter(self, number: int, body: bytes) -> None:
        """The epoch of this roster, if it holds this guardian's own note."""
        roster, secrets = decode(body, Roster), self._vows.secrets(number)
        silos = tuple(note.silo for note in epochs.check_roster(roster, self._accepted))
        guardians = epochs.guardian_notes(roster, self._accepted)
        if secrets is None or self._post.party.id not in [note.guardian for note in guardians]:
            self._give_up(number, "the roster was made without it")
            return
        epochs.check_own_guardian(secrets, guardians)
        context = epochs.epoch_ctx(self._accepted.digest, number, body)
        self._epoch, self._round = Epoch(number=number, context=context, silos=silos, secrets=secrets), None
        self._post.told(f"epoch {number}: guardian {self._post.party.id} for silos {list(silos)}")

    def _give_up(self, number: int, why: str) -> None:
        """Sit this epoch out, as a guardian that is down. The next epoch starts afresh."""
        self._given_up = number
        self._epoch = self._round = None
        self._post.told(f"epoch {number}: guardian {self._post.party.id} does not act: {why}")

    # --- Round -----------------------------------------------------------------------------------------------------------

    def _over(self, number: int) -> bool:
        """Whether the round has an outcome: the head of the next one is shown right after it."""
        return self._post.get("checkpoint", number + 1) is not None

    def _leave_round(self, epoch: Epoch) -> None:
        if self._round is not None:
            self.finished += 1
            self._vows.forget_documents(epoch.number, self._round.number)
            self._number, self._round = self._round.number + 1, None

    def _enter_round(self, epoch: Epoch) -> Waiting:
        """Find the round to act in, and bind to its manifest; what to wait for when there is none."""
        while self._post.get("manifest", self._number + 1) is not None:
            self._number += 1
        if self._over(self._number):
            self._number += 1
        number, document = self._number, self._post.get("manifest", self._number)
        if self._watch is not None and not self._watch.follow(number, wait_s=0.0):
            return ("checkpoint", number, AGGREGATOR), NEVER
        if document is None:
            return ("manifest", number, AGGREGATOR), NEVER
        if decode(document, Signed).context != epoch.context:  # of an epoch in which it has no part: only its end matters
            return ("checkpoint", number + 1, AGGREGATOR), NEVER
        body = self._post.open(document, "manifest", epoch.context)
        manifest, ctx = decode(body, Manifest), guardian_sum.round_ctx(body)
        self._check_manifest(manifest, epoch)
        said: tuple[Kind, ...] = ("list", "endorsement", "shares", "close")
        for kind in said:
            if self._vows.broken(kind, number) and self._post.get(kind, number, self._post.party.id) is not None:
                self._give_up(epoch.number, f"its {kind} {number} stands on the board and no promise of it lies here")
                return ("epoch", self._called + 1, AGGREGATOR), NEVER
        self._vows.bind(number, ctx)
        self._vows.forget_epochs(before=epoch.number)
        self._round = Round(self._post, epoch, manifest, ctx, self._clock)
        return ("checkpoint", number + 1, AGGREGATOR), NEVER

    def _check_manifest(self, manifest: Manifest, epoch: Epoch) -> None:
        """Return if the manifest continues the outcome before it, on a head of the log that a quorum cosigned."""
        raw = self._post.get("head", manifest.round)
        earlier = self._earlier if self._is_first(manifest.round) else ()
        head = None if raw is None else log.open_head(notes.parse(raw), self._accepted.terms, earlier)
        expected: dict[str, object] = {
            "epoch_ctx": epoch.context, "epoch": epoch.number, "round": self._number, "previous": self._previous(self._number),
            "log_size": None if head is None else head.size, "log_root": None if head is None else head.root,
            "deadline_at": manifest.opened_at + self._accepted.terms.sum.deadline_s,
        }  # fmt: skip
        for name, wanted in expected.items():
            if getattr(manifest, name) != wanted:
                raise TrustError(
                    f"the manifest of round {self._number} has another {name} than this guardian knows",
                    hint="nothing was said in this round", code=f"manifest-{name}".replace("_", "-"),
                )  # fmt: skip

    def _previous(self, number: int) -> bytes | None:
        """What the manifest of this round must name as the outcome before it."""
        if number == 1:
            return self._accepted.digest
        if number - 1 not in self._outcomes:
            document = self._post.get("outcome", number - 1)
            if document is None:
                return None
            signed = decode(document, Signed)  # in the context of its own epoch; that the aggregator signed it is what counts
            self._outcomes[number - 1] = hashlib.sha256(self._opened(document, signed.context, number)).digest()
        return self._outcomes[number - 1]

    def _opened(self, document: bytes, context: bytes, number: int) -> bytes:
        """The body of the outcome before round ``number``, which a key of an earlier version may have signed."""
        for terms in self._earlier if self._is_first(number) else ():
            try:
                key = terms.aggregator.verify_key
                return envelope.open_signed(document, type="outcome", context=context, sender=AGGREGATOR, key=key)
            except TrustError:
                continue
        return self._post.open(document, "outcome", context)

    def _is_first(self, number: int) -> bool:
        """Whether the round before was of an earlier version: its outcome, and the head of this one, have the keys of then."""
        before = self._post.get("manifest", number - 1)
        call = None if before is None else self._post.get("epoch", decode(decode(before, Signed).body, Manifest).epoch)
        return call is not None and decode(call, Signed).context in self._former


def party_of(accepted: Accepted, identity: keys.Identity) -> Party | None:
    """The guardian of the contract whose key this identity holds, or None."""
    own = identity.public.sign_key[:32].hex()
    return next((guardian for guardian in accepted.terms.guardian if guardian.sign_key == own), None)
