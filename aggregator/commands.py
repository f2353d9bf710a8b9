# SPDX-License-Identifier: Apache-2.0
"""What the ``aggregator`` commands do, without the words: homes in, facts out.

Each function opens what it needs from the aggregator's directory and closes it again. Only ``running`` and ``sign`` read the
private key; ``serve`` never does.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aggregator import admission, enrolment, revision, versions
from aggregator.board import Board
from aggregator.config import Home
from aggregator.coordinator import Coordinator, coordinating
from aggregator.desk import Event
from aggregator.draft import Terms
from aggregator.reporting import compliance, gathering, logged, no_guarantee, report
from aggregator.reporting.record import Scalar
from aggregator.store import Store
from privacy import base_model, files
from privacy.dp import unprotected
from privacy.errors import ConfigError, MachineError
from privacy.federation import Accepted, Model
from privacy.identity import keys

_SOFTWARE = ("siloquy", "cryptography", "dp-accounting", "numpy", "msgspec", "typst")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An aggregator's home with its store."""

    home: Home
    store: Store

    @property
    def accepted(self) -> Accepted:
        """The contract in force. Raises ConfigError before there is one."""
        accepted = versions.in_force(self.store)
        if accepted is None:
            raise ConfigError("no contract is signed yet", hint="add the members, then run `aggregator sign`", code="no-contract")
        return accepted


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Opened]:
    """The home in ``root`` and its store. Raises ConfigError when there is no aggregator there."""
    home = Home(root)
    store = Store(home.evidence_folder, home.database_url(home.config()))
    try:
        yield Opened(home=home, store=store)
    finally:
        store.close()


def describe_model(
    name: str, targets: Sequence[str], *, pooling: str = "mean", last_layers: int | None = None
) -> tuple[Model, tuple[str, ...], int]:
    """(the contract's model table, the adapted modules, Σ(in + out) over them) of a local, packaged or hub model.

    Args:
        last_layers: adapt only modules of the last so many layers; all layers when None.

    Raises:
        ConfigError: there is no such model, or a target matches none of its modules.
    """
    folder = base_model.locate(name)
    described = base_model.describe(folder)
    modules = _in_last_layers(base_model.match_modules(described, targets), last_layers)
    model = Model(name=name, digest=base_model.digest(folder), hidden_size=described.hidden_size, pooling=pooling)  # type: ignore[arg-type]
    return model, modules, sum(sum(described.linear[module]) for module in modules)


def shapes_of(name: str, modules: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(out, in) of each of ``modules``. Raises ConfigError when there is no such model."""
    linear = base_model.describe(base_model.locate(name)).linear
    return tuple(linear[module] for module in modules)


def _in_last_layers(modules: Sequence[str], count: int | None) -> tuple[str, ...]:
    """The modules of the last ``count`` layers; a module's layer is the first number in its name."""
    layers = {module: int(found[0]) for module in modules if (found := re.findall(r"(?<=\.)[0-9]+(?=\.)", module))}
    if count is None or not layers:
        return tuple(modules)
    first = max(layers.values()) - count + 1
    return tuple(module for module in modules if layers.get(module, first) >= first)


def init(
    root: Path,
    *,
    organisation: str,
    terms: Terms,
    lora_width: int,
    host: str = "127.0.0.1",
    port: int,
    database_url: str = "",
    simulated: bool = False,
) -> dict[str, Any]:
    """A new aggregator with its draft contract; what to tell the silos. ``simulated``: every report of it says that it is one."""
    home, identity = enrolment.init(
        root, name="aggregator", organisation=organisation, terms=terms, host=host, port=port, database_url=database_url,
        facts={"lora_width": lora_width, "simulated": simulated},
    )  # fmt: skip
    shown = keys.fingerprint(identity.public.under(terms.signatures))
    return {"home": str(root), "draft": str(home.draft_path), "fingerprint": shown}


def add_member(root: Path, public: Path) -> dict[str, Any]:
    """Add the silo that introduces itself in ``public`` to the draft."""
    return change_member(root, public)


def change_member(root: Path, public: Path | None, *, replace: str = "", remove: str = "") -> dict[str, Any]:
    """Add the silo that introduces itself in ``public`` to the draft, or put its keys in place of a member's, or remove one."""
    if public is None:
        gone = revision.remove(Home(root), remove)
        return {"member": gone.id, "name": gone.name, "organisation": gone.organisation, "removed": True}
    try:
        raw = public.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {public}: {error.strerror}", hint="ask the silo for its identity.pub", code="no-file"
        ) from error
    member = revision.replace(Home(root), replace, raw) if replace else enrolment.add_member(Home(root), raw)
    shown = keys.fingerprint(keys.stated(member))
    return {"member": member.id, "name": member.name, "organisation": member.organisation, "fingerprint": shown}


def add_guardian(root: Path, public: Path) -> dict[str, Any]:
    """Add the guardian that introduces itself in ``public`` to the draft."""
    try:
        raw = public.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {public}: {error.strerror}", hint="ask the guardian for its identity.pub", code="no-file"
        ) from error
    guardian = enrolment.add_guardian(Home(root), raw)
    shown = keys.fingerprint(keys.stated(guardian))
    return {"guardian": guardian.id, "name": guardian.name, "organisation": guardian.organisation, "fingerprint": shown}


def revise(
    root: Path, *, rounds: int | None = None, expires: str = "", signatures: str = "", give_up: bool = False
) -> dict[str, Any]:
    """Begin the draft of the contract's next version."""
    with opened(root) as at:
        identity = keys.load(at.home.identity_path)
        newest, version = revision.revise(
            at.home, identity, at.store, rounds=rounds, expires=expires, signatures=signatures, give_up=give_up
        )
    return {"version": version, "previous": newest.digest.hex(), "draft": str(at.home.draft_path)}


def sign(root: Path) -> dict[str, Any]:
    """Complete, check, sign and publish the draft."""
    with opened(root) as at:
        accepted = enrolment.sign_version(at.home, keys.load(at.home.identity_path), at.store, now=time.time())
    plan = accepted.terms.privacy
    return {
        "contract": accepted.digest.hex(),
        "version": accepted.terms.version,
        "silos": accepted.terms.silos,
        "noise_multiplier": plan.noise_multiplier,
        "lattice_bits": plan.lattice_bits,
        "epsilon": plan.epsilon or None,
        "delta": plan.delta or None,
        **({} if accepted.terms.is_private else {"epsilon_none": unprotected.IN_WORDS}),
        "mode": accepted.terms.training.mode,
        "rounds": accepted.terms.training.rounds,
        "steps_per_round": accepted.terms.training.steps_per_round,
        "dimension": accepted.terms.dimension,
    }


def serve(root: Path, *, host: str | None = None, port: int | None = None, folder: Path | None = None) -> None:
    """Run the mailbox, over HTTP or in a folder, until it is told to stop; it holds no private key."""
    with opened(root) as at:
        listen = at.home.config().listen
        board = Board(at.store, admission.admit, time.time)
        if folder is not None:
            from aggregator import mailbox

            mailbox.serve(folder.absolute(), home=at.home, store=at.store, board=board)
            return
        from aggregator import service

        service.serve(
            service.create_app(board, at.home.log_folder), host or listen.host, listen.port if port is None else port,
            service_file=at.home.service_path,
        )


@contextlib.contextmanager
def running(root: Path, *, progress: Callable[[Event], None], sleep: Callable[[float], None] = time.sleep) -> Iterator[Coordinator]:
    """The coordinator of a home, alone at work in it."""
    with opened(root) as at:
        identity = keys.load(at.home.identity_path)
        with coordinating(
            at.home, store=at.store, identity=identity, clock=time.time, sleep=sleep, progress=progress
        ) as coordinator:
            yield coordinator


def status(root: Path) -> dict[str, Any]:
    """Public facts about the federation."""
    with opened(root) as at:
        return Board(at.store, admission.admit, time.time).status()


def build_report(root: Path, extra: dict[str, Scalar] | None = None) -> no_guarantee.AnyReport:
    """The facts of the report, from the documents on the board; without differential privacy the one that says so.

    Raises:
        ConfigError: there is no differential privacy, and rounds were opened under an earlier version.
    """
    with opened(root) as at:
        accepted, ended = at.accepted, gathering.settled(at.store)
        earlier = gathering.earlier(at.store, accepted)
        known: dict[str, Any] = {
            "rounds": ended,
            "upload_bytes": gathering.bytes_per_silo_and_round(ended),
            "lora_bytes": _lora_bytes(at),
            "state_digest": ended[-1].state_digest if ended else gathering.initial_state(accepted, earlier),
            "generated_at": int(time.time()),
            "software": software(),
            "extra": {**(extra or {}), **({"simulated": True} if _facts_at_start(at.home).get("simulated") else {})},
            "still_open": gathering.still_open(at.store),
        }
        if not accepted.terms.is_private:
            gathering.check_one_version(accepted, ended)
            return no_guarantee.facts(accepted, sets=gathering.sets(at.store, ended), **known)
        return compliance.facts(accepted, earlier=earlier, **known)


def write_report(root: Path, folder: Path, facts: no_guarantee.AnyReport) -> tuple[Path, Path]:
    """Put the report's digest into the log, and write the report, signed in the suite of the contract; its record and page.

    The same facts as before are the same report: no second leaf, and the record as it was made then.

    Raises:
        MachineError: another process writes a report of this home, or the folder cannot be written.
    """
    with opened(root) as at:
        identity, accepted = keys.load(at.home.identity_path), at.accepted
        signer = identity.under(accepted.terms.signatures)
        facts = logged.publish(at.store, signer, accepted, facts, now=time.time())
        _renew_head(at, identity)
    with files.locked(root / ".report.lock"):
        return report.write(facts, folder, sign=signer.sign)


def _renew_head(at: Opened, identity: keys.Identity) -> None:
    """Show a head over all that stands; a coordinator that is at work does that itself."""
    try:
        with coordinating(
            at.home, store=at.store, identity=identity, clock=time.time, sleep=time.sleep, progress=lambda event: None
        ) as coordinator:
            coordinator.renew_head()
    except MachineError as error:
        if error.code != "busy":
            raise


def software() -> dict[str, str]:
    """Versions of what computed the figures."""
    versions = {name: importlib.metadata.version(name) for name in _SOFTWARE}
    return {**versions, "python": platform.python_version(), "machine": platform.machine()}


def in_a_year() -> str:
    """The default expiry of a new contract, ISO 8601."""
    return (datetime.now(UTC) + timedelta(days=365)).date().isoformat()


def _lora_bytes(at: Opened) -> int:
    """What plain LoRA of the same rank and the same head would send, in float32."""
    terms = at.accepted.terms
    head = len(terms.task.labels) * (terms.model.hidden_size + 1)
    width = int(_facts_at_start(at.home)["lora_width"])
    return 4 * (terms.adapter.vectors * width + head)


def _facts_at_start(home: Home) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(home.facts_path.read_bytes())
    return found
