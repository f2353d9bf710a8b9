# SPDX-License-Identifier: Apache-2.0
"""The tables ``[basis]`` and ``[public_basis]`` of a draft contract: where the frozen factors come from, if not from the model.

``[basis]`` says what the basis round before the training rounds is, where there is one (ADR 0020); ``[public_basis]`` names a data
set and the digests of what was made of it (ADR 0019). Promised: the first stands in a draft exactly where ``adapter.basis`` is
"private" or "raw", and its lattice is filled in when the draft is signed, like the other one's, as the finest that fits the ring;
the second stands where it is "public", and is signed only beside the file that it pins. Not promised: that the figures suit the
data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aggregator import defaults
from privacy import basis_file, basis_round, federation
from privacy.errors import ConfigError
from privacy.federation import Contract

OF_RECORDS: Final = ("private", "raw")
"""The bases that come from records."""
_TABLE = r"(?ms)^\[basis\]\n.*?(?=^\[|\Z)"
OPEN: Final = "open"
_PUBLIC = r"(?ms)^\[public_basis\]\n.*?(?=^\[|\Z)"
_OPEN = r'(?m)^(lattice_bits[ \t]*=[ \t]*)"auto"'


def table(basis: str, shapes: Sequence[Sequence[int]], *, vectors: int, without_privacy: bool) -> str:
    """The draft's table, "" where the basis is public.

    Args:
        shapes: (out, in) of the adapted modules, in their order.
        vectors: how many vectors A and B of a module have.

    Raises:
        ConfigError: "private" without differential privacy, or "raw" with it.
    """
    if basis not in OF_RECORDS:
        return ""
    if (basis == "raw") != without_privacy:
        raise ConfigError(
            f"the basis {basis} is for contracts {'with' if basis == 'private' else 'without'} differential privacy",
            hint="raw gradients need --without-privacy; with noise the basis is private", code="basis",
        )  # fmt: skip
    listed = ", ".join(f"[{out}, {into}]" for out, into in shapes)
    loud = "" if basis == "private" else "# RAW: no noise at all; everybody who takes part sees the exact sum of these gradients.\n"
    noise = (
        f"# sigma of this round. Many units with noise once beat few without; it is part of the plan's epsilon.\n"
        f"noise_multiplier = {defaults.BASIS_NOISE_MULTIPLIER!r}\n"
    )
    return f"""\
[basis]
{loud}# Before the training rounds: one sum over all units of all silos, each with its gradient sketched and clipped as a whole,
# which fixes A and B. (out, in) of each adapted layer, in the order of adapter.modules.
shapes = [{listed}]
# l: the columns of a sketch; two to four times the vectors of a layer.
width = {defaults.BASIS_WIDTH * vectors}
# C of this round.
max_grad_norm = {defaults.BASIS_GRAD_NORM!r}
{noise if basis == "private" else ""}# p of this round; "auto": the finest that fits the ring.
lattice_bits = "auto"
# How many such rounds the plan pays for: one that is void is run again.
attempts = {defaults.BASIS_ATTEMPTS}
"""


def public_table(data: str, *, vectors: int) -> str:
    """The draft's ``[public_basis]``, its digests open; ``vectors`` as in ``table``.

    Raises:
        ConfigError: the data set has no name, or one that is not printable.
    """
    if not data or not data.isprintable():
        raise ConfigError("a public basis of which data set?", hint="name it: --public-data WORDS", code="basis")
    return f"""\
[public_basis]
# A and B are made of gradients on this public data set, which costs no privacy. Nobody else checks that it is public.
data = {json.dumps(data, ensure_ascii=False)}
# The SHA-256 of its file, and the digest of the factors. Both are printed by
# `silo basis --data FILE --contract federation.draft.toml --out basis.safetensors`; that file lies beside this one.
data_digest = "{OPEN}"
digest = "{OPEN}"
# l: the columns of a sketch, and the norm to which a record's gradient is clipped; with these anybody can make the factors again.
width = {defaults.BASIS_WIDTH * vectors}
max_grad_norm = {defaults.BASIS_GRAD_NORM!r}
"""


def stated(text: str, *, data_digest: str, digest: str) -> str:
    """The draft with the open digests of ``[public_basis]``; what stands there already stays."""

    def with_digests(found: re.Match[str]) -> str:
        once = re.sub(_open_digest("data_digest"), lambda place: f'{place[1]}"{data_digest}"', found[0])
        return re.sub(_open_digest("digest"), lambda place: f'{place[1]}"{digest}"', once)

    return re.sub(_PUBLIC, with_digests, text)


def check_file(path: Path, terms: Contract) -> None:
    """Return if the contract needs no file of factors, or ``path`` holds the one that it pins.

    Raises:
        ConfigError: there is none.
        TrustError: it is another one, or has not the contract's modules and rank.
    """
    if terms.public_basis is None:
        return
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="make it: `silo basis --data FILE --contract DRAFT --out` this path",
            code="no-basis",
        ) from error  # fmt: skip
    basis_file.load_public(raw, terms)


def _open_digest(key: str) -> str:
    return rf'(?m)^({key}[ \t]*=[ \t]*)"{OPEN}"'


def filled(text: str, bits: int) -> str:
    """The draft with the open place for the basis round's lattice filled in; the training rounds' stays as it is."""

    def with_bits(found: re.Match[str]) -> str:
        return re.sub(_OPEN, lambda place: f"{place[1]}{bits}", found[0])

    return re.sub(_TABLE, with_bits, text)


def reopened(text: str) -> str:
    """A version's text, as the draft of the next one: the basis round's lattice is chosen anew, since members may come and go."""
    return re.sub(_TABLE, lambda found: re.sub(r"(?m)^(lattice_bits[ \t]*=[ \t]*)\d+", r'\1"auto"', found[0]), text)


def completed(text: str, terms: Contract) -> str:
    """The draft with the basis round's lattice where it is open.

    Raises:
        ConfigError: no lattice fits the ring; or the digests of a public basis are open.
    """
    if stated(text, data_digest="", digest="") != text:
        raise ConfigError(
            "the digests in [public_basis] are open", code="basis-open",
            hint="`silo basis --data FILE --contract DRAFT --out basis.safetensors` beside the draft prints them",
        )  # fmt: skip
    found = re.search(_TABLE, text)
    if terms.basis is None or found is None or re.search(_OPEN, found[0]) is None:
        return text
    at = basis_round.terms_of(terms)
    plan = federation.ring_plan_at(at, noise_multiplier=at.privacy.noise_multiplier, lattice_bits=None)
    return filled(text, plan.lattice_bits)
