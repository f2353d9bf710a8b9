# SPDX-License-Identifier: Apache-2.0
"""A report made again from the evidence, to be held to the one that was written: what differs is named by its place in the JSON.

**Formal guarantees**

- *Everything that can be*: every number, digest, list and sentence of the record is computed again from the verified walk (contract
  versions, whose uploads are recorded, how each round ended, the state) and compared; numbers to one part in a million, all else
  exactly. What is not named below cannot be changed in a record that passes. An epsilon, or what is left of one, may be off by
  that millionth itself.
- *What cannot be* is taken from the record itself: when it was made and each round was closed (``generated_at``, ``closed_at``),
  the software, ``extra``, and ``traffic.lora_bytes``, which follows from the base model. ``bytes_in`` is held between what stood
  when the round ended and what stands now, where all its documents are still here.
- *Views*: page, PDF and registry entry that lie beside the record are made again from it and compared byte for byte, where the
  record names this release of this software and of typst; else that is open.

Edge cases: a record of another schema is not made again (the caller has fewer questions for it). Sentences are compared only with
those of the same release of this software: a record that names another one leaves them open, and everything else is compared.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from aggregator.reporting import compliance, gathering, no_guarantee, report
from aggregator.reporting.no_guarantee import AnyReport, OpenReport
from aggregator.reporting.record import RoundFacts
from privacy.audit.check_round import RoundFacts as Walked
from privacy.audit.evidence import Remnant
from privacy.audit.findings import Findings, Slot, Source
from privacy.errors import SiloquyError, TrustError
from privacy.federation import Accepted
from privacy.messages import AGGREGATOR, Manifest, Outcome, Signed, decode
from privacy.reporting.stated import views_of

CLOSE = 1e-6
MOST_NAMED = 12
"""So many differences are named; of more only the number."""
_AFTER_THE_END = frozenset({"acknowledgement", "close", "cosignature"})
"""Documents of a round that may still arrive when it is over."""
_SENTENCES = re.compile(
    rf"(summary|guarantee|mechanism|composition|traffic|assumptions|crosswalk|consents|checks)\b.*|versions\[\d+\]\.changed.*|{no_guarantee.KEY}"
)
"""Where the words of a release stand; every other text is data."""
_ROUNDED = re.compile(r".*\b(epsilon\w*|left|spent|plan|stood)")
"""Where an epsilon stands, or a difference of two: near zero the millionth is absolute."""


def recheck(
    found: Findings, slot: Slot, record: bytes, accepted: Accepted, versions: Sequence[Accepted], rounds: Sequence[Walked],
    *, views: Mapping[str, bytes] | None = None,
) -> None:  # fmt: skip
    """Make the report again and name each place where ``record`` says something else.

    Args:
        accepted: the version in force.
        versions: every published version, ascending.
        rounds: the whole walk.
        views: by name, what lies beside the record (``report.read_views``).
    """
    stated = found.test(slot, "contents", report.decode, record)
    if stated is None:
        return
    _check_views(found, slot, stated, views or {})
    if isinstance(stated, OpenReport) == accepted.terms.is_private:
        found.add(slot, "contents", "failed", "one is with and one without differential privacy, the report and the contract")
        return
    again = found.test(slot, "contents", _again, found.source, stated, accepted, versions, rounds)
    if again is None:
        return
    same_release = stated.software.get("siloquy") == importlib.metadata.version("siloquy")
    if not same_release:
        found.add(slot, "sentences", "open", "it says that another release of this software made it: its words were not compared")
    wrong = list(differences(msgspec.to_builtins(stated), msgspec.to_builtins(again), words=same_release))
    for path, said, wanted in wrong[:MOST_NAMED]:
        found.add(slot, path, "failed", f"it says {_short(said)}, computed again it is {_short(wanted)}")
    if len(wrong) > MOST_NAMED:
        found.add(slot, "other places", "failed", f"{len(wrong) - MOST_NAMED} more places differ")
    if not wrong:
        found.add(slot, "every figure", "ok")


def _check_views(found: Findings, slot: Slot, stated: AnyReport, views: Mapping[str, bytes]) -> None:
    """Whether each view is what the record gives, byte for byte."""
    if not views:
        return
    other = next((name for name in ("siloquy", "typst") if stated.software.get(name) != importlib.metadata.version(name)), None)
    if other is not None:
        found.add(slot, "views", "open", f"the record names another release of {other}: {', '.join(sorted(views))} were not "
        "compared")
        return
    again = found.test(slot, "views", views_of, functools.partial(report.views, stated))
    if again is None:
        return
    for name, content in sorted(views.items()):
        if again.get(name) == content:
            found.add(slot, name, "ok")
        else:
            found.add(slot, name, "failed", "it is not the view of this record: believe the record, and ask for this file again")


def differences(said: object, wanted: object, *, words: bool = True, path: str = "") -> Iterator[tuple[str, object, object]]:
    """(place, said, wanted) wherever two JSON documents differ; ``words``: whether sentences count too."""
    if isinstance(said, dict) and isinstance(wanted, dict):
        for key in sorted(said.keys() | wanted.keys()):
            yield from differences(said.get(key), wanted.get(key), words=words, path=f"{path}.{key}".lstrip("."))
    elif isinstance(said, list | tuple) and isinstance(wanted, list | tuple):
        if len(said) != len(wanted):
            yield f"{path}.length", len(said), len(wanted)
        for place, pair in enumerate(zip(said, wanted, strict=False)):
            yield from differences(*pair, words=words, path=f"{path}[{place}]")
    elif not words and isinstance(said, str) and isinstance(wanted, str) and _SENTENCES.fullmatch(path):
        return
    elif not _same(said, wanted, CLOSE if _ROUNDED.fullmatch(path) else 0.0):
        yield path, said, wanted


def _same(said: object, wanted: object, nearly: float) -> bool:
    if type(said) is float or type(wanted) is float:
        numbers = [each for each in (said, wanted) if isinstance(each, float | int) and not isinstance(each, bool)]
        return len(numbers) == 2 and math.isclose(numbers[0], numbers[1], rel_tol=CLOSE, abs_tol=nearly)
    return type(said) is type(wanted) and said == wanted


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _again(
    source: Source, stated: AnyReport, accepted: Accepted, versions: Sequence[Accepted], rounds: Sequence[Walked]
) -> AnyReport:
    said = {each.number: each for each in stated.rounds}
    members = {party.id for each in versions for party in each.terms.member}
    parties = sorted(members | {party.id for each in versions for party in each.terms.guardian})
    over = [each for each in rounds if each.how != "open"]
    ended = [_round(source, each, said.get(each.number), parties) for each in over]
    earlier = tuple(each for each in versions if each.terms.version < accepted.terms.version)
    first = gathering.initial_state(accepted, earlier)
    known: dict[str, Any] = {
        "rounds": ended,
        "upload_bytes": gathering.bytes_per_silo_and_round(ended),
        "lora_bytes": stated.traffic.lora_bytes,
        "state_digest": ended[-1].state_digest if ended else first,
        "generated_at": stated.generated_at,
        "software": stated.software,
        "extra": stated.extra,
        "still_open": [silo for each in rounds if each.how == "open" for silo in each.charged],
    }
    if not accepted.terms.is_private:
        sets = {each.number: walked.stood for each, walked in zip(ended, over, strict=True) if each.kind == "result"}
        return no_guarantee.facts(accepted, sets=sets, **known)
    return compliance.facts(accepted, earlier=earlier, **known)


def _round(source: Source, walked: Walked, said: RoundFacts | None, parties: Sequence[int]) -> RoundFacts:
    """The round as the walk found it. What only its document says is read from that, which the walk has verified."""
    outcome, digest = _outcome(source, walked.number)
    raw = source.get("manifest", walked.number, AGGREGATOR)
    if raw is None or walked.accepted is None:
        raise _unknown(walked.number)
    terms = walked.accepted.terms
    return RoundFacts(
        number=walked.number,
        version=terms.version,
        kind=outcome.kind,
        reason=outcome.reason,
        opened_at=decode(decode(raw, Signed).body, Manifest).opened_at,
        closed_at=0 if said is None else said.closed_at,
        participants=walked.charged,
        outcome_digest=digest.hex(),
        state_digest=walked.state,
        bytes_in=_bytes_in(source, walked.number, 0 if said is None else said.bytes_in, parties),
        stood=len(outcome.seeds) if terms.shared else None,
        basis=walked.basis,
    )


def _outcome(source: Source, number: int) -> tuple[Outcome, bytes]:
    kept = source.remnant("outcome", number, AGGREGATOR)
    if kept is not None:
        remnant = decode(kept, Remnant)
        return decode(remnant.outcome, Outcome), remnant.body
    raw = source.get("outcome", number, AGGREGATOR)
    if raw is None:
        raise _unknown(number)
    body = decode(raw, Signed).body
    return decode(body, Outcome), hashlib.sha256(body).digest()


def _bytes_in(source: Source, number: int, said: int, parties: Sequence[int]) -> int:
    """What was received in a round: ``said`` where that lies between what stood at its end and what stands now."""
    sizes = _sizes(source, number, parties)
    if sizes is None:
        return said
    most = sum(sizes.values())
    least = sum(size for (kind, _), size in sizes.items() if kind not in _AFTER_THE_END)
    return said if least <= said <= most else most


def _sizes(source: Source, number: int, parties: Sequence[int]) -> Mapping[tuple[str, int], int] | None:
    """The sizes of a round's documents; None where one of them is recorded and not here any more.

    A member of an earlier version may have cosigned the head on which the first round of the next one was opened.
    """
    sizes = {}
    for kind in gathering.SENT_IN_A_ROUND:
        for party in parties:
            try:
                raw = source.get(kind, number, party)
            except SiloquyError:
                return None
            if raw is not None:
                sizes[kind, party] = len(raw)
    return sizes


def _unknown(number: int) -> SiloquyError:
    return TrustError(
        f"round {number} did not verify, so the report on it cannot be made again", hint="see what failed there", code="audit"
    )
