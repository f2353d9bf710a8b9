# SPDX-License-Identifier: Apache-2.0
"""What a silo sends in a round: its vector of ring words, masked, sealed to the aggregator and signed.

In joint mode the vector is the clamped sum of one step plus this silo's share of the noise (``noisy``); in local mode
(``silo.learning.local``) it is what the silo's own steps changed, each of which went through ``noisy`` with the noise in full.

Promised: the vector inside is uniform to everyone until every member has consented to a set that holds it; it is bound to
its round, attempt and silo; and the silo's signature covers every byte that is sent. The unmasked vector, the noise and the
sample exist in memory only. Not promised: that Python wipes them there, or, in local mode, that nothing computed from them lies
on the disk: the optimiser's moments do, in a file of mode 0600. They are functions of noised sums, as private as what is sent;
with SGD without momentum and one step a round they determine the noised change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privacy import envelope
from privacy.dp import noise, ring
from privacy.errors import MachineError
from privacy.federation import Contract, ring_plan
from privacy.messages import Attempt, Digest, Key, Number, Upload, Wire
from privacy.prg import Randomness
from privacy.secure_sum import guardian_sum, shares
from privacy.secure_sum.epoch import Secret


class Persisted(Secret, frozen=True, kw_only=True):
    """An attempt on disk, as one private file: all that is needed to send, consent and release again after a crash.

    ``header`` and ``upload`` are the signed documents; ``upload`` is sent as it lies here, byte for byte. ``own`` is the silo's
    own optimiser after an attempt in local mode (``State.to_bytes``, its θ zeros), empty in joint mode; it is never sent.
    """

    format: Literal["attempt/2"] = "attempt/2"
    round: Number
    round_ctx: Digest
    attempt: Attempt
    self_seed: Key
    header: bytes
    upload: bytes
    own: bytes = b""


def noisy(total: NDArray[np.int64], terms: Contract, randomness: Randomness) -> NDArray[np.uint32]:
    """x_i ``(d,)``: this silo's sum with its share of the noise, in the ring.

    Args:
        total: the noiseless integer sum ``(d,)`` of one step.
        randomness: fresh for this attempt.

    Formal guarantees:
        - *Clamped before, never after*: each coordinate of ``total`` is clamped to the contract's ±Q, then noise is added;
          nothing is clamped, refused or redrawn afterwards.
        - *Full share*: every coordinate gets its own discrete Gaussian of the contract's share variance. None is added only where
          the contract says in words that there is no differential privacy; the ring's plan alone never decides that.

    Raises:
        MachineError: ``total`` is not of the contract's dimension; decided before noise is drawn.
    """
    plan = ring_plan(terms)
    if total.shape != (terms.dimension,) or total.dtype != np.int64:
        raise MachineError(
            f"a step gave {total.dtype} {total.shape}, the contract has ({terms.dimension},)", hint="check the model", code="shape"
        )
    if not terms.is_private:
        return ring.encode(ring.clamp(total, plan), np.zeros_like(total))
    share = noise.discrete_gaussian(terms.dimension, plan.share_variance, randomness)
    return ring.encode(ring.clamp(total, plan), share)


def masked(
    x: NDArray[np.uint32],
    *,
    round_number: int,
    round_ctx: bytes,
    silo: int,
    attempt: bytes,
    ledger_counter: int,
    pair_keys: Mapping[int, bytes],
    install_secret: bytes,
    os_random: bytes,
    seal_key: bytes,
    guardian_keys: Mapping[int, bytes],
    terms: Contract,
    sign: Callable[[Literal["header", "upload"], Wire], bytes],
) -> Persisted:
    """The finished upload of one attempt, ready to be persisted and then sent.

    Args:
        x: from :func:`noisy`, or ``silo.learning.local.trained``.
        os_random: 32 fresh bytes of the operating system, for this attempt's self-mask seed.
        guardian_keys: in share mode what the shares of its secrets are sealed to, by guardian; in consent mode nothing.
        sign: gives this silo's signed document of a message, in the context of the epoch.
    """
    seed = guardian_sum.self_seed(install_secret, attempt, hashlib.sha256(x.tobytes()).digest(), os_random)
    y = guardian_sum.mask(x, round_ctx=round_ctx, silo=silo, attempt=attempt, self_seed=seed, pair_keys=pair_keys)
    dealt = shares.Dealt(bundles=(), entries=())
    if terms.shared:
        dealt = shares.deal(
            self_seed=seed, pair_keys=pair_keys, round_ctx=round_ctx, silo=silo, attempt=attempt, terms=terms,
            guardian_keys=guardian_keys,
        )  # fmt: skip
    stated = guardian_sum.build_header(
        y, round_ctx=round_ctx, silo=silo, attempt=attempt, ledger_counter=ledger_counter, self_seed=seed, pair_keys=pair_keys,
        bundles=dealt.entries,
    )  # fmt: skip
    header = sign("header", stated)
    sealed = envelope.seal(seal_key, y.tobytes(), info=guardian_sum.upload_info(round_ctx=round_ctx, silo=silo, header=header))
    upload = sign("upload", Upload(header=header, sealed=sealed, bundles=dealt.bundles))
    return Persisted(round=round_number, round_ctx=round_ctx, attempt=attempt, self_seed=seed, header=header, upload=upload)
