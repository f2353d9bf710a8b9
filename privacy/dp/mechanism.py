# SPDX-License-Identifier: Apache-2.0
"""What was done to the records, as data: the facts an accountant needs and nothing that depends on a record.

A mechanism says *what happened*; ``privacy/dp/accounting.py`` says what it costs. Mechanisms are written into signed ledgers
and contracts that outlive this code, so they evolve by one rule (after dp_accounting's ``DpEvent``): never remove a kind or
a field, never change what one means, only add a new kind with a new tag. The JSON form carries the tag in ``type``;
unknown tags and unknown fields are refused, never skipped.

Not promised here: that the mechanism was really run this way. That is the business of ``lattice``, ``noise`` and the tests.
"""

from __future__ import annotations

import math
from typing import Self

import msgspec

from privacy.errors import NotCertified, PrivacyRefusal

SMOOTHING_VARIANCE = 16
"""tau squared of the convolution lemma, tau = 4 lattice units (docs/concepts/privacy.md)."""

MIN_SHARE_VARIANCE = 64**2
"""The smallest variance of one silo's noise for which a figure is certified, in squared lattice units."""

MOST_STEPS = 10**9
"""The most steps that one mechanism is composed over."""

MOST_CONTRIBUTIONS = 2**16
"""The most that one unit may contribute in one step."""

_MAX_INTEGER = 2**63 - 1


class LatticeGaussian(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lattice-gaussian"):
    """Poisson-sampled units, clipped to integer vectors of norm at most 2^p, plus discrete Gaussian noise; ``steps`` times.

    Neighbouring relation: one privacy unit added or removed. Sensitivity of one step: 2^p in the L2 norm, on integers.

    Args:
        sampling_rate: q in (0, 1], the probability with which each unit enters a step.
        lattice_bits: p, in 1..30; the clipping bound C is 2^p lattice units.
        share_variance: s squared, the variance parameter of *one* silo's noise per coordinate, in squared lattice units.
        shares: how many independent shares of that noise the adversary faces; 1 in local mode.
        dimension: d, the number of released coordinates per step.
        steps: T, how many times the step is run; each run has a fresh sample and fresh noise.

    Formal guarantees: ``steps`` compositions of the Poisson-subsampled *continuous* Gaussian with noise multiplier
    ``effective_noise_multiplier`` bound the privacy of the mechanism, up to a max divergence of ``slack_log`` in all
    (convolution lemma: Peikert 2010; Micciancio, Regev 2007; sums of shares: Kairouz, Liu, Steinke, arXiv 2102.06387).

    ============================  ======================================================
    case                          result
    ============================  ======================================================
    NaN, infinite, q <= 0, q > 1  ``PrivacyRefusal`` on construction and on decoding
    a count that is not an int    ``PrivacyRefusal`` (a bool is not a count)
    s < 64                        constructed, but no figure: ``NotCertified``
    q = 1                         the unsampled Gaussian
    ============================  ======================================================

    Raises:
        PrivacyRefusal: a value is not a number of the stated range.
    """

    sampling_rate: float
    lattice_bits: int
    share_variance: int
    shares: int
    dimension: int
    steps: int

    def __post_init__(self) -> None:
        _check_rate(self)
        _check_counts(self, *_COUNTS)

    @property
    def effective_noise_multiplier(self) -> float:
        """sigma' = sqrt(s^2 * shares - tau^2) / 2^p, rounded down: the multiplier the continuous accountants are given.

        Raises:
            NotCertified: s < 64, where the smoothing argument is not claimed.
        """
        self._require_smooth()
        root = math.sqrt(self.share_variance * self.shares - SMOOTHING_VARIANCE)
        return math.nextafter(math.nextafter(root, 0.0) / 2.0**self.lattice_bits, 0.0)

    @property
    def slack_log(self) -> float:
        """zeta, the max divergence between this mechanism and its continuous counterpart over all steps and coordinates.

        T * d * (5 exp(-2 pi^2 tau^2) + sum over k of 10 exp(-2 pi^2 s^2 k/(k+1)), k = 1 .. shares - 1). It costs
        2 * zeta in epsilon and a factor exp(zeta) in delta.

        Raises:
            NotCertified: s < 64.
        """
        self._require_smooth()
        smoothing = 5 * math.exp(-2 * math.pi**2 * SMOOTHING_VARIANCE)
        # k/(k+1) is smallest at k = 1, so this bounds the sum over k.
        sharing = (self.shares - 1) * 10 * math.exp(-(math.pi**2) * self.share_variance)
        return self.steps * self.dimension * (smoothing + sharing)

    def with_steps(self, steps: int) -> LatticeGaussian:
        """The same mechanism run ``steps`` times."""
        return msgspec.structs.replace(self, steps=steps)

    def with_shares(self, shares: int) -> LatticeGaussian:
        """The same mechanism against an adversary who faces ``shares`` shares of the noise."""
        return msgspec.structs.replace(self, shares=shares)

    def as_json(self) -> bytes:
        """The mechanism as compact JSON; equal mechanisms give equal bytes."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The mechanism in ``data``, strictly: exactly the bytes that ``as_json`` writes.

        Raises:
            PrivacyRefusal: not this kind of mechanism, a value out of range, or another spelling of the same values.
        """
        hint = "update Siloquy on this machine, or ask the sender for the document as it was written"
        try:
            event = msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise PrivacyRefusal(f"not a mechanism this version knows: {error}", hint=hint) from error
        if event.as_json() != data:
            raise PrivacyRefusal(f"a mechanism in another spelling: {len(data)} bytes, canonical {len(event.as_json())}", hint=hint)
        return event

    def _require_smooth(self) -> None:
        if self.share_variance < MIN_SHARE_VARIANCE:
            raise NotCertified(
                f"one silo's noise has variance {self.share_variance} in lattice units, at least {MIN_SHARE_VARIANCE} is needed",
                hint="use more lattice bits or a larger noise multiplier",
                share_variance=self.share_variance, minimum=MIN_SHARE_VARIANCE,
            )


class LatticeMixture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lattice-gaussian-mixture"):
    """``LatticeGaussian`` as a unit is exposed to it that contributes more than once, each time by a coin of its own.

    Neighbouring relation: that unit added or removed, with all of its contributions. The other fields are those of
    ``LatticeGaussian``; ``privacy.dp.groups`` makes these from one.

    Args:
        contributions: k, how many vectors of norm at most 2^p the unit may add to *one* sum: silos that know it, or its records.
        releases: how many such sums, each with noise of its own, are released in one step: silos whose uploads are read alone.

    Formal guarantees: ``steps`` times ``releases`` compositions of N(0, z^2) against N(J, z^2), J from Binomial(k, q) and z the
    ``effective_noise_multiplier``, bound the privacy of the mechanism, up to a max divergence of ``slack_log`` in all
    (docs/concepts/privacy.md, "A unit in several places"). Fewer contributions, of any norm up to 2^p, cost less.

    Raises:
        PrivacyRefusal: a value is not a number of the stated range, or neither figure is above 1.
    """

    sampling_rate: float
    lattice_bits: int
    share_variance: int
    shares: int
    dimension: int
    steps: int
    contributions: int
    releases: int

    def __post_init__(self) -> None:
        _check_rate(self)
        _check_counts(self, *_COUNTS, *_COUNTS_OF_MIXTURE)
        if self.contributions * self.releases < 2:
            raise _outside("contributions", self.contributions, "above 1 where there is one release: else it is a lattice-gaussian")

    @property
    def once(self) -> LatticeGaussian:
        """The mechanism as a unit is exposed to it that contributes once."""
        return LatticeGaussian(**{name: getattr(self, name) for name in LatticeGaussian.__struct_fields__})

    @property
    def effective_noise_multiplier(self) -> float:
        """As ``LatticeGaussian`` has it: the smoothing does not depend on how far the sum is shifted.

        Raises:
            NotCertified: s < 64.
        """
        return self.once.effective_noise_multiplier

    @property
    def slack_log(self) -> float:
        """As ``LatticeGaussian`` has it, for every release of every step.

        Raises:
            NotCertified: s < 64.
        """
        return self.releases * self.once.slack_log

    def with_steps(self, steps: int) -> LatticeMixture:
        """The same mechanism run ``steps`` times."""
        return msgspec.structs.replace(self, steps=steps)

    def with_shares(self, shares: int) -> LatticeMixture:
        """The same mechanism against an adversary who faces ``shares`` shares of the noise."""
        return msgspec.structs.replace(self, shares=shares)

    def as_json(self) -> bytes:
        """The mechanism as compact JSON; equal mechanisms give equal bytes."""
        return msgspec.json.encode(self)


class Unprotected(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="no-differential-privacy"):
    """Poisson-sampled units, clipped to integer vectors of norm at most 2^p and summed **without noise**; ``steps`` times.

    It stands in ledgers so that such a run is never forgotten. Fields as in ``LatticeGaussian``; there is no noise to state.

    Formal guarantees: none. No finite epsilon bounds it, at any delta below the chance that a unit is drawn, whatever the
    clipping. It has no ``effective_noise_multiplier``, so no accountant can be asked about it; whatever it is composed with over
    the same units has no finite epsilon either (``privacy.dp.unprotected``).

    Raises:
        PrivacyRefusal: a value is not a number of the stated range.
    """

    sampling_rate: float
    lattice_bits: int
    dimension: int
    steps: int

    def __post_init__(self) -> None:
        _check_rate(self)
        _check_counts(self, "lattice_bits", "dimension", "steps")

    def with_steps(self, steps: int) -> Unprotected:
        """The same sums, ``steps`` times."""
        return msgspec.structs.replace(self, steps=steps)


Noised = LatticeGaussian | LatticeMixture
"""Every kind with noise: what an accountant can be asked about."""
Mechanism = LatticeGaussian | LatticeMixture | Unprotected
"""Every kind of mechanism this version knows."""


def adversaries(event: LatticeGaussian, *, silos: int, colluders: int) -> dict[str, LatticeGaussian]:
    """The same run as three adversaries see it, by the shares of the noise that each cannot subtract.

    ``outside`` sees released states only and faces all ``silos`` shares of the set that counted; ``insiders`` are the
    aggregator with ``colluders`` silos, who know their own noise; ``sum_broken`` reads one silo's upload in the clear.

    Raises:
        PrivacyRefusal: fewer than one colluder (every silo knows its own noise), or no honest silo left.
    """
    if not 1 <= colluders < silos:
        raise PrivacyRefusal(
            f"{colluders} colluders among {silos} silos: at least one must collude and one must not",
            hint="plan with colluders = 1 or more, and more silos than colluders", colluders=colluders, silos=silos,
        )
    return {
        "outside": event.with_shares(silos),
        "insiders": event.with_shares(silos - colluders),
        "sum_broken": event.with_shares(1),
    }


_COUNTS = {"lattice_bits": 30, "share_variance": _MAX_INTEGER, "shares": 10**6, "dimension": 2**40, "steps": MOST_STEPS}
_COUNTS_OF_MIXTURE = {"contributions": MOST_CONTRIBUTIONS, "releases": MOST_CONTRIBUTIONS}


def _check_rate(event: Mechanism) -> None:
    rate = event.sampling_rate
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise _outside("sampling_rate", rate, "a number above 0 and at most 1")
    msgspec.structs.force_setattr(event, "sampling_rate", float(rate))  # 1 and 1.0 must give equal bytes


def _check_counts(event: Mechanism, *names: str) -> None:
    for name in names:
        value, top = getattr(event, name), (_COUNTS | _COUNTS_OF_MIXTURE)[name]
        if type(value) is not int or not 1 <= value <= top:
            raise _outside(name, value, f"an integer from 1 to {top}")


def _outside(name: str, value: object, wanted: str) -> PrivacyRefusal:
    return PrivacyRefusal(f"{name} is {value!r}, it must be {wanted}", hint=f"correct {name}", name=name, value=repr(value))
