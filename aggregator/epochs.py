# SPDX-License-Identifier: Apache-2.0
"""Epochs as the coordinator sets them up: a call, the parties' notes, a roster, and a confirmed secret for every pair of silos.

In consent mode an epoch holds all members. In share mode it holds the silos that posted a note in time, at least u_min, and the
guardians that did, at least q. A silo of the roster that then does not confirm, or not the same as another, is left out of the next
call at once. A note that is not in the roster is a knock: that silo waits for the next epoch, called before the next round.

Promised: an epoch is used only when all its silos confirmed the same secrets; what stands is gone on with after a restart. Not
promised: that it comes about while parties are missing.
"""

from __future__ import annotations

import logging

from aggregator import rounds
from aggregator.desk import Desk
from aggregator.rounds import Epoch
from privacy.errors import RoundError, TrustError
from privacy.secure_sum import choice, epoch

_LOG = logging.getLogger(__name__)


class Epochs:
    """See the module docstring.

    Args:
        desk: the coordinator's.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk, self._store, self._accepted = desk, desk.store, desk.accepted
        self._confirmed: Epoch | None = None

    @property
    def standing(self) -> Epoch | None:
        """The latest epoch, when it is known here to be confirmed."""
        at = self._confirmed
        return at if at is not None and at.number == self._store.latest("epoch") else None

    def call(self) -> Epoch:
        """A new epoch, confirmed; in share mode called again without the silos of a roster that did not confirm it.

        Raises:
            RoundError: too few parties are there at the deadline; who is missing is named.
            TrustError: it is refused (privacy.secure_sum.epoch).
        """
        without: frozenset[int] = frozenset()
        while True:
            number = (self._store.latest("epoch") or 0) + 1
            self._desk.publish("epoch", number, self._accepted.digest, rounds.call(self._accepted, number))
            silent = self._complete(number, without)
            if not silent:
                return self._done(number)
            without |= silent  # at least one more each time: it ends

    def complete(self, number: int) -> Epoch | None:
        """Go on with epoch ``number`` as it stands; None when a silo of its roster stays silent (share mode): call again.

        Raises:
            As ``call``.
        """
        return None if self._complete(number, frozenset()) else self._done(number)

    def _done(self, number: int) -> Epoch:
        self._confirmed = self._made(number)
        return self._confirmed

    def _made(self, number: int) -> Epoch:
        at = rounds.epoch_in(self._store, self._accepted, number)
        if at is None:
            raise RoundError(f"epoch {number} has no roster", hint="run the same command again", code="missing")
        return at

    def _complete(self, number: int, without: frozenset[int]) -> frozenset[int]:
        """Bring an epoch as far as it goes; the silos of its roster that did not confirm (share mode)."""
        at = rounds.epoch_in(self._store, self._accepted, number) or self._roster(number, without)
        for kind in ("pair-seeds", "confirmation"):
            if self._accepted.terms.shared:
                deadline_at = self._desk.now() + self._accepted.terms.sum.deadline_s
                silent = self._desk.collect(kind, number, shown=number, deadline_at=deadline_at, parties=at.silos)
                if silent:
                    return frozenset(silent)
            else:
                self._desk.demand(kind, number, shown=number)
        tags = self._desk.all("confirmation", number, at.silos)
        try:
            epoch.check_confirmations(tags, accepted=self._accepted, context=at.context, epoch=number, silos=at.silos)
        except TrustError as error:
            apart = error.facts.get("pairs")
            if not (self._accepted.terms.shared and isinstance(apart, list)):
                raise
            _LOG.warning("epoch %d: %s", number, error.message)  # nobody can tell which of two lies
            return frozenset(at.silos) - choice.without_mismatches(apart, at.silos)
        return frozenset()

    def _roster(self, number: int, without: frozenset[int]) -> Epoch:
        terms, desk = self._accepted.terms, self._desk
        silos, guardians = tuple(each for each in desk.members if each not in without), tuple(each.id for each in terms.guardian)
        if terms.shared:
            deadline_at = desk.now() + terms.sum.deadline_s
            desk.collect("guardian-note", number, shown=number, deadline_at=deadline_at, parties=guardians)
            desk.collect("epoch-note", number, shown=number, deadline_at=deadline_at, parties=silos)
            silos, guardians = self._here("epoch-note", number, silos), self._here("guardian-note", number, guardians)
            self._check_enough(number, silos, guardians)
        else:
            desk.demand("epoch-note", number, shown=number)
        notes, watching = desk.all("epoch-note", number, silos), desk.all("guardian-note", number, guardians)
        desk.publish("roster", number, self._accepted.digest, rounds.roster(self._accepted, number, notes, watching))
        return self._made(number)

    def _here(self, kind: str, number: int, parties: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(party for party in self._store.parties(kind, number) if party in parties)

    def _check_enough(self, number: int, silos: tuple[int, ...], guardians: tuple[int, ...]) -> None:
        terms = self._accepted.terms
        for what, kind, here, wanted, every in (
            ("silos", "epoch-note", silos, terms.fewest, self._desk.members),
            ("guardians", "guardian-note", guardians, terms.quorum, tuple(each.id for each in terms.guardian)),
        ):
            if len(here) < wanted:
                missing = [party for party in every if party not in here]
                raise RoundError(
                    f"no {kind} {number} from {what} {missing} by the deadline: {len(here)} are here, {wanted} are needed",
                    hint="start them, then run the same command again", code="absent", missing=missing,
                )  # fmt: skip

    def knocked(self, at: Epoch) -> bool:
        """Whether a silo outside this epoch posted its note for it (share mode), late or left out: it waits for the next."""
        here = self._here("epoch-note", at.number, self._desk.members)
        return self._accepted.terms.shared and not set(here) <= set(at.silos)
