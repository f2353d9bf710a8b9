# SPDX-License-Identifier: Apache-2.0
"""A silo's rounds one after the other, in whatever epoch the aggregator has called: what ``silo train`` runs.

Promised: an open round is settled before a newer epoch's keys replace those it needs; nothing is spent while waiting. In share mode
a silo that is a guardian too works as one beside its rounds, and a silo outside an epoch follows its rounds by public documents, so
that it stands where the others do when it enters the next. So does a restored silo, in either mode, before it enters an epoch that
was called since. Not promised: that rounds come; ``wait_s`` bounds how long a silo waits for each.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

from privacy.errors import Replay, RoundError, TrustError
from privacy.messages import AGGREGATOR, Manifest, Signed, decode
from silo import session
from silo.catching_up import catch_up
from silo.guardians.guarding import Watching, guarding
from silo.parts import Parts, Settled
from silo.round import POLL_S, Rounds
from silo.session import Epoch
from silo.settlement import load_progress
from silo.succession import ancestors
from silo.watch import refuse_after_equivocation

_LOG = logging.getLogger(__name__)


def participate(parts: Parts, *, basis: bytes, rounds: int | None, wait_s: float) -> Iterator[Settled]:
    """The outcome of each round this silo takes part in or follows, ``rounds`` of them, or until the caller stops.

    Args:
        basis: digest of the (A, B) this silo computed itself, or what is compared before a round fixes them (privacy.basis_round).
        wait_s: how long to wait for an epoch, for each thing in its set-up, and for each round to be opened.

    Raises:
        Equivocation: evidence against the aggregator's log lies in the home.
        RoundError: nothing was opened within ``wait_s`` seconds, or as ``Rounds.take_part``.
        SiloquyError: as ``Rounds.take_part``, ``silo.session.establish`` and ``silo.guardians.guardian.Guardian.step``.
    """
    refuse_after_equivocation(parts.home)
    outcomes: dict[int, bytes] = {}
    watching = Watching(
        home=parts.home, transport=parts.transport, identity=parts.identity, accepted=parts.accepted, clock=parts.clock,
        former=ancestors(parts.home, parts.accepted),
    )  # fmt: skip
    with guarding(watching, outcomes) as check:
        taking_part = _Taking(dataclasses.replace(parts, pulse=check), basis, wait_s)
        settled, waiting_since = 0, parts.clock()
        while rounds is None or settled < rounds:
            check()
            done = taking_part.next()
            if done is not None:
                progress = load_progress(parts.home, parts.accepted)
                outcomes[progress.round] = progress.outcome
                settled, waiting_since = settled + 1, parts.clock()
                yield done
            elif parts.clock() - waiting_since >= wait_s:
                raise RoundError(
                    f"no {taking_part.what} was opened within {wait_s:g} s",
                    hint="ask the coordinator to run `aggregator round`",
                    code="nothing-opened",
                )


class _Taking:
    """The epoch this silo is in, the one that was made without it, and the rounds that follow."""

    def __init__(self, parts: Parts, basis: bytes, wait_s: float) -> None:
        self._parts, self._basis, self._wait_s = parts, basis, wait_s
        self._outside = parts.home.restored_epoch()
        self._following: Rounds | None = None
        self._enter(session.current(parts.home))

    @property
    def what(self) -> str:
        """What is waited for."""
        return "epoch" if self._own is None else "round"

    def next(self) -> Settled | None:
        """The next round, once it is settled; None after a while without one."""
        newer = self._newer()
        if newer is not None:
            missed = self._follow(wait_s=0.0)
            if missed is None:
                parts = self._parts
                catch_up(parts.home, parts.transport, parts.accepted)  # what ended under an earlier version while this silo waited
                self._establish(newer)
            return missed
        if self._outside and (self._epoch is None or self._outside > self._epoch.number):
            return self._follow(wait_s=POLL_S)
        return None if self._own is None else self._own.take_part(wait_s=POLL_S)

    def _enter(self, epoch: Epoch | None) -> None:
        self._epoch, self._own = epoch, None if epoch is None else Rounds(self._parts, epoch)

    def _newer(self) -> int | None:
        """The epoch to enter now: the newest called one, once no round of the present one is open."""
        parts, number = self._parts, max(self._outside, 0 if self._epoch is None else self._epoch.number)
        wait_s = POLL_S if self._epoch is None and not self._outside else 0.0
        if parts.transport.get("epoch", number + 1, AGGREGATOR, wait_s=wait_s) is None:
            return None
        if self._epoch is not None and self._is_open(self._epoch):
            return None  # also under a contract that a newer epoch replaces
        return session.called(parts.transport, parts.accepted, after=number, former=ancestors(parts.home, parts.accepted))

    def _is_open(self, epoch: Epoch) -> bool:
        """Whether the next round was opened in ``epoch``, so that its keys are still needed."""
        manifest = self._manifest(wait_s=0.0)
        return manifest is not None and decode(manifest, Signed).context == epoch.context

    def _manifest(self, *, wait_s: float) -> bytes | None:
        number = load_progress(self._parts.home, self._parts.accepted).round + 1
        return self._parts.transport.get("manifest", number, AGGREGATOR, wait_s=wait_s)

    def _follow(self, *, wait_s: float) -> Settled | None:
        """The next round, if it was opened in an epoch in which this silo has no part (share mode; restored), once settled."""
        is_outside = self._outside > 0 and self._epoch is None
        manifest = self._manifest(wait_s=wait_s) if self._parts.accepted.terms.shared or is_outside else None
        if manifest is None:
            return None
        signed = decode(manifest, Signed)
        if self._epoch is not None and signed.context == self._epoch.context:
            return None
        following = session.public(self._parts.transport, self._parts.accepted, decode(signed.body, Manifest).epoch)
        return Rounds(self._parts, following).take_part(wait_s=wait_s)

    def _establish(self, number: int) -> None:
        """Set the epoch up, unless the aggregator gave it up meanwhile and called a newer one, or made it without this silo."""
        parts = self._parts
        progress = load_progress(parts.home, parts.accepted)
        settled = progress.round
        try:
            self._enter(
                session.establish(
                    parts.home,
                    parts.transport,
                    parts.identity,
                    parts.accepted,
                    member=parts.member,
                    number=number,
                    basis=progress.state.basis or self._basis,  # fixed by a round since this process began
                    settled=settled,
                    wait_s=self._wait_s,
                )
            )
        except (RoundError, TrustError) as error:
            # In share mode what one silo spoils ends nobody: those whom it concerns wait for the next epoch, the others go on.
            spoilt = parts.accepted.terms.shared and (error.code == "sealed" or "pairs" in error.facts)
            if spoilt:
                _LOG.warning("epoch %d: %s", number, error.message)
            if spoilt or error.code == "not-in-epoch":
                self._outside = number
                return
            late = isinstance(error, RoundError | Replay)
            if not late or session.called(parts.transport, parts.accepted, after=number) is None:
                raise
