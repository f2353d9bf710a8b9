# SPDX-License-Identifier: Apache-2.0
"""A whole federation in memory: honest silos that answer whatever stands on the board, a clock that moves only when somebody
sleeps, and levers to withhold or alter what a silo says. Its silos train nothing: their vectors are small seeded integers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable

import numpy as np

from aggregator import admission, rounds
from aggregator.board import Board
from aggregator.config import Config, Home, Listen
from aggregator.coordinator import Coordinator
from aggregator.store import Entry, Store
from privacy import envelope, update_rule
from privacy.federation import parse, ring_plan
from privacy.identity.keys import Identity
from privacy.messages import (
    AGGREGATOR,
    Acknowledgement,
    Certificate,
    Consent,
    Countersignature,
    Freeze,
    Outcome,
    Roster,
    Signed,
    Upload,
    decode,
    encode,
)
from privacy.secure_sum import epoch as epochs
from privacy.secure_sum import guardian_sum
from privacy.transparency import log, notes
from tests.terms import contract_bytes

HUB = Identity(name="hub", sign_seed=bytes([100]) * 32, receive_seed=bytes([101]) * 32)
START = 1_800_000_000.0


def silo_identity(silo: int) -> Identity:
    return Identity(name=f"silo-{silo}", sign_seed=bytes([silo]) * 32)


def signed_by_hub(kind, context, message):
    body = message if isinstance(message, bytes) else encode(message)
    return envelope.sign(HUB, type=kind, context=context, sender=AGGREGATOR, body=body)


def upload_of(document: bytes) -> Upload:
    """What an upload's document says; signatures are not checked."""
    return decode(decode(document, Signed).body, Upload)


def vector(silo: int, number: int, dimension: int, seed: int = 0) -> np.ndarray:
    """The silo's integers in a round, (d,) int64, small enough for any plan."""
    random = np.random.default_rng([seed, silo, number])
    return random.integers(-100_000, 100_000, dimension)


class NoBoard:
    """A silo's transport that shows nothing."""

    def get(self, *_, **__):
        return None

    fetch = get


class Stopped(Exception):
    """The test's sudden end of a coordinator."""


class Remembering(Store):
    """A store that looks up once what stands: a slot is written once, and such looks are half of all work in these tests."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.known: dict[tuple[str, int, int], Entry] = {}

    def entry(self, kind, number, party):
        found = self.known.get((kind, number, party)) or super().entry(kind, number, party)
        if found is not None:
            self.known[kind, number, party] = found
        return found


class Clock:
    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now


class HonestSilo:
    """One silo. ``step`` does all it can do now; ``withhold`` names kinds it does not send, ``alter`` changes bytes underway."""

    def __init__(self, silo: int, accepted, board: Board):
        self.id, self.accepted, self.board = silo, accepted, board
        self.identity = silo_identity(silo)
        self.member = accepted.terms.by_id(silo)
        self.withhold: set[str] = set()
        self.alter: dict[str, Callable[[bytes], bytes]] = {}
        self.state = update_rule.initial(accepted.terms)
        self.epoch = self.settled = 0
        self.secrets: dict[int, epochs.EpochSecrets] = {}
        self.sent: dict[tuple[str, int], bytes] = {}
        self.held: dict[tuple[str, int], bytes] = {}
        self.chain = self.seed = None
        self.consented = b""
        self.ledger_counter: int | None = None  # the lever of a ledger that was put back

    def step(self) -> None:
        self.say(
            "countersignature", 1, self.accepted.digest, lambda: Countersignature(contract=self.accepted.digest, member=self.id)
        )
        number = self.epoch + 1
        while self.hub("epoch", number + 1, self.accepted.digest):
            number += 1
        if self.hub("epoch", number, self.accepted.digest):
            self.set_up(number)
        elif self.chain is not None:
            self.cosign(self.settled + 1)
            self.take_part(self.settled + 1)

    def cosign(self, number: int) -> None:
        """Cosign the log's head of a round; an honest silo of this kind does not look what is in it."""
        checkpoint = self.board.get("checkpoint", number, AGGREGATOR)
        if checkpoint is not None and ("cosignature", number) not in self.sent and "cosignature" not in self.withhold:
            text, name = notes.parse(checkpoint).text, log.cosigner_name(self.accepted.terms, self.member)
            made = notes.cosigned(text, name=name, seed=self.identity.sign_seed, time=int(START)).to_bytes()
            self.board.put("cosignature", number, self.id, made)
            self.sent["cosignature", number] = made

    def set_up(self, number: int) -> None:
        digest = self.accepted.digest
        if number not in self.secrets:
            self.secrets[number], _ = epochs.new_note(digest, number, self.id, bytes(32))
        secrets = self.secrets[number]
        self.say("epoch-note", number, digest, lambda: epochs.note_of(secrets))
        body = self.hub("roster", number, digest)
        if body is None:
            return
        notes = epochs.check_roster(decode(body, Roster), self.accepted)
        context = epochs.epoch_ctx(digest, number, body)
        self.say("pair-seeds", number, context, lambda: epochs.seal_seeds(secrets, notes, context=context))
        if (seeds := self.everybody("pair-seeds", number)) is None:
            return
        pairs = epochs.pair_secrets(secrets, notes, seeds, accepted=self.accepted, context=context)
        own = epochs.confirmation(secrets, pairs)
        self.say("confirmation", number, context, lambda: own)
        if (tags := self.everybody("confirmation", number)) is None:
            return
        epochs.check_confirmations(tags, accepted=self.accepted, context=context, epoch=number, own=own)
        self.chain, self.epoch = epochs.PairChain.start(secrets, pairs, context=context), number

    def take_part(self, number: int) -> None:
        context = self.chain.context
        manifest = self.hub("manifest", number, context)
        if manifest is None:
            return
        ctx = guardian_sum.round_ctx(manifest)
        if (outcome := self.hub("outcome", number, context)) is not None:
            self.settle(number, ctx, outcome)
            return
        self.say("upload", number, context, lambda: self.upload(number, ctx))
        freeze = self.hub("freeze", number, context)
        if freeze is None:
            return
        own = upload_of(self.sent["upload", number]).header if ("upload", number) in self.sent else None
        frozen = guardian_sum.check_freeze(
            decode(freeze, Freeze), accepted=self.accepted, epoch_ctx=context, round_ctx=ctx, own_header=own
        )
        self.consented = frozen.digest
        self.say("consent", number, context, lambda: Consent(round_ctx=ctx, silo=self.id, frozen=frozen.digest))
        body = self.hub("certificate", number, context)
        if body is None:
            return
        certified = guardian_sum.check_certificate(decode(body, Certificate), frozen, accepted=self.accepted, epoch_ctx=context)
        seal_key = bytes.fromhex(self.accepted.terms.aggregator.seal_key)
        release = lambda: guardian_sum.seal_release(certified, silo=self.id, self_seed=self.seed, seal_key=seal_key)  # noqa: E731
        self.say("release", number, context, release)

    def upload(self, number: int, ctx: bytes) -> Upload:
        x = (vector(self.id, number, self.accepted.terms.dimension) % 2**32).astype("<u4")
        attempt = hashlib.sha256(bytes([self.id, number])).digest()[:16]
        x_digest = hashlib.sha256(x.tobytes()).digest()
        self.seed = guardian_sum.self_seed(bytes([self.id]) * 32, attempt, x_digest, bytes([number]) * 32)
        place = {
            "round_ctx": ctx,
            "silo": self.id,
            "attempt": attempt,
            "self_seed": self.seed,
            "pair_keys": self.chain.round_keys(ctx),
        }
        y = guardian_sum.mask(x, **place)
        counter = number if self.ledger_counter is None else self.ledger_counter
        header = self.sign("header", self.chain.context, guardian_sum.build_header(y, ledger_counter=counter, **place))
        info = guardian_sum.upload_info(round_ctx=ctx, silo=self.id, header=header)
        sealed = envelope.seal(bytes.fromhex(self.accepted.terms.aggregator.seal_key), y.tobytes(), info=info)
        return Upload(header=header, sealed=sealed)

    def settle(self, number: int, ctx: bytes, body: bytes) -> None:
        outcome = decode(body, Outcome)
        assert outcome.kind == "void" or outcome.frozen == self.consented
        after = rounds.settle(self.state, outcome, self.accepted.terms)
        digest = hashlib.sha256(body).digest()
        stated = Acknowledgement(round_ctx=ctx, silo=self.id, outcome=digest, state=after.digest)
        if self.say("acknowledgement", number, self.chain.context, lambda: stated):
            self.chain, self.settled, self.state = self.chain.advance(), number, after

    def say(self, kind, number, context, make) -> bool:
        """Whether the document stands; one that is withheld is made, and sent when the lever is let go."""
        slot = (kind, number)
        if slot in self.sent:
            return True
        if slot not in self.held:
            self.held[slot] = self.alter.get(kind, lambda same: same)(self.sign(kind, context, make()))
        if kind in self.withhold:
            return False
        self.board.put(kind, number, self.id, self.held[slot])
        self.sent[slot] = self.held.pop(slot)
        return True

    def sign(self, kind, context, message) -> bytes:
        return envelope.sign(self.identity, type=kind, context=context, sender=self.id, body=encode(message))

    def hub(self, kind, number, context) -> bytes | None:
        raw = self.board.get(kind, number, AGGREGATOR)
        key = bytes.fromhex(self.accepted.terms.aggregator.sign_key)
        return None if raw is None else envelope.open_signed(raw, type=kind, context=context, sender=AGGREGATOR, key=key)

    def everybody(self, kind, number) -> dict[int, bytes] | None:
        found = {member.id: self.board.get(kind, number, member.id) for member in self.accepted.terms.member}
        return None if None in found.values() else found


class Federation:
    """A home with a published contract, its board, honest silos and a clock. The silos act whenever the coordinator sleeps."""

    def __init__(self, root, silos: int = 3, **changes):
        self.clock = Clock()
        changes["sum"] = {"deadline_s": 10, **changes.get("sum", {})}
        self.home = Home.create(root / "aggregator", Config(name="hub", listen=Listen(port=0)))
        raw = contract_bytes(
            silos, sign_keys=[silo_identity(i).public.sign_key.hex() for i in range(1, silos + 1)],
            aggregator_key=HUB.public.sign_key.hex(), seal_key=HUB.public.seal_key.hex(), **changes,
        )  # fmt: skip
        self.accepted = parse(raw)
        self.store = Remembering(self.home.evidence_folder, self.home.database_url(self.home.config()))
        self.store.put_once("contract", 1, AGGREGATOR, signed_by_hub("contract", self.accepted.digest, raw), received_at=START)
        self.board = Board(self.store, admission.admit, self.clock)
        self.silos = [HonestSilo(i, self.accepted, self.board) for i in range(1, silos + 1)]
        self.events = []

    def sleep(self, seconds: float) -> None:
        self.clock.now += max(seconds, 0.5)
        for silo in self.silos:
            silo.step()

    def coordinator(self, *, sleep=None, progress=None, store=None) -> Coordinator:
        return Coordinator(
            home=self.home, store=store or self.store, identity=HUB, accepted=self.accepted, clock=self.clock,
            sleep=sleep or self.sleep, progress=progress or self.events.append,
        )  # fmt: skip

    def ready(self) -> Coordinator:
        """A coordinator whose federation is countersigned and has an epoch."""
        coordinator = self.coordinator()
        coordinator.ensure_countersigned()
        coordinator.ensure_epoch()
        return coordinator

    def stall(self, number: int, kind: str, *silos: int) -> rounds.Round | None:
        """Go on, up to a round, until only ``kind`` of these silos (default: of all) is missing; the round, if it is open."""
        for silo in self.silos:
            if not silos or silo.id in silos:
                silo.withhold.add(kind)
        left = [16]

        def sleep(seconds: float) -> None:
            self.sleep(seconds)
            left[0] -= 1
            if left[0] == 0:
                raise Stopped

        with contextlib.suppress(Stopped):
            coordinator = self.coordinator(sleep=sleep)
            coordinator.ensure_countersigned()
            coordinator.run_round(number)
        for silo in self.silos:
            silo.withhold.discard(kind)
        return rounds.round_in(self.store, self.accepted, number)

    def expected_total(self, number: int) -> np.ndarray:
        """The exact integer sum of a round, (d,) int64."""
        return sum(vector(silo.id, number, self.accepted.terms.dimension) for silo in self.silos)

    def reached(self, numbers) -> update_rule.State:
        """The state after results of these rounds, by the update rule alone."""
        state = update_rule.initial(self.accepted.terms)
        assert ring_plan(self.accepted.terms).clamp > 100_000
        for number in numbers:
            state = update_rule.advance(state, self.expected_total(number), self.accepted.terms)
        return state
