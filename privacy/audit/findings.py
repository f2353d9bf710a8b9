# SPDX-License-Identifier: Apache-2.0
"""What a verification found: one line per object and question, and never a question dropped in silence.

A check is ``ok``, ``failed``, ``open`` (it rests on something that failed or is not there, so nobody can say) or a ``note`` (worth
knowing, nothing wrong). Promised: a fault is reported at the object that has it; what rests on that object is open, not failed.
Not here: what is asked (privacy.audit.whole), and where the documents come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol, TypeVar

import msgspec

from privacy.errors import MachineError, SiloquyError

Status = Literal["ok", "failed", "open", "note"]
STATUSES: tuple[Status, ...] = ("ok", "failed", "open", "note")
T = TypeVar("T")

RESTS = "rests on an object that failed or is not here"
MISSING = "missing"
"""The code of an error that says: this document should be there and is not."""


class Slot(NamedTuple):
    """Where a document stands on the board."""

    kind: str
    number: int
    party: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number} of party {self.party}"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One question about one object, and its answer.

    ``party`` is the author of the object, 0 for the aggregator. ``what``: a slug such as ``file``, ``signature``, ``sum``.
    ``file``: the name of the evidence file where there is one. ``why`` is empty when the answer is ok.
    """

    kind: str
    number: int
    party: int
    what: str
    status: Status
    why: str = ""
    file: str = ""

    @property
    def slot(self) -> Slot:
        """The object's place on the board."""
        return Slot(self.kind, self.number, self.party)


class Source(Protocol):
    """Where documents come from: a folder of evidence, or a board over a transport."""

    def get(self, kind: str, number: int, party: int) -> bytes | None:
        """The document, or None when nothing is recorded there. Raises TrustError when it is recorded, and damaged or gone."""
        ...

    def has(self, kind: str, number: int, party: int) -> bool:
        """Whether a document is recorded there, readable or not."""
        ...

    def latest(self, kind: str) -> int:
        """The highest number of this kind, 0 when there is none."""
        ...

    def digest(self, kind: str, number: int, party: int) -> bytes | None:
        """SHA-256 of the document as it is recorded, or None."""
        ...

    def file(self, kind: str, number: int, party: int) -> str:
        """The name of the document's file, or "" where there is none."""
        ...

    def remnant(self, kind: str, number: int, party: int) -> bytes | None:
        """What is kept of a document whose masked vectors were deleted (privacy.audit.evidence.Remnant), or None."""
        ...


class Findings:
    """Asks, and keeps the answers in order; the same answer to the same question is kept once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._checks: dict[Check, None] = {}
        self._read: dict[Slot, bool] = {}

    @property
    def checks(self) -> tuple[Check, ...]:
        """All answers so far."""
        return tuple(self._checks)

    def failed(self, slot: Slot) -> bool:
        """Whether any question about this object failed."""
        return any(check.status == "failed" and check.slot == slot for check in self._checks)

    def read(self, slot: Slot, *, required: str = "") -> bytes | None:
        """The document, or None: damaged (failed), or not there, which fails only when ``required`` says why it must be."""
        try:
            raw = self.source.get(*slot)
        except SiloquyError as error:
            _let_machine_faults_pass(error)
            self.add(slot, "file", "failed", error.message)
            return None
        if raw is not None:
            self.add(slot, "file", "ok")
        elif required:
            self.add(slot, MISSING, "failed", required)
        return raw

    def test(self, slot: Slot, what: str, job: Callable[..., T], *needs: object) -> T | None:
        """``job(*needs)``, or None: it refused (failed), or one of ``needs`` is None (open)."""
        return self._ask(slot, what, job, needs)[1]

    def hold(self, slot: Slot, what: str, job: Callable[..., object], *needs: object) -> bool:
        """Whether ``job(*needs)`` went through without a refusal; see ``test``."""
        return self._ask(slot, what, job, needs)[0] == "ok"

    def _ask(self, slot: Slot, what: str, job: Callable[..., T], needs: tuple[object, ...]) -> tuple[Status, T | None]:
        if any(need is None for need in needs):
            self.add(slot, what, "open", RESTS)
            return "open", None
        try:
            value = job(*needs)
        except SiloquyError as error:
            _let_machine_faults_pass(error)
            self.add(slot, what, "failed", error.message)
            return "failed", None
        self.add(slot, what, "ok")
        return "ok", value

    def expect(self, slot: Slot, what: str, pairs: Iterable[tuple[str, object, object]]) -> bool:
        """Whether every (name, found, wanted) agrees; the first that does not is the reason. None as a wanted value is unknown."""
        unknown = False
        for name, found, wanted in pairs:
            if wanted is None:
                unknown = True
            elif found != wanted:
                self.add(slot, what, "failed", f"its {name} is {shown(found)}, expected {shown(wanted)}")
                return False
        if unknown:
            self.add(slot, what, "open", RESTS)
        else:
            self.add(slot, what, "ok")
        return not unknown

    def add(self, slot: Slot, what: str, status: Status, why: str = "") -> None:
        """One more answer."""
        file = self.source.file(*slot)
        check = Check(kind=slot.kind, number=slot.number, party=slot.party, what=what, status=status, why=why, file=file)
        self.keep(check)

    def keep(self, check: Check) -> None:
        """Take an answer that was found elsewhere."""
        self._checks.setdefault(check)


def shown(value: object) -> str:
    """A value for a message: the first 8 bytes of a digest, in hex."""
    return f"{value.hex()[:16]}…" if isinstance(value, bytes) else str(value)


def _let_machine_faults_pass(error: SiloquyError) -> None:
    """A machine that cannot compute or read says nothing about the evidence: that ends the verification."""
    if isinstance(error, MachineError) or type(error) is SiloquyError:
        raise error
