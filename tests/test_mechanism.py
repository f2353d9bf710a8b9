# SPDX-License-Identifier: Apache-2.0
"""Mechanisms as data: strict forms, the effective noise multiplier, the slack, and the three adversaries."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.dp.mechanism import LatticeGaussian, adversaries
from privacy.errors import NotCertified, PrivacyRefusal

FACTS = {"sampling_rate": 0.2, "lattice_bits": 16, "share_variance": 2**32, "shares": 4, "dimension": 1000, "steps": 75}


def some(**changes):
    return LatticeGaussian(**{**FACTS, **changes})


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1, 0.0, 1.0000001, True, "0.2", None])
def test_a_sampling_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(PrivacyRefusal, match="sampling_rate"):
        some(sampling_rate=rate)


@pytest.mark.parametrize("name", ["lattice_bits", "share_variance", "shares", "dimension", "steps"])
@pytest.mark.parametrize("value", [0, -1, 1.0, math.nan, True, 2**64])
def test_a_count_that_is_no_positive_integer_in_range_is_refused(name, value):
    with pytest.raises(PrivacyRefusal, match=name):
        some(**{name: value})


def test_every_change_of_a_mechanism_is_checked_again():
    with pytest.raises(PrivacyRefusal):
        some().with_steps(0)
    with pytest.raises(PrivacyRefusal):
        some().with_shares(-1)
    with pytest.raises(AttributeError):
        some().steps = 5


def test_effective_noise_multiplier_is_the_sum_of_shares_less_tau_squared():
    event = some(share_variance=64**2, shares=3, lattice_bits=6)
    exact = math.sqrt(3 * 64**2 - 16) / 64
    assert exact * (1 - 1e-15) < event.effective_noise_multiplier < exact
    assert event.effective_noise_multiplier < math.sqrt(3) - 3e-4


def test_no_figure_below_s_64():
    some(share_variance=64**2).effective_noise_multiplier  # noqa: B018 - it must not raise
    with pytest.raises(NotCertified, match="4095"):
        some(share_variance=64**2 - 1).effective_noise_multiplier  # noqa: B018
    with pytest.raises(NotCertified):
        some(share_variance=64**2 - 1).slack_log  # noqa: B018


def test_slack_grows_with_steps_and_coordinates_and_is_never_zero():
    one = some(dimension=1, steps=1).slack_log
    assert 0 < one < 1e-135
    assert some(dimension=1000, steps=75).slack_log == pytest.approx(75_000 * one)
    bound = 5 * math.exp(-2 * math.pi**2 * 16) + sum(10 * math.exp(-2 * math.pi**2 * 64**2 * k / (k + 1)) for k in (1, 2, 3))
    assert some(share_variance=64**2, dimension=1, steps=1).slack_log >= bound * (1 - 1e-12)


def test_adversaries_face_the_shares_they_cannot_subtract():
    seen = adversaries(some(), silos=5, colluders=2)
    assert {name: event.shares for name, event in seen.items()} == {"outside": 5, "insiders": 3, "sum_broken": 1}
    assert all(event.with_shares(4) == some() for event in seen.values())


@pytest.mark.parametrize(("silos", "colluders"), [(5, 0), (5, 5), (1, 1), (3, -1)])
def test_someone_colludes_and_someone_does_not(silos, colluders):
    with pytest.raises(PrivacyRefusal, match="collude"):
        adversaries(some(), silos=silos, colluders=colluders)


@given(
    rate=st.floats(min_value=1e-12, max_value=1.0), bits=st.integers(1, 30), variance=st.integers(1, 2**63 - 1),
    shares=st.integers(1, 1000), dimension=st.integers(1, 10**6), steps=st.integers(1, 10**6),
)
def test_json_comes_back_as_the_same_mechanism(rate, bits, variance, shares, dimension, steps):
    event = LatticeGaussian(
        sampling_rate=rate, lattice_bits=bits, share_variance=variance, shares=shares, dimension=dimension, steps=steps
    )
    assert LatticeGaussian.from_json(event.as_json()) == event


def test_equal_mechanisms_have_equal_bytes():
    assert some(sampling_rate=1) == some(sampling_rate=1.0)
    assert some(sampling_rate=1).as_json() == some(sampling_rate=1.0).as_json()
    assert len({some(), some()}) == 1


def test_the_json_form_never_changes():
    assert some().as_json() == (
        b'{"type":"lattice-gaussian","sampling_rate":0.2,"lattice_bits":16,"share_variance":4294967296,"shares":4,'
        b'"dimension":1000,"steps":75}'
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"lattice-gaussian", b"laplace"), (b'"steps":75', b'"steps":75.0'), (b'"steps":75', b'"steps":"75"'), (b"0.2", b"1.5"),
        (b"0.2", b"NaN"), (b"0.2", b"null"), (b'"steps":75', b'"steps":-75'), (b"0.2", b"0.20"), (b',"steps":75', b""),
        (b"}", b',"also":1}'), (b'"type":"lattice-gaussian",', b""), (b"}", b"} "), (b"}", b',"steps":75}'), (b"{", b""),
    ],
)
def test_json_that_says_anything_else_is_refused(old, new):
    with pytest.raises(PrivacyRefusal):
        LatticeGaussian.from_json(some().as_json().replace(old, new))


def test_a_mechanism_inside_a_larger_document_is_checked_as_well():
    with pytest.raises(PrivacyRefusal):
        msgspec.json.decode(some().as_json().replace(b"0.2", b"2.0"), type=LatticeGaussian)
