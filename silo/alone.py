# SPDX-License-Identifier: Apache-2.0
"""``silo train --alone``: what this silo reaches by itself under a contract's terms. The comparison to see before it joins.

Model, adapter, schedule, steps, sampling rate, clipping norm and noise multiplier are the contract's. There is no aggregator and
no other silo: a step is the clipped sum over this silo's own sample, with its own noise in full, and the public divisor of one
silo. So the whole run costs what the contract's plan costs, and what the federation adds is seen at one and the same epsilon.

It draws from the silo's units, so it is a run like any other: declared in the ledger, each round reserved before it is computed,
charged whatever becomes of it, composed with everything else, refused beyond the limit. A contract whose basis comes from records
is trained with the basis of the weights here: that release takes all silos.

Promised: nothing leaves this machine, and no file of the federation is written but the ledger; a killed run goes on and never
undercounts. The ledger is held to the board as ``silo train`` does, where the board can be reached (``silo.rollback``). Not
promised: that it is free. With what it spends the federations' own plans, of this home and of others on the same records, may no
longer fit; then it is refused, unless the silo says that it wants the run all the same.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from privacy import federation, files, update_rule
from privacy.dp import ring, unprotected
from privacy.dp.budget import Gate, Limits
from privacy.dp.declared import Declared
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import Mechanism
from privacy.dp.together import Together
from privacy.errors import BudgetExhausted, ConfigError, PrivacyRefusal, TrustError
from privacy.federation import Accepted, Contract
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import agreed_basis, alone_kept, commands, config, keyring, other_homes, reading, rollback, succession, unit_sets
from silo.alone_terms import run_of, terms_alone
from silo.home import Home, Progress
from silo.settlement import load_progress, refuse_to_go_on
from silo.upload import noisy

ATTEMPT_BYTES = 16

_NOTHING = bytes(32)
_LATEST = "latest"


def stepped(
    state: State, terms: Contract, number: int, *, contribute: Callable[[State], NDArray[np.int64]],
    randomness: Callable[[], Randomness],
) -> State:  # fmt: skip
    """The silo's own state after the private steps of round ``number``.

    Args:
        terms: of ``terms_alone``.
        contribute: the noiseless integer sum ``(d,)`` of one private step at a state; draws its own fresh sample.
        randomness: gives a fresh source at every call, one for each step's noise.

    Formal guarantees:
        - *One noise per step*: each sum gets a full draw of its own before anything else is done with it (silo.upload.noisy).
        - *Public count*: ``steps_per_round`` steps are run, whatever they find, also with an empty sample.

    Raises:
        MachineError: a step gave another shape than the contract's.
        RoundError: the next state is not finite; the attempt stays charged.
    """
    for _ in range(terms.training.steps_per_round):
        total = ring.lift(noisy(contribute(state), terms, randomness()))
        state = update_rule.step(state, total, terms, applied=number - 1)
    return state


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round that a silo trained alone, for its owner."""

    round: int
    rounds: int
    epsilon: float
    limit: float
    seconds: float
    state_digest: str


class Run:
    """A run alone: its state in a folder of its own, each round charged before it is computed.

    Args:
        terms: of ``terms_alone``.
        run: of ``run_of``.
        place: where its state lies.
        gate: over the silo's ledger, for this run's plan, declared.
        contribute: as in ``stepped``.
        clock: seconds, monotonic.

    Formal guarantees:
        - *Charged before computed*: an attempt at a round is on the disk before a sample is drawn for it, and stays charged.
        - *Never twice*: an attempt that was lost is made anew, with a new reservation, sample and noise; of what it computed
          nothing was kept or seen.
        - *No more than planned*: rounds end with the plan, attempts that were lost count in it; nor more attempts at one round
          than ``budget.MOST_ATTEMPTS``: no deadline ends a round of a run alone, so then this run is over.
        - *Apart*: nothing is read from the federation's state, and nothing written there.
    """

    def __init__(
        self, *, terms: Contract, run: bytes, place: Home, gate: Gate, contribute: Callable[[State], NDArray[np.int64]],
        limit: float, randomness: Callable[[], Randomness] = Randomness.from_os, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.terms, self._run, self._place, self._gate = terms, run, place, gate
        self._contribute, self._randomness, self._limit, self._clock = contribute, randomness, limit, clock
        self._trained = 0
        self._progress = progress_of(place, run, terms)
        if self._progress.round:
            gate.settle(self._progress.round, "result")  # a process may have been killed between the state and this note

    @property
    def rounds_left(self) -> int:
        """How many rounds can still be trained: those of the schedule, as far as the plan has attempts for them."""
        return max(0, min(self.terms.training.rounds - self._progress.round, self._gate.attempts_left))

    def train(self, rounds: int | None = None) -> Iterator[Round]:
        """The next ``rounds`` rounds, or all that are left, each as it is done.

        Raises:
            PrivacyRefusal: the gate refused, and nothing was computed; or a round was attempted too often.
            MachineError: the trained matrices did not move, or the disk refuses.
            RoundError: the state would not be finite.
        """
        for _ in range(self.rounds_left if rounds is None else min(rounds, self.rounds_left)):
            begun = self._clock()
            number = self._progress.round + 1
            self._admit(number)
            state = stepped(self._progress.state, self.terms, number, contribute=self._contribute, randomness=self._randomness)
            self._progress = msgspec.structs.replace(self._progress, round=number, state=state)
            self._place.save_progress(self._progress)
            self._gate.settle(number, "result")
            self._trained += 1
            refuse_to_go_on(self._progress, self.terms)
            yield Round(
                round=number, rounds=self.terms.training.rounds, epsilon=self._gate.spent().epsilon, limit=self._limit,
                seconds=self._clock() - begun, state_digest=state.digest.hex(),
            )  # fmt: skip

    def _admit(self, number: int) -> None:
        """Charge one attempt. Raises as ``Gate.admit``, with what can be done here where the attempts at a round are used up."""
        try:
            self._gate.admit(number, os.urandom(ATTEMPT_BYTES))
        except PrivacyRefusal as error:
            if error.code != "too-many-attempts":
                raise
            raise PrivacyRefusal(
                f"{error.message}, so this run alone is over after {self._progress.round} rounds; "
                f"epsilon {self._gate.spent().epsilon:.4g} of {self._limit:g} is spent",
                hint="find out why no attempt came to its end; then a new run alone, from the start, with what is left: copy the "
                "contract, change its name, plan as many rounds as fit, and `silo train --alone --contract COPY`",
                code=error.code,
            ) from error

    def summary(self) -> dict[str, Any]:
        """What this process did, where the run stands, and what the silo has spent in all."""
        spent = self._gate.spent()
        return {
            "rounds": self._trained,
            "rounds_done": self._progress.round,
            "rounds_planned": self.terms.training.rounds,
            "epsilon": unprotected.figure(spent.epsilon),
            "delta": reading.delta_of(spent),
            **reading.why_none(spent),
            "limit": self._limit,
            "basis": self.terms.adapter.basis,
            "model_digest": self._progress.state.digest.hex(),
        }


def progress_of(place: Home, run: bytes, terms: Contract) -> Progress:
    """Where the run in ``place`` stands; before its first round, the initial state. Raises TrustError when it is another's."""
    found = place.progress()
    if found is None:
        state = update_rule.initial(terms)
        return Progress(contract=run, epoch=0, round=0, manifest=_NOTHING, outcome=_NOTHING, voids=0, state=state)
    if found.contract != run:
        raise TrustError(
            f"the state in {place.root} is of the run {found.contract.hex()[:16]}…, this is {run.hex()[:16]}…",
            hint="put back the folder as it was", code="contract-changed",
        )  # fmt: skip
    return found


@contextlib.contextmanager
def training(
    root: Path, *, contract: Path | None = None, fingerprint: str = "", folder: Path | None = None, instead: bool = False,
    say: Callable[[str], None] | None = None,
) -> Iterator[tuple[Run, float]]:  # fmt: skip
    """A run alone of the silo in ``root``, checked and declared; and epsilon after it and the federation's own plan together.

    Args:
        contract: a draft or published ``federation.toml``; else the joined contract, else the one that ``silo join`` would show.
        fingerprint, folder: as for ``silo join``, where nothing is joined yet.
        instead: spend the budget on this run though the federation's plan does not fit beside it.
        say: is told in one line why the ledger was not held to the board, where it was not.

    Raises:
        BudgetExhausted: the plan of the run alone is above the limit; or is with the federation's own, without ``instead``.
        LedgerBroken: this run, another one alone, or the federation has rounds that the ledger never reserved; the board too.
        TrustError: a restore of this home has not ended.
        SiloquyError: as ``silo.commands.joining`` and ``silo.learning.training.build``.
    """
    from silo.learning import training as learning

    home, settings = reading.opened(root)
    accepted = _accepted(root, contract, fingerprint, folder)
    terms, run = terms_alone(accepted.terms), run_of(accepted.digest)
    with home.locked(), _gate(home, settings, accepted, terms, instead=instead) as (gate, then):
        if (unasked := rollback.asked_if_reached(home, settings.aggregator, folder)) and say is not None:
            say(f"the ledger was not compared with the board: {unasked}")
        progress_of(_place(home, accepted), run, terms)
        bases = agreed_basis.pinned(home, terms)
        contribution = learning.build(home, settings, terms, bases=bases)
        ids, unit = contribution.unit_ids, terms.privacy.unit
        gate.draws_from(unit_sets.keep(home, ids, unit=unit, lasting=settings.records.lasting_ids))
        gate.declare(run=f"alone: {terms.name}")
        place = _begin(home, accepted)
        yield (
            Run(terms=terms, run=run, place=place, gate=gate, contribute=contribution, limit=settings.limits.epsilon),
            then,
        )


def evaluate(root: Path, records: Path, *, threads: int | None = None) -> dict[str, Any]:
    """Accuracy on ``records`` of the base model, of the latest run alone, and of the federation's model where there is one.

    For the owner of the records: the figures are exact, are sent nowhere and stand in no ledger.

    Raises:
        ConfigError: no run alone was begun here.
    """
    from silo.learning import evaluation

    home, settings = reading.opened(root)
    accepted = _latest(home)
    terms, run = terms_alone(accepted.terms), run_of(accepted.digest)
    progress = progress_of(_place(home, accepted), run, terms)
    compute = settings.compute if threads is None else msgspec.structs.replace(settings.compute, threads=threads)
    bases = agreed_basis.pinned(home, terms)
    bench = evaluation.open_bench(terms, model=settings.model.path, compute=compute, bases=bases)
    facts: dict[str, Any] = {
        **evaluation.measure(bench, None, records, "before"),
        **evaluation.measure(bench, progress.state, records, "alone"),
        "rounds_alone": progress.round,
        "rounds_planned": terms.training.rounds,
        "contract": accepted.digest.hex(),
    }
    together = succession.if_joined(home)
    if together is not None and together.digest == accepted.digest and terms.adapter == accepted.terms.adapter:
        state = load_progress(home, together)
        facts |= {**evaluation.measure(bench, state.state, records, "after"), "rounds": state.round}
    return facts


def _accepted(root: Path, contract: Path | None, fingerprint: str, folder: Path | None) -> Accepted:
    """The contract to train under: the given one, the joined one, or the one on the board, verified as for ``silo join``."""
    if contract is not None:
        return alone_kept.read_contract(contract)
    joined = succession.if_joined(Home(root))
    if joined is not None:
        return joined
    with commands.joining(root, fingerprint, folder=folder) as visit:
        return visit.accepted


@contextlib.contextmanager
def _gate(
    home: Home, settings: config.Config, accepted: Accepted, terms: Contract, *, instead: bool
) -> Iterator[tuple[Gate, float]]:
    """The gate of a run alone, and epsilon with the federation's plan; refused where that does not fit.

    That epsilon is at the smaller delta of the two contracts: the federation's own gate asks at its own.
    """
    home.restored_epoch()  # refuses while a restore has not ended: it fills the ledger's own places
    signer, limits = keyring.signer(home, accepted), reading.limits(settings, accepted)
    run, event = run_of(accepted.digest).hex(), federation.event(terms)
    ledger = Ledger.open(home.ledger_path, sign=signer.sign, verify=keyring.verifier(home), clock=time.time)
    with ledger, other_homes.held(home, settings) as beside:
        alone_kept.require_reserved(home, ledger)
        joined = succession.if_joined(home)
        if joined is not None:
            commands.check_promises(home, ledger, [joined.digest, *succession.ancestors(home, joined)])
        own = Declared(contract=run, training=event, each=terms.training.steps_per_round)
        ahead = [*own.rest(ledger.entries), *reading.plan_left(home, ledger, joined or accepted)]
        ahead += reading.other_plans_left(settings, beside)
        strictest = limits if joined is None else min(limits, reading.limits(settings, joined), key=lambda each: each.delta)
        then = _together(Together(ledger, beside), strictest, ahead)
        if not instead and then > limits.epsilon:
            raise BudgetExhausted(
                f"after this run the federation's own plan{' and those of the other homes' * bool(beside)} would bring epsilon to "
                f"{then:.4g}, the limit is {limits.epsilon:.4g}",
                hint="all draw from the same units: raise [limits] epsilon after your data protection officer agrees, or say "
                "--instead-of-joining and spend it on this run",
                code="no-room-to-join", epsilon_after=unprotected.figure(then), limit=limits.epsilon, delta=strictest.delta,
            )  # fmt: skip
        gate = Gate(
            ledger, limits, plan=event, contract=run, steps_per_attempt=own.each, units=unit_sets.reader(home), beside=beside,
            unit=terms.privacy.unit,
        )  # fmt: skip
        yield gate, then


def _together(history: History, limits: Limits, more: list[Mechanism]) -> float:
    """Epsilon of all that is charged and ``more``, as if all drew the same units; by the filter, for each follows the last."""
    return unprotected.certify([*history.charged(), *more], limits.delta, order=limits.filter_order).epsilon


def _begin(home: Home, accepted: Accepted) -> Home:
    """The run's own folder, with the contract it is under; from here on it is the latest."""
    place = _place(home, accepted)
    for folder in (place.root.parent, place.root):
        files.make_folder(folder, mode=0o700)
        with contextlib.suppress(PermissionError):
            folder.chmod(0o700)  # a copy that was brought back may be open to everybody
        files.sweep(folder)
    files.write_once(place.root / alone_kept.CONTRACT, accepted.raw, mode=files.PRIVATE)
    latest, line = place.root.with_name(_LATEST), accepted.digest.hex().encode() + b"\n"
    if not latest.is_file() or latest.read_bytes() != line:
        files.write_atomic(latest, line, mode=files.PRIVATE)
    return place


def _place(home: Home, accepted: Accepted) -> Home:
    return Home(home.root / alone_kept.FOLDER / accepted.digest.hex())


def _latest(home: Home) -> Accepted:
    """The contract of the run that was begun last. Raises ConfigError when there is none."""
    try:
        name = (home.root / alone_kept.FOLDER / _LATEST).read_text(encoding="ascii").strip()
        raw = (home.root / alone_kept.FOLDER / name / alone_kept.CONTRACT).read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no run alone was begun in {home.root}", hint="run `silo train --alone` first", code="not-alone"
        ) from error
    return federation.parse(raw)
