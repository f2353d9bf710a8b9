# SPDX-License-Identifier: Apache-2.0
"""A whole federation in one process: what it reaches, what its aggregator sees, what it refuses, and that it survives its power."""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil

import msgspec
import numpy as np
import pytest

import silo.round
from aggregator import admission
from privacy import envelope, federation, guardian_sum, prg, update_rule
from privacy.budget import Limits
from privacy.errors import (
    BudgetExhausted,
    ConfigError,
    Equivocation,
    MachineError,
    Replay,
    RoundError,
    SiloquyError,
    TrustError,
)
from privacy.federation import parse
from privacy.keys import expand, u32
from privacy.messages import AGGREGATOR, AGGREGATOR_KINDS, Acknowledgement, Outcome, PairSeeds, Upload, decode
from silo import membership, session
from silo.home import Home
from silo.round import Rounds
from tests.whole import BASIS, NOW, PATIENCE_S, SILOS, Power, PowerCut, View, Whole, flips, together

REFUSALS = (TrustError, RoundError)  # Replay and Equivocation are TrustErrors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Countersigned, no epoch yet. Copied by each test."""
    return Whole.create(tmp_path_factory.mktemp("whole") / "federation")


@pytest.fixture(scope="module")
def ready(made, tmp_path_factory):
    """With a confirmed epoch: one round was run and is part of it."""
    whole = made.copied(tmp_path_factory.mktemp("ready") / "federation")
    whole.run(1)
    return whole


@pytest.fixture
def whole(made, tmp_path):
    return made.copied(tmp_path / "federation")


@pytest.fixture
def ran(ready, tmp_path):
    return ready.copied(tmp_path / "federation")


def body(whole, kind, number, party, type_):
    return decode(envelope.decode(whole.store.get(kind, number, party), envelope.Signed).body, type_)


# --- Reaching one model -----------------------------------------------------------------------------------------------------


def test_all_four_parties_reach_the_same_digest_each_round(whole):
    settled, closed = whole.run(4)
    assert [c.kind for c in closed] == ["result"] * 4
    for number, close in enumerate(closed, start=1):
        reached = {s: settled[s][number - 1].state.digest for s in SILOS}
        stated = {s: body(whole, "acknowledgement", number, s, Acknowledgement).state for s in SILOS}
        assert set(reached.values()) == set(stated.values()) == {close.state}
    assert len({c.state for c in closed}) == 4, "the model moved in every round"
    with whole.coordinator() as coordinator:
        assert coordinator.state().digest == closed[-1].state == whole.progress(2).state.digest
    assert all(len(whole.attempts(s, number)) == 1 for s in SILOS for number in (1, 2, 3, 4))


def test_every_round_costs_and_epsilon_only_grows(whole):
    whole.run(3)
    running = whole.silo(1)
    with running:
        spent = running.gate.spent()
        one = running.gate.forecast([1])[0][1]
    assert 0 < spent.epsilon < one
    assert sum(event.steps for event in whole.history(1).charged()) == 3


# --- What the aggregator sees -------------------------------------------------------------------------------------------------


class Spy:
    """What the silos know and the aggregator must not: the noisy vectors and the pair keys, by (round, silo)."""

    def __init__(self, monkeypatch):
        self.x, self.pair_keys = {}, {}
        original = silo.round.masked

        def masked(x, **given):
            slot = given["round_number"], given["silo"]
            self.x[slot], self.pair_keys[slot] = x.copy(), dict(given["pair_keys"])
            return original(x, **given)

        monkeypatch.setattr(silo.round, "masked", masked)

    def partial_sums(self, number):
        """Σ x_i over every proper, non-empty subset of the silos."""
        for size in (1, 2):
            for some in itertools.combinations(SILOS, size):
                yield some, sum((self.x[number, s] for s in some), np.zeros_like(self.x[number, 1]))


def chi_square(words: np.ndarray) -> float:
    """Of the bytes against the uniform distribution: mean 255, standard deviation 22.6."""
    counts = np.bincount(words.astype("<u4").view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


UNIFORM = 255 + 8 * 22.6


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A federation with a long vector after three rounds, and its spy."""
    whole = Whole.create(
        tmp_path_factory.mktemp("watched") / "f", model={"hidden_size": 2000}, privacy={"lattice_bits": 14, "units": 200}
    )
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        whole.run(3)
    return whole, spy


def opened(whole, number):
    """Everything the aggregator can open in a round: (masked vector, self-mask seed, header) by silo."""
    seed, found = whole.identity.receive_seed, {}
    outcome = body(whole, "outcome", number, AGGREGATOR, Outcome)
    for member in whole.accepted.terms.member:
        upload = decode(whole.store.get("upload", number, member.id), Upload)
        context = decode(upload.header, envelope.Signed).context
        header = guardian_sum.check_header(
            upload.header, member, accepted=whole.accepted, epoch_ctx=context, round_ctx=outcome.round_ctx
        )
        found[member.id] = guardian_sum.open_upload(upload, header, seal_seed=seed), dict(outcome.seeds)[member.id], header
    return found


def without_self_mask(y, seed, header):
    """What is left of a masked vector once its released seed is used."""
    left = y.copy()
    key = expand(seed, "gsum/1 self-mask", header.round_ctx, header.attempt, u32(header.silo))
    prg.add_stream(left, key, -1)
    return left


def test_nothing_that_the_aggregator_stores_holds_a_vector_a_partial_sum_or_a_pair_key(watched):
    whole, spy = watched
    stored = [p.read_bytes() for p in whole.home.root.rglob("*") if p.is_file()]
    stored += [y.tobytes() for number in (1, 2, 3) for y, _, _ in opened(whole, number).values()]
    pile = b"\0".join(stored)
    for number in (1, 2, 3):
        total = sum(spy.x[number, s] for s in SILOS).astype("<u4")
        assert total.tobytes() in pile, "the search finds what is there: the sum"
        for some, partial in spy.partial_sums(number):
            assert partial.astype("<u4").tobytes()[:32] not in pile, some
            lifted = partial.astype(np.int32)
            assert lifted.astype("<i8").tobytes()[:64] not in pile, some
            assert lifted.astype("<f8").tobytes()[:64] not in pile, some
        for keys_ in spy.pair_keys.values():
            for key in keys_.values():
                assert key not in pile
                assert key.hex().encode() not in pile


def test_what_is_left_without_self_masks_is_uniform_until_all_three_are_added(watched):
    whole, spy = watched
    for number in (1, 2, 3):
        left = {s: without_self_mask(*given) for s, given in opened(whole, number).items()}
        for size in (1, 2):
            for some in itertools.combinations(SILOS, size):
                assert chi_square(sum(left[s] for s in some)) < UNIFORM, some
        assert np.array_equal(sum(left.values()).astype("<u4"), sum(spy.x[number, s] for s in SILOS))
        assert chi_square(spy.x[number, 1]) > 100 * UNIFORM, "the test has power: a bare vector is far from uniform"


def test_the_pair_keys_are_what_hides_a_vector(watched):
    whole, spy = watched
    left = {s: without_self_mask(*given) for s, given in opened(whole, 2).items()}
    for peer, key in spy.pair_keys[2, 1].items():
        prg.add_stream(left[1], expand(key, "gsum/1 mask"), -1 if peer > 1 else 1)
    assert np.array_equal(left[1], spy.x[2, 1])


def test_two_rounds_of_one_silo_do_not_cancel_each_others_masks(watched):
    whole, _ = watched
    first, second = (without_self_mask(*opened(whole, number)[1]) for number in (1, 2))
    assert chi_square(first - second) < UNIFORM


def test_the_aggregators_key_opens_no_pair_seed(watched):
    whole, _ = watched
    number = whole.store.latest("epoch")
    for sender in SILOS:
        raw = whole.store.get("pair-seeds", number, sender)
        context = envelope.decode(raw, envelope.Signed).context
        for reader, sealed in body(whole, "pair-seeds", number, sender, PairSeeds).sealed:
            info = b"gsum/1 pair-seed\0" + context + u32(sender) + u32(reader)
            with pytest.raises(TrustError, match="does not open"):
                envelope.open_sealed(whole.identity.receive_seed, sealed, info=info)


# --- Other terms, another model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"), [(b"learning_rate = 0.02", b"learning_rate = 0.03"), (b"noise_multiplier = 2.0", b"noise_multiplier = 1.0")]
)
def test_a_silo_under_other_terms_is_refused_by_name_before_summing(whole, old, new):
    assert whole.accepted.raw.count(old) == 1
    other = parse(whole.accepted.raw.replace(old, new))
    assert sum(a != b for a, b in zip(whole.accepted.raw, other.raw, strict=True)) == 1

    def strange():
        with pytest.raises(TrustError) as caught:
            whole.silo(3, accepted=other).take_part(1)
        assert caught.value.code in ("wrong-context", "context")
        whole.clock.skip(1e4)

    def waiting():
        with pytest.raises(RoundError, match=r"no epoch-note 1 from silos \[3\]"):
            whole.coordinate(1)

    together(strange, waiting)
    assert whole.store.latest("manifest") is None


def test_a_silo_with_another_base_model_stops_the_epoch_by_name(whole, monkeypatch):
    monkeypatch.setattr("tests.whole.BASIS", BASIS)

    def other():
        from silo.participation import participate

        with whole.silo(3) as running, pytest.raises(TrustError, match=r"silos \[3\]"):
            list(participate(running.parts, basis=b"o" * 32, rounds=1, wait_s=5))

    def hub():
        with pytest.raises(TrustError, match=r"silos \[1, 2\] have .* silos \[3\] have") as caught:
            whole.coordinate(1)
        assert caught.value.code == "basis-differs"
        whole.power.is_out = True  # nobody gets a roster: the silos would wait for it

    def honest(silo):
        with pytest.raises((PowerCut, RoundError)):
            whole.silo(silo).take_part(1)

    with pytest.raises((PowerCut, AssertionError, BaseException)) if False else _nothing():
        together(hub, *(functools.partial(honest, s) for s in (1, 2)), functools.partial(_suppressed, other))
    assert whole.store.latest("manifest") is None


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def _suppressed(job):
    try:
        job()
    except (PowerCut, BaseException):  # noqa: S110
        pass
