# SPDX-License-Identifier: Apache-2.0
"""The basis round: what the contract says of the one round whose sum fixes the frozen factors B and A (docs/adr/0020).

With ``adapter.basis`` "private" or "raw" the rounds before the first training round are *basis rounds*: every unit of every
silo enters once (q = 1), its gradient sketches are clipped as one vector, noise is added, and the very same secure sum is taken.
The first of them that ends with a result fixes the factors; all that come after it are training rounds. Which of the two a round
is, its base state says, by the digest of the factors in it, and its manifest, by the length of its vectors: ``Accepted.at`` and
``Accepted.in_round`` give the contract as it governs that round.

Promised: ``BasisTerms`` is a contract whose every figure is the basis round's, so that no other code has two cases; factors are a
function of the released sum and the contract alone, the same bytes everywhere (privacy.sketch). Not promised: that they help.
"""

from __future__ import annotations

import functools
import hashlib

import msgspec
import numpy as np
from numpy.typing import NDArray

from privacy import sketch
from privacy.contract import Contract
from privacy.errors import ConfigError, RoundError
from privacy.orthonormal import Factors, digest
from privacy.sketch import Layout


class BasisTerms(Contract, frozen=True, kw_only=True):
    """A contract as it governs its basis rounds; from ``terms_of``. ``training.rounds`` is the number of attempts, a step each.

    ``alone``: the contract is one of local mode: each silo's noise is taken for itself, h = 1, as in its training rounds.

    Formal guarantees: the sampling rate is 1; noise, clipping bound and lattice are those of ``[basis]``; ``dimension`` is that of
    the sketches; the ring holds the vectors of all silos, in local mode too, where each has its noise in full.
    """

    alone: bool

    @property
    def dimension(self) -> int:
        """The numbers of all sketches together."""
        return layout_of(self).dimension

    @property
    def is_local(self) -> bool:
        """Whether a silo's noise is counted for itself; what is sent is a noised sum in both modes."""
        return self.alone

    @property
    def summed(self) -> int:
        """n: the sum of a basis round is always over all silos' noised vectors."""
        return self.silos

    @property
    def shares(self) -> int:
        """h: 1 in local mode, whose silos count on no other's noise; as in a training round elsewhere."""
        return 1 if self.alone else self.fewest - self.privacy.colluders


def terms_of(terms: Contract) -> BasisTerms:
    """``terms`` as they govern the basis rounds.

    Raises:
        ConfigError: they have none.
    """
    if isinstance(terms, BasisTerms):
        return terms
    return _terms_of(terms)


@functools.lru_cache(maxsize=16)
def _terms_of(terms: Contract) -> BasisTerms:
    basis = terms.basis
    if basis is None:
        raise ConfigError(
            f"a contract with the basis {terms.adapter.basis} has no basis round", hint="it needs none", code="no-basis-round"
        )
    fields: dict[str, object] = {name: getattr(terms, name) for name in Contract.__struct_fields__}
    fields["training"] = msgspec.structs.replace(
        terms.training, mode="joint", rounds=basis.attempts, steps_per_round=1, warmup_rounds=0, decay_rounds=0
    )
    fields["privacy"] = msgspec.structs.replace(
        terms.privacy, sampling_rate=1.0, max_grad_norm=basis.max_grad_norm, noise_multiplier=basis.noise_multiplier,
        lattice_bits=basis.lattice_bits,
    )  # fmt: skip
    return BasisTerms(**fields, alone=terms.is_local)  # type: ignore[arg-type]


def terms_after(terms: Contract, basis: bytes) -> Contract:
    """``terms`` as they govern the round after a state that names the factors ``basis``: b"" while none are fixed."""
    return terms if terms.basis is None or basis else terms_of(terms)


def without(terms: Contract) -> Contract:
    """``terms`` with the base model's weights as basis, and no basis round: for whoever needs a model before there are factors."""
    return msgspec.structs.replace(terms, basis=None, adapter=msgspec.structs.replace(terms.adapter, basis="weights"))


def is_one(terms: Contract) -> bool:
    """Whether these are the terms of a basis round."""
    return isinstance(terms, BasisTerms)


def layout_of(terms: Contract) -> Layout:
    """Where each module's sketches stand in the vector of a basis round.

    Raises:
        ConfigError: the contract has no basis round, or its modules, shapes and width contradict each other.
    """
    if terms.basis is None:
        raise ConfigError("this contract has no [basis]", hint="nothing is to be done", code="no-basis-round")
    return _layout(terms.adapter.modules, terms.basis.shapes, terms.basis.width)


@functools.lru_cache(maxsize=16)
def _layout(modules: tuple[str, ...], shapes: tuple[tuple[int, int], ...], width: int) -> Layout:
    return sketch.layout(modules, shapes, width)


def factors(total: NDArray[np.int64], terms: Contract) -> dict[str, Factors]:
    """(B, A) of each module from the released, lifted sum ``(dimension,)`` of a basis round.

    Formal guarantees: post-processing of the release, so it costs nothing; the same bytes on every IEEE-754 machine.

    Raises:
        RoundError: the sum has not as many directions as the adapter has vectors for a module: a result that fixes nothing.
        ConfigError: it has another length than the contract's.
    """
    return dict(_factors(total.astype("<i8").tobytes(), layout_of(terms), terms.adapter.vectors))


@functools.lru_cache(maxsize=2)
def _factors(total: bytes, layout: Layout, rank: int) -> tuple[tuple[str, Factors], ...]:
    sums = np.frombuffer(total, dtype="<i8").astype(np.float64)
    try:
        return tuple(sketch.factors_of(sums, layout, rank).items())
    except ConfigError as error:
        if error.code != "basis-too-flat":
            raise
        raise RoundError(error.message, hint=error.hint, code=error.code) from error


def digest_of(total: NDArray[np.int64], terms: Contract) -> bytes:
    """Digest of the factors that a released sum fixes; what the next state names. Raises as ``factors``."""
    return digest(factors(total, terms))


def pending(terms: Contract) -> bytes:
    """What silos compare in an epoch's notes before any factors are fixed: the sketches' layout, by each silo's own software.

    SHA-256 of ``siloquy/basis/pending/1`` NUL, the base model's digest, the width, and each module's name and shape: whoever
    would read a sum of sketches otherwise has another digest, and the epoch does not start.
    """
    layout = layout_of(terms)
    state = hashlib.sha256(b"siloquy/basis/pending/1\x00" + bytes.fromhex(terms.model.digest) + layout.width.to_bytes(8, "little"))
    for name, (m, n) in zip(layout.modules, layout.shapes, strict=True):
        encoded = name.encode()
        state.update(len(encoded).to_bytes(4, "little") + encoded + m.to_bytes(8, "little") + n.to_bytes(8, "little"))
    return state.digest()
