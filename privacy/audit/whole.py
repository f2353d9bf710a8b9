# SPDX-License-Identifier: Apache-2.0
"""Verification of a federation from its evidence alone: from a compared fingerprint to the digest of the model, with no secret.

``audit`` walks contract chain, epochs and rounds, and asks every question again that a silo asked when it took part, and those
that it could not ask: are all copies of one document the same, does every sum follow from the vectors, every state from the sums.

**Formal guarantees**

- *A verdict without a failed and without an open check* means: under the pinned key every round's sum is, bit for bit, the sum of
  vectors to which its silos are bound by signed headers, unmasked by seeds to which they are bound by signed commitments, over a
  set that every member signed for; and the model is what the contract's update rule makes of these sums.
- *A fault is named*: a document that is missing, or whose bytes are not those that were recorded, fails under its own name; what
  rests on it is open.
- *It says which of the two it did*: rounds ``recomputed`` from the masked vectors, and rounds ``relied``, whose vectors were
  deleted: there the signatures and the update rule were checked, and the sum rests on the silos' acknowledgements.

Not promised: that what silos put in was honest, that members exist (compare fingerprints aloud), that documents were not withheld
as a whole after the last one that others name (the log's cosigned head says how many there are), or anything about a silo's ledger.

=========================================  ==================================================
edge case                                  behaviour
=========================================  ==================================================
no contract                                one failed check; nothing else can be asked
no fingerprint to compare                  one open check that shows the one in the contract
a round that has no outcome yet            its documents are checked; it is listed as open
an outcome that cannot be read             failed; the states of all later rounds are open
=========================================  ==================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from privacy import update_rule
from privacy.audit import check_budget
from privacy.audit.check_budget import Spent
from privacy.audit.check_epoch import EpochFacts, contracts, epochs, in_force
from privacy.audit.check_round import Place, RoundFacts, walk_round
from privacy.audit.findings import STATUSES, Check, Findings, Slot, Source
from privacy.errors import SiloquyError
from privacy.federation import Accepted
from privacy.messages import AGGREGATOR, Manifest, Signed, decode


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found; rounds by how their sum was verified. ``state``: the model's digest in hex, "" when it is not known.

    ``spent``: after each round; nothing where only some rounds were asked in full, since nobody looked whom the others charged.
    """

    checks: tuple[Check, ...]
    recomputed: tuple[int, ...]
    relied: tuple[int, ...]
    void: tuple[int, ...]
    state: str
    spent: tuple[Spent, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def open(self) -> tuple[Check, ...]:
        """The checks that could not be made."""
        return tuple(check for check in self.checks if check.status == "open")

    @property
    def holds(self) -> bool:
        """Whether nothing failed. With ``open`` empty too, everything that was asked was answered yes."""
        return not self.failed

    @property
    def counts(self) -> dict[str, int]:
        """How many checks there are of each status."""
        found = Counter(check.status for check in self.checks)
        return {status: found[status] for status in STATUSES}

    def sentence(self) -> str:
        """The verdict in words, with which of the two it did."""
        made = f"{len(self.checks)} checks, {len(self.failed)} failed"
        missing = f", {len(self.open)} could not be made" if self.open else ""
        parts = []
        if self.recomputed:
            parts.append(f"{_rounds(self.recomputed)} recomputed from the masked vectors, bit for bit")
        if self.relied:
            parts.append(
                f"{_rounds(self.relied)} by signatures and update rule only: the masked vectors were deleted, "
                "and the sums rest on the silos' word, each an acknowledgement or verdicts on slices"
            )
        if self.void:
            parts.append(f"{_rounds(self.void)} void, nothing was summed")
        return f"{made}{missing}; {'; '.join(parts) or 'no round has ended'}"


Step = Callable[[Findings, Mapping[bytes, Accepted], Sequence[RoundFacts]], None]
Again = Callable[[Findings, Slot, bytes, Accepted, Sequence[Accepted], Sequence[RoundFacts]], None]
"""Makes a report again from the walk: its record, the version in force, all versions, the rounds."""


def audit(
    source: Source,
    *,
    pinned: Sequence[str] = (),
    rounds: Collection[int] | None = None,
    before: Collection[Check] = (),
    also: Step | None = None,
    report: tuple[bytes, bytes | None] | None = None,
    again: Again | None = None,
    at_least: int = 0,
) -> Verdict:
    """Walk everything that ``source`` has; see the module docstring.

    Args:
        pinned: the aggregator's fingerprint, or a contract version's digest, as a person compared it; one must be right.
        rounds: verify these in full, and of the others only what these rest on; all when None.
        before: checks that were made already, such as of the files themselves.
        also: asks more about the same source (the log, a silo's ledger), given the contract versions and the rounds.
        report: a report's record and its signature, to be compared.
        again: makes that report again, so that everything in it is compared (aggregator.reporting.recheck).
        at_least: so many rounds must have ended: who knows that they did notices a home that was cut.

    Raises:
        MachineError: this machine's floating point is not IEEE 754, or something cannot be read.
        NotCertified: the accountants give no agreed, finite figure.
    """
    found = Findings(source)
    for check in before:
        found.keep(check)
    versions = contracts(found, pinned)
    if not source.latest("contract"):
        found.add(Slot("contract", 1, AGGREGATOR), "missing", "failed", "there is no contract here")
    last = source.latest("manifest")
    facts = epochs(found, versions, _epochs_of(source, last))
    walked, state = _walk(found, facts, versions, last, rounds)
    _check_at_least(found, at_least, walked)
    figures = check_budget.spent(walked) if rounds is None else []
    if report is not None and versions:
        if rounds is None:
            _compare(found, report, versions, walked, figures, again)
        else:
            found.add(Slot("report", 0, AGGREGATOR), "contents", "open", "it is on all rounds: verify without --round")
    if also is not None:
        also(found, versions, walked)
    if rounds is None:
        _name_unasked(found, before)
    shown = [each for each in walked if rounds is None or each.number in rounds]
    return Verdict(
        checks=found.checks,
        recomputed=tuple(each.number for each in shown if each.how == "recomputed"),
        relied=tuple(each.number for each in shown if each.how == "relied"),
        void=tuple(each.number for each in shown if each.how == "void"),
        state=state,
        spent=tuple(figures),
    )


def _compare(
    found: Findings, report: tuple[bytes, bytes | None], versions: Mapping[bytes, Accepted], walked: Sequence[RoundFacts],
    figures: Sequence[Spent], again: Again | None,
) -> None:  # fmt: skip
    opened = next((each.accepted for each in walked[-1:] if each.how == "open"), None)
    accepted = in_force(found, versions, opened)

    def made(found: Findings, slot: Slot, record: bytes) -> None:
        if again is not None:
            again(found, slot, record, accepted, list(versions.values()), walked)

    check_budget.compare_report(
        found, *report, accepted=accepted, figures=figures, rounds=walked, again=None if again is None else made
    )


def _check_at_least(found: Findings, at_least: int, rounds: Sequence[RoundFacts]) -> None:
    ended = max((each.number for each in rounds if each.how != "open"), default=0)
    slot = Slot("outcome", at_least, AGGREGATOR)
    if at_least > ended:
        found.add(slot, "rounds at least", "failed", f"the last round that ended here is {ended}: what came after it is missing")
    elif at_least:
        found.add(slot, "rounds at least", "ok")


def _name_unasked(found: Findings, before: Collection[Check]) -> None:
    """A document of which nothing but its bytes could be checked is open, never dropped in silence."""
    asked = {check.slot for check in found.checks if check.what != "file" or check.status != "ok"}
    for check in before:
        if check.what == "file" and check.status == "ok" and check.slot not in asked:
            found.add(check.slot, "contents", "open", "its bytes are as recorded; nothing that holds rests on it, or names it")


def _walk(
    found: Findings,
    facts: Mapping[int, EpochFacts],
    versions: Mapping[bytes, Accepted],
    last: int,
    rounds: Collection[int] | None,
) -> tuple[list[RoundFacts], str]:
    first = next(iter(versions.values()), None)
    place = Place(state=None if first is None else update_rule.initial(first.terms), previous=None)
    full = range(1, last + 1) if rounds is None else rounds
    for number in sorted(set(full) - set(range(1, last + 1))):
        found.add(Slot("manifest", number, AGGREGATOR), "missing", "failed", f"the last round that was opened is {last}")
    walked = [walk_round(found, number, place, facts, full=number in full) for number in range(1, last + 1)]
    return walked, "" if place.state is None else place.state.digest.hex()


def _epochs_of(source: Source, last: int) -> frozenset[int]:
    """The epochs that rounds name, as far as their manifests can be read."""
    named = set()
    for number in range(1, last + 1):
        try:
            raw = source.get("manifest", number, AGGREGATOR)
            if raw is not None:
                named.add(decode(decode(raw, Signed).body, Manifest).epoch)
        except SiloquyError:
            continue
    return frozenset(named)


def _rounds(numbers: tuple[int, ...]) -> str:
    """``round 3``, ``rounds 1–4``, ``rounds 1, 3, 4``."""
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    whole = numbers == tuple(range(numbers[0], numbers[-1] + 1))
    return "rounds " + (f"{numbers[0]}–{numbers[-1]}" if whole else ", ".join(map(str, numbers)))
