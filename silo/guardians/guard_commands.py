# SPDX-License-Identifier: Apache-2.0
"""What the ``silo guard`` commands do, without the words: a guardian with a home of its own, that has no records and no model.

::

    guard.toml             name, organisation, and where the aggregator is
    identity.key, .pub     who it is
    contract/v<version>/   the contract as signed, and every member's countersignature
    promises/, log/        what it has bound itself to; the log as it saw it
    epoch/                 0700; the secrets of the epoch; never in a backup

A silo whose key is a guardian of the contract works as one by itself (``silo train``); ``run`` also works in a silo's home, for a
guardian that goes on while its silo does not train. Promised: it acts only under a contract whose every countersignature it
verified itself, that of the newest epoch; over to a newer version that it keeps it goes by itself. torch is never loaded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from privacy import chain, files
from privacy.envelope import open_contract
from privacy.errors import ConfigError, RoundError, TrustError
from privacy.federation import Accepted, Guardian, Name
from privacy.identity import keys
from silo import config, keyring, membership, reading, restoring, succession
from silo.folder import transporting
from silo.guardians.guardian import Guardian as Working
from silo.guardians.guardian import party_of
from silo.guardians.guarding import work
from silo.home import Home
from silo.session import Superseded
from silo.transport import Transport
from silo.watch import Watch, refuse_after_equivocation

FILE = "guard.toml"


class Config(config.Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of ``guard.toml``."""

    name: Name
    organisation: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    aggregator: config.Aggregator


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A contract that was fetched and verified, before this guardian keeps it."""

    home: Home
    transport: Transport
    fetched: succession.Fetched
    party: Guardian
    words: list[str]

    def keep(self, *, wait_s: float = 0.0) -> Accepted:
        """Keep the contract with its chain and every member's countersignature. Raises RoundError while members have not signed."""
        accepted = self.fetched.newest
        succession.keep(self.home, self.fetched)
        self.home.keep_contract(accepted.terms.version, self.fetched.documents[-1].document)
        membership.verify_all_countersigned(self.transport, accepted, home=self.home, wait_s=wait_s)
        return accepted


def create(
    root: Path, *, name: str, organisation: str, url: str = "", folder: Path | None = None, fingerprint: str
) -> tuple[str, str]:
    """A new guardian's home in ``root``; its fingerprints, as silo.reading.fingerprints. A half-made one is completed.

    Raises:
        ConfigError: a value is not allowed, or there is a silo.
        Equivocation: a guardian with another configuration is there.
        MachineError: the folder cannot be written.
    """
    if (root / config.FILE).exists():
        raise ConfigError(f"{root} is a silo", hint="a silo that is a guardian needs no other home", code="home-exists")
    where = f"url = {config.quote(url)}" if url else f"folder = {config.quote(str((folder or Path()).absolute()))}"
    text = (
        "# A guardian: it keeps shares of what unmasks a sum. The terms stand in the contract.\n"
        f"name = {config.quote(name)}\norganisation = {config.quote(organisation)}\n\n[aggregator]\n{where}\n"
        f"# The aggregator's fingerprint, compared over another channel.\nfingerprint = {config.quote(fingerprint)}\n"
    )
    _decoded(text.encode(), root / FILE)
    home = Home.create(root)
    with home.locked():
        files.write_once(root / FILE, text.encode())
        made = home.identity_path.exists()
        identity = keys.load(home.identity_path) if made else keys.create(home.identity_path, name=name, receives=False)
        keys.write_public(home.public_path, identity, organisation)
    return reading.fingerprints(identity)


@contextlib.contextmanager
def joining(root: Path, fingerprint: str, *, folder: Path | None = None) -> Iterator[Visit]:
    """Fetch the contract and check that this home's key is one of its guardians.

    Raises:
        ConfigError: no fingerprint anywhere.
        TrustError: the contract does not hold, or has no such guardian.
    """
    home, at = Home(root), _aggregator(root)
    expected = fingerprint or at.fingerprint
    if not expected:
        raise ConfigError(
            "the aggregator's fingerprint is not known", hint="ask the coordinator, give it with --fingerprint", code="fingerprint"
        )
    with home.locked(), transporting(at, folder) as transport:
        fetched = membership.fetch(transport, expected, home=home)
        _, party = _own(home, fetched.newest)
        words = [*membership.terms_in_words(fetched.newest), *succession.in_words(fetched)]
        yield Visit(home=home, transport=transport, fetched=fetched, party=party, words=words)


def run(root: Path, *, rounds: int | None, folder: Path | None = None, told: Callable[[str], None]) -> int:
    """Work as a guardian until so many rounds have an outcome, or until it is stopped; how many had.

    Raises:
        ConfigError: no contract was joined.
        Superseded: the newest epoch is under a contract that was not joined.
        SiloquyError: as silo.guardians.guardian.Guardian.step.
    """
    home, at = Home(root), _aggregator(root)
    refuse_after_equivocation(home)
    with home.locked(), transporting(at, folder) as transport:
        return serve(home, transport, rounds=rounds or 2**31, told=told, clock=time.time)


def serve(
    home: Home, transport: Transport, *, rounds: int, told: Callable[[str], None], clock: Callable[[], float]
) -> int:
    """``run`` over a transport; hold the home's lock."""
    finished = 0
    while True:
        guardian = _working(home, transport, told, clock)

        def is_over(guardian: Working = guardian, before: int = finished) -> bool:
            return guardian.superseded is not None or before + guardian.finished >= rounds

        work(guardian, transport, clock, is_over)
        finished += guardian.finished
        if finished >= rounds:
            return finished


def _working(home: Home, transport: Transport, told: Callable[[str], None], clock: Callable[[], float]) -> Working:
    accepted = at_work(home, transport)
    membership.check_expiry(accepted, datetime.fromtimestamp(clock(), UTC))
    identity, party = _own(home, accepted)
    return Working(
        home=home, transport=transport, identity=identity, accepted=accepted, party=party, clock=clock,
        former=succession.ancestors(home, accepted), told=told,
        watch=Watch(home=home, transport=transport, identity=identity, accepted=accepted, clock=clock),
    )  # fmt: skip


def at_work(home: Home, transport: Transport) -> Accepted:
    """The version under which this guardian acts: that of the newest epoch; before any, the newest that all members signed.

    Raises:
        ConfigError: no contract was joined.
        RoundError: members have not signed it.
        Superseded: the newest epoch is under a version that is not kept here, or that a later one passed over.
    """
    kept = [open_contract(raw) for _, raw in home.contracts()]
    if not kept:
        raise ConfigError("this guardian has joined no federation", hint="run `silo guard join` first", code="not-joined")
    standing = [*chain.ancestors(kept[-1], kept), kept[-1]]
    called = succession.newest_call(home, transport)
    if called is not None:
        standing = [each for each in standing if each.digest == called[1]]
        if not standing:
            raise Superseded.by(*called)
    while len(standing) > 1:
        with contextlib.suppress(RoundError):
            membership.verify_all_countersigned(transport, standing[-1], home=home)
            return standing[-1]
        standing.pop()
    membership.verify_all_countersigned(transport, standing[0], home=home, wait_s=standing[0].terms.sum.deadline_s)
    return standing[0]


def is_alone(root: Path) -> bool:
    """Whether this is the home of a guardian and of no silo."""
    return (root / FILE).exists()


def restore(root: Path, *, folder: Path | None = None) -> int:
    """After a backup of this guardian was copied back: it sits out every epoch up to the one that it gives, for good.

    Raises:
        ConfigError: no contract was joined.
        SiloquyError: as silo.restoring.restored_guardian.
    """
    home, at = Home(root), _aggregator(root)
    with home.locked(), transporting(at, folder) as transport:
        accepted = at_work(home, transport)
        return restoring.restored_guardian(home, transport, accepted, _own(home, accepted)[0])


def organisation(root: Path) -> str:
    """Whose guardian this is, by ``guard.toml``."""
    return _decoded((root / FILE).read_bytes(), root / FILE).organisation


def _own(home: Home, accepted: Accepted) -> tuple[keys.Identity, Guardian]:
    """This home's newest key that is a guardian's of the contract, with exactly its suite; and which guardian it is."""
    for identity in keyring.identities(home):
        party = party_of(accepted, identity)
        if party is not None:
            return identity.under(accepted.terms.signatures), party
    raise TrustError(
        f"no guardian of {accepted.terms.name} has this home's key", code="not-a-member",
        hint="send identity.pub to the coordinator, who adds it with `aggregator guardian`",
    )  # fmt: skip


def _aggregator(root: Path) -> config.Aggregator:
    """Where the aggregator is, by ``guard.toml`` or in a silo's home ``silo.toml``."""
    path = root / FILE
    if not path.exists():
        return config.load(root / config.FILE).aggregator
    return _decoded(path.read_bytes(), path).aggregator


def _decoded(raw: bytes, path: Path) -> Config:
    try:
        return msgspec.toml.decode(raw, type=Config)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: {error}", hint="mend that line", code="config", path=str(path)) from error
