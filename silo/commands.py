# SPDX-License-Identifier: Apache-2.0
"""What the ``silo`` commands do that change something, without the words: a home in, facts out. ``silo.reading`` has the rest.

The one place that puts a silo's parts together: home, identity, ledger, gate, transport, contribution. Nothing is decided here.
torch is loaded only by the functions that compute.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privacy import keys
from privacy.budget import Gate
from privacy.errors import ConfigError, LedgerBroken
from privacy.federation import Accepted, Member, mechanism
from privacy.ledger import Ledger, is_begun
from silo import config, membership
from silo.home import Home
from silo.participation import participate
from silo.reading import limits, opened, verifier
from silo.round import Parts, Settled
from silo.settlement import load_progress
from silo.transport import HttpTransport


@dataclass(frozen=True, kw_only=True)
class Created:
    """A new silo: what to send to the coordinator, and what to read aloud."""

    public_path: Path
    fingerprint: str


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
    root: Path, *, name: str, organisation: str, url: str, fingerprint: str, records: Path, epsilon: float, delta: float, model: str
) -> Created:
    """A new silo in ``root``: configuration, identity, local secrets, an empty ledger. A half-made one is completed.

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
            fingerprint=fingerprint,
            records=str(records.absolute()),
            epsilon=epsilon,
            delta=delta,
            model=str(Path(model).absolute()) if model else "",
        )
        identity = _identity(home, name)
        keys.write_public(home.public_path, identity, organisation)
        _begin_ledger(home, identity)
    return Created(public_path=home.public_path, fingerprint=keys.fingerprint(identity.public))


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
        Ledger.create(home.ledger_path, who=identity.name, sign=identity.sign, verify=verifier(identity), clock=time.time).close()


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A contract that was fetched and verified, before this silo says yes."""

    home: Home
    transport: HttpTransport
    identity: keys.Identity
    accepted: Accepted
    settings: config.Config
    words: list[str]
    plan_epsilon: float

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
        )

    def _check_local(self, accepted: Accepted) -> None:
        """The last check before the signature: model and records fit, and the plan fits the ledger, which holds it from here on."""
        membership.check_fit(accepted, config=self.settings, home=self.home)
        with _gate(self.home, self.identity, accepted, self.settings) as gate:
            gate.declare(run=accepted.terms.name)


@contextlib.contextmanager
def joining(root: Path, fingerprint: str) -> Iterator[Visit]:
    """Fetch the contract for ``silo join``. ``fingerprint`` is the one given now, or the configured one.

    Raises:
        ConfigError: no fingerprint anywhere.
        SiloquyError: as ``silo.membership``.
    """
    home, settings = opened(root)
    expected = fingerprint or settings.aggregator.fingerprint
    if not expected:
        raise ConfigError(
            "the aggregator's fingerprint is not known", hint="ask the coordinator, give it with --fingerprint", code="fingerprint"
        )
    with home.locked(), _transport(settings) as transport:
        accepted = membership.fetch_contract(transport, expected)
        yield Visit(
            home=home,
            transport=transport,
            identity=keys.load(home.identity_path),
            accepted=accepted,
            settings=settings,
            words=membership.terms_in_words(accepted),
            plan_epsilon=membership.check_limits(accepted, settings.limits),
        )


class Session:
    """A silo that takes part in rounds; from ``training``."""

    def __init__(self, parts: Parts, gate: Gate, *, basis: bytes, limit: float, wait_s: float) -> None:
        self._parts, self._gate, self._basis, self._limit, self._wait_s = parts, gate, basis, limit, wait_s
        self._settled = 0

    @property
    def rounds_left(self) -> int:
        """How many attempts the plan has left."""
        return self._gate.attempts_left

    def take_part(self, rounds: int) -> Iterator[Report]:
        """Each of the next ``rounds`` rounds as it is settled. Raises as ``silo.participation.participate``."""
        begun = time.monotonic()
        for settled in participate(self._parts, basis=self._basis, rounds=rounds, wait_s=self._wait_s):
            self._settled += 1
            yield self._report(settled, time.monotonic() - begun)
            begun = time.monotonic()

    def summary(self) -> dict[str, Any]:
        """What this process did, and where the silo stands."""
        spent = self._gate.spent()
        state = load_progress(self._parts.home, self._parts.accepted).state
        return {
            "rounds": self._settled,
            "epsilon": spent.epsilon,
            "delta": spent.delta,
            "limit": self._limit,
            "model_digest": state.digest.hex(),
        }

    def _report(self, settled: Settled, seconds: float) -> Report:
        return Report(
            round=settled.round,
            kind=settled.kind,
            epsilon=self._gate.spent().epsilon,
            limit=self._limit,
            seconds=seconds,
            state_digest=settled.state.digest.hex(),
        )


@contextlib.contextmanager
def training(root: Path) -> Iterator[Session]:
    """Everything ``silo train`` needs, checked before a round is waited for: signatures, ledger, model, records, layout."""
    from silo import training as learning

    home, settings = opened(root)
    identity = keys.load(home.identity_path)
    accepted, member = membership.joined(home, identity, now=datetime.now(UTC))
    terms = accepted.terms
    with home.locked(), _transport(settings) as transport, _gate(home, identity, accepted, settings) as gate:
        membership.verify_all_countersigned(transport, accepted, home=home, wait_s=terms.sum.deadline_s)
        gate.declare(run=terms.name)
        contribution = learning.build(home, settings, terms)
        parts = Parts(
            home=home,
            transport=transport,
            identity=identity,
            accepted=accepted,
            member=member,
            gate=gate,
            contribute=contribution,
            clock=time.time,
        )
        yield Session(
            parts, gate, basis=contribution.model.basis_digest, limit=settings.limits.epsilon, wait_s=float(terms.sum.deadline_s)
        )


def dry_run(root: Path) -> dict[str, Any]:
    """One step on this machine whose result is thrown away: seconds, memory, device. Nothing is charged or sent."""
    from silo import training as learning

    home, settings = opened(root)
    accepted, _ = membership.joined(home, keys.load(home.identity_path), now=datetime.now(UTC))
    with home.locked():
        found = learning.build(home, settings, accepted.terms).dry_run(load_progress(home, accepted).state)
    return {
        "seconds": round(found.seconds, 3),
        "seconds_per_round": round(found.seconds_per_round, 3),
        "peak_memory_bytes": found.peak_memory_bytes,
        "device": found.device,
        "precision": found.precision,
    }


@contextlib.contextmanager
def _transport(settings: config.Config) -> Iterator[HttpTransport]:
    transport = HttpTransport(settings.aggregator.url, insecure_http=settings.aggregator.insecure_http)
    try:
        yield transport
    finally:
        transport.close()


@contextlib.contextmanager
def _gate(home: Home, identity: keys.Identity, accepted: Accepted, settings: config.Config) -> Iterator[Gate]:
    ledger = Ledger.open(home.ledger_path, sign=identity.sign, verify=verifier(identity), clock=time.time)
    try:
        _check_promises(home, ledger, accepted.digest.hex())
        yield Gate(
            ledger, limits(settings, accepted), plan=mechanism(accepted.terms), contract=accepted.digest.hex(),
            steps_per_attempt=accepted.terms.training.steps_per_round,
        )  # fmt: skip
    finally:
        ledger.close()


def _check_promises(home: Home, ledger: Ledger, contract: str) -> None:
    """Every round this silo promised to take part in was reserved before; a ledger without it was rolled back or replaced."""
    for number in home.promised_rounds():
        if not ledger.attempts(contract, number):
            raise LedgerBroken(
                f"this silo took part in round {number}, its ledger of {ledger.counter} entries has no reservation for it",
                hint="stop: restore the newest copy of the ledger, never an older one",
                code="ledger-behind",
                round=number,
            )
