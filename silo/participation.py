# SPDX-License-Identifier: Apache-2.0
"""A silo's rounds one after the other, in whatever epoch the aggregator has called: what ``silo train`` runs.

Promised: an open round is settled before a newer epoch's keys replace those it needs; nothing is spent while waiting.
Not promised: that rounds come; ``wait_s`` bounds how long a silo waits for each.
"""

from __future__ import annotations

from collections.abc import Iterator

from privacy.errors import Replay, RoundError
from privacy.messages import AGGREGATOR, Signed, decode
from silo import session
from silo.round import POLL_S, Parts, Rounds, Settled
from silo.session import Epoch
from silo.settlement import load_progress


def participate(parts: Parts, *, basis: bytes, rounds: int | None, wait_s: float) -> Iterator[Settled]:
    """The outcome of each round this silo takes part in, ``rounds`` of them, or until the caller stops.

    Args:
        basis: digest of the (A, B) this silo computed itself.
        wait_s: how long to wait for an epoch, for each thing in its set-up, and for each round to be opened.

    Raises:
        RoundError: nothing was opened within ``wait_s`` seconds, or as ``Rounds.take_part``.
        SiloquyError: as ``Rounds.take_part`` and ``silo.session.establish``.
    """
    epoch = session.current(parts.home)
    own = None if epoch is None else Rounds(parts, epoch)
    settled, waiting_since = 0, parts.clock()
    while rounds is None or settled < rounds:
        newer = _newer(parts, epoch, wait_s=POLL_S if epoch is None else 0.0)
        if newer is not None:
            entered = _enter(parts, basis, newer, wait_s)
            if entered is None:
                continue
            epoch = entered
            own = Rounds(parts, epoch)
        done = None if own is None else own.take_part(wait_s=POLL_S)
        if done is not None:
            settled, waiting_since = settled + 1, parts.clock()
            yield done
        elif parts.clock() - waiting_since >= wait_s:
            what = "epoch" if own is None else "round"
            raise RoundError(
                f"no {what} was opened within {wait_s:g} s",
                hint="ask the coordinator to run `aggregator round`",
                code="nothing-opened",
            )


def _newer(parts: Parts, epoch: Epoch | None, *, wait_s: float) -> int | None:
    """The epoch to enter now: the newest called one, once no round of the present one is open."""
    number = 0 if epoch is None else epoch.number
    if parts.transport.get("epoch", number + 1, AGGREGATOR, wait_s=wait_s) is None:
        return None
    newest = session.called(parts.transport, parts.accepted, after=number)
    return None if epoch is not None and _is_open(parts, epoch) else newest


def _is_open(parts: Parts, epoch: Epoch) -> bool:
    """Whether the next round was opened in ``epoch``, so that its keys are still needed."""
    number = load_progress(parts.home, parts.accepted).round + 1
    manifest = parts.transport.get("manifest", number, AGGREGATOR, wait_s=0)
    return manifest is not None and decode(manifest, Signed).context == epoch.context


def _enter(parts: Parts, basis: bytes, number: int, wait_s: float) -> Epoch | None:
    """The epoch, set up; None when the aggregator gave it up meanwhile and called a newer one."""
    settled = load_progress(parts.home, parts.accepted).round
    try:
        return session.establish(
            parts.home,
            parts.transport,
            parts.identity,
            parts.accepted,
            member=parts.member,
            number=number,
            basis=basis,
            settled=settled,
            wait_s=wait_s,
        )
    except (RoundError, Replay):
        if session.called(parts.transport, parts.accepted, after=number) is None:
            raise
        return None
