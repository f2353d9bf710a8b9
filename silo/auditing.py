# SPDX-License-Identifier: Apache-2.0
"""A silo's audit of slices: which segments of a claimed sum it fetches, what it finds, what it keeps (privacy.secure_sum.audits).

Promised: only the bytes of those segments are fetched; the verdict lies on the disk before it leaves, and after a crash the same
bytes leave; a claim that this silo found wrong lies in the home's ``log/`` with its verdict and the pieces that prove it, as they
were fetched the first time, before anything is said. What it looks at beyond its duty depends on a secret and the round alone: who
sees what it fetches, and lets that fail, gets no other choice out of it. A piece that does not come is waited for until the
aggregator has an outcome or half a deadline is over. Not promised: that the aggregator takes the verdict; where it goes on without
it, or before there was one, this silo looks before it applies anything (silo.round).

Files of evidence: ``log/claim-<round>`` and ``log/verdict-<round>``, as signed; ``log/segment-<round>-<segment>``: every silo's
piece, by ascending silo, one after the other.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from privacy import files
from privacy.identity.keys import expand, u32
from privacy.messages import SegmentVerdict, Signed, decode
from privacy.secure_sum import audits, slices
from privacy.secure_sum.audits import Claimed, Fetch

_FILE: Final = "verdict"
_PAUSE_S: Final = 0.2
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Auditor:
    """One silo's audit of one round.

    Args:
        folder: where the verdict is written down: the epoch's.
        evidence: where what proves a claim wrong is kept.
        fetch: bytes of the silos' published vectors.
        over: whether pieces that did not come are waited for no longer.
        random: picks what it looks at beyond its duty, see ``coin``.
    """

    silo: int
    number: int
    folder: Path
    evidence: Path
    fetch: Fetch
    over: Callable[[], bool]
    sign: Callable[[SegmentVerdict], bytes]
    random: Callable[[int], bytes] = os.urandom

    def verdict(self, document: bytes, claimed: Claimed) -> bytes | None:
        """This silo's signed verdict, written down; None when it has nothing to say: it has no duty here, and finds nothing amiss.

        Args:
            document: the claim, as signed, of which ``claimed`` is what it says.
        """
        if (found := kept(self.folder, claimed.claim.round_ctx)) is not None:
            return found[0]
        made = self._found(sorted({*claimed.duties(self.silo), *chosen(self.random, claimed.dimension)}), claimed)
        if not (made.right or made.wrong or made.withheld):
            return None
        signed = self.sign(made)
        if wrong := sorted(audits.complaints(made)):
            files.write_atomic(self.evidence / f"claim-{self.number}", document)
            files.write_atomic(self.evidence / f"verdict-{self.number}", signed)
            what = "round %d: segments %s of the claimed sum are wrong or withheld; the evidence is in %s"
            _LOG.warning(what, self.number, wrong, self.evidence)
        files.write_atomic(self.folder / _FILE, signed)
        return signed

    def _found(self, segments: Sequence[int], claimed: Claimed) -> SegmentVerdict:
        made = audits.find((), claimed, self.fetch, silo=self.silo)
        due = list(segments)
        while due:
            for segment in due:
                made = _joined(made, self._look(segment, claimed))
            due = [segment for segment, _ in made.withheld]
            if not due or self.over():
                break
            time.sleep(_PAUSE_S)
            made = msgspec.structs.replace(made, withheld=())
        return made

    def _look(self, segment: int, claimed: Claimed) -> SegmentVerdict:
        """What there is to say of one segment; if it is wrong, the pieces that prove it are written down as they were found."""
        pieces: dict[int, bytes] = {}

        def fetch(silo: int, start: int, size: int) -> bytes | None:
            if (raw := self.fetch(silo, start, size)) is not None:
                pieces[silo] = raw
            return raw

        made = audits.find([segment], claimed, fetch, silo=self.silo)
        if made.wrong:
            joined = b"".join(pieces[silo] for silo in sorted(pieces))
            files.write_atomic(self.evidence / f"segment-{self.number}-{segment}", joined)
        return made


def _joined(one: SegmentVerdict, other: SegmentVerdict) -> SegmentVerdict:
    """Both verdicts of a silo on one claim in one."""
    return msgspec.structs.replace(
        one, right=tuple(sorted({*one.right, *other.right})), wrong=tuple(sorted({*one.wrong, *other.wrong})),
        withheld=tuple(sorted({*one.withheld, *other.withheld})),
    )  # fmt: skip


def coin(secret: bytes, round_ctx: bytes) -> Callable[[int], bytes]:
    """Bytes (at most 32 a toss) that nobody foresees who lacks ``secret`` (32 bytes), the same ones again for the same round."""
    tosses = itertools.count()
    return lambda size: expand(secret, "silo/1 own audit", round_ctx, u32(next(tosses)))[:size]


def chosen(random: Callable[[int], bytes], dimension: int) -> tuple[int, ...]:
    """The segments that a silo looks at by its own choice, whatever its duties are: toss g is for segment g."""
    return slices.own_choice((), dimension, random=random)


def kept(folder: Path, round_ctx: bytes) -> tuple[bytes, SegmentVerdict] | None:
    """This silo's verdict on the round, as signed and as read, where it has made one."""
    path = folder / _FILE
    if not path.is_file():
        return None
    document = path.read_bytes()
    stated = decode(decode(document, Signed).body, SegmentVerdict)
    return (document, stated) if stated.round_ctx == round_ctx else None


def complained(folder: Path | None, round_ctx: bytes) -> frozenset[int]:
    """The segments of the round's sum that this silo itself found wrong or withheld."""
    found = None if folder is None else kept(folder, round_ctx)
    return frozenset() if found is None else audits.complaints(found[1])
