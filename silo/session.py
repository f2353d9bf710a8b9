# SPDX-License-Identifier: Apache-2.0
"""One epoch of a silo: from the aggregator's call to a confirmed secret with every other silo, and its chain on disk.

Every step is written down before its message leaves, so a silo that crashes goes on with the same keys and sends the same
bytes. Promised: one note per epoch; private epoch keys and sent seeds are deleted when all pairs are confirmed; older epochs are
deleted when a newer one stands; the chain on disk never goes back. Not promised: that deletion wipes the medium.

In share mode an epoch has the silos that posted in time. One that came too late stays outside: it can follow the rounds
(``public``), which needs nothing secret, and enters the next epoch.

Files in ``epoch/<number>/``, all 0600: ``secrets`` and ``seeds`` (until confirmed), ``chain``, and those of the open round; in
share mode also ``roster``, which is public.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from privacy import envelope, files
from privacy.errors import RoundError, TrustError
from privacy.federation import Accepted, Member
from privacy.identity import keys
from privacy.messages import AGGREGATOR, EpochCall, EpochNote, GuardianNote, Number, Roster, Signed, decode, encode
from privacy.secure_sum import epoch as epochs
from privacy.secure_sum.epoch import EpochSecrets, PairChain, Secret
from silo.home import Home, remove_folder
from silo.transport import Transport
from silo.watch import expect

POLL_S = 5.0


class _Link(Secret, frozen=True, kw_only=True):
    """The chain as it stands after the outcome of round ``settled``."""

    format: Literal["chain-file/1"] = "chain-file/1"
    settled: Number
    chain: bytes


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A confirmed epoch: its number, epoch_ctx and folder. The chain is read from disk when it is needed.

    ``folder`` is None where this silo has no part in it and only follows. In share mode ``silos`` are those of the roster,
    ascending, and ``guardian_keys`` what shares are sealed to; in consent mode None, for all members, and nothing.
    """

    number: int
    context: bytes
    folder: Path | None
    silos: tuple[int, ...] | None = None
    guardian_keys: Mapping[int, bytes] = field(default_factory=dict)

    def round_keys(self, round_ctx: bytes, *, after: int) -> dict[int, bytes]:
        """k_ij for every peer in the round that follows the settled round ``after``.

        Raises:
            TrustError: the chain on disk stands at another round: the home was restored, or two processes shared it.
        """
        link = self._link()
        if link.settled != after:
            raise TrustError(
                f"the pair secrets stand after round {link.settled}, the state after round {after}",
                hint="ask the coordinator for a new epoch",
                code="chain-out-of-step",
            )
        return PairChain.from_bytes(link.chain).round_keys(round_ctx)

    def settle(self, round_number: int) -> None:
        """Move the chain past round ``round_number``, whose outcome is settled; repeating it changes nothing."""
        if self.folder is None:
            return
        link = self._link()
        if link.settled >= round_number:
            return
        chain = PairChain.from_bytes(link.chain)
        for _ in range(link.settled, round_number):
            chain = chain.advance()
        _write_link(self.folder, settled=round_number, chain=chain)

    def _link(self) -> _Link:
        raw = None if self.folder is None else _read(self.folder / "chain")
        if raw is None:
            raise TrustError(f"epoch {self.number} has no chain file", hint="join in a new epoch", code="malformed")
        return _Link.from_bytes(raw)


def current(home: Home) -> Epoch | None:
    """The newest confirmed epoch on this disk, or None. What a crash left of older ones is deleted."""
    found = next((each for number in sorted(_numbers(home), reverse=True) if (each := _established(home, number))), None)
    if found is not None:
        _forget_older(home, found)
    return found


class Superseded(TrustError):
    """The aggregator called an epoch under another version of the contract than the one at work here."""

    default_code = "contract-superseded"

    @classmethod
    def by(cls, epoch: int, contract: bytes) -> Superseded:
        """The refusal to go on in ``epoch``, which is called under ``contract``."""
        return cls(
            f"epoch {epoch} is called under contract {contract.hex()[:16]}…, which this silo has not countersigned",
            hint="run `silo join`, read what changes, and then `silo train` again", epoch=epoch, contract=contract.hex(),
        )  # fmt: skip


def called(transport: Transport, accepted: Accepted, *, after: int, former: Container[bytes] = ()) -> int | None:
    """The newest epoch above ``after`` that the aggregator has called for, or None.

    Args:
        former: digests of the contract's earlier versions: epochs under them are not this silo's any more.

    Raises:
        Superseded: one is called under another contract.
        TrustError: a call is not signed by the aggregator, or says another number or contract.
    """
    newest, number = None, after + 1
    while (document := transport.get("epoch", number, AGGREGATOR, wait_s=0)) is not None:
        context = decode(document, Signed).context
        if context in former:
            number += 1
            continue
        if context != accepted.digest:
            raise Superseded.by(number, context)
        call = decode(_from_aggregator(document, "epoch", accepted), EpochCall)
        if call != EpochCall(contract=accepted.digest, epoch=number):
            raise TrustError(
                f"the call stored for epoch {number} is for epoch {call.epoch}",
                hint="the aggregator is faulty",
                code="wrong-number",
            )
        newest, number = number, number + 1
    return newest


def public(transport: Transport, accepted: Accepted, number: int) -> Epoch:
    """Epoch ``number`` as everybody sees it, from its roster; for following rounds that this silo has no part in (share mode).

    Raises:
        RoundError: its roster is not there.
        TrustError: the roster does not hold.
    """
    document = transport.get("roster", number, AGGREGATOR, wait_s=0)
    if document is None:
        raise RoundError(f"epoch {number} has no roster", hint="run the same command again", code="epoch-incomplete", epoch=number)
    body = _from_aggregator(document, "roster", accepted)
    epochs.check_roster(_roster_of(body, number), accepted)
    return _seen(number, epochs.epoch_ctx(accepted.digest, number, body), None, body)


def establish(
    home: Home,
    transport: Transport,
    identity: keys.Identity,
    accepted: Accepted,
    *,
    member: Member,
    number: int,
    basis: bytes,
    settled: int,
    wait_s: float,
) -> Epoch:
    """Take part in setting up epoch ``number``; resumes where an earlier attempt stopped.

    Args:
        basis: digest of the (A, B) that this silo computed itself.
        settled: the last round this silo has settled; the chain starts after it.
        wait_s: how long to wait for each thing that the others must post.

    Raises:
        RoundError: somebody did not post in time; the message names who. Code ``not-in-epoch``: the roster is without it.
        TrustError: a note, seed or tag does not hold; the epoch does not start.
        Equivocation: the roster holds another note of this silo than its own.
    """
    found = _established(home, number)
    if found is None:
        folder = home.epoch_folder / str(number)
        files.make_folder(folder, mode=0o700)
        chain = _Setup(
            home=home, settled=settled, transport=transport, identity=identity, accepted=accepted, member=member, number=number,
            folder=folder, wait_s=wait_s,
        ).run(basis)  # fmt: skip
        _write_link(folder, settled=settled, chain=chain)
        _forget_setup(folder)
        found = _seen(number, chain.context, folder, _read(folder / "roster"))
    _forget_older(home, found)
    return found


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """The set-up of one epoch: four messages, each persisted before it leaves."""

    home: Home
    settled: int
    transport: Transport
    identity: keys.Identity
    accepted: Accepted
    member: Member
    number: int
    folder: Path
    wait_s: float

    def run(self, basis: bytes) -> PairChain:
        """The confirmed chain."""
        secrets = self._secrets(basis)
        self._post("epoch-note", self.accepted.digest, encode(epochs.note_of(secrets)))
        roster_bytes, notes = self._roster()
        context = epochs.epoch_ctx(self.accepted.digest, self.number, roster_bytes)
        silos = tuple(note.silo for note in notes)
        if self.member.id not in silos:
            raise RoundError(
                f"epoch {self.number} was made without this silo: it has silos {list(silos)}",
                hint="this silo enters the next epoch", code="not-in-epoch", epoch=self.number,
            )  # fmt: skip
        if self.accepted.terms.shared:
            files.write_once(self.folder / "roster", roster_bytes, mode=files.PRIVATE)
        self._post_seeds(secrets, notes, context)
        seeds = self._collect("pair-seeds", silos)
        pairs = epochs.pair_secrets(secrets, notes, seeds, accepted=self.accepted, context=context)
        own = epochs.confirmation(secrets, pairs)
        self._post("confirmation", context, encode(own))
        tags = self._collect("confirmation", silos)
        epochs.check_confirmations(tags, accepted=self.accepted, context=context, epoch=self.number, own=own, silos=silos)
        return PairChain.start(secrets, pairs, context=context)

    def _secrets(self, basis: bytes) -> EpochSecrets:
        """This epoch's own keys: made once, on the disk before anything of them is posted."""
        path = self.folder / "secrets"
        kept = _read(path)
        if kept is None:
            made, _ = epochs.new_note(self.accepted.digest, self.number, self.member.id, basis)
            files.write_once(path, made.to_bytes(), mode=files.PRIVATE)
            return made
        secrets = EpochSecrets.from_bytes(kept)
        if secrets.basis != basis:
            raise TrustError(
                f"the basis is now {basis.hex()[:16]}, this epoch began with {secrets.basis.hex()[:16]}",
                hint="the base model or a library changed; put it back, or start a new epoch",
                code="basis-differs",
            )
        return secrets

    def _roster(self) -> tuple[bytes, tuple[EpochNote, ...]]:
        document = self._wait("roster", AGGREGATOR, self.wait_s)
        if document is None:
            raise self._late("the roster of", "not every silo has posted its epoch keys")
        body = _from_aggregator(document, "roster", self.accepted)
        notes = epochs.check_roster(_roster_of(body, self.number), self.accepted)
        # log: the next head may be out already, so the one after it; before the first round the first.
        expect(self.home, "roster", self.number, AGGREGATOR, document, due=self.settled + 2 if self.settled else 1)
        return body, notes

    def _post_seeds(self, secrets: EpochSecrets, notes: tuple[EpochNote, ...], context: bytes) -> None:
        """Sealing draws new randomness each time, so the bytes are kept before they leave: a board takes one version only."""
        path = self.folder / "seeds"
        document = _read(path)
        if document is None:
            document = self._sign("pair-seeds", context, encode(epochs.seal_seeds(secrets, notes, context=context)))
            files.write_once(path, document, mode=files.PRIVATE)
        self.transport.put("pair-seeds", self.number, self.member.id, document)

    def _collect(self, kind: Literal["pair-seeds", "confirmation"], silos: Sequence[int]) -> dict[int, bytes]:
        """These silos' documents of this kind; who is late is named."""
        found: dict[int, bytes] = {}
        late: list[str] = []
        for member in map(self.accepted.terms.by_id, silos):
            document = self._wait(kind, member.id, 0.0 if late else self.wait_s)
            if document is None:
                late.append(f"{member.name} ({member.id})")
            else:
                found[member.id] = document
        if late:
            raise self._late(f"the {kind} of", ", ".join(late) + " did not post")
        return found

    def _wait(self, kind: Literal["roster", "pair-seeds", "confirmation"], party: int, wait_s: float) -> bytes | None:
        """The document, or None when it did not come in time, or the aggregator has given this epoch up for a newer one."""
        while True:
            document = self.transport.get(kind, self.number, party, wait_s=min(wait_s, POLL_S))
            wait_s -= POLL_S
            if document is not None or wait_s <= 0 or called(self.transport, self.accepted, after=self.number) is not None:
                return document

    def _post(self, kind: Literal["epoch-note", "confirmation"], context: bytes, body: bytes) -> None:
        self.transport.put(kind, self.number, self.member.id, self._sign(kind, context, body))

    def _sign(self, kind: Literal["epoch-note", "pair-seeds", "confirmation"], context: bytes, body: bytes) -> bytes:
        return envelope.sign(self.identity, type=kind, context=context, sender=self.member.id, body=body)

    def _late(self, what: str, why: str) -> RoundError:
        return RoundError(
            f"{what} epoch {self.number} did not come within {self.wait_s:g} s: {why}",
            hint="run the same command again: it goes on where it stopped",
            code="epoch-incomplete",
            epoch=self.number,
        )


def _from_aggregator(document: bytes, kind: Literal["epoch", "roster"], accepted: Accepted) -> bytes:
    key = accepted.terms.aggregator.verify_key
    return envelope.open_signed(document, type=kind, context=accepted.digest, sender=AGGREGATOR, key=key)


def _established(home: Home, number: int) -> Epoch | None:
    folder = home.epoch_folder / str(number)
    raw = _read(folder / "chain")
    if raw is None:
        return None
    _forget_setup(folder)  # a crash may have come between the chain and this
    return _seen(number, PairChain.from_bytes(_Link.from_bytes(raw).chain).context, folder, _read(folder / "roster"))


def _roster_of(body: bytes, number: int) -> Roster:
    roster = decode(body, Roster)
    if roster.epoch != number:
        raise TrustError(
            f"the roster is for epoch {roster.epoch}, wanted {number}", hint="the aggregator is faulty", code="wrong-number"
        )
    return roster


def _seen(number: int, context: bytes, folder: Path | None, roster: bytes | None) -> Epoch:
    """An epoch with what its verified roster says, in share mode."""
    if roster is None:
        return Epoch(number=number, context=context, folder=folder)
    made = decode(roster, Roster)
    silos = tuple(decode(decode(raw, Signed).body, EpochNote).silo for raw in made.notes)
    guardians = (decode(decode(raw, Signed).body, GuardianNote) for raw in made.guardians)
    sealing = {note.guardian: note.guardian_key for note in guardians}
    return Epoch(number=number, context=context, folder=folder, silos=silos, guardian_keys=sealing)


def _forget_setup(folder: Path) -> None:
    for name in ("secrets", "seeds"):
        (folder / name).unlink(missing_ok=True)


def _forget_older(home: Home, standing: Epoch) -> None:
    for number in _numbers(home):
        if number < standing.number:
            remove_folder(home.epoch_folder / str(number))
    home.forget_restored(standing.number)


def _write_link(folder: Path, *, settled: int, chain: PairChain) -> None:
    files.write_atomic(folder / "chain", _Link(settled=settled, chain=chain.to_bytes()).to_bytes(), mode=files.PRIVATE)


def _numbers(home: Home) -> Iterator[int]:
    if home.epoch_folder.is_dir():
        yield from [int(entry.name) for entry in home.epoch_folder.iterdir() if entry.name.isascii() and entry.name.isdigit()]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
