# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, with its exit code and one hint.

::

    SiloquyError                     exit 1   (raised bare: a bug)
    ├── ConfigError                  exit 3   configuration: unknown key, wrong value, missing file
    │   └── RecordsError             exit 3   the silo's records: malformed, unknown label, too few units
    ├── TrustError                   exit 4   signature, sender, fingerprint, contract changed, malformed bytes
    │   ├── Replay                   exit 4   a document for a number or slot that is already taken
    │   └── Equivocation             exit 4   one party said two things where it may say one
    ├── PrivacyRefusal               exit 5   refused before anything was spent
    │   ├── BudgetExhausted          exit 5   the round, or the plan, would pass a limit
    │   ├── LedgerBroken             exit 5   the chain, a signature or the counter does not hold
    │   └── NotCertified             exit 5   accountants disagree or a bound is not finite
    ├── RoundError                   exit 6   quorum, deadline, void, out of order
    └── MachineError                 exit 7   device, memory, disk, clock, network; R did not move

A message states what is wrong and the two values that disagree; the hint is the one thing to do. ``facts`` are the same
values by name, for ``--json``. Errors never carry a secret or a record.
"""

from __future__ import annotations

from typing import ClassVar, Self


class SiloquyError(Exception):
    """Base of all errors that are meant for people; see the module docstring for the tree.

    Args:
        message: what is wrong, lower case, no full stop.
        hint: the one thing to do about it.
        code: a stable slug (``budget-exhausted``); the class's own when not given.
        facts: the disagreeing values by name, JSON-serialisable.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "bug"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code
        self.facts = facts

    def as_json(self) -> dict[str, object]:
        """The error as the one JSON document that ``--json`` prints."""
        body: dict[str, object] = {"code": self.code, "exit_code": self.exit_code, "message": self.message, "hint": self.hint}
        return {"error": {**self.facts, **body}}


class ConfigError(SiloquyError):
    """The configuration, or a file it names, cannot be used as it is."""

    exit_code = 3
    default_code = "config"


class RecordsError(ConfigError):
    """The silo's records cannot be used under this contract. Raised before joining or reading for a round."""

    default_code = "records"


class TrustError(SiloquyError):
    """Bytes did not come from whom they claim, or do not say what they must."""

    exit_code = 4
    default_code = "trust"


class Replay(TrustError):
    """A document for a round, epoch or slot that is already settled."""

    default_code = "replay"


class Equivocation(TrustError):
    """One party produced two different documents where it may produce one."""

    default_code = "equivocation"


class PrivacyRefusal(SiloquyError):
    """Refused for privacy, before any record was read."""

    exit_code = 5
    default_code = "privacy-refused"


class BudgetExhausted(PrivacyRefusal):
    """The next round, or the declared plan, would pass a limit."""

    default_code = "budget-exhausted"

    @classmethod
    def for_round(cls, *, round_number: int, epsilon_after: float, limit: float, delta: float) -> Self:
        """The refusal that the gate raises before a round."""
        return cls(
            f"round {round_number} would bring epsilon to {epsilon_after:.4g}, the limit is {limit:.4g} (delta {delta:g})",
            hint="stop here, or raise [limits] epsilon in silo.toml after your data protection officer agrees",
            round=round_number,
            epsilon_after=epsilon_after,
            limit=limit,
            delta=delta,
        )


class LedgerBroken(PrivacyRefusal):
    """The privacy ledger was altered, rolled back or cut."""

    default_code = "ledger-broken"


class NotCertified(PrivacyRefusal):
    """No finite, agreed privacy bound exists for these parameters."""

    default_code = "not-certified"


class RoundError(SiloquyError):
    """The round did not complete."""

    exit_code = 6
    default_code = "round"


class MachineError(SiloquyError):
    """The machine, its disk, its network or its device got in the way."""

    exit_code = 7
    default_code = "machine"
