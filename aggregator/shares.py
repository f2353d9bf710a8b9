# SPDX-License-Identifier: Apache-2.0
"""An open round of share mode, brought to its end: silos upload once, guardians list, endorse one set, and release their shares.

Each step ends as soon as what it needs is there, at the latest a deadline after the step before; or when q guardians have closed
the round, since nothing more can come then. Promised: the set, the certificate and the sum follow from the documents that stand,
so a restart goes on to the same end; a guardian whose shares contradict a silo's header is left aside and named (``Desk.faults``).
The set is proposed half a deadline before guardians close for want of one. A round without a sum ends only on q guardians' closes;
silos that disagree over a common key are named when too few others are left. Not promised: an end while fewer than q answer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Final, TypeVar

from aggregator import audits, rounds
from aggregator.desk import Desk, Vectors
from aggregator.rounds import Round
from privacy.errors import RoundError, TrustError
from privacy.federation import Accepted
from privacy.messages import Certificate, Freeze, Header, Kind, Outcome, Signed, decode
from privacy.secure_sum import freeze, guardian_sum, shares
from privacy.secure_sum.guardian_sum import Certified, Frozen
from privacy.secure_sum.shares import Released, Secrets
from privacy.update_rule import State

TOO_FEW: Final = "too-few-shares"
_LAST_STEPS: Final = 4
"""Deadlines after that of the uploads by which every living guardian has closed: lists, endorsements, shares, one to spare."""

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


def summed(desk: Desk, opened: Round, state: State, seal_seed: bytes) -> tuple[Outcome, State] | str:
    """The round's result and the state after it, or why there is none.

    Raises:
        TrustError: a silo's document is faulty; the message names it.
    """
    frozen = _frozen(desk, opened, seal_seed)
    if frozen is None:
        return rounds.ABSENT
    certified = _certified(desk, opened, frozen)
    if certified is None:
        return "not-endorsed"
    secrets = _secrets(desk, opened, certified, seal_seed)
    if secrets is None:
        return "shares-missing"
    vectors = Vectors(desk, frozen.headers, seal_seed, opened)
    total = guardian_sum.unmask(vectors, secrets.seeds, certified, secrets.pair_keys)
    return audits.result(desk, opened, state, certified, total, vectors, secrets.seeds, secrets.pair_keys)


def closed(desk: Desk, opened: Round, state: State, reason: str) -> Outcome:
    """The outcome without a sum, void or annulled, that q guardians' closes make.

    Raises:
        RoundError: they are not there; the round stays open.
    """
    number, guardians = opened.number, _guardians(desk)
    deadline_at = max(desk.now(), opened.manifest.deadline_at + (_LAST_STEPS - 1) * _step_s(desk)) + _step_s(desk)
    desk.until(
        "close", number, shown=number, deadline_at=deadline_at, parties=guardians,
        done=lambda arrived: len(arrived) >= _quorum(desk),
    )  # fmt: skip
    here = desk.store.parties("close", number)
    closes = desk.all("close", number, here)
    chosen = freeze.choose_closes(closes, accepted=desk.accepted, epoch_ctx=opened.context, round_ctx=opened.ctx)
    if chosen is None:
        missing = [guardian for guardian in guardians if guardian not in here]
        raise RoundError(
            f"round {number} has no sum ({reason}) and stays open: guardians {missing} have not closed it",
            hint="start them, then run the same command again", code="absent", missing=missing,
        )  # fmt: skip
    kind = freeze.ended(chosen, accepted=desk.accepted, epoch_ctx=opened.context, round_ctx=opened.ctx)
    return rounds.void(opened, state, reason, kind=kind, closes=chosen)


def _frozen(desk: Desk, opened: Round, seal_seed: bytes) -> Frozen | None:
    """The set that stands or, if the lists give one, is proposed now."""
    number = opened.number
    body = rounds.own(desk.store, desk.accepted, "freeze", number, opened.context)
    if body is None:
        deadline_at, choice = opened.manifest.deadline_at, _Choice(desk, opened, seal_seed)
        _waited(desk, opened, "upload", opened.silos, deadline_at, lambda arrived, last=False: None)
        # Guardians close a whole step after the deadline: a better set is waited for half of it, then any set does.
        chosen = _waited(desk, opened, "list", _guardians(desk), deadline_at + _step_s(desk) / 2, choice)
        if chosen is None:
            any_set = functools.partial(choice, last=True)
            chosen = _waited(desk, opened, "list", _guardians(desk), deadline_at + _step_s(desk), any_set)
        if chosen is None:
            choice.check_pairs()
            return None
        body = desk.publish("freeze", number, opened.context, chosen)
    return guardian_sum.check_freeze(
        decode(body, Freeze), accepted=_accepted(desk, opened), epoch_ctx=opened.context, round_ctx=opened.ctx, own_header=None,
        silos=opened.silos,
    )  # fmt: skip


class _Choice:
    """The freeze that the lists give so far: as soon as none can be better, or at the last moment."""

    def __init__(self, desk: Desk, opened: Round, seal_seed: bytes) -> None:
        self._desk, self._opened, self._seal_seed = desk, opened, seal_seed
        self._headers: dict[int, bytes] = {}

    def __call__(self, arrived: frozenset[int], *, last: bool = False) -> Freeze | None:
        if len(arrived) < _quorum(self._desk):
            return None
        headers = self._checked()
        lists = self._desk.all("list", self._opened.number, arrived)
        chosen = freeze.choose(
            headers, lists, accepted=_accepted(self._desk, self._opened), epoch_ctx=self._opened.context,
            round_ctx=self._opened.ctx, silos=self._opened.silos,
        )  # fmt: skip
        complete = chosen is not None and len(chosen.headers) == len(headers)
        return chosen if complete or last or len(arrived) == len(_guardians(self._desk)) else None

    def check_pairs(self) -> None:
        """Where there is no set: raises TrustError naming the silos whose common keys differ, which no set may hold."""
        freeze.check_pairs({silo: decode(decode(raw, Signed).body, Header) for silo, raw in self._headers.items()})

    def _checked(self) -> dict[int, bytes]:
        """Signed headers of the uploads that are here, each with a vector that opens and matches it."""
        desk, opened = self._desk, self._opened
        for silo in set(desk.store.parties("upload", opened.number)) - set(self._headers):
            raw = desk.upload(opened, silo).header
            header = guardian_sum.check_header(
                raw, desk.accepted.terms.by_id(silo), accepted=_accepted(desk, opened), epoch_ctx=opened.context,
                round_ctx=opened.ctx,
                silos=opened.silos,
            )  # fmt: skip
            Vectors(desk, {silo: header}, self._seal_seed, opened).check()
            self._headers[silo] = raw
        return dict(self._headers)


def _certified(desk: Desk, opened: Round, frozen: Frozen) -> Certified | None:
    accepted, context = desk.accepted, opened.context
    body = rounds.own(desk.store, desk.accepted, "certificate", opened.number, opened.context)
    if body is None:

        def enough(arrived: frozenset[int], *, last: bool = False) -> Certificate | None:
            endorsements = desk.all("endorsement", opened.number, arrived)
            return freeze.choose_endorsements(endorsements, frozen, accepted=accepted, epoch_ctx=context)

        deadline_at = desk.deadline_after("freeze", opened.number)
        chosen = _waited(desk, opened, "endorsement", _guardians(desk), deadline_at, enough)
        if chosen is None:
            return None
        body = desk.publish("certificate", opened.number, opened.context, chosen)
    return guardian_sum.check_certificate(decode(body, Certificate), frozen, accepted=accepted, epoch_ctx=context)


def _secrets(desk: Desk, opened: Round, certified: Certified, seal_seed: bytes) -> Secrets | None:
    released: dict[int, Released] = {}
    tried: set[int] = set()

    def enough(arrived: frozenset[int], *, last: bool = False) -> Secrets | None:
        for each in sorted(arrived - tried):
            tried.add(each)
            raw, guardian = desk.read("shares", opened.number, each), desk.accepted.terms.by_guardian(each)
            try:
                released[each] = shares.open_shares(
                    raw, certified, guardian=guardian, epoch_ctx=opened.context, seal_seed=seal_seed
                )
            except TrustError as error:  # this guardian's fault: the others' shares may do
                desk.faults.append(error)
                _LOG.warning("round %d: %s", opened.number, error.message)
        if len(released) < _quorum(desk):
            return None
        try:
            return shares.reconstruct(released, certified, accepted=desk.accepted)
        except TrustError as error:
            if error.code != TOO_FEW:
                raise
            return None

    return _waited(desk, opened, "shares", _guardians(desk), desk.deadline_after("certificate", opened.number), enough)


def _waited(
    desk: Desk, opened: Round, kind: Kind, parties: tuple[int, ...], deadline_at: float, found: Callable[..., T | None]
) -> T | None:
    """What ``found`` gives for the documents of a step; asked when another one came, and a last time when waiting is over."""
    last: list[tuple[frozenset[int], T | None]] = []

    def done(arrived: frozenset[int]) -> bool:
        if not last or last[-1][0] != arrived:
            last.append((arrived, found(arrived)))
        over = len(arrived) == len(parties) or len(desk.store.parties("close", opened.number)) >= _quorum(desk)
        return over or last[-1][1] is not None

    arrived = desk.until(kind, opened.number, shown=opened.number, deadline_at=deadline_at, parties=parties, done=done)
    return last[-1][1] if last[-1][1] is not None else found(arrived, last=True)


def _accepted(desk: Desk, opened: Round) -> Accepted:
    """The contract as it governs this round."""
    return desk.accepted.in_round(opened.manifest.dimension)


def _guardians(desk: Desk) -> tuple[int, ...]:
    return tuple(guardian.id for guardian in desk.accepted.terms.guardian)


def _quorum(desk: Desk) -> int:
    return desk.accepted.terms.quorum


def _step_s(desk: Desk) -> int:
    return desk.accepted.terms.sum.deadline_s
