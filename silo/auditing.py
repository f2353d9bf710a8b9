# SPDX-License-Identifier: Apache-2.0
"""A silo's audit of slices: which segments of a claimed sum it fetches, what it finds, what it keeps (privacy.secure_sum.audits).

Promised: only the bytes of those segments are fetched; the verdict lies on the disk before it leaves, and after a crash the same
bytes leave; a claim that this silo found wrong lies in the home's ``log/`` with its verdict and the pieces that prove it, before
anything is said. A piece that does not come is waited for until the aggregator has an outcome or half a deadline is over. Not
promised: that the aggregator takes the verdict; where it goes on without it, this silo looks again before it applies anything.

Files of evidence: ``log/claim-<round>`` and ``log/verdict-<round>``, as signed; ``log/segment-<round>-<segment>``: every silo's
piece, by ascending silo, one after the other.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from privacy import files
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
        random: picks what it looks at beyond its duty.
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
        must = claimed.duties(self.silo)
        made = self._found((*must, *slices.own_choice(must, claimed.dimension, random=self.random)), claimed)
        if not (made.right or made.wrong or made.withheld):
            return None
        signed = self.sign(made)
        if wrong := sorted(audits.complaints(made)):
            self._keep(document, signed, made, claimed)
            what = "round %d: segments %s of the claimed sum are wrong or withheld; the evidence is in %s"
            _LOG.warning(what, self.number, wrong, self.evidence)
        files.write_atomic(self.folder / _FILE, signed)
        return signed

    def _found(self, segments: Sequence[int], claimed: Claimed) -> SegmentVerdict:
        made = audits.find(segments, claimed, self.fetch, silo=self.silo)
        while made.withheld and not self.over():
            time.sleep(_PAUSE_S)
            again = audits.find([segment for segment, _ in made.withheld], claimed, self.fetch, silo=self.silo)
            made = msgspec.structs.replace(
                made, right=tuple(sorted(made.right + again.right)), wrong=tuple(sorted(made.wrong + again.wrong)),
                withheld=again.withheld,
            )  # fmt: skip
        return made

    def _keep(self, document: bytes, signed: bytes, made: SegmentVerdict, claimed: Claimed) -> None:
        """Write down what proves a claim wrong."""
        files.write_atomic(self.evidence / f"claim-{self.number}", document)
        files.write_atomic(self.evidence / f"verdict-{self.number}", signed)
        for segment, _ in made.wrong:
            pieces = audits.pieces_of(segment, claimed, self.fetch)
            if not isinstance(pieces, int):
                joined = b"".join(pieces[silo].tobytes() for silo in sorted(pieces))
                files.write_atomic(self.evidence / f"segment-{self.number}-{segment}", joined)


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
