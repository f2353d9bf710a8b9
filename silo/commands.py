# SPDX-License-Identifier: Apache-2.0
"""What the ``silo`` commands do that change something, without the words: a home in, facts out. ``silo.reading`` has the rest.

The one place that puts a silo's parts together: home, identity, ledger, gate, transport, contribution. Nothing is decided here.
torch is loaded only by the functions that compute.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from privacy.dp import unprotected
from privacy.dp.budget import Gate
from privacy.dp.ledger import History, Ledger, is_begun
from privacy.errors import ConfigError, LedgerBroken
from privacy.federation import Accepted, Contract, Member
from privacy.identity import keys
from privacy.update_rule import State
from silo import (
    agreed_basis,
    alone_kept,
    config,
    fixed_basis,
    keyring,
    membership,
    other_homes,
    reading,
    rollback,
    succession,
    unit_sets,
)
from silo.catching_up import catch_up
from silo.folder import transporting
from silo.home import Home
from silo.participation import participate
from silo.parts import Parts, Settled
from silo.reading import limits, opened, plan
from silo.session import Superseded
from silo.settlement import load_progress
from silo.succession import Fetched
from silo.transport import Transport

if TYPE_CHECKING:
    from silo.learning.staged import Staged
    from silo.learning.training import Contribution


@dataclass(frozen=True, kw_only=True)
class Created:
    """A new silo: what to send to the coordinator, and what to read aloud."""

    public_path: Path
    fingerprint: str
    fingerprint_ml_dsa: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """One settled round of ``silo train``, for its owner."""

    round: int
    kind: str
    epsilon: float
    limit: float
    seconds: float
    state_digest: str


def create(
    root: Path, *, name: str, organisation: str, url: str = "", folder: Path | None = None, fingerprint: str, records: Path,
    epsilon: float, delta: float, model: str,
) -> Created:  # fmt: skip
    """A new silo in ``root``: configuration, identity, local secrets, an empty ledger. A half-made one is completed.

    The aggregator is at ``url`` or in ``folder``, one of the two.

    Raises:
        ConfigError: a value is not allowed, or there is a silo already.
        MachineError: the folder cannot be written.
    """
    home = Home.create(root)
    with home.locked():
        config.write_commented(
            home.config_path,
            name=name,
            organisation=organisation,
            url=url,
            folder="" if folder is None else str(folder.absolute()),
            fingerprint=fingerprint,
            records=str(records.absolute()),
            epsilon=epsilon,
            delta=delta,
            model=str(Path(model).absolute()) if model else "",
        )
        identity = _identity(home, name)
        keys.write_public(home.public_path, identity, organisation)
        _begin_ledger(home, identity)
    plain, both = reading.fingerprints(identity)
    return Created(public_path=home.public_path, fingerprint=plain, fingerprint_ml_dsa=both)


def _identity(home: Home, name: str) -> keys.Identity:
    return (
        keys.load(home.identity_path) if home.identity_path.exists() else keys.create(home.identity_path, name=name, receives=False)
    )


def _begin_ledger(home: Home, identity: keys.Identity) -> None:
    """The ledger's first entry, unless it stands. Raises LedgerBroken when this silo took part before and its ledger is gone."""
    if not is_begun(home.ledger_path):
        if home.promised_rounds() or home.state_path.exists():
            raise LedgerBroken(
                f"{home.ledger_path.name} is missing, this silo took part in round {max(home.promised_rounds(), default=0)}",
                hint="restore the newest copy of the ledger, never start a new one",
            )
        verify = keyring.ordered([identity.public.sign_key])
        Ledger.create(home.ledger_path, who=identity.name, sign=identity.sign, verify=verify, clock=time.time).close()


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A contract that was fetched and verified, before this silo says yes."""

    home: Home
    transport: Transport
    identity: keys.Identity
    fetched: Fetched
    settings: config.Config
    words: list[str]
    plan_epsilon: float

    @property
    def accepted(self) -> Accepted:
        """The contract to be countersigned."""
        return self.fetched.newest

    @property
    def cost(self) -> dict[str, Any]:
        """The whole plan's epsilon for a JSON document; null with the reason where there is no differential privacy."""
        epsilon = unprotected.figure(self.plan_epsilon)
        return {"epsilon": epsilon} if epsilon is not None else {"epsilon": None, "epsilon_none": unprotected.IN_WORDS}

    def countersign(self) -> Member:
        """Check budget, limits, model and records, sign, and post; which member this silo is."""
        return membership.countersign(
            self.home,
            self.transport,
            self.identity,
            self.accepted,
            limits=self.settings.limits,
            now=datetime.now(UTC),
            check_local=self._check_local,
            fetched=self.fetched,
        )

    def _check_local(self, accepted: Accepted) -> None:
        """The last check before the signature: model and records fit, and the plan fits the ledger, which holds it from here on."""
        ids = membership.check_fit(accepted, config=self.settings, home=self.home)
        agreed_basis.pinned(self.home, accepted.terms)
        opened_rounds = succession.opened_rounds(self.home, self.transport) if self.fetched.before else 0
        with _gate(self.home, accepted, self.settings, opened_rounds, self.transport) as gate:
            gate.draws_from(_units(self.home, accepted, self.settings, ids))
            gate.declare(run=accepted.terms.name)


@contextlib.contextmanager
def joining(
    root: Path, fingerprint: str, *, folder: Path | None = None, without_privacy: bool = False, basis: Path | None = None
) -> Iterator[Visit]:  # fmt: skip
    """Fetch the contract for ``silo join``. ``fingerprint`` is the one given now, or the configured one; so is ``folder``.

    Args:
        without_privacy: this silo's word, given now, that the contract may have no differential privacy.
        basis: the coordinator's file of a public basis; it is kept once it is the one that the contract pins.

    Raises:
        ConfigError: no fingerprint anywhere.
        SiloquyError: as ``silo.membership``.
    """
    home, settings = opened(root)
    if without_privacy:
        settings = msgspec.structs.replace(settings, limits=msgspec.structs.replace(settings.limits, without_privacy=True))
    expected = fingerprint or settings.aggregator.fingerprint or succession.kept_pin(home)
    if not expected:
        raise ConfigError(
            "the aggregator's fingerprint is not known", hint="ask the coordinator, give it with --fingerprint", code="fingerprint"
        )
    with home.locked(), transporting(settings.aggregator, folder) as transport:
        fetched = membership.fetch(transport, expected, home=home)
        if basis is not None:
            agreed_basis.take(home, fetched.newest.terms, basis)
        yield Visit(
            home=home,
            transport=transport,
            identity=keyring.under(home, fetched.newest),
            fetched=fetched,
            settings=settings,
            words=[
                *membership.terms_in_words(fetched.newest), *succession.in_words(fetched),
                *reading.earlier_runs(home, fetched.newest, settings),
            ],
            plan_epsilon=membership.check_limits(fetched.newest, settings.limits),
        )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A silo at work under one version of the contract."""

    parts: Parts
    gate: Gate
    basis: bytes


class Session:
    """A silo that takes part in rounds; from ``training``. It goes on by itself under a newer contract that it countersigned."""

    def __init__(self, home: Home, settings: config.Config, transport: Transport) -> None:
        self._home, self._settings, self._transport = home, settings, transport
        self._limit, self._settled = settings.limits.epsilon, 0
        self._closing = contextlib.ExitStack()
        self._work = self._closing.enter_context(_at_work(home, settings, transport))

    @property
    def rounds_left(self) -> int:
        """How many attempts the plan has left."""
        return self._work.gate.attempts_left

    def take_part(self, rounds: int) -> Iterator[Report]:
        """Each of the next ``rounds`` rounds as it is settled. Raises as ``silo.participation.participate``."""
        begun, last = time.monotonic(), self._settled + rounds
        while self._settled < last:
            # In share mode each step of the round before, and of an epoch, may take a deadline.
            terms = self._work.parts.accepted.terms
            wait_s = float(terms.sum.deadline_s * (6 if terms.shared else 1))
            try:
                for settled in participate(
                    self._work.parts, basis=self._work.basis, rounds=last - self._settled, wait_s=wait_s
                ):
                    self._settled += 1
                    keyring.retire(self._home, self._work.parts.accepted)  # the new key settled a round: the old one is done
                    yield self._report(settled, time.monotonic() - begun)
                    begun = time.monotonic()
            except Superseded:
                self._reopen()

    def summary(self) -> dict[str, Any]:
        """What this process did, and where the silo stands."""
        spent = self._work.gate.spent()
        state = load_progress(self._home, self._work.parts.accepted).state
        return {
            "rounds": self._settled,
            "epsilon": unprotected.figure(spent.epsilon),
            "delta": reading.delta_of(spent),
            **reading.why_none(spent),
            "limit": self._limit,
            "model_digest": state.digest.hex(),
        }

    def close(self) -> None:
        """Let another process open the ledger."""
        self._closing.close()

    def _reopen(self) -> None:
        """Go on under the contract of the newest epoch. Raises Superseded when this silo has not countersigned it."""
        self._closing.close()
        self._work = self._closing.enter_context(_at_work(self._home, self._settings, self._transport))

    def _report(self, settled: Settled, seconds: float) -> Report:
        return Report(
            round=settled.round,
            kind=settled.kind,
            epsilon=self._work.gate.spent().epsilon,
            limit=self._limit,
            seconds=seconds,
            state_digest=settled.state.digest.hex(),
        )


@contextlib.contextmanager
def training(root: Path, *, folder: Path | None = None) -> Iterator[Session]:
    """Everything ``silo train`` needs, checked before a round is waited for: signatures, ledger, model, records, layout."""
    home, settings = opened(root)
    membership.joined(home, now=datetime.now(UTC))  # before anything is locked or fetched
    with (
        home.locked(),
        transporting(settings.aggregator, folder) as transport,
        contextlib.closing(Session(home, settings, transport)) as session,
    ):
        yield session


@contextlib.contextmanager
def _at_work(home: Home, settings: config.Config, transport: Transport) -> Iterator[_Work]:
    """This silo under the contract in force, which all members countersigned, with its state brought up to it."""
    accepted, member, identity = membership.joined(home, now=datetime.now(UTC), transport=transport)
    terms = accepted.terms
    if reading.settled(home, accepted) == 0 and home.progress() is not None:
        keyring.retire(home, accepted)
    with _gate(home, accepted, settings, reading.settled(home, accepted), transport) as gate:
        membership.verify_all_countersigned(transport, accepted, home=home, wait_s=terms.sum.deadline_s)
        catch_up(home, transport, accepted)
        gate.declare(run=terms.name)
        state = load_progress(home, accepted).state
        contribution = fixed_basis.built(
            home, transport, terms, state.basis, lambda: _contribution(home, settings, terms, state)
        )
        gate.draws_from(_units(home, accepted, settings, contribution.unit_ids))
        parts = Parts(
            home=home, transport=transport, identity=identity, accepted=accepted, member=member, gate=gate,
            contribute=contribution, clock=time.time,
        )  # fmt: skip
        yield _Work(parts=parts, gate=gate, basis=contribution.basis_digest)


def dry_run(root: Path) -> dict[str, Any]:
    """One step on this machine whose result is thrown away: seconds, memory, device. Nothing is charged or sent."""
    home, settings = opened(root)
    accepted, _, _ = membership.joined(home, now=datetime.now(UTC))
    terms, state = accepted.terms, load_progress(home, accepted).state
    with home.locked():
        made = _contribution(home, settings, terms, state)
        found = made.dry_run(state)
    return {
        "seconds": round(found.seconds, 3),
        "seconds_per_round": round(found.seconds_per_round, 3),
        "peak_memory_bytes": found.peak_memory_bytes,
        "device": found.device,
        "precision": found.precision,
    }


def _contribution(home: Home, settings: config.Config, terms: Contract, state: State) -> Contribution | Staged:
    """What a round asks for a vector: private steps, or sketches before them where a basis round comes first."""
    from silo.learning import staged, training

    if terms.basis is not None:
        return staged.Staged(home, settings, terms, state)
    return training.build(home, settings, terms, bases=agreed_basis.of(home, terms, state))


@contextlib.contextmanager
def _gate(
    home: Home, accepted: Accepted, settings: config.Config, opened_rounds: int, transport: Transport
) -> Iterator[Gate]:  # fmt: skip
    """What may be spent, once the ledger is shown to be no older than what this silo promised and signed."""
    signer = keyring.signer(home, accepted)
    ledger = Ledger.open(home.ledger_path, sign=signer.sign, verify=keyring.verifier(home), clock=time.time)
    with contextlib.closing(ledger), other_homes.held(home, settings) as beside:
        before = succession.ancestors(home, accepted)
        check_promises(home, ledger, [accepted.digest, *before])
        alone_kept.require_reserved(home, ledger)
        known = accepted.terms.privacy.max_silos_per_unit
        other_homes.require_elsewhere(beside, [each.hex() for each in (accepted.digest, *before)], known=known)
        rollback.require_newest(home, transport, ledger, [accepted, *reversed(before.values())])
        yield Gate(
            ledger, limits(settings, accepted), plan=plan(ledger, accepted, opened_rounds), contract=accepted.digest.hex(),
            steps_per_attempt=accepted.terms.training.steps_per_round, fewest=reading.fewest(accepted.terms),
            units=unit_sets.reader(home), beside=beside, before=reading.plan_before(ledger, accepted, home),
            unit=accepted.terms.privacy.unit,
        )  # fmt: skip


def _units(home: Home, accepted: Accepted, settings: config.Config, ids: Sequence[str]) -> str | None:
    """The digest of the file that says which units may be drawn under this contract, once it is on the disk."""
    return unit_sets.keep(home, ids, unit=accepted.terms.privacy.unit, lasting=settings.records.lasting_ids)


def check_promises(home: Home, ledger: History, contracts: Sequence[bytes]) -> None:
    """Every round this silo promised to take part in was reserved before; a ledger without it was rolled back or replaced."""
    for number in home.promised_rounds():
        if not any(ledger.attempts(contract.hex(), number) for contract in contracts):
            raise LedgerBroken(
                f"this silo took part in round {number}, its ledger of {ledger.counter} entries has no reservation for it",
                hint="stop: restore the newest copy of the ledger, never an older one",
                code="ledger-behind",
                round=number,
            )
