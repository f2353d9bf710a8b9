# SPDX-License-Identifier: Apache-2.0
"""What a restore charges (``silo.restoring``): lost lines of a ledger, from what uploads on the board state of them.

**Formal guarantees** of ``charge``

- *In its place*: each own upload has its reservation afterwards, under its own attempt, as the entry that its header states.
- *Never understated*: each lost line before an upload is charged, but the one note by which the round before ended: as an attempt
  that costs no less than one at any of the rounds that it may have been at: these differ in kind and in their contract's version,
  and neither need be the dearer one in every composition. Each round after the last that is known to be reserved is charged one
  attempt, whether there was one or not. What else is on the ledger, such as a run alone, says nothing of these rounds.
- *Repeatable*: killed anywhere and run again, it ends in the same charges.

**Formal guarantees** of ``charge_alone``

- *Never understated*: afterwards as many attempts stand under the run as its plan ever pays for, at its own price, whatever was
  run; and each round that it may have trained has one. Nothing says of them which units they drew, so they compose with all.
- *Repeatable*: as above.

Not promised: what neither uploads nor anybody states. Lines that were lost of a run alone are counted twice where an upload came
after them: as attempts at a round, and with the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from privacy.dp.entries import Commit, Reserve, Void
from privacy.dp.ledger import Ledger
from privacy.dp.mechanism import Mechanism, Unprotected
from privacy.federation import Accepted, event

_DOMAIN = b"siloquy restored"
_ATTEMPT_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Sent:
    """This silo's own upload of a round, as its signed header states it."""

    attempt: str
    counter: int


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A round that was opened, with what this silo sent in it and how it ended; what is not known is None."""

    number: int
    contract: Accepted
    ctx: bytes | None = None
    sent: Sent | None = None
    ended: Literal["result", "without", "void"] | None = None

    @property
    def key(self) -> str:
        """The contract's digest, as the ledger has it."""
        return self.contract.digest.hex()


def charge(ledger: Ledger, rounds: Sequence[Opened], *, contracts: Collection[str]) -> None:
    """Reserve what this silo's uploads state, in their places, and one attempt for each round that was opened since.

    Args:
        rounds: ascending; one that nobody shows may stand twice, as both kinds that it may have been.
        contracts: the versions of the contract, as the ledger has them.
    """
    ended: Opened | None = None
    for each in rounds:
        if each.sent is not None and each.sent.attempt not in ledger.attempts(each.key, each.number):
            if ended is not None and ledger.counter < each.sent.counter - 1:
                _note(ledger, ended)
            lost = _dominating(rounds, ended, each) if ledger.counter < each.sent.counter - 1 else None
            while ledger.counter < each.sent.counter - 1:
                _reserve(ledger, each, _unknown(ledger, each), lost)
            _reserve(ledger, each, each.sent.attempt)
        if ledger.attempts(each.key, each.number):
            ended = each
    reserved = (body for body in ledger.entries if isinstance(body, Reserve))
    latest = max((body.round for body in reserved if body.contract in contracts), default=0)
    for each in rounds:
        if each.number > latest or _is_left_out(ledger, each):
            _reserve(ledger, each, _unknown(ledger, each))


def charge_alone(ledger: Ledger, run: str, one: Mechanism, *, rounds: int) -> None:
    """Reserve what the plan of a run alone has left, as if all of it had been run.

    Args:
        run: under which it stands in the ledger.
        one: what one attempt at a round of it is charged.
        rounds: how many attempts its plan pays for.
    """
    charged = [body for body in ledger.entries if isinstance(body, Reserve) and body.contract == run]
    missing = [number for number in range(1, rounds + 1) if number not in {body.round for body in charged}]
    for number in missing[: max(0, rounds - len(charged))]:
        attempt = hashlib.sha256(_DOMAIN + b" alone" + bytes.fromhex(run) + number.to_bytes(4, "big")).hexdigest()
        ledger.reserve(contract=run, round_number=number, attempt=attempt[: 2 * _ATTEMPT_BYTES], mechanism=one)


def _reserve(ledger: Ledger, opened: Opened, attempt: str, one: Mechanism | None = None) -> None:
    """Charge one attempt at a round in full, whatever the limits; as ``one`` where it may have been at another round."""
    ledger.reserve(contract=opened.key, round_number=opened.number, attempt=attempt, mechanism=one or _attempt_at(opened))


def _attempt_at(opened: Opened) -> Mechanism:
    """What one attempt at a round is charged."""
    terms = opened.contract.terms
    return event(terms).with_steps(terms.training.steps_per_round)


def _dominating(rounds: Sequence[Opened], ended: Opened | None, until: Opened) -> Mechanism:
    """What one lost line before the upload of ``until`` is charged: it may have been an attempt at any round since ``ended``.

    Where these are of several kinds: the least noise of all, at the highest rate, for the most steps and numbers.
    """
    first = 0 if ended is None else ended.number + (ended.sent is not None)
    kinds = {_attempt_at(each) for each in (until, *rounds) if first <= each.number <= until.number}
    noised = [one for one in kinds if not isinstance(one, Unprotected)]
    if len(kinds) == 1 or not noised:  # a chain has noise in all of its versions, or in none
        return _attempt_at(until)
    most = {name: max(getattr(one, name) for one in noised) for name in ("sampling_rate", "steps", "dimension")}
    return msgspec.structs.replace(min(noised, key=lambda one: one.effective_noise_multiplier), **most)


def _is_left_out(ledger: Ledger, opened: Opened) -> bool:
    """Whether a restore was killed after it charged a round that nobody shows as one of two kinds, before it did as this one."""
    place = (opened.key, opened.number)
    made = [body for body in ledger.entries if isinstance(body, Reserve) and (body.contract, body.round) == place]
    by_restore = [body.attempt for body in made] == [_name(opened, index) for index in range(len(made))]
    return opened.ctx is None and bool(made) and by_restore and _attempt_at(opened) not in [body.mechanism for body in made]


def _unknown(ledger: Ledger, opened: Opened) -> str:
    """The name of one more attempt whose own one is lost."""
    return _name(opened, len(ledger.attempts(opened.key, opened.number)))


def _name(opened: Opened, index: int) -> str:
    named = _DOMAIN + opened.number.to_bytes(4, "big") + index.to_bytes(4, "big")
    return hashlib.sha256(named).hexdigest()[: 2 * _ATTEMPT_BYTES]


def _note(ledger: Ledger, opened: Opened) -> None:
    """How a round ended, unless it stands there: that note came before any attempt at a later one, so it is one of the lost lines.

    How many silos stood is left open: the charge counts the fewest.
    """
    place = (opened.key, opened.number)
    if opened.ended is None or any(isinstance(b, Commit | Void) and (b.contract, b.round) == place for b in ledger.entries):
        return
    if opened.ended == "result":
        attempt = ledger.attempts(*place)[-1] if opened.sent is None else opened.sent.attempt
        ledger.commit(contract=opened.key, round_number=opened.number, attempt=attempt)
    else:
        reason = "the sum was made without this silo" if opened.ended == "without" else "the round closed without a result"
        ledger.void(contract=opened.key, round_number=opened.number, reason=reason)
