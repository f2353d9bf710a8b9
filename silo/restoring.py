# SPDX-License-Identifier: Apache-2.0
"""``silo restore``: a home that was copied back from a backup is made fit to take part again, and its ledger whole.

A backup knows nothing of what this silo spent after it was made. So the ledger is brought up to what this silo's own signed uploads
on the board state, and every round that was opened since is charged; the secrets of all epochs are gone, and none of them is
entered again.

**Formal guarantees**

- *Never understated*: of the ledger copies the longest is taken, and each must be a beginning of it. Each own upload that is on the
  board or in the log has its reservation afterwards, under its own attempt. The lost entries before it are as many as its signed
  counter states; each is charged as an attempt, but the one note by which the round before ended. Each round that was opened after
  the last known reservation is charged one attempt, whether there was one or not (``silo.recharging``). Limits change nothing of
  it: the gate refuses later. No board knows of runs alone: of one whose folder is ahead of the ledger, and of each whose
  contract is named, everything is charged that its plan has left.
- *Nothing said twice*: ``epoch/`` is emptied first; each charged round is promised to the manifest on the board, cosignatures are
  taken back from it, and only an epoch newer than all called ones is entered.
- *Repeatable*: what is done is read from the disk, so a restore that was killed ends in the same ledger as one that was not.
  In between the home enters no epoch.

Not promised: that attempts are counted of which the aggregator never got an upload and whose number nothing states, beyond one a
round; runs alone that left no trace and that nobody names: so whoever restores is asked for them (``silo restore``); nor what an
aggregator hides that shows no log. The next head must continue the one in the backup.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from privacy import basis_round, envelope, files
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import Mechanism
from privacy.errors import LedgerBroken, RoundError, TrustError
from privacy.federation import Accepted, event
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR, Header, Kind, Manifest, Outcome, Signed, Upload, decode
from privacy.secure_sum import guardian_sum
from privacy.transparency import log, notes
from privacy.transparency.log import Leaf, Tiles
from silo import alone_kept, keyring, reading, session, succession
from silo.alone_terms import run_of, terms_alone
from silo.folder import transporting
from silo.home import Home, remove_folder
from silo.recharging import Opened, Sent, charge, charge_alone
from silo.session import Epoch
from silo.transport import Transport
from silo.watch import refuse_after_equivocation
from silo.witness import Witness


def restore(
    root: Path, *, ledgers: Sequence[Path] = (), alone: Sequence[Path] = (), folder: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    """Bring a home that was copied back up to what this silo did since; repeatable.

    Args:
        ledgers: other copies of this silo's ledger.
        alone: the contract of every run alone since the newest of these copies.
        folder: exchange documents there, whatever ``silo.toml`` says.

    Raises:
        ConfigError: there is no silo, it has joined no federation, or a contract that is named cannot be read. Nothing was changed.
            Or that of a run alone in the home: name it, or put it back, and the same command goes on.
        PrivacyRefusal: a contract that was named has no differential privacy: nobody trains alone under it. Nothing was changed.
        LedgerBroken: a copy does not verify, or two have different histories. Nothing was changed.
        TrustError: a document on the board does not hold, or an upload in the log is not shown.
        MachineError: the disk or the way to the board; the same command goes on where it stopped.
    """
    home, settings = reading.opened(root)
    named = [alone_kept.read_contract(path) for path in alone]
    with home.locked(), transporting(settings.aggregator, folder) as transport:
        facts = restored(home, transport, ledgers=ledgers, alone=named)
    budget = reading.budget(root, 0)
    return {**facts, **{name: budget[name] for name in ("epsilon", "delta", "limit", "rounds_left")}}


def restored(
    home: Home, transport: Transport, *, ledgers: Sequence[Path] = (), alone: Sequence[Accepted] = ()
) -> dict[str, Any]:  # fmt: skip
    """``restore`` of a home that is locked. Raises as it does.

    Formal guarantees: see the module docstring.
    """
    refuse_after_equivocation(home)
    runs = [_Alone.of(each) for each in alone]
    newest = _newest_copy(home, ledgers)
    _begin(home)
    if newest is not None:
        files.write_atomic(home.ledger_path, newest, mode=files.PRIVATE)
    called, charged, apart = _caught_up(home, transport, runs)
    home.end_restore(called)
    return {"charged": charged, "charged_alone": apart, "adopted": newest is not None, "epoch": called}


def restored_guardian(home: Home, transport: Transport, accepted: Accepted, identity: Identity) -> int:
    """The same for the locked home of a guardian alone; the newest called epoch, which it sits out: its secrets are gone.

    Raises:
        Equivocation: evidence against the aggregator's log lies in the home.
        TrustError: a cosignature on the board does not hold.
    """
    refuse_after_equivocation(home)
    _begin(home)
    called = _newest(transport, "epoch")
    _take_back_cosignatures(home, transport, accepted, identity, last=_newest(transport, "checkpoint"))
    home.end_restore(called)
    return called


def _begin(home: Home) -> None:
    home.begin_restore()
    remove_folder(home.epoch_folder)
    files.make_folder(home.epoch_folder, mode=0o700)


def _caught_up(
    home: Home, transport: Transport, named: Sequence[_Alone]
) -> tuple[int, list[dict[str, int]], list[dict[str, Any]]]:  # fmt: skip
    """Charge and promise what the board shows; the newest called epoch, the attempts charged by round, and by run alone."""
    accepted, member, identity = succession.at_work(home, transport)
    versions = {**succession.ancestors(home, accepted), accepted.digest: accepted}
    called = _newest(transport, "epoch")
    session.called(transport, accepted, after=0, former=versions.keys() - {accepted.digest})  # each is the aggregator's
    board = _Board(home=home, transport=transport, accepted=accepted, versions=versions, silo=member.id)
    rounds = board.rounds()
    signer = keyring.signer(home, accepted)
    with Ledger.open(home.ledger_path, sign=signer.sign, verify=keyring.verifier(home), clock=time.time) as ledger:
        before = _by_round(ledger)
        charge(ledger, rounds, contracts={digest.hex() for digest in versions})
        after = _by_round(ledger)
        apart = _charged_alone(ledger, named)
        apart += _charged_alone(ledger, [_Alone.of(each) for each in alone_kept.behind(home, ledger)])  # not what was named
        _promise(home, ledger, rounds)
    _take_back_cosignatures(home, transport, accepted, identity, last=_newest(transport, "checkpoint"))
    added = {number: count - before.get(number, 0) for number, count in after.items()}
    return called, [{"round": number, "attempts": count} for number, count in sorted(added.items()) if count], apart


# --- Ledger copies ---------------------------------------------------------------------------------------------------------------


def _newest_copy(home: Home, ledgers: Sequence[Path]) -> bytes | None:
    """The longest copy, if it is not the home's own; one of those that is missing or damaged is none where another is given.

    Formal guarantees: every copy is verified, and is a beginning of the one that is taken; else LedgerBroken by its path.
    """
    own: bytes | None = None
    try:
        own = _whole_lines(home, home.ledger_path, "restore its newest copy, or name one with --ledger")
    except LedgerBroken:
        if not ledgers:
            raise
    copies = {path: _whole_lines(home, path, "leave this copy out, or give a whole one") for path in ledgers}
    if own is not None:
        copies[home.ledger_path] = own
    longest = max(copies, key=lambda path: len(copies[path]))
    for path, lines in copies.items():
        if not copies[longest].startswith(lines):
            raise LedgerBroken(
                f"{path} and {longest} have different histories",
                hint="find out which one this silo went on with; nothing was changed", code="ledger-forked",
            )  # fmt: skip
    return None if copies[longest] == own else copies[longest]


def _whole_lines(home: Home, path: Path, hint: str) -> bytes:
    """A verified copy without the torn end of a line."""
    try:
        History.read(path, verify=keyring.verifier(home))
    except LedgerBroken as error:
        raise LedgerBroken(f"{path}: {error.message}", hint=hint, code=error.code) from error
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return whole + b"\n"


# --- Charging --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Alone:
    """A run alone: its name, how it stands in the ledger, what an attempt is charged, and for how many its plan pays."""

    name: str
    run: str
    one: Mechanism
    rounds: int

    @classmethod
    def of(cls, accepted: Accepted) -> _Alone:
        """The run alone under a contract. Raises PrivacyRefusal where there is none."""
        terms = terms_alone(accepted.terms)
        one = event(terms).with_steps(terms.training.steps_per_round)
        return cls(name=terms.name, run=run_of(accepted.digest).hex(), one=one, rounds=terms.training.rounds)


def _charged_alone(ledger: Ledger, runs: Sequence[_Alone]) -> list[dict[str, Any]]:
    """Charge what the plans of these runs have left; how many attempts that was of each."""
    found: list[dict[str, Any]] = []
    for each in {run.run: run for run in runs}.values():
        before = ledger.counter
        charge_alone(ledger, each.run, each.one, rounds=each.rounds)
        found += [{"run": each.name, "attempts": ledger.counter - before}] if ledger.counter > before else []
    return found


def _by_round(ledger: History) -> dict[int, int]:
    """How many attempts are reserved for each round."""
    found: dict[int, int] = {}
    for body in ledger.entries:
        if isinstance(body, Reserve):
            found[body.round] = found.get(body.round, 0) + 1
    return found


def _promise(home: Home, ledger: History, rounds: Sequence[Opened]) -> None:
    """Bind this silo to the manifest of every charged round, so that it takes part in none of them again.

    Raises:
        Equivocation: another manifest was promised.
    """
    for each in rounds:
        is_past = each.number < (home.latest_promise() or 0)
        if each.ctx is not None and not is_past and ledger.attempts(each.key, each.number):
            home.promise_manifest(each.number, each.ctx)


# --- The board -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Board:
    """What the board, the log, and the home's own promises and receipts know of the rounds since the first."""

    home: Home
    transport: Transport
    accepted: Accepted
    versions: Mapping[bytes, Accepted]
    silo: int

    def rounds(self) -> list[Opened]:
        """Every round that was opened under a contract with this silo in it, ascending, with all that is verified of it."""
        logged = self._logged()
        epochs: dict[int, tuple[Accepted, Epoch]] = {}
        found, number = [], 1
        while (document := self._get("manifest", number)) is not None:
            stated = decode(decode(document, Signed).body, Manifest).epoch
            if stated not in epochs:
                epochs[stated] = self._epoch(stated)
            contract, epoch = epochs[stated]
            if any(member.id == self.silo for member in contract.terms.member):
                found.append(self._opened(number, document, contract, epoch, logged.get(number)))
            number += 1
        if any(each >= number for each in logged):
            raise _hidden(max(logged))
        unseen = max(self._known(), default=0)
        # Opened, as this home knows, but not shown: charged all the same; as both kinds where the factors may not be fixed yet.
        hidden = range(number, unseen + 1)
        if self.accepted.terms.basis is None or any(not basis_round.is_one(each.contract.terms) for each in found):
            return found + [Opened(number=each, contract=self.accepted) for each in hidden]
        kinds = (self.accepted.at(b""), self.accepted)
        return found + [Opened(number=each, contract=kind) for each in hidden for kind in kinds if each > 1 or kind is kinds[0]]

    def _opened(self, number: int, document: bytes, contract: Accepted, epoch: Epoch, logged: bytes | None) -> Opened:
        witness = Witness(accepted=contract, epoch=epoch, silo=self.silo)
        body = witness.open(document, "manifest")
        ctx, contract = guardian_sum.round_ctx(body), contract.in_round(decode(body, Manifest).dimension)
        upload, ended = self.transport.get("upload", number, self.silo, wait_s=0), self._get("outcome", number)
        if logged is not None and (upload is None or hashlib.sha256(upload).digest() != logged):
            raise _hidden(number)
        return Opened(
            number=number, contract=contract, ctx=ctx,
            sent=None if upload is None else self._sent(upload, contract, epoch, ctx),
            ended=None if ended is None else self._ended(decode(witness.open(ended, "outcome"), Outcome), contract),
        )  # fmt: skip

    def _ended(self, outcome: Outcome, contract: Accepted) -> Literal["result", "without", "void"]:
        if outcome.kind != "result":
            return "void"
        return "without" if contract.terms.shared and self.silo not in dict(outcome.seeds) else "result"

    def _sent(self, document: bytes, contract: Accepted, epoch: Epoch, ctx: bytes) -> Sent:
        """What the header in an upload states, once both signatures are verified as this silo's."""
        key, context = contract.terms.by_id(self.silo).verify_key, epoch.context
        body = envelope.open_signed(document, type="upload", context=context, sender=self.silo, key=key)
        raw = decode(body, Upload).header
        header = decode(envelope.open_signed(raw, type="header", context=context, sender=self.silo, key=key), Header)
        if (header.round_ctx, header.silo) != (ctx, self.silo):
            raise TrustError("an upload of this silo stands in another round", hint="the aggregator is faulty", code="wrong-round")
        return Sent(attempt=header.attempt.hex(), counter=header.ledger_counter)

    def _epoch(self, number: int) -> tuple[Accepted, Epoch]:
        """The version of the contract under which an epoch was called, and the epoch by its roster."""
        call = self._get("epoch", number)
        contract = None if call is None else self.versions.get(decode(call, Signed).context)
        if contract is None:
            raise RoundError(
                f"epoch {number} was called under a contract that is not in this home", code="contract-superseded",
                hint="run `silo join`, then `silo restore` again",
            )  # fmt: skip
        return contract, session.public(self.transport, contract, number)

    def _logged(self) -> dict[int, bytes]:
        """The digest of each own upload in the newest head of the log, by round."""
        number, raw = 0, None
        while (newer := self._get("checkpoint", number + 1)) is not None:
            number, raw = number + 1, newer
        if raw is None:
            return {}
        head = log.open_checkpoint(notes.parse(raw), self.accepted.terms)
        tiles = Tiles(head.size, self.transport.fetch)
        tiles.check(head.root)
        leaves = (decode(tiles.leaf(index), Leaf) for index in range(head.size))
        return {leaf.number: leaf.digest for leaf in leaves if (leaf.kind, leaf.party) == ("upload", self.silo)}

    def _known(self) -> list[int]:
        """Rounds that this home knows were opened: promises, and uploads with a receipt or to be in the log."""
        folder = self.home.log_folder
        names = [path.name.split("-") for each in ("receipt-upload-*", "expect-upload-*") for path in folder.glob(each)]
        return self.home.promised_rounds() + [int(name[2]) for name in names if name[2].isascii() and name[2].isdigit()]

    def _get(self, kind: Kind, number: int) -> bytes | None:
        return self.transport.get(kind, number, AGGREGATOR, wait_s=0)


def _hidden(number: int) -> TrustError:
    return TrustError(
        f"the log has an upload of this silo in round {number} that the board does not show",
        hint="the aggregator must put back its folder evidence/, then run `silo restore` again", code="upload-hidden",
    )  # fmt: skip


def _newest(transport: Transport, kind: Kind) -> int:
    """The last number that the aggregator has reached in a kind of documents; 0 before the first."""
    number = 0
    while transport.get(kind, number + 1, AGGREGATOR, wait_s=0) is not None:
        number += 1
    return number


def _take_back_cosignatures(home: Home, transport: Transport, accepted: Accepted, identity: Identity, *, last: int) -> None:
    """Keep this silo's cosignatures that the board has, up to round ``last``: a second one of the same head has another time."""
    own = identity.public.sign_key[:32].hex()
    party = next((each.id for each in log.cosigners(accepted.terms).values() if each.sign_key == own), None)
    if party is None:
        return
    former = tuple(each.terms for each in succession.ancestors(home, accepted).values())
    files.make_folder(home.log_folder)
    for number in range(1, last + 1):
        path = home.log_folder / f"cosignature-{number}"
        raw = None if path.is_file() else transport.get("cosignature", number, party, wait_s=0)
        shown = None if raw is None else transport.get("checkpoint", number, AGGREGATOR, wait_s=0)
        if raw is not None and shown is not None:
            log.open_cosignature(raw, shown, accepted.terms, party, former)
            files.write_once(path, raw)
