# SPDX-License-Identifier: Apache-2.0
"""``silo doctor``: is this silo fit to train? Everything that a start would trip over, asked at once, the self-test last.

Promised: every question is asked, whatever the others answered; each that fails says what is wrong and what to do, in the words of
the command that would have failed. Nothing is sent, written or charged, and of records that fit nothing else is said.
Not promised: that the aggregator can be reached, that other silos are well, or that what passes is right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privacy import update_rule
from privacy.dp import unprotected
from privacy.dp.ledger import History
from privacy.errors import BudgetExhausted, ConfigError, MachineError, SiloquyError
from privacy.federation import Accepted
from silo import alone_kept, commands, config, keyring, membership, reading, succession, watch
from silo.home import Home

LEAST_FREE_BYTES = 2**28
"""What a disk should have left: a full one stops a round, with nothing lost."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its answer. ``exit_code``: what a command that trips over it ends with; 0 where it passed."""

    name: str
    passed: bool
    found: str
    hint: str = ""
    exit_code: int = 0


def examine(root: Path, *, quick: bool = False) -> dict[str, Any]:
    """All answers about the silo in ``root`` as one JSON document; without the self-test where ``quick``."""
    home = Home(root)
    asked: list[tuple[str, Callable[[], str]]] = [
        ("settings", lambda: f"silo {_settings(home).name}"),
        ("keys", lambda: _keys(home)),
        ("arithmetic", _arithmetic),
        ("disk", lambda: _disk(root)),
        ("device", lambda: _device(home)),
        ("ledger", lambda: _ledger(home)),
        ("contract", lambda: _contract(home)),
        ("limits", lambda: _limits(home)),
        ("base model", lambda: _model(home)),
        ("records", lambda: _records(home)),
    ]
    answers = [_answered(name, question) for name, question in asked]
    facts: dict[str, Any] = {}
    if not quick:
        facts["selftest"] = None
        answers.append(_answered("self-test", lambda: _selftest(root, facts)))
    return {"passed": all(each.passed for each in answers), "checks": [asdict(each) for each in answers], **facts}


def _answered(name: str, question: Callable[[], str]) -> Question:
    try:
        return Question(name=name, passed=True, found=question())
    except SiloquyError as error:
        return Question(name=name, passed=False, found=error.message, hint=error.hint or "", exit_code=error.exit_code)


def _settings(home: Home) -> config.Config:
    return config.load(home.config_path)


def _keys(home: Home) -> str:
    _ = home.install_secret, home.selection_key  # each refuses where it is missing, or others can read it
    return f"{len(keyring.identities(home))} usable"


def _arithmetic() -> str:
    update_rule.self_check()
    return "IEEE 754, the known answer to the bit"


def _disk(root: Path) -> str:
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise MachineError(f"cannot look at {root}: {error.strerror}", hint="mend the folder", code="cannot-read") from error
    if free < LEAST_FREE_BYTES:
        raise MachineError(
            f"{free // 2**20} MiB are free, {LEAST_FREE_BYTES // 2**20} should be",
            hint="make room before training",
            code="disk-full",
        )
    return f"{free // 2**20} MiB free"


def _device(home: Home) -> str:
    from silo.learning import training

    device, precision = training.resolve(_settings(home).compute)
    return f"{device.type}, {precision}"


def _ledger(home: Home) -> str:
    home.restored_epoch()  # refuses while a restore has not ended
    history, accepted = History.read(home.ledger_path, verify=keyring.verifier(home)), succession.if_joined(home)
    alone_kept.require_reserved(home, history)
    if accepted is not None:
        commands.check_promises(home, history, [accepted.digest, *succession.ancestors(home, accepted)])
    return f"{history.counter} entries, each signed by this silo"


def _contract(home: Home) -> str:
    accepted = succession.if_joined(home)
    if accepted is None:
        if home.progress() is not None:
            raise ConfigError(
                "this silo has a state and no contract that it countersigned",
                hint="restore contract/ from the backup of this silo", code="not-joined",
            )  # fmt: skip
        return "none joined yet"
    membership.check_expiry(accepted, datetime.now(UTC))
    watch.refuse_after_equivocation(home)
    return f"{accepted.terms.name}, version {accepted.terms.version}, until {accepted.terms.expires}"


def _limits(home: Home) -> str:
    accepted, settings = succession.if_joined(home), _settings(home)
    if accepted is None:
        return f"epsilon {settings.limits.epsilon:g} at delta {settings.limits.delta:g}, over everything"
    planned = membership.check_limits(accepted, settings.limits)
    spent = reading.budget(home.root, 0)
    _require_room(home, accepted, spent["rounds_left"])
    return (
        f"the plan costs {unprotected.in_words(planned)}; spent {unprotected.in_words(spent['epsilon'])} of "
        f"{settings.limits.epsilon:g}"
    )


def _require_room(home: Home, accepted: Accepted, rounds_left: int) -> None:
    """What is ahead fits beside all that is charged: the next round of a declared plan, the whole of one that is not."""
    declared = History.read(home.ledger_path, verify=keyring.verifier(home)).plan(accepted.digest.hex()) is not None
    ahead = reading.budget(home.root, min(1, rounds_left) if declared else rounds_left)["forecast"]
    if ahead and ahead[-1]["refused"] == "limit":
        raise BudgetExhausted(
            f"beside all that is charged, {ahead[-1]['rounds']} more rounds come to epsilon "
            f"{unprotected.in_words(ahead[-1]['epsilon'])}",
            hint="see `silo budget`; raise [limits] epsilon after your data protection officer agrees",
        )


def _model(home: Home) -> str:
    accepted = succession.if_joined(home)
    if accepted is None:
        return "no contract says which"
    return f"the contract's, in {membership.base_folder(accepted.terms, _settings(home).model.path)}"


def _records(home: Home) -> str:
    accepted, settings = succession.if_joined(home), _settings(home)
    if accepted is not None:
        membership.unit_ids(accepted.terms, config=settings, home=home)
        return "every record fits the contract, and there are neither too few units nor too many"
    if not Path(settings.records.path).is_file():
        raise ConfigError(f"there is no file {settings.records.path}", hint="correct [records] path", code="no-records")
    return "there is such a file; no contract says what must be in it"


def _selftest(root: Path, facts: dict[str, Any]) -> str:
    from silo import selftest

    facts["selftest"] = found = selftest.run(root)
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    if failed:
        raise _failed(failed, len(found["checks"]))
    return f"{len(found['checks'])} checks of {found['subject']} passed"


def _failed(names: list[str], count: int) -> SiloquyError:
    from privacy.errors import PrivacyRefusal

    return PrivacyRefusal(
        f"{len(names)} of {count} checks failed: {', '.join(names)}",
        hint="train no further on this machine; `silo selftest` says more", code="selftest",
    )  # fmt: skip
