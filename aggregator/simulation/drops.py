# SPDX-License-Identifier: Apache-2.0
"""Silos of a simulation that are ended in a round on purpose, to show that the round goes on without them and they come back.

Promised: the process is killed, without a request, once the round is opened, and started again when the round has its outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aggregator.coordinator import Coordinator
from aggregator.desk import Event
from aggregator.simulation.processes import Children
from privacy.errors import ConfigError, RoundError

Drop = tuple[str, int]
"""A silo's name and the round in which it is ended."""
_STARTS: Final = 10
"""Deadlines that the silos have to start."""


class Drops:
    """Who is to be away, and who is away now.

    Args:
        rounds: how many rounds the simulation has.
        home: its folder.
    """

    def __init__(self, drops: Sequence[Drop], rounds: int, home: Path, running: Children) -> None:
        self._drops, self._rounds, self._home, self._running = drops, rounds, home, running
        self._down: list[Drop] = []

    def look(self, event: Event) -> None:
        """End who is to be away in the round that has just been opened; to be told of the coordinator's progress."""
        for drop in self._drops:
            if (event.step, event.round) == ("upload", drop[1]) and drop not in self._down:
                self._down.append(drop)
                self._running.kill(f"train-{drop[0]}")

    def after(self, number: int) -> None:
        """Start again who was away in round ``number``, which is over: for that round, which it still settles, and the rest."""
        for name, ended_in in self._down:
            if ended_in == number:
                left = str(self._rounds - number + 1)
                self._running.start(f"train-{name}", "silo", ["train", "--home", self._home / name, "--rounds", left])


def first_epoch(coordinator: Coordinator) -> None:
    """The first epoch. The deadline is short where silos are to be away; those that take longer to start are waited for."""
    for left in reversed(range(_STARTS)):
        try:
            coordinator.ensure_epoch()
            return
        except RoundError as error:
            if error.code != "absent" or not left:
                raise


def check_drops(drops: Sequence[Drop], *, rounds: int, names: Sequence[str], dropouts: int) -> None:
    """Return if these silos can be away in these rounds. Raises ConfigError."""
    for name, number in drops:
        if name not in names or number > rounds:
            raise ConfigError(
                f"{name} cannot be away in round {number}", hint=f"silos are {', '.join(names)}, rounds 1 to {rounds}", code="mode"
            )
    most = max((sum(number == each for _, each in drops) for _, number in drops), default=0)
    if most > dropouts:
        raise ConfigError(
            f"{most} silos are to be away in one round, {dropouts} may be", code="mode",
            hint="say --protocol shares and --dropouts, with enough --silos",
        )  # fmt: skip
