# SPDX-License-Identifier: Apache-2.0
"""privacy.secure_sum.guardian_sum in consent mode: exact sums, equal views for equal sums, and every refusal by name.

A whole round runs in one process with real keys; ``Round`` can be bent at each step. Statistical tests use fixed keys, so
they give the same figures on every run.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import files, prg
from privacy.dp import ring
from privacy.envelope import seal, sign
from privacy.errors import Equivocation, TrustError
from privacy.identity import keys
from privacy.messages import Certificate, Consent, Freeze, Header, Release, Upload, decode, encode
from privacy.secure_sum import guardian_sum, merkle
from privacy.secure_sum.epoch import PairChain
from privacy.secure_sum.guardian_sum import Certified, Frozen
from tests.terms import seed
from tests.test_epoch import Epoch, confirmed

HUB = keys.Identity(name="hub", sign_seed=seed(100), receive_seed=b"h" * 32)
MANIFEST = b"manifest of round 1"


@dataclass(frozen=True)
class Attempt:
    """What one silo made in one attempt."""

    x: np.ndarray
    attempt: bytes
    self_seed: bytes
    y: np.ndarray
    header: Header
    raw: bytes


class Round:
    """One round of an epoch: all silos upload; then freeze, consent, release, unmask."""

    def __init__(
        self, setup: Epoch, *, manifest: bytes = MANIFEST, settled: int = 0, xs: dict[int, np.ndarray] | None = None
    ) -> None:
        self.setup, self.settled, self.ctx = setup, settled, guardian_sum.round_ctx(manifest)
        self.members = {member.id: member for member in setup.accepted.terms.member}
        generator = np.random.default_rng(settled)
        self.dimension = setup.accepted.terms.dimension
        xs = xs or {i: generator.integers(0, 2**32, self.dimension, dtype=np.uint32) for i in self.members}
        self.made = {i: self.attempt(i, xs[i]) for i in self.members}

    def pair_keys(self, silo: int, ctx: bytes | None = None) -> dict[int, bytes]:
        chain: PairChain = self.setup.parties[silo].chain
        for _ in range(self.settled):
            chain = chain.advance()
        return chain.round_keys(ctx or self.ctx)

    def attempt(self, silo: int, x: np.ndarray, *, number: int = 1, ctx: bytes | None = None, **changes) -> Attempt:
        ctx = ctx or self.ctx
        attempt = hashlib.sha256(bytes([silo, number])).digest()[:16]
        own_seed = guardian_sum.self_seed(bytes([silo]) * 32, attempt, hashlib.sha256(x.tobytes()).digest(), bytes([number]) * 32)
        place = {"round_ctx": ctx, "silo": silo, "attempt": attempt, "self_seed": own_seed, "pair_keys": self.pair_keys(silo, ctx)}
        y = guardian_sum.mask(x, **place)
        header = guardian_sum.build_header(y, ledger_counter=number, **place)
        if changes:
            header = changed_header(header, **changes)
        return Attempt(x=x, attempt=attempt, self_seed=own_seed, y=y, header=header, raw=self.signed(silo, "header", header))

    def signed(self, silo: int, type: str, message: object) -> bytes:
        return sign(self.setup.parties[silo].identity, type=type, context=self.setup.context, sender=silo, body=encode(message))

    def freeze(self) -> Freeze:
        return Freeze(round_ctx=self.ctx, headers=tuple(made.raw for made in self.made.values()))

    def check_freeze(self, freeze: Freeze | None = None, own: bytes | None = None) -> Frozen:
        return guardian_sum.check_freeze(
            freeze or self.freeze(), accepted=self.setup.accepted, epoch_ctx=self.setup.context, round_ctx=self.ctx, own_header=own
        )

    def consent(self, silo: int, frozen: Frozen) -> bytes:
        return self.signed(silo, "consent", Consent(round_ctx=self.ctx, silo=silo, frozen=frozen.digest))

    def certificate(self, frozen: Frozen) -> Certificate:
        consents = tuple(self.consent(i, frozen) for i in self.members)
        return Certificate(round_ctx=self.ctx, frozen=frozen.digest, consents=consents)

    def check_certificate(self, certificate: Certificate, frozen: Frozen) -> Certified:
        return guardian_sum.check_certificate(certificate, frozen, accepted=self.setup.accepted, epoch_ctx=self.setup.context)

    def certified(self) -> Certified:
        frozen = self.check_freeze()
        return self.check_certificate(self.certificate(frozen), frozen)

    def release(self, silo: int, certified: Certified) -> bytes:
        made = self.made[silo]
        message = guardian_sum.seal_release(certified, silo=silo, self_seed=made.self_seed, seal_key=HUB.public.seal_key)
        return self.signed(silo, "release", message)

    def open_release(self, raw: bytes, silo: int, certified: Certified) -> bytes:
        return guardian_sum.open_release(
            raw, certified, member=self.members[silo], epoch_ctx=self.setup.context, seal_seed=HUB.receive_seed
        )

    def total(self) -> np.ndarray:
        certified = self.certified()
        seeds = {i: self.open_release(self.release(i, certified), i, certified) for i in self.members}
        return guardian_sum.unmask({i: made.y for i, made in self.made.items()}, seeds, certified)

    def forced_total(self) -> np.ndarray:
        """What an aggregator computes that skips every check and somehow has all seeds."""
        headers = {i: made.header for i, made in self.made.items()}
        forced = Certified(frozen=Frozen(round_ctx=self.ctx, digest=bytes(32), headers=headers))
        vectors, seeds = ({i: getattr(made, name) for i, made in self.made.items()} for name in ("y", "self_seed"))
        return guardian_sum.unmask(vectors, seeds, forced)


def changed_header(header: Header, **changes) -> Header:
    return Header(**{**{name: getattr(header, name) for name in Header.__struct_fields__}, **changes})


@cache
def an_epoch(silos: int = 3, hidden: int = 8, name: str = "test-federation") -> Epoch:
    return confirmed(silos, model={"hidden_size": hidden}, name=name)


@pytest.fixture
def a_round() -> Round:
    return Round(an_epoch())


def sum_of(vectors: list[np.ndarray]) -> np.ndarray:
    return np.sum(np.array(vectors, dtype=np.uint64), axis=0).astype(np.uint32)


def chi_square(words: np.ndarray) -> float:
    """Of the byte histogram; 255 degrees of freedom: mean 255, standard deviation 22.6."""
    counts = np.bincount(np.ascontiguousarray(words).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2) / expected).sum())


def looks_uniform(words: np.ndarray) -> bool:
    return 140 < chi_square(words) < 400


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silos", [2, 3, 4, 5, 6])
def test_the_sum_is_exact(silos: int) -> None:
    a_round = Round(an_epoch(silos))
    assert np.array_equal(a_round.total(), sum_of([made.x for made in a_round.made.values()]))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=26 * 3, max_size=26 * 3))
def test_the_sum_is_exact_for_any_words(words: list[int]) -> None:
    xs = np.array(words, dtype=np.uint32).reshape(3, 26)
    a_round = Round(an_epoch(), xs=dict(enumerate(xs, start=1)))
    assert np.array_equal(a_round.total(), sum_of(list(xs)))


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
def test_no_word_is_special(word: int) -> None:
    a_round = Round(an_epoch(), xs={i: np.full(26, word, dtype=np.uint32) for i in (1, 2, 3)})
    assert set(a_round.total().tolist()) == {3 * word % 2**32}


def test_signed_integers_survive_the_ring_over_several_leaves() -> None:
    setup = an_epoch(hidden=20000)  # 160 kB: two whole leaves and a short one
    generator = np.random.default_rng(5)
    values = {i: generator.integers(-(2**28), 2**28, setup.accepted.terms.dimension) for i in (1, 2, 3)}
    a_round = Round(setup, xs={i: x.astype(np.uint32) for i, x in values.items()})
    assert np.array_equal(ring.lift(a_round.total()), sum(values.values()))
    assert a_round.made[1].header.root == merkle.root(a_round.made[1].y.astype("<u4").tobytes())


def test_several_rounds_of_one_epoch_sum() -> None:
    for settled in range(3):
        a_round = Round(an_epoch(), settled=settled, manifest=b"manifest %d" % settled)
        assert np.array_equal(a_round.total(), sum_of([made.x for made in a_round.made.values()]))


def test_masking_is_the_documented_formula() -> None:
    a_round = Round(an_epoch())
    for i, made in a_round.made.items():
        place = a_round.ctx + made.attempt + i.to_bytes(4, "big")
        expected = made.x + prg.stream(keys.expand(made.self_seed, "gsum/1 self-mask", place), 26)
        for j, key in a_round.pair_keys(i).items():
            mask = prg.stream(keys.expand(key, "gsum/1 mask"), 26)
            expected = expected + mask if j > i else expected - mask
            assert dict(made.header.pair_commitments)[j] == keys.expand(key, "gsum/1 commit")
        assert np.array_equal(made.y, expected)
        assert made.header.self_commitment == keys.expand(made.self_seed, "gsum/1 self-commit", place)


def test_the_digest_of_a_set_is_the_documented_one(a_round: Round) -> None:
    entries = b"".join(
        i.to_bytes(4, "big") + made.attempt + hashlib.sha256(made.raw).digest() for i, made in a_round.made.items()
    )
    assert a_round.check_freeze().digest == hashlib.sha256(b"gsum/1 set\0" + entries).digest()


def test_masking_leaves_its_input_alone_and_takes_any_stride() -> None:
    a_round, wide = Round(an_epoch()), np.arange(52, dtype=np.uint32)
    made = a_round.attempt(1, wide[::2])
    assert np.array_equal(wide, np.arange(52, dtype=np.uint32))
    assert np.array_equal(made.y, a_round.attempt(1, wide[::2].copy()).y)
    assert not np.shares_memory(made.y, wide)


@pytest.mark.parametrize("x", [
    np.zeros(26, dtype=np.int32), np.zeros(26, dtype=np.int64), np.zeros(26, dtype=np.float32), np.zeros(26, dtype=">u4"),
    np.zeros((2, 13), dtype=np.uint32), np.zeros(0, dtype=np.uint32),
])  # fmt: skip
def test_only_one_uint32_vector_is_masked(x: np.ndarray) -> None:
    with pytest.raises(TrustError, match="wanted a non-empty uint32 vector"):
        guardian_sum.mask(x, round_ctx=bytes(32), silo=1, attempt=bytes(16), self_seed=bytes(32), pair_keys={2: bytes(32)})


@pytest.mark.parametrize("pair_keys", [{}, {1: bytes(32)}, {1: bytes(32), 2: bytes(32)}])
def test_a_silo_without_peers_or_paired_with_itself_is_refused(pair_keys: dict[int, bytes]) -> None:
    x = np.zeros(4, dtype=np.uint32)
    with pytest.raises(TrustError, match="silo 1 needs a key for each of its peers"):
        guardian_sum.mask(x, round_ctx=bytes(32), silo=1, attempt=bytes(16), self_seed=bytes(32), pair_keys=pair_keys)


def test_two_silos_see_each_other() -> None:
    """The documented edge case: with n = 2 the sum hides nothing from the other silo."""
    a_round = Round(an_epoch(2))
    assert np.array_equal(a_round.total() - a_round.made[1].x, a_round.made[2].x)


# --- guarantee 1: equal sums, equal views -----------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_equal_sums_equal_views_by_explicit_simulation(silos: int, random: int) -> None:
    """For the real y, headers and released seeds, and any x' with the same sum, pair streams exist that explain x'.

    The change of streams is a translation, hence a bijection: uniform streams give both inputs the same view.
    """
    a_round, generator = Round(an_epoch(silos)), np.random.default_rng(random)
    pairs = combinations(a_round.members, 2)
    streams = {(i, j): prg.stream(keys.expand(a_round.pair_keys(i)[j], "gsum/1 mask"), 26) for i, j in pairs}
    others = {i: generator.integers(0, 2**32, 26, dtype=np.uint32) for i in range(2, silos + 1)}
    others[1] = sum_of([made.x for made in a_round.made.values()]) - sum_of(list(others.values()))
    for j in range(2, silos + 1):
        streams[1, j] = streams[1, j] - (a_round.made[j].x - others[j])
    for i, made in a_round.made.items():
        place = a_round.ctx + made.attempt + i.to_bytes(4, "big")
        explained = others[i] + prg.stream(keys.expand(made.self_seed, "gsum/1 self-mask", place), 26)
        for (low, high), words in streams.items():
            explained = explained + words if low == i else explained - words if high == i else explained
        assert np.array_equal(explained, made.y)


def coefficients(silos: int) -> dict[tuple[int, int], list[int]]:
    """How often each pair's stream enters each y, read off the real code by changing one pair key at a time."""
    pairs = {pair: bytes([index + 1]) * 32 for index, pair in enumerate(combinations(range(1, silos + 1), 2))}

    def masked(i: int, table: dict[tuple[int, int], bytes]) -> np.ndarray:
        own = {sum(pair) - i: key for pair, key in table.items() if i in pair}
        return guardian_sum.mask(
            np.zeros(8, dtype=np.uint32), round_ctx=bytes(32), silo=i, attempt=bytes(16), self_seed=bytes([i]) * 32, pair_keys=own
        )

    found = {}
    for pair, key in pairs.items():
        changed = bytes(32)
        step = prg.stream(keys.expand(changed, "gsum/1 mask"), 8) - prg.stream(keys.expand(key, "gsum/1 mask"), 8)
        moves = [masked(i, {**pairs, pair: changed}) - masked(i, pairs) for i in range(1, silos + 1)]
        found[pair] = [1 if np.array_equal(m, step) else -1 if np.array_equal(m, -step) else 0 if not m.any() else 9 for m in moves]
    return found


def views(x: tuple[int, ...], signs: list[list[int]], known: list[list[int]], modulus: int) -> Counter:
    """All y a coalition may see for x, over all pads of honest pairs, in a small ring; ``known`` pads are all 1."""
    fixed = [sum(row[i] for row in known) for i in range(len(x))]
    return Counter(
        tuple((x[i] + fixed[i] + sum(pad * row[i] for pad, row in zip(pads, signs, strict=True))) % modulus for i in range(len(x)))
        for pads in product(range(modulus), repeat=len(signs))
    )


def test_equal_sums_equal_views_exhaustively_in_a_small_ring() -> None:
    signs = list(coefficients(3).values())
    assert all(sorted(row) == [-1, 0, 1] for row in signs)
    by_sum: dict[int, list[Counter]] = {}
    for x in product(range(4), repeat=3):
        by_sum.setdefault(sum(x) % 4, []).append(views(x, signs, [], 4))
    for same in by_sum.values():
        assert len(same) == 16
        assert all(view == same[0] for view in same)
    assert not any(set(one[0]) & set(other[0]) for one, other in combinations(by_sum.values(), 2))


def test_equal_honest_sums_equal_views_for_a_coalition_with_a_silo() -> None:
    table = coefficients(4)
    signs, known = ([row for pair, row in table.items() if (4 in pair) is corrupt] for corrupt in (False, True))
    inputs = [x for x in product(range(3), repeat=4) if x[3] == 2]
    for one, other in combinations(inputs, 2):
        same = views(one, signs, known, 3) == views(other, signs, known, 3)
        assert same is (sum(one[:3]) % 3 == sum(other[:3]) % 3)


def test_before_any_release_a_view_is_uniform_whatever_the_input() -> None:
    signs = [*coefficients(3).values(), [1, 0, 0], [0, 1, 0], [0, 0, 1]]  # the three self masks are unknown as well
    for x in ((0, 0, 0), (1, 0, 2), (2, 2, 2)):
        assert set(views(x, signs, [], 3).values()) == {3**6 // 27}
        assert len(views(x, signs, [], 3)) == 27


@pytest.fixture(scope="module")
def zeros() -> Round:
    """Sixteen thousand words per silo, all zero: whatever structure a mask has would show."""
    return Round(an_epoch(hidden=8192), xs={i: np.zeros(16394, dtype=np.uint32) for i in (1, 2, 3)})


def test_single_masked_words_are_uniform(zeros: Round) -> None:
    for made in zeros.made.values():
        assert looks_uniform(made.y)
        assert len(np.unique(made.y)) > 16380  # not one scalar per tensor
    assert looks_uniform(zeros.made[1].y + zeros.made[2].y)
    assert not looks_uniform(zeros.made[1].x)


def test_all_but_one_seed_and_no_consent_leave_a_vector_uniform(zeros: Round) -> None:
    headers = {i: made.header for i, made in zeros.made.items()}
    total = sum_of([made.y for made in zeros.made.values()])
    for i in (1, 2):
        place = zeros.ctx + headers[i].attempt + i.to_bytes(4, "big")
        prg.add_stream(total, keys.expand(zeros.made[i].self_seed, "gsum/1 self-mask", place), -1)
    assert looks_uniform(total)


# --- guarantee 2: no consent, no sum ----------------------------------------------------------------------------------


def test_the_number_of_consents_stands_in_the_contract_not_in_the_message(a_round: Round) -> None:
    frozen = a_round.check_freeze()
    consents = a_round.certificate(frozen).consents
    for fewer in ((), consents[:1], consents[:2], (*consents, consents[0])):
        with pytest.raises(TrustError, match="all 3 members must sign"):
            a_round.check_certificate(Certificate(round_ctx=a_round.ctx, frozen=frozen.digest, consents=fewer), frozen)


def test_one_silo_cannot_consent_for_another(a_round: Round) -> None:
    frozen = a_round.check_freeze()
    good = a_round.certificate(frozen).consents
    forged = sign(a_round.setup.parties[3].identity, type="consent", context=a_round.setup.context, sender=2,
                  body=encode(Consent(round_ctx=a_round.ctx, silo=2, frozen=frozen.digest)))  # fmt: skip
    renamed = a_round.signed(2, "consent", Consent(round_ctx=a_round.ctx, silo=1, frozen=frozen.digest))
    for raw, message in (
        (good[0], "sender 1 where sender 2"), (forged, "not by key"), (renamed, "consent of silo 2 says it is of silo 1"),
        (a_round.made[2].raw, "type header where type consent"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=message):
            a_round.check_certificate(
                Certificate(round_ctx=a_round.ctx, frozen=frozen.digest, consents=(good[0], raw, good[2])), frozen
            )


def test_a_consent_holds_for_one_set_of_one_round_of_one_epoch(a_round: Round) -> None:
    frozen = a_round.check_freeze()
    good = a_round.certificate(frozen)
    other_set = a_round.signed(2, "consent", Consent(round_ctx=a_round.ctx, silo=2, frozen=bytes(32)))
    other_round = a_round.signed(2, "consent", Consent(round_ctx=bytes(32), silo=2, frozen=frozen.digest))
    other_epoch = Round(an_epoch(name="other")).consent(2, frozen)
    for raw, message in (
        (other_set, "of silo 2 is for set 0000"), (other_round, "of silo 2 is for round 0000"), (other_epoch, "context"),
    ):  # fmt: skip
        consents = (good.consents[0], raw, good.consents[2])
        with pytest.raises(TrustError, match=message):
            a_round.check_certificate(Certificate(round_ctx=a_round.ctx, frozen=frozen.digest, consents=consents), frozen)
    with pytest.raises(TrustError, match="the certificate is for set"):
        a_round.check_certificate(Certificate(round_ctx=a_round.ctx, frozen=bytes(32), consents=good.consents), frozen)
    with pytest.raises(TrustError, match="the certificate is for round"):
        a_round.check_certificate(Certificate(round_ctx=bytes(32), frozen=frozen.digest, consents=good.consents), frozen)


# --- guarantee 3: one sum per round -----------------------------------------------------------------------------------


def test_crash_and_retrain_in_one_round_leaks_no_difference(zeros: Round) -> None:
    """Same pair keys, new attempt: y - y' holds two unknown self masks; without them it would be x - x'."""
    x = np.arange(16394, dtype=np.uint32)
    again = zeros.attempt(1, x, number=2)
    first = zeros.made[1]
    assert zeros.pair_keys(1) == zeros.pair_keys(1)
    assert again.header.pair_commitments == first.header.pair_commitments
    assert looks_uniform(again.y - first.y)
    unmasked = [
        made.y - prg.stream(keys.expand(made.self_seed, "gsum/1 self-mask", zeros.ctx + made.attempt + b"\0\0\0\1"), 16394)
        for made in (again, first)
    ]
    assert np.array_equal(unmasked[0] - unmasked[1], x), "this is what releasing both seeds would show"


def test_the_retrained_attempt_sums(a_round: Round) -> None:
    a_round.made[1] = a_round.attempt(1, np.full(26, 5, dtype=np.uint32), number=2)
    assert np.array_equal(a_round.total(), sum_of([made.x for made in a_round.made.values()]))


def test_the_seed_of_an_attempt_outside_the_set_is_not_released(a_round: Round) -> None:
    certified, again = a_round.certified(), a_round.attempt(1, a_round.made[1].x, number=2)
    assert a_round.release(1, certified)
    a_round.made[1] = again
    with pytest.raises(TrustError, match="seed of silo 1 contradicts the commitment of the attempt in the set"):
        a_round.release(1, certified)


def test_both_attempts_of_a_round_cannot_be_certified(a_round: Round, tmp_path: Path) -> None:
    """(round → digest of U) on disk before signing; and without this silo's consent nothing is certified."""
    promise = tmp_path / a_round.ctx.hex()
    first = a_round.check_freeze()
    files.write_once(promise, first.digest)
    a_round.made[1] = a_round.attempt(1, a_round.made[1].x, number=2)
    second = a_round.check_freeze()
    with pytest.raises(Equivocation):
        files.write_once(promise, second.digest)
    replayed = (a_round.consent(1, first), a_round.consent(2, second), a_round.consent(3, second))
    with pytest.raises(TrustError, match="consent of silo 1 is for set"):
        a_round.check_certificate(Certificate(round_ctx=a_round.ctx, frozen=second.digest, consents=replayed), second)


def test_a_cloned_machine_does_not_repeat_a_seed_for_another_vector() -> None:
    base = {"install_secret": bytes(32), "attempt": bytes(16), "x_digest": bytes(32), "os_random": bytes(32)}
    made = {guardian_sum.self_seed(**base)}
    for name, value in base.items():
        for bit in (0, 8 * len(value) - 1):
            changed = bytearray(value)
            changed[bit // 8] ^= 1 << bit % 8
            made.add(guardian_sum.self_seed(**{**base, name: bytes(changed)}))
    assert len(made) == 9
    for name, value in base.items():
        with pytest.raises(TrustError, match=name):
            guardian_sum.self_seed(**{**base, name: value[:-1]})


# --- guarantee 4: bound to the terms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["manifest", "round", "contract", "epoch"])
def test_a_silo_on_other_terms_yields_noise_and_is_named(what: str) -> None:
    setup, xs = an_epoch(hidden=8192), {i: np.zeros(16394, dtype=np.uint32) for i in (1, 2, 3)}
    a_round = Round(setup, xs=xs)
    assert not a_round.forced_total().any()
    elsewhere = {
        "manifest": lambda: a_round.attempt(2, xs[2], ctx=guardian_sum.round_ctx(b"another base state"), round_ctx=a_round.ctx),
        "round": lambda: Round(setup, settled=1, xs=xs).made[2],
        "contract": lambda: Round(an_epoch(hidden=8192, name="other-terms"), xs=xs).made[2],
        "epoch": lambda: Round(confirmed(3, model={"hidden_size": 8192}, number=2), xs=xs).made[2],
    }[what]()
    header = elsewhere.header
    commitment = guardian_sum.self_commitment(elsewhere.self_seed, round_ctx=a_round.ctx, attempt=elsewhere.attempt, silo=2)
    header = Header(round_ctx=a_round.ctx, silo=2, attempt=header.attempt, ledger_counter=1, dimension=16394, root=header.root,
                    self_commitment=commitment, pair_commitments=header.pair_commitments)  # fmt: skip
    a_round.made[2] = Attempt(x=xs[2], attempt=elsewhere.attempt, self_seed=elsewhere.self_seed, y=elsewhere.y, header=header,
                              raw=a_round.signed(2, "header", header))  # fmt: skip
    assert looks_uniform(a_round.forced_total())
    with pytest.raises(TrustError, match="commitments of these silos differ: 1 and 2, 2 and 3"):
        a_round.check_freeze()


def test_rounds_share_no_mask(zeros: Round) -> None:
    later = Round(zeros.setup, settled=1, xs={i: made.x for i, made in zeros.made.items()})
    for i in (1, 2, 3):
        assert looks_uniform(later.made[i].y - zeros.made[i].y)
        assert not set(later.pair_keys(i).values()) & set(zeros.pair_keys(i).values())


def test_every_stream_of_a_round_has_its_own_key(a_round: Round) -> None:
    found = []
    for i, made in a_round.made.items():
        place = a_round.ctx + made.attempt + i.to_bytes(4, "big")
        found += [keys.expand(made.self_seed, label, place) for label in ("gsum/1 self-mask", "gsum/1 self-commit")]
        upper = [key for j, key in a_round.pair_keys(i).items() if j > i]
        found += [keys.expand(key, label) for key in upper for label in ("gsum/1 mask", "gsum/1 commit")]
    assert len(set(found)) == len(found) == 12


def test_seeds_are_not_folded_all_256_bits_count() -> None:
    def masked(self_seed: bytes, pair_key: bytes) -> bytes:
        x = np.zeros(4, dtype=np.uint32)
        place = {"round_ctx": bytes(32), "silo": 1, "attempt": bytes(16)}
        return guardian_sum.mask(x, **place, self_seed=self_seed, pair_keys={2: pair_key}).tobytes()

    flips = [(1 << bit).to_bytes(32, "big") for bit in range(256)]
    made = {masked(flip, bytes(32)) for flip in [bytes(32), *flips]} | {masked(bytes(32), flip) for flip in flips}
    assert len(made) == 513


# --- the freeze -------------------------------------------------------------------------------------------------------


def assert_refused(a_round: Round, *headers: bytes, match: str, own: bytes | None = None) -> None:
    with pytest.raises(TrustError, match=match):
        a_round.check_freeze(Freeze(round_ctx=a_round.ctx, headers=headers), own)


def test_a_freeze_holds_every_member_once(a_round: Round) -> None:
    one, two, three = (made.raw for made in a_round.made.values())
    assert_refused(a_round, one, two, match="2 headers for 3 members")
    assert_refused(a_round, match="0 headers")
    assert_refused(a_round, one, one, three, match="sender 1 where sender 2")
    assert_refused(a_round, two, one, three, match="sender 2 where sender 1")
    with pytest.raises(TrustError, match="the freeze is for round 0000"):
        a_round.check_freeze(Freeze(round_ctx=bytes(32), headers=(one, two, three)))


def test_a_header_of_another_round_epoch_or_type_is_refused(a_round: Round) -> None:
    one, _, three = (made.raw for made in a_round.made.values())
    assert_refused(a_round, one, Round(a_round.setup, manifest=b"other").made[2].raw, three, match="header of silo 2 is for round")
    assert_refused(a_round, one, Round(an_epoch(name="other")).made[2].raw, three, match="context")
    assert_refused(a_round, one, a_round.consent(2, a_round.check_freeze()), three, match="type consent where type header")


@pytest.mark.parametrize(("changes", "message"), [
    ({"dimension": 25}, "header of silo 2 is for 25 words, the contract has 26"),
    ({"silo": 1}, "header of silo 2 says it is of silo 1"),
    ({"pair_commitments": ()}, r"header of silo 2 commits to pairs with \[\]"),
    ({"pair_commitments": ((1, bytes(32)), (2, bytes(32)), (3, bytes(32)))}, "header of silo 2 commits to pairs"),
    ({"pair_commitments": ((3, bytes(32)), (1, bytes(32)))}, "header of silo 2 commits to pairs"),
    ({"pair_commitments": ((1, bytes(32)), (3, bytes(32)))}, "silos differ: 1 and 2, 2 and 3"),
])  # fmt: skip
def test_a_header_that_does_not_fit_is_refused_by_name(a_round: Round, changes: dict, message: str) -> None:
    bent = a_round.attempt(2, a_round.made[2].x, ctx=a_round.ctx).header
    header = changed_header(bent, **changes)
    assert_refused(a_round, a_round.made[1].raw, a_round.signed(2, "header", header), a_round.made[3].raw, match=message)


def test_a_silo_recognises_only_the_header_it_sent(a_round: Round) -> None:
    again = a_round.attempt(1, a_round.made[1].x, number=2)
    assert a_round.check_freeze(own=a_round.made[1].raw)
    with pytest.raises(TrustError, match="another header of this silo"):
        a_round.check_freeze(own=again.raw)


def test_the_digest_of_a_set_covers_every_attempt_and_header(a_round: Round) -> None:
    digests = {a_round.check_freeze().digest}
    for i in (1, 2, 3):
        kept, a_round.made[i] = a_round.made[i], a_round.attempt(i, a_round.made[i].x, number=2)
        digests.add(a_round.check_freeze().digest)
        a_round.made[i] = kept
    assert len(digests) == 4


def test_every_flipped_byte_of_a_header_consent_or_release_is_refused(a_round: Round) -> None:
    certified = a_round.certified()
    frozen, release, one, three = certified.frozen, a_round.release(2, certified), a_round.made[1].raw, a_round.made[3].raw
    checks = (
        (a_round.made[2].raw, lambda raw: a_round.check_freeze(Freeze(round_ctx=a_round.ctx, headers=(one, raw, three)))),
        (
            a_round.consent(2, frozen),
            lambda raw: guardian_sum.check_consent(raw, a_round.members[2], frozen, epoch_ctx=a_round.setup.context),
        ),
        (release, lambda raw: a_round.open_release(raw, 2, certified)),
    )
    for raw, check in checks:
        check(raw)
        for place in range(0, len(raw), 3):
            changed = bytearray(raw)
            changed[place] ^= 1 << place % 7  # never the top bit of a text byte alone
            with pytest.raises(TrustError):
                check(bytes(changed))


# --- the release ------------------------------------------------------------------------------------------------------


def test_a_release_opens_in_its_own_round_set_and_sender_only(a_round: Round) -> None:
    certified = a_round.certified()
    again = Round(a_round.setup)
    again.made[3] = again.attempt(3, again.made[3].x, number=2)
    places = {"here": (a_round, certified), "attempt": (again, again.certified())}
    later = Round(a_round.setup, settled=1, manifest=b"round 2")
    other = Round(an_epoch(name="other"))
    places |= {"round": (later, later.certified()), "epoch": (other, other.certified())}
    releases = {(name, i): place.release(i, set_) for name, (place, set_) in places.items() for i in (1, 2, 3)}
    for (name, sender), raw in releases.items():
        for where, (place, set_) in places.items():
            for reader in (1, 2, 3):
                if (name, sender) == (where, reader):
                    assert place.open_release(raw, reader, set_) == place.made[reader].self_seed
                    continue
                with pytest.raises(TrustError, match=r"sender|context|is for round|is for set"):
                    place.open_release(raw, reader, set_)


def test_a_sealed_seed_moved_into_another_signed_release_does_not_open(a_round: Round) -> None:
    certified, later = a_round.certified(), Round(a_round.setup, settled=1, manifest=b"round 2")
    stranger = guardian_sum.seal_release(later.certified(), silo=2, self_seed=later.made[2].self_seed, seal_key=HUB.public.seal_key)
    neighbour = guardian_sum.seal_release(certified, silo=1, self_seed=a_round.made[1].self_seed, seal_key=HUB.public.seal_key)
    for sealed in (stranger.sealed, neighbour.sealed, b""):
        moved = Release(round_ctx=a_round.ctx, silo=2, frozen=certified.frozen.digest, sealed=sealed)
        with pytest.raises(TrustError, match="does not open as 'gsum/1 release'"):
            a_round.open_release(a_round.signed(2, "release", moved), 2, certified)


def test_a_seed_that_contradicts_the_commitment_is_refused_by_name(a_round: Round) -> None:
    certified = a_round.certified()
    info = b"gsum/1 release\0" + a_round.ctx + certified.frozen.digest + b"\0\0\0\2"
    for wrong in (bytes(32), a_round.made[1].self_seed, a_round.made[2].self_seed + b"\0", b""):
        sealed = seal(HUB.public.seal_key, wrong, info=info)
        lie = Release(round_ctx=a_round.ctx, silo=2, frozen=certified.frozen.digest, sealed=sealed)
        with pytest.raises(TrustError, match="seed of silo 2 contradicts"):
            a_round.open_release(a_round.signed(2, "release", lie), 2, certified)


def test_a_silo_outside_the_set_releases_nothing(a_round: Round) -> None:
    with pytest.raises(TrustError, match="silo 4 is not in the set"):
        guardian_sum.seal_release(a_round.certified(), silo=4, self_seed=bytes(32), seal_key=HUB.public.seal_key)


# --- guarantee 5: the right sum, or a name ----------------------------------------------------------------------------


def test_every_changed_vector_or_seed_is_named(a_round: Round) -> None:
    certified = a_round.certified()
    vectors, seeds = ({i: getattr(made, name) for i, made in a_round.made.items()} for name in ("y", "self_seed"))
    for silo, place in product((1, 2, 3), (0, 13, 25)):
        changed = vectors[silo].copy()
        changed[place] ^= 1 << (31 - place)
        with pytest.raises(TrustError, match=f"masked vector of silo {silo} does not match the root"):
            guardian_sum.unmask({**vectors, silo: changed}, seeds, certified)
    for wrong, message in (
        (vectors[2][:-1], "silo 2 does not match"), (vectors[2].astype(np.int64), "silo 2 is int64"),
        (vectors[1], "silo 2 does not match"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=message):
            guardian_sum.unmask({**vectors, 2: wrong}, seeds, certified)
    with pytest.raises(TrustError, match="seed of silo 2 contradicts"):
        guardian_sum.unmask(vectors, {**seeds, 2: seeds[1]}, certified)


def test_vectors_and_seeds_are_those_of_the_set(a_round: Round) -> None:
    certified = a_round.certified()
    vectors, seeds = ({i: getattr(made, name) for i, made in a_round.made.items()} for name in ("y", "self_seed"))
    for some, other in (({1: vectors[1]}, seeds), (vectors, {1: seeds[1], 2: seeds[2]}), ({**vectors, 4: vectors[1]}, seeds)):
        with pytest.raises(TrustError, match=r"for a set of \[1, 2, 3\]"):
            guardian_sum.unmask(some, other, certified)


def test_a_partial_unmask_is_refused_and_would_open_nothing() -> None:
    """Two vectors and seeds of three: refused at every door; and where code forgets to refuse, the third one's pair masks stay."""
    zeros = Round(an_epoch(hidden=8192), xs={i: np.zeros(16394, dtype=np.uint32) for i in (1, 2, 3)})
    certified = zeros.certified()
    vectors, seeds = ({i: getattr(zeros.made[i], name) for i in (1, 2)} for name in ("y", "self_seed"))
    with pytest.raises(TrustError, match=r"vectors of silos \[1, 2\] for a set of \[1, 2, 3\]"):
        guardian_sum.unmask(vectors, seeds, certified)
    with pytest.raises(TrustError):
        zeros.check_freeze(Freeze(round_ctx=zeros.ctx, headers=zeros.freeze().headers[:2]))
    headers = {i: zeros.made[i].header for i in (1, 2)}
    forgetful = Certified(frozen=Frozen(round_ctx=zeros.ctx, digest=bytes(32), headers=headers))
    assert looks_uniform(guardian_sum.unmask(vectors, seeds, forgetful))
    two = vectors[1] + vectors[2]
    with pytest.raises(TrustError, match="for a set of"):
        guardian_sum.check_total(two, vectors, seeds, certified.frozen)
    everyones, all_seeds = {**vectors, 3: zeros.made[3].y}, {**seeds, 3: zeros.made[3].self_seed}
    with pytest.raises(TrustError, match="is not the sum of the vectors"):
        guardian_sum.check_total(two, everyones, all_seeds, certified.frozen)
    with pytest.raises(TrustError):  # nobody releases a seed for the set without the third: there is no certificate for it
        zeros.check_certificate(zeros.certificate(certified.frozen), forgetful.frozen)


def test_an_upload_opens_in_its_own_round_attempt_and_silo_only(a_round: Round) -> None:
    def opened(made: Attempt, *, data: bytes | None = None, beside: bytes | None = None, **place) -> np.ndarray:
        info = guardian_sum.upload_info(**{"round_ctx": a_round.ctx, "silo": 2, "header": made.raw, **place})
        sealed = seal(HUB.public.seal_key, made.y.tobytes() if data is None else data, info=info)
        return guardian_sum.open_upload(Upload(header=beside or made.raw, sealed=sealed), made.header, seal_seed=HUB.receive_seed)

    made, again = a_round.made[2], a_round.attempt(2, a_round.made[2].x, number=2)
    assert np.array_equal(opened(made), made.y)
    for place in ({"round_ctx": bytes(32)}, {"silo": 1}, {"header": again.raw}, {"beside": again.raw}):
        with pytest.raises(TrustError, match="does not open as 'gsum/1 upload'"):
            opened(made, **place)
    for data, message in ((made.y.tobytes()[:-1], "103 bytes"), (b"", "0 bytes"), (a_round.made[1].y.tobytes(), "match the root")):
        with pytest.raises(TrustError, match=message):
            opened(made, data=data)


def test_a_release_of_another_round_for_the_same_set_is_refused(a_round: Round) -> None:
    certified = a_round.certified()
    made = guardian_sum.seal_release(certified, silo=2, self_seed=a_round.made[2].self_seed, seal_key=HUB.public.seal_key)
    moved = Release(round_ctx=bytes(32), silo=2, frozen=made.frozen, sealed=made.sealed)
    with pytest.raises(TrustError, match="release of silo 2 is for round 0000"):
        a_round.open_release(a_round.signed(2, "release", moved), 2, certified)


class FromDisk(Mapping[int, np.ndarray]):
    """Vectors read when they are asked for; remembers how often, and how many were alive at once."""

    def __init__(self, vectors: dict[int, np.ndarray]) -> None:
        self.kept = {i: vector.tobytes() for i, vector in vectors.items()}
        self.given: list[weakref.ref[np.ndarray]] = []
        self.most = 0

    def __getitem__(self, silo: int) -> np.ndarray:
        vector = np.frombuffer(self.kept[silo], dtype="<u4").copy()
        self.given.append(weakref.ref(vector))
        self.most = max(self.most, sum(reference() is not None for reference in self.given))
        return vector

    def __iter__(self) -> Iterator[int]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def test_unmasking_holds_few_vectors_and_checks_seeds_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merkle, "THREADS", 1)
    a_round = Round(an_epoch(6))
    certified, seeds = a_round.certified(), {i: made.self_seed for i, made in a_round.made.items()}
    on_disk = FromDisk({i: made.y for i, made in a_round.made.items()})
    total = guardian_sum.unmask(on_disk, seeds, certified)
    assert np.array_equal(total, sum_of([made.x for made in a_round.made.values()]))
    assert len(on_disk.given) == 6
    assert on_disk.most <= 3  # one that is added, one that is hashed, one that is read
    on_disk.given.clear()
    with pytest.raises(TrustError, match="seed of silo 6"):
        guardian_sum.unmask(on_disk, {**seeds, 6: bytes(32)}, certified)
    assert not on_disk.given


def test_a_silo_that_masks_otherwise_than_it_committed_destroys_the_sum_anonymously() -> None:
    """The documented limit: every check passes, the sum is noise, nobody is named, nothing is learned."""
    xs = {i: np.zeros(16394, dtype=np.uint32) for i in (1, 2, 3)}
    a_round = Round(an_epoch(hidden=8192), xs=xs)
    made = a_round.made[2]
    y = made.y + prg.stream(bytes(32), 16394)
    header = changed_header(made.header, root=guardian_sum.vector_root(y))
    a_round.made[2] = Attempt(x=made.x, attempt=made.attempt, self_seed=made.self_seed, y=y, header=header,
                              raw=a_round.signed(2, "header", header))  # fmt: skip
    assert looks_uniform(a_round.total())


# --- what stands in clear ---------------------------------------------------------------------------------------------


def test_a_header_holds_digests_and_commitments_and_no_count_or_loss(a_round: Round) -> None:
    assert set(Header.__struct_fields__) == {
        "round_ctx", "silo", "attempt", "ledger_counter", "dimension", "root", "self_commitment", "pair_commitments", "bundles",
    }  # fmt: skip
    made = a_round.made[1]
    for secret in (made.self_seed, made.x.tobytes()[:16], *a_round.pair_keys(1).values()):
        assert secret not in made.raw
    assert decode(encode(made.header), Header) == made.header


def test_a_header_says_nothing_about_an_equal_vector(a_round: Round) -> None:
    """Two attempts on one x share no public value but the pair commitments: equality of x cannot be seen."""
    one, two = a_round.made[1].header, a_round.attempt(1, a_round.made[1].x, number=2).header
    assert one.root != two.root
    assert one.self_commitment != two.self_commitment


def test_a_release_message_shows_no_seed(a_round: Round) -> None:
    certified = a_round.certified()
    assert a_round.made[1].self_seed not in a_round.release(1, certified)
    assert len({a_round.release(1, certified) for _ in range(3)}) == 3
