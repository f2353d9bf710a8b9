# SPDX-License-Identifier: Apache-2.0
"""The facts of a silo's own report, from its home alone: records, ledger, state, and a held-out file where one is given.

Every epsilon is the ledger's (``silo.reading.budget``). Nothing is written, sent or charged. Only a held-out file loads torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections import Counter
from pathlib import Path
from typing import Any

from privacy.dp import unprotected
from privacy.dp.entries import Commit, Void
from privacy.dp.ledger import History
from privacy.dp.together import Together
from privacy.errors import ConfigError, MachineError, PrivacyRefusal
from privacy.federation import Accepted
from privacy.identity import keys
from privacy.rows import read_rows
from privacy.visible import visible
from silo import config, keyring, other_homes, reading, succession
from silo.home import Home
from silo.learning import records
from silo.reporting.record import (
    SCHEMA,
    SENTENCE,
    Ahead,
    Budget,
    HeldOut,
    LedgerHead,
    Place,
    Records,
    Run,
    Several,
    Silo,
    SiloReport,
)
from silo.settlement import load_progress

_SOFTWARE = ("siloquy", "cryptography", "dp-accounting", "numpy", "msgspec", "typst")


def gather(root: Path, *, held_out: Path | None = None, generated_at: int) -> SiloReport:
    """The report on the silo in ``root`` as it stands.

    Args:
        held_out: records that were not trained on; the accuracy of the base model and of the reached state on them.

    Raises:
        ConfigError: no silo, no federation joined, or no base model.
        RecordsError: the records or the held-out file cannot be read.
        LedgerBroken: the ledger does not verify.
        PrivacyRefusal: the held-out file is the one that the silo trains on.
        MachineError: a round was charged meanwhile: figures of two moments would be one record.
    """
    home, settings = reading.opened(root)
    if held_out is not None:
        _require_other(Path(settings.records.path), held_out)
    accepted, member, identity = succession.at_work(home)
    history = History.read(home.ledger_path, verify=keyring.verifier(home))
    together = Together(history, other_homes.histories(home, settings))
    progress = load_progress(home, accepted)
    spent = reading.budget(root, max(0, accepted.terms.training.rounds - progress.round))
    _require_still(home, history, together, settings)
    return SiloReport(
        warning=SENTENCE, format=SCHEMA, generated_at=generated_at,
        silo=Silo(name=settings.name, organisation=settings.organisation, fingerprint=keys.fingerprint(identity.public)),
        federation=Place(
            name=accepted.terms.name, version=accepted.terms.version, member=member.id, mode=accepted.terms.training.mode,
            expires=accepted.terms.expires, contract_digest=accepted.digest.hex(), round=progress.round,
            rounds_planned=accepted.terms.training.rounds, state_digest=progress.state.digest.hex(),
        ),
        records=_records(home, settings, accepted),
        held_out=None if held_out is None else _held_out(root, held_out),
        budget=_budget(spent),
        several=tuple(Several(**each) for each in spent["several"]),
        runs=tuple(_run(together, each) for each in spent["runs"]),
        forecast=tuple(Ahead(**each) for each in spent["forecast"]),
        ledger=LedgerHead(entries=history.counter, head=history.head),
        software=software(),
    )  # fmt: skip


def _require_other(own: Path, held_out: Path) -> None:
    if own.exists() and held_out.exists() and own.samefile(held_out):
        raise PrivacyRefusal(
            f"{held_out} is the file this silo trains on", hint="name records that were not trained on", code="own-records"
        )


def _require_still(home: Home, history: History, together: Together, settings: config.Config) -> None:
    again = History.read(home.ledger_path, verify=keyring.verifier(home))
    if again.head != history.head or Together(again, other_homes.histories(home, settings)).entries != together.entries:
        raise MachineError(
            "the ledger went on while the report was made", hint="run `silo report` again between two rounds", code="busy"
        )


def software() -> dict[str, str]:
    """Versions of what made the report."""
    versions = {name: importlib.metadata.version(name) for name in _SOFTWARE}
    return {**versions, "python": platform.python_version(), "machine": platform.machine()}


def _records(home: Home, settings: config.Config, accepted: Accepted) -> Records:
    path, terms = home.root / settings.records.path, accepted.terms
    units = records.load(path, terms.task, terms.privacy, selection_key=home.selection_key)
    column = terms.privacy.unit
    return Records(
        unit="one record" if column == records.RECORD_AS_UNIT else f"one value of “{column}” with all of its records",
        units=len(units), records=sum(1 for _ in read_rows(path)), kept=sum(len(unit.records) for unit in units),
        most_units=terms.privacy.units,
    )  # fmt: skip


def _held_out(root: Path, path: Path) -> HeldOut:
    found = reading.evaluate(root, path, ())
    if "accuracy_after" not in found:
        raise ConfigError(
            "the report states accuracies, and this federation's model completes texts",
            hint="leave --held-out out; `silo eval` states loss and perplexity", code="task-kind",
        )  # fmt: skip
    return HeldOut(
        file=visible(path.name), digest=hashlib.sha256(path.read_bytes()).hexdigest(), records=sum(1 for _ in read_rows(path)),
        accuracy_before=found["accuracy_before"], accuracy_after=found["accuracy_after"],
    )  # fmt: skip


def _budget(spent: dict[str, Any]) -> Budget:
    return Budget(
        epsilon=spent["epsilon"], epsilon_pld=spent["epsilon_pld"], epsilon_rdp=spent["epsilon_rdp"], delta=spent["delta"],
        reason=unprotected.IN_WORDS if spent["epsilon"] is None else "", limit=spent["limit"],
        left=0.0 if spent["epsilon"] is None else spent["left"], steps_left=spent["steps_left"], rounds_left=spent["rounds_left"],
    )  # fmt: skip


def _run(history: History, run: dict[str, Any]) -> Run:
    ended = Counter(type(body) for body in history.entries if isinstance(body, Commit | Void) and body.contract == run["contract"])
    return Run(**run, released=ended[Commit], void=ended[Void])
