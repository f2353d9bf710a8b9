# SPDX-License-Identifier: Apache-2.0
"""The checker of tests/views.py over what the real guardian code does: guardians.guardian_round with its promises on a real disk.

For each honest guardian every set that a server can have proposed to it, and then a certificate for every set, whether or not
that certificate could exist; after a restart also a second proposal. What it endorses and gives away is read from the documents
that it posts. All strategies of the server over all guardians follow from these answers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from itertools import combinations_with_replacement, product

import pytest

from privacy import envelope, federation
from privacy.errors import SiloquyError
from privacy.messages import Certificate, Endorsement, Manifest, Signed, Upload, decode, encode
from privacy.secure_sum import guardian_sum, shares
from privacy.secure_sum.freeze import Certified
from silo.guardians.guardian_round import Epoch, Post, Round
from silo.guardians.vows import Vows
from silo.home import Home
from tests.sharing import HUB, ShareRound, build_epoch, payload_of, share_terms
from tests.views import Vector, is_one_sum_of, learned, opened, release_of, sets

NUMBER = 1


class Served:
    """What a server shows one guardian, by slot; what it posts is kept."""

    def __init__(self, documents):
        self.documents, self.posted = dict(documents), {}

    def get(self, kind, number, party, *, wait_s):
        return self.documents.get((kind, party))

    def put(self, kind, number, party, data):
        assert self.posted.setdefault(kind, data) == data


class Shown:
    """One round with real keys and documents, and everything that a server can make of it.

    The last guardian is corrupt: what it signs is the server's to choose, so its list names any set.
    """

    def __init__(self, silos: int, guardians: int, *, corrupt: int = 1, dropouts: int = 2):
        raw = share_terms(silos, guardians, corrupt=corrupt, dropouts=dropouts, seal_key=HUB.public.seal_key.hex())
        self.setup = build_epoch(federation.parse(raw), range(1, silos + 1))
        terms = self.setup.accepted.terms
        self.silos, self.quorum, self.corrupt = silos, terms.quorum, corrupt
        self.manifest = Manifest(
            epoch_ctx=self.setup.context, epoch=1, round=NUMBER, previous=bytes(32), base_state=bytes(32),
            dimension=terms.dimension, ring_bits=32, lattice_bits=1, clamp=1, opened_at=0, deadline_at=100,
        )  # fmt: skip
        self.round = ShareRound(self.setup, manifest=encode(self.manifest))
        *self.honest, self.lying = self.round.guardians
        self.sets = sets(silos, terms.fewest)
        self._frozen, self._certificates = {}, {}
        self.uploads = {
            ("upload", i): self.round.signed(i, "upload", Upload(header=made.raw, sealed=b"", bundles=made.bundles))
            for i, made in self.round.made.items()
        }

    @functools.cached_property
    def full_lists(self) -> dict[int, bytes]:
        return {guardian: self.round.list_of(guardian) for guardian in self.honest}

    def frozen(self, chosen):
        """(document, verified) of the freeze that proposes this set: the corrupt guardian lists these silos alone."""
        if chosen not in self._frozen:
            self._frozen[chosen] = self.make_frozen(chosen)
        return self._frozen[chosen]

    def make_frozen(self, chosen):
        lists = dict(itertools.islice(self.full_lists.items(), self.quorum - 1))
        lists[self.lying] = self.round.list_of(self.lying, only=chosen)
        made = self.round.choose(lists)
        assert made is not None
        return self.by_hub("freeze", made), self.round.check_freeze(made)

    def certificate(self, chosen) -> bytes:
        if chosen not in self._certificates:
            self._certificates[chosen] = self.by_hub("certificate", self.round.certificate(self.frozen(chosen)[1]))
        return self._certificates[chosen]

    def by_hub(self, kind, message) -> bytes:
        return envelope.sign(HUB, type=kind, context=self.setup.context, sender=0, body=encode(message))

    def guardian(self, home, guardian, documents) -> tuple[Round, Served]:
        served, guard = Served({**self.uploads, **documents}), self.setup.guards[guardian]
        post = Post(
            transport=served, identity=guard.identity, accepted=self.setup.accepted,
            party=self.round.guardians[guardian], vows=Vows(home), told=lambda _: None,
        )  # fmt: skip
        epoch = Epoch(number=1, context=self.setup.context, silos=self.setup.silos, secrets=guard.secrets)
        return Round(post, epoch, self.manifest, self.round.ctx, lambda: 1.0), served

    def answers(self, home, guardian, *documents) -> tuple[set[frozenset[int]], set[frozenset[int]]]:
        """(sets endorsed, sets whose secrets were given away) after being shown these documents, one restart between each."""
        endorsed, given = set(), set()
        for shown in documents:
            machine, served = self.guardian(home, guardian, shown)
            with contextlib.suppress(SiloquyError):
                machine.step()
            if (raw := served.posted.get("endorsement")) is not None:
                endorsed.add(self.named(decode(decode(raw, Signed).body, Endorsement).frozen))
            if (raw := served.posted.get("shares")) is not None:
                given.add(self.given(guardian, raw))
        return endorsed, given

    def named(self, digest: bytes) -> frozenset[int]:
        return next(chosen for chosen in self.sets if self.frozen(chosen)[1].digest == digest)

    def given(self, guardian, raw) -> frozenset[int]:
        """The set whose secrets these shares are: they open for it, and are exactly the page's places."""
        stated = decode(decode(raw, Signed).body, shares.Shares)
        chosen = self.named(stated.frozen)
        certified = Certified(frozen=self.frozen(chosen)[1])
        released = self.round.open_shares(raw, guardian, certified)
        places = shares.places(certified.frozen)
        assert set(places) == release_of(chosen, self.silos)
        assert len(released.shares) == len(places)
        assert len(payload_of(self.round, raw, certified, guardian)) == shares.release_bytes(certified.frozen) - 1136
        return chosen

    def shown(self, chosen, certified=None) -> dict:
        documents = {("freeze", 0): self.frozen(chosen)[0]}
        if certified is not None:
            documents["certificate", 0] = self.certificate(certified)
        return documents

    def leaks(self, released, certified_sets, colluder: int | None = None) -> bool:
        """Whether the server learns anything but one sum of a certified set, less what a colluding silo knows."""
        vectors = [Vector(i) for i in range(1, self.silos + 1)]
        given = opened([release_of(chosen, self.silos) for chosen in released], quorum=self.quorum, corrupt=self.corrupt)
        secrets = {(0, 0, secret) for secret in given}
        if colluder is not None:
            secrets |= {(0, 0, (colluder, 0))}
            secrets |= {(0, 0, (min(colluder, j), max(colluder, j))) for j in range(1, self.silos + 1) if j != colluder}
        images = learned(vectors, secrets, self.silos)
        honest = [{v: c for v, c in image.items() if v.silo != colluder} for image in images]
        allowed = {frozenset(Vector(i) for i in chosen if i != colluder) for chosen in certified_sets}
        return not is_one_sum_of([image for image in honest if image], allowed)


@pytest.fixture(scope="module", params=[(5, 5), (5, 4)], ids=["five-guardians", "four-guardians"])
def shown(request):
    return Shown(*request.param)


def home_in(path, number) -> Home:
    return Home.create(path / str(number))


@pytest.fixture(scope="module")
def table(shown, tmp_path_factory):
    """What an honest guardian does when it is shown one set and then a certificate for another: for all pairs of sets."""
    root, numbers = tmp_path_factory.mktemp("homes"), itertools.count()
    guardian = shown.honest[0]
    return {
        (first, second): shown.answers(home_in(root, next(numbers)), guardian, shown.shown(first), shown.shown(first, second))
        for first, second in product(shown.sets, shown.sets)
    }


def test_a_guardian_endorses_what_it_was_shown_first_and_releases_for_that_set_alone(shown, table):
    for (first, second), (endorsed, given) in table.items():
        assert endorsed == {first}
        assert given == ({first} if second == first else set())


def test_after_a_second_proposal_a_guardian_stands_by_its_first(shown, tmp_path):
    numbers = itertools.count()
    shifted = [(at, (at + by) % len(shown.sets)) for at in range(len(shown.sets)) for by in (1, 5, 7)]
    for first, second in ((shown.sets[one], shown.sets[other]) for one, other in shifted):
        documents = (shown.shown(first), shown.shown(second), shown.shown(second, second), shown.shown(first, first))
        endorsed, given = shown.answers(home_in(tmp_path, next(numbers)), shown.honest[1], *documents)
        assert endorsed == {first}
        assert given <= {first}


def certifiable(shown, views) -> list[frozenset[int]]:
    """Sets that reach the quorum when honest guardians endorse ``views`` and corrupt ones everything."""
    return [chosen for chosen in shown.sets if views.count(chosen) + shown.corrupt >= shown.quorum]


def test_no_strategy_of_the_server_learns_more_than_one_sum_of_a_certified_set(shown, table):
    """All assignments of first proposals to honest guardians, the corrupt one's help, and any one silo's."""
    strategies = 0
    for views in combinations_with_replacement([None, *shown.sets], len(shown.honest)):
        strategies += 1
        certified = certifiable(shown, views)
        assert len(certified) <= 1, "two sets of one round are never certified"
        released = [given for view in views if view for chosen in certified for given in table[view, chosen][1]]
        for colluder in (None, *range(1, shown.silos + 1)):
            assert not shown.leaks(released, certified, colluder), (views, colluder)
    assert strategies > 900


def test_negative_control_a_guardian_that_needs_no_certificate_fails_the_checker(tmp_path, monkeypatch):
    shown = Shown(5, 4)
    monkeypatch.setattr(guardian_sum, "check_certificate", lambda certificate, frozen, **_: Certified(frozen=frozen))
    none = Certificate(round_ctx=shown.round.ctx, frozen=bytes(32), consents=())
    given = {}
    for number, chosen in enumerate(shown.sets):
        documents = shown.shown(chosen) | {("certificate", 0): shown.by_hub("certificate", none)}
        given[chosen] = shown.answers(home_in(tmp_path, number), shown.honest[0], documents)[1]
    assert all(given.values()), "it gives away shares for whatever it is shown"
    leaks = [
        views for views in combinations_with_replacement(shown.sets, len(shown.honest))
        if shown.leaks([each for view in views for each in given[view]], shown.sets)
    ]  # fmt: skip
    assert len(leaks) == 10, "the strategies that a certificate prevents"


def test_negative_control_a_guardian_that_was_put_back_fails_the_checker(tmp_path):
    """T corrupt guardians are at the limit; one more that forgets what it promised gives two certificates."""
    shown = Shown(5, 4)
    first, second = frozenset({1, 2, 3}), frozenset({3, 4, 5})
    back = shown.honest[0]
    one = shown.answers(home_in(tmp_path, 1), back, shown.shown(first), shown.shown(first, first))
    two = shown.answers(home_in(tmp_path, 2), back, shown.shown(second), shown.shown(second, second))
    assert (one, two) == (({first}, {first}), ({second}, {second})), "the second home knows nothing of the first"
    # guardians: back (twice), one that saw the first, one that saw the second, and the corrupt one
    views = [first, second, first, second]
    certified = certifiable(shown, views)
    assert set(certified) == {first, second}
    assert shown.leaks(views, certified)


def test_two_attempts_of_one_silo_open_only_the_one_in_the_set(tmp_path):
    """The pair streams of both are the same; of the attempt outside the set no seed is ever given away."""
    shown = Shown(5, 5)
    chosen = frozenset({1, 2, 3, 4, 5})
    vectors = [Vector(i) for i in range(1, 6)] + [Vector(1, attempt=1)]
    secrets = [(0, 0, secret) for secret in opened([release_of(chosen, 5)] * 4, quorum=4, corrupt=1)]
    images = learned(vectors, secrets, 5)
    assert is_one_sum_of(images, {frozenset(Vector(i) for i in chosen)})
    second = shown.round.attempt(1, number=2)
    guard = shown.setup.guards[shown.honest[0]]
    received = shown.round.received(guard.id)
    received[1] = shares.receive(second.upload, second.header, guardian=guard.id, seal_seed=guard.secrets.seal_seed)
    certified = Certified(frozen=shown.frozen(chosen)[1])
    with pytest.raises(SiloquyError) as caught:
        shares.release(certified, received, guardian=guard.id, seal_key=HUB.public.seal_key)
    assert caught.value.code == "no-bundle"


def test_two_manifests_of_one_number_share_no_stream_and_a_guardian_acts_in_one(tmp_path):
    home = home_in(tmp_path, 1)
    vows = Vows(home)
    vows.bind(1, b"a" * 32)
    with pytest.raises(SiloquyError):
        vows.bind(1, b"b" * 32)
    # both manifests' vectors of all silos, and a whole release for one of them: still one sum
    vectors = [Vector(i, manifest=m) for i in range(1, 6) for m in (0, 1)]
    chosen = frozenset({1, 2, 3})
    images = learned(vectors, [(0, 0, s) for s in opened([release_of(chosen, 5)] * 4, quorum=4, corrupt=1)], 5)
    assert is_one_sum_of(images, {frozenset(Vector(i) for i in chosen)})


def test_a_guardian_that_closed_says_nothing_more(tmp_path):
    shown, chosen = Shown(5, 5), frozenset({1, 2, 3, 4})
    home = home_in(tmp_path, 1)
    machine, served = shown.guardian(home, shown.honest[0], {})
    machine._clock = lambda: 1e9
    machine.step()
    assert "close" in served.posted
    assert shown.answers(home, shown.honest[0], shown.shown(chosen), shown.shown(chosen, chosen)) == (set(), set())


def test_a_dealer_of_rubbish_is_named_and_opens_nothing():
    shown = Shown(5, 5)
    round_ = shown.round
    lie = {peer: bytes([peer]) * 32 for peer in (2,)}
    round_.made[1] = round_.attempt(1, lie=lie)
    made = round_.choose({g: round_.list_of(g) for g in round_.guardians})
    assert dict(made.left_out) == {1: "mismatch", 2: "mismatch"}, "who of the two lies cannot be told: both are out, nobody else"
