# SPDX-License-Identifier: Apache-2.0
"""What a simulation is asked for, and the contract that follows from it.

Promised: settings that ``check`` lets pass name a mode, drops and a folder that a simulation can use. Not promised: that the
records fit them; dealing says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregator import basis_draft, commands, defaults
from aggregator.draft import Terms
from aggregator.simulation.dealing import Dealt
from aggregator.simulation.drops import check_drops
from privacy.errors import ConfigError
from privacy.federation import Model

_SHORT_S = 30
"""The deadline where silos are to be away on purpose: everybody waits for them that long."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to simulate.

    ``data`` None takes the built-in pairs, ``held_out`` None a fifth of the units of ``data``. ``delta`` None takes 1/(10·units)
    rounded down, at most 1e-5. ``max_records_per_unit`` None keeps one record of a unit that is a record, eight of one that a
    column names. ``without_privacy``: no noise; ``epsilon`` and ``delta`` are then not looked at. ``public_data``: the records of a
    public basis.
    """

    home: Path
    data: Path | None = None
    held_out: Path | None = None
    silo_column: str | None = None
    silos: int = 3
    unit: str | None = None
    max_records_per_unit: int | None = None
    model: str = "minilm"
    mode: str = "joint"
    rounds: int = defaults.ROUNDS["joint"]
    steps_per_round: int = 1
    epsilon: float = defaults.EPSILON
    delta: float | None = None
    sampling_rate: float = defaults.SAMPLING_RATE
    rank: int = defaults.RANK
    scale: float | None = None
    learning_rate: float = defaults.LEARNING_RATE
    max_grad_norm: float = defaults.MAX_GRAD_NORM
    max_length: int = 48
    basis: str = defaults.BASIS
    public_data: Path | None = None
    heads: int = 1
    targets: tuple[str, ...] = (defaults.TARGETS,)
    last_layers: int | None = defaults.LAST_LAYERS
    protocol: str = "consent"
    dropouts: int = 0
    drops: tuple[tuple[str, int], ...] = ()
    without_privacy: bool = False

    @property
    def clips_at(self) -> float:
        """C: generous where there is no noise to be scaled by it, unless another norm was asked for."""
        usual = self.max_grad_norm == defaults.MAX_GRAD_NORM
        return defaults.GENEROUS_GRAD_NORM if self.without_privacy and usual else self.max_grad_norm


def check(settings: Settings) -> None:
    """Return if these settings can be simulated. Raises ConfigError."""
    if settings.mode not in defaults.ROUNDS:
        raise ConfigError(
            f"mode {settings.mode!r} is not known", hint="use --mode joint or --mode local", code="mode", mode=settings.mode
        )
    if settings.mode == "joint" and settings.steps_per_round != 1:
        raise ConfigError(
            f"a round in joint mode is one step, {settings.steps_per_round} were asked for",
            hint="leave --steps-per-round out, or use --mode local",
            code="mode",
        )
    if (settings.basis == "public") != (settings.public_data is not None):
        raise ConfigError(
            f"--basis {settings.basis} {'without' if settings.public_data is None else 'with'} --public-data",
            hint="a public basis is made of a data set, and only that one is", code="basis",
        )  # fmt: skip
    check_drops(settings.drops, rounds=settings.rounds, names=silo_names(settings.silos), dropouts=settings.dropouts)
    if settings.home.exists() and any(settings.home.iterdir()):
        raise ConfigError(
            f"{settings.home} is not empty",
            hint="name a new folder with --home: a simulation is not continued, and never overwrites ledgers",
            code="home-exists",
        )
    if settings.unit in (None, "record") and (settings.max_records_per_unit or 1) > 1 and settings.data is not None:
        raise ConfigError(
            f"at most {settings.max_records_per_unit} records of a unit, each record is a unit of its own",
            hint="name the column of the privacy unit with --unit",
            code="no-unit",
        )


def rounds_of(settings: Settings) -> int:
    """How many rounds there are in all: a basis round comes before those that were asked for."""
    return settings.rounds + (settings.basis in basis_draft.OF_RECORDS)


def terms_of(settings: Settings, dealt: Dealt, delta: float, *, model: Model, modules: Sequence[str]) -> Terms:
    """What the draft of the simulation's contract starts from."""
    return Terms(
        name="simulation",
        expires=commands.in_a_year(),
        labels=dealt.labels,
        model=model,
        modules=modules,
        units=dealt.units,
        rounds=settings.rounds,
        mode=settings.mode,
        steps_per_round=settings.steps_per_round,
        text_pair=dealt.text_pair,
        max_length=settings.max_length,
        rank=settings.rank,
        basis=settings.basis,
        public_data="" if settings.public_data is None else settings.public_data.name,
        heads=settings.heads,
        shapes=commands.shapes_of(model.name, modules) if settings.basis in basis_draft.OF_RECORDS else (),
        scale=settings.scale,
        learning_rate=settings.learning_rate,
        unit=dealt.unit,
        max_records_per_unit=dealt.max_records_per_unit,
        sampling_rate=settings.sampling_rate,
        max_grad_norm=settings.clips_at,
        epsilon=settings.epsilon,
        delta=delta,
        without_privacy=settings.without_privacy,
        protocol=settings.protocol,
        dropouts=settings.dropouts,
        deadline_s=_SHORT_S if settings.drops else Terms.deadline_s,
    )


def silo_names(silos: int) -> list[str]:
    """What the silos of a simulation are called."""
    return [f"silo-{number}" for number in range(1, silos + 1)]
