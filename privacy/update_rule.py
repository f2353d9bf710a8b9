# SPDX-License-Identifier: Apache-2.0
"""The next model is arithmetic on integers that everybody can see.

Every silo and the aggregator apply this rule to the same integer sum and compare digests, so the aggregator cannot hand
out a model of its own making. Only elementwise +, −, ×, ÷ and ``np.sqrt`` on float64 arrays and Python floats are used:
IEEE 754 fixes their results to the bit. No ``**``, exp, cos, sum, mean, dot, norm or einsum: libraries differ there.
Adam's powers of beta are state, multiplied once per round, for the same reason.

The expression tree, with S the integer sum over the silos U, γ = C / 2^p, D the contract's public divisor for |U| silos and t
rounds applied so far. |U| is public and certified; where it is not given, all n silos stand in the sum::

    g     = (S × γ) ÷ D
    sgd   m ← (m × momentum) + g                     θ ← θ − (lr_t × m)
    adam  b1 ← b1 × β₁        m ← (m × β₁) + (g × (1 − β₁))
          b2 ← b2 × β₂        v ← (v × β₂) + ((g × g) × (1 − β₂))
          θ ← θ − (lr_t × ((m ÷ (1 − b1)) ÷ (√(v ÷ (1 − b2)) + ε)))
    lr_t  = lr × (t + 1) ÷ warmup while t < warmup; over the last ``decay_rounds`` of the plan it falls linearly,
            lr × (f + ((1 − f) × (left ÷ decay))) with left = rounds − t and f = final_fraction; otherwise lr

In local mode the sum is one of changes of the model, on a grid of width γ = update_bound / clamp, and its silos take their
mean; the moments of the shared state stay zero::

    θ ← θ + ((S × γ) ÷ |U|)

The sum of a basis round (privacy.basis_round) moves nothing but the frozen factors: the state after it is the initial one, with the
digest of the factors that follow from the sum, which every later state digest covers.

A silo's own steps follow the first tree, with moments of its own, D = q·units, and t the rounds applied to the shared state.

A state digest covers the little-endian float64 bytes of all arrays, so equal digests are equal models.
"""

from __future__ import annotations

import functools
import hashlib
import struct

import msgspec
import numpy as np
from numpy.typing import NDArray

from privacy import basis_round
from privacy.basis_round import BasisTerms
from privacy.errors import MachineError, RoundError, TrustError
from privacy.federation import Contract, Training, ring_plan, update_grid

Floats = NDArray[np.float64]
KNOWN_ANSWER = "8d2f279ccd20c058392d005fdb4bf1439add9ffa879e1dce7a43b4a6367dfa6c"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The model and the optimiser after ``applied`` results (of a silo's own: steps). Arrays have shape (d,).

    ``basis``: digest of the factors that a basis round fixed; b"" before it, and where they are public and need no round.
    """

    applied: int
    beta1_power: float
    beta2_power: float
    theta: Floats
    first_moment: Floats
    second_moment: Floats
    basis: bytes = b""

    @property
    def digest(self) -> bytes:
        """SHA-256 over the canonical bytes; equal digests are equal models."""
        return hashlib.sha256(self.to_bytes()).digest()

    def to_bytes(self) -> bytes:
        """Canonical bytes: magic, u64 applied, u64 d, two powers, then θ, m, v as '<f8'.

        With a basis of a round the magic is ``siloquy state 2`` NUL, and its 32 bytes follow it.
        """
        magic = b"siloquy state 2\0" + self.basis if self.basis else b"siloquy state 1\0"
        head = magic + struct.pack("<QQdd", self.applied, self.theta.size, self.beta1_power, self.beta2_power)
        return head + b"".join(a.astype("<f8").tobytes() for a in (self.theta, self.first_moment, self.second_moment))

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """The state in canonical bytes.

        Raises:
            TrustError: another length or magic than a state has.
        """
        basis = data[16:48] if data[:16] == b"siloquy state 2\0" else b""
        data = data[:16] + data[16 + len(basis) :]
        if data[:16] not in (b"siloquy state 1\0", b"siloquy state 2\0") or len(data) < 48:
            raise TrustError("these bytes are no model state", hint="restore the file from a backup", code="malformed")
        applied, d, beta1_power, beta2_power = struct.unpack("<QQdd", data[16:48])
        if len(data) != 48 + 24 * d:
            raise TrustError(f"the state has {len(data)} bytes, {48 + 24 * d} expected", hint="restore the file", code="malformed")
        theta, first, second = (np.frombuffer(data, "<f8", d, 48 + 8 * d * k).astype(np.float64) for k in range(3))
        return cls(
            applied=applied, beta1_power=beta1_power, beta2_power=beta2_power, theta=theta, first_moment=first,
            second_moment=second, basis=basis,
        )  # fmt: skip


def initial(terms: Contract) -> State:
    """The public state before round 1: R₀ = 0 on every module, a zero head, fresh moments."""
    zeros = np.zeros(terms.trainables, dtype=np.float64)
    return State(applied=0, beta1_power=1.0, beta2_power=1.0, theta=zeros, first_moment=zeros.copy(), second_moment=zeros.copy())


def accepts(total: NDArray[np.int64], terms: Contract, *, silos: int | None = None) -> bool:
    """Whether a sum is within what its ``silos`` can reach, clamped sums with noise or changes; outside it nothing moves.

    Raises:
        RoundError: a sum of so many silos is none of this contract.
    """
    plan, standing = ring_plan(terms), _standing(terms, silos)
    bound = plan.clamp * standing + plan.headroom
    if terms.training.mode == "local":
        bound = update_grid(terms).clamp * standing
    return bool(np.all(total <= bound) and np.all(total >= -bound))


def advance(state: State, total: NDArray[np.int64], terms: Contract, *, silos: int | None = None) -> State:
    """The state after one more result; see the module docstring for the exact expression tree.

    Args:
        total: (d,) the lifted integer sum of the round.
        silos: how many silos stand in it, |U|; None for all.

    Raises:
        MachineError: this machine's floating point is not IEEE 754 (denormals off, or a known answer missed).
        RoundError: the next state would not be finite, or a sum of so many silos is none of this contract; the old one stands.
    """
    if isinstance(terms, BasisTerms):
        self_check()
        return msgspec.structs.replace(initial(terms), basis=basis_round.digest_of(total, terms))
    if terms.training.mode == "joint":
        return step(state, total, terms, applied=state.applied, silos=silos)
    self_check()
    mean = (total.astype(np.float64) * update_grid(terms).step) / float(_standing(terms, silos))
    return _finite(msgspec.structs.replace(state, applied=state.applied + 1, theta=state.theta + mean))


def step(state: State, total: NDArray[np.int64], terms: Contract, *, applied: int, silos: int | None = None) -> State:
    """The model and optimiser after one private step: of all silos in joint mode, of one silo on its own in local mode.

    Args:
        total: (d,) the lifted, noised integer sum of the step.
        applied: results applied to the shared state, by which the learning rate's schedule goes.
        silos: as in ``advance``; in local mode a step is of one silo whatever it says.

    Raises:
        As ``advance``.
    """
    self_check()
    rate, divisor = learning_rate(terms.training, applied), terms.divisor_for(_standing(terms, silos))
    return _advance(state, total, terms.training, ring_plan(terms).lattice_bits, terms.privacy.max_grad_norm, divisor, rate)


def _standing(terms: Contract, silos: int | None) -> int:
    """|U|, held to what the contract lets anybody sum."""
    if silos is None:
        return terms.silos
    if not terms.fewest <= silos <= terms.silos:
        raise RoundError(
            f"a sum of {silos} silos; under this contract {terms.fewest} to {terms.silos} stand in one",
            hint="stop, and keep the outcome as evidence", code="silos-in-sum", found=silos,
        )
    return silos


def _advance(
    state: State, total: NDArray[np.int64], training: Training, lattice_bits: int, norm: float, divisor: float, rate: float
) -> State:
    gradient = (total.astype(np.float64) * (norm / float(1 << lattice_bits))) / divisor
    rule = _sgd if training.optimizer == "sgd" else _adam
    with np.errstate(over="ignore", invalid="ignore"):
        return _finite(rule(state, gradient, training, rate))


def _finite(after: State) -> State:
    if not (
        np.all(np.isfinite(after.theta)) and np.all(np.isfinite(after.first_moment)) and np.all(np.isfinite(after.second_moment))
    ):
        raise RoundError(
            "the update is not finite", hint="lower training.learning_rate in a new contract version", code="not-finite"
        )
    return after


def learning_rate(training: Training, applied: int) -> float:
    """lr_t after ``applied`` results: linear warm-up, constant, linear decay over the last ``decay_rounds``."""
    if applied < training.warmup_rounds:
        return training.learning_rate * float(applied + 1) / float(training.warmup_rounds)
    left = max(training.rounds - applied, 0)
    if left < training.decay_rounds:
        f = training.final_fraction
        return training.learning_rate * (f + ((1.0 - f) * (float(left) / float(training.decay_rounds))))
    return training.learning_rate


def _sgd(state: State, gradient: Floats, training: Training, rate: float) -> State:
    first = (state.first_moment * training.momentum) + gradient
    return State(
        applied=state.applied + 1,
        beta1_power=state.beta1_power,
        beta2_power=state.beta2_power,
        theta=state.theta - (rate * first),
        first_moment=first,
        second_moment=state.second_moment,
        basis=state.basis,
    )


def _adam(state: State, gradient: Floats, training: Training, rate: float) -> State:
    beta1, beta2 = training.beta1, training.beta2
    power1, power2 = state.beta1_power * beta1, state.beta2_power * beta2
    first = (state.first_moment * beta1) + (gradient * (1.0 - beta1))
    second = (state.second_moment * beta2) + ((gradient * gradient) * (1.0 - beta2))
    step = (first / (1.0 - power1)) / (np.sqrt(second / (1.0 - power2)) + training.epsilon)
    return State(
        applied=state.applied + 1,
        beta1_power=power1,
        beta2_power=power2,
        theta=state.theta - (rate * step),
        first_moment=first,
        second_moment=second,
        basis=state.basis,
    )


@functools.cache
def self_check() -> None:
    """Refuse a machine whose floating point differs: denormals switched off, or 1,000 known steps that end elsewhere.

    Raises:
        MachineError: with the digest found and the one expected.
    """
    tiny = np.array([5e-324, 2.0**-1022])
    if (tiny[0] * 1.0) == 0.0 or (tiny[1] / 2.0) == 0.0:
        raise MachineError(
            "denormal numbers are switched off in this process",
            hint="remove the library that was built with -ffast-math",
            code="not-ieee754",
        )
    found = known_trajectory()
    if found != KNOWN_ANSWER:
        raise MachineError(
            f"1,000 known update steps end at {found[:16]}, expected {KNOWN_ANSWER[:16]}",
            hint="use a numpy build with IEEE 754 arithmetic",
            code="not-ieee754",
            found=found,
            expected=KNOWN_ANSWER,
        )


def known_trajectory() -> str:
    """Hex digest of the state after 1,000 Adam steps on a fixed integer sequence (a linear congruence mod 2³²)."""
    training = Training(rounds=1000, learning_rate=0.01, warmup_rounds=10, decay_rounds=500, final_fraction=0.1)
    zeros = np.zeros(8, dtype=np.float64)
    state = State(applied=0, beta1_power=1.0, beta2_power=1.0, theta=zeros, first_moment=zeros, second_moment=zeros)
    word = np.arange(1, 9, dtype=np.uint64)
    for _ in range(1000):
        word = (word * np.uint64(1664525) + np.uint64(1013904223)) & np.uint64(0xFFFFFFFF)
        rate = learning_rate(training, state.applied)
        state = _advance(state, word.astype(np.int64) - (1 << 31), training, 20, 0.5, 1234.5, rate)
    return state.digest.hex()
