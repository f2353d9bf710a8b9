# SPDX-License-Identifier: Apache-2.0
"""A whole federation in one process: what it reaches, what its aggregator sees, what it refuses, and that it survives its power."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import time

import msgspec
import numpy as np
import pytest

import silo.round
from aggregator import admission
from privacy import envelope, prg
from privacy.dp.budget import Limits
from privacy.errors import (
    BudgetExhausted,
    ConfigError,
    Equivocation,
    MachineError,
    RoundError,
    SiloquyError,
    TrustError,
)
from privacy.federation import parse
from privacy.identity import keys
from privacy.identity.keys import expand, u32
from privacy.messages import (
    AGGREGATOR,
    AGGREGATOR_KINDS,
    KINDS,
    Acknowledgement,
    Outcome,
    PairSeeds,
    decode,
    encode,
)
from privacy.secure_sum import guardian_sum
from silo import membership, session
from silo.home import Home
from silo.round import Rounds
from silo.upload import Persisted
from tests.federation import upload_of
from tests.whole import BASIS, MOST_STRIDE, PATIENCE_S, SILOS, Power, PowerCut, View, Whole, flips, stride, together

REFUSALS = (TrustError, RoundError)  # Replay and Equivocation are TrustErrors


@pytest.fixture(scope="module", autouse=True)
def _quick_polls():
    """A silo looks again after 50 ms and not after five seconds; what it does then is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("silo.round.POLL_S", 0.05)
        patch.setattr("silo.participation.POLL_S", 0.05)
        yield


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
        upload = upload_of(whole.store.get("upload", number, member.id))
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
        assert caught.value.code == "contract-superseded"
        whole.wait_for("epoch-note", 1, 1, 2)
        whole.clock.skip(1e4)

    def honest(silo):
        with pytest.raises(RoundError, match="the roster of epoch 1"):
            enter_epoch(whole, silo, 1, wait_s=0.5)

    def waiting():
        with pytest.raises(RoundError, match=r"no epoch-note 1 from silos \[3\]"):
            whole.coordinate(1)

    together(strange, waiting, *(functools.partial(honest, s) for s in (1, 2)))
    assert whole.store.latest("manifest") is None


def enter_epoch(whole, silo, number, *, basis=BASIS, wait_s=PATIENCE_S, line=None):
    whole.wait_for("epoch", number, AGGREGATOR)
    with whole.silo(silo, line=line) as running:
        p, settled = running.parts, whole.progress(silo).round
        return session.establish(
            p.home, p.transport, p.identity, p.accepted, member=p.member, number=number, basis=basis, settled=settled, wait_s=wait_s
        )


def test_a_silo_with_another_base_model_stops_the_epoch_by_name(whole):
    def enter(silo):
        with pytest.raises(RoundError, match="the roster of epoch 1"):
            enter_epoch(whole, silo, 1, basis=b"o" * 32 if silo == 3 else BASIS, wait_s=0.5)

    def hub():
        with pytest.raises(TrustError, match=r"silos \[1, 2\] have .* silos \[3\] have") as caught:
            whole.coordinate(1)
        assert caught.value.code == "basis-differs"

    together(hub, *(functools.partial(enter, s) for s in SILOS))
    assert whole.store.latest("manifest") is None


def test_a_silo_that_computes_otherwise_stops_the_federation_and_is_named(ran):
    training = msgspec.structs.replace(ran.accepted.terms.training, learning_rate=0.5)
    other = msgspec.structs.replace(ran.accepted, terms=msgspec.structs.replace(ran.accepted.terms, training=training))

    def strange():
        with ran.silo(3, accepted=other) as running, pytest.raises(TrustError) as caught:
            Rounds(running.parts, session.current(running.home)).take_part(wait_s=PATIENCE_S)
        assert caught.value.code == "state-differs"
        ran.wait_for("acknowledgement", 2, 1, 2)
        ran.clock.skip(1e4)

    def hub():
        with pytest.raises(RoundError, match=r"no acknowledgement 2 from silos \[3\]"):
            ran.coordinate(2)

    together(hub, strange, *(functools.partial(ran.take_part, s, 2) for s in (1, 2)))
    assert ran.progress(3).round == 1


# --- Missing silos ------------------------------------------------------------------------------------------------------------


def void_round(whole, number, absent=3):
    """Run a round in which one silo stays away until the deadline passed."""
    there = [s for s in SILOS if s != absent]

    def hurry():
        whole.wait_for("upload", number, *there)
        whole.clock.skip(100.0)

    *settled, closed, _ = together(
        *(functools.partial(whole.take_part, s, number) for s in there), functools.partial(whole.coordinate, number), hurry
    )
    return settled, closed


def test_a_missing_silo_closes_the_round_as_void_budget_charged_and_the_next_works(ran):
    before = ran.progress(1).state.digest
    settled, closed = void_round(ran, 2)
    assert [(c.kind, c.reason) for c in closed] == [("void", "absent")]
    assert {s[0].kind for s in settled} == {"void"}
    assert closed[0].state == before, "nothing moved"
    assert not [k for k in ("freeze", "consent", "certificate", "release") if ran.store.parties(k, 2)]
    assert [len(ran.attempts(s, 2)) for s in SILOS] == [1, 1, 0], "charged where something left, and only there"
    settled, closed = ran.run(3)
    assert closed[-1].kind == "result"
    assert [s.kind for s in settled[3]] == ["void", "result"], "the absent silo settles the void round without spending"
    assert ran.attempts(3, 2) == []
    assert {ran.progress(s).state.digest for s in SILOS} == {closed[-1].state}


def test_too_many_void_rounds_stop_every_silo_and_the_coordinator_at_the_same_round(ran):
    void_round(ran, 2)

    def last_allowed(silo):
        with pytest.raises(RoundError, match="2 rounds in a row were void"):
            ran.take_part(silo, 3)

    def hurry():
        ran.wait_for("upload", 3, 1, 2)
        ran.clock.skip(100.0)

    def hub():
        with pytest.raises(RoundError, match="2 rounds in a row were void"):
            ran.coordinate(3)

    # Without silo 3's cosignature round 3 would not even be opened: it signs the log and then sends nothing.
    together(hub, hurry, *(functools.partial(last_allowed, s) for s in (1, 2)), functools.partial(ran.cosign, 3, 3))
    spent = [ran.history(s).counter for s in SILOS]
    for stopped in (1, 2):
        with pytest.raises(RoundError, match="2 rounds in a row were void"):
            ran.take_part(stopped, 4)
    assert [ran.history(s).counter for s in SILOS] == spent, "a silo that stopped spends nothing"
    with pytest.raises(RoundError, match="2 rounds in a row were void"):
        ran.coordinate(4)
    assert ran.store.latest("manifest") == 3


# --- The gate -------------------------------------------------------------------------------------------------------------------


def test_the_gate_refuses_before_any_record_is_read_and_the_round_is_void(ran):
    with ran.silo(1) as running:
        spent, after = running.gate.spent().epsilon, running.gate.forecast([1])[0][1]

    def reads(state):
        raise AssertionError("a record was read")

    def full():
        limits = Limits(epsilon=(spent + after) / 2, delta=1e-5)
        with pytest.raises(BudgetExhausted, match="round 2 would bring epsilon to"):
            ran.take_part(1, 2, limits=limits, contribute=reads)
        ran.wait_for("upload", 2, 2, 3)
        ran.clock.skip(100.0)

    entries = ran.history(1).counter
    *_, closed = together(full, *(functools.partial(ran.take_part, s, 2) for s in (2, 3)), functools.partial(ran.coordinate, 2))
    assert [c.kind for c in closed] == ["void"]
    assert ran.history(1).counter == entries
    assert Home(ran.root / "silo-1").promised_manifest(2) is None
    assert ran.store.parties("upload", 2) == (2, 3)


def test_a_plan_beyond_the_limit_is_refused_before_it_starts(whole):
    with pytest.raises(BudgetExhausted, match="the plan of 10 steps"):
        whole.silo(1, limits=Limits(epsilon=0.01, delta=1e-5))
    assert whole.history(1).counter == 1, "only the first entry"


# --- Replays, swaps and flipped bits ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(made, tmp_path_factory):
    """The federation, and its documents of a set-up and two rounds in the order in which they came."""
    whole = made.copied(tmp_path_factory.mktemp("logged") / "federation")
    slots = [("contract", 1, AGGREGATOR), *(("countersignature", 1, s) for s in SILOS)]
    first = [(slot, whole.store.get(*slot)) for slot in slots]
    whole.run(2)
    return whole, first + whole.store.log


def member_documents(log):
    """(place, slot, document) of everything that a member wrote."""
    return [(place, slot, data) for place, (slot, data) in enumerate(log) if slot[0] not in AGGREGATOR_KINDS]


def test_every_member_document_is_admitted_where_it_stood(logged):
    _, log = logged
    found = member_documents(log)
    for place, slot, data in found:
        admission.admit(*slot, data, View(log[:place]))
    assert {slot[0] for _, slot, _ in found} == {
        "countersignature", "epoch-note", "pair-seeds", "confirmation", "upload", "consent", "release", "acknowledgement",
        "cosignature",
    }  # fmt: skip


def test_no_other_document_is_admitted_into_a_members_slot(logged):
    """Every document ever written, of every kind, round and silo, offered to every slot when it was open: only its own fits."""
    _, log = logged
    tried = 0
    for place, slot, own in member_documents(log):
        view = View(log[:place])
        for other_slot, other in log:
            if other_slot != slot:
                assert other != own
                tried += 1
                with pytest.raises(REFUSALS):
                    admission.admit(*slot, other, view)
    assert tried > 1000


def test_a_members_document_fits_no_other_number_or_party(logged):
    _, log = logged
    view = View(log)
    for _, (kind, number, party), data in member_documents(log):
        others = [(number + 1, party), (number - 1, party), *((number, s) for s in (0, *SILOS, 4) if s != party)]
        for other in others:
            with pytest.raises(REFUSALS):
                admission.admit(kind, *other, data, view)


def test_a_flipped_bit_in_a_members_document_is_refused_at_the_door(logged):
    _, log = logged
    seen: dict[str, int] = {}
    for place, (kind, number, party), data in member_documents(log):
        view = View(log[:place])
        for changed in flips(data):
            seen[kind] = seen.get(kind, 0) + 1
            with pytest.raises(REFUSALS):
                admission.admit(kind, number, party, changed, view)
    assert all(count > 5 for count in seen.values()), seen


def test_an_upload_that_does_not_open_closes_the_round_before_anybody_consents(ran):
    """Only the silo itself can make one: the door refuses it without the silo's signature."""
    line, identity = ran.line(), keys.load(Home(ran.root / "silo-3").identity_path)
    put = line.put

    def altered(kind, number, party, data):
        if kind == "upload":
            upload, context = upload_of(data), decode(data, envelope.Signed).context
            garbage = msgspec.structs.replace(upload, sealed=upload.sealed[:-1] + bytes([upload.sealed[-1] ^ 1]))
            data = envelope.sign(identity, type="upload", context=context, sender=party, body=encode(garbage))
        put(kind, number, party, data)

    line.put = altered

    def hub():
        with pytest.raises(TrustError):
            ran.coordinate(2)

    def third():
        with pytest.raises(TrustError, match="for the upload 2 of party 3, here it was"):  # its own receipt finds it out too
            ran.take_part(3, 2, line=line)

    settled = together(*(functools.partial(ran.take_part, s, 2) for s in (1, 2)), third, hub)
    assert [s[0].kind for s in settled[:2]] == ["void"] * 2
    assert settled[0][0].reason.startswith("refused")
    assert not ran.store.parties("consent", 2)


@pytest.fixture(scope="module")
def stalled(ready, tmp_path_factory):
    """Round 2 stands complete on the board; silo 1 lost its power when it was to read the outcome. With all documents."""
    log = [
        (slot, data)
        for kind in (*KINDS[2:],)
        for slot in ((kind, 1, AGGREGATOR if kind in AGGREGATOR_KINDS else 2),)
        if (data := ready.store.get(*slot)) is not None
    ]
    whole = ready.copied(tmp_path_factory.mktemp("stalled") / "federation")
    line = whole.line()

    def cut(slot, data):
        if slot == ("outcome", 2, AGGREGATOR) and whole.store.entry("release", 2, 1) is not None:
            raise PowerCut
        return data

    line.alter = cut

    def falls():
        with pytest.raises(PowerCut):
            whole.take_part(1, 2, line=line)

    def hub():
        with whole.coordinator() as coordinator, pytest.raises(RoundError, match="no acknowledgement"):
            coordinator.run_round(2)

    def late():
        whole.wait_for("acknowledgement", 2, 2, 3)
        whole.clock.skip(1e4)

    together(falls, hub, late, *(functools.partial(whole.take_part, s, 2) for s in (2, 3)))
    return whole, log + whole.store.log


def take_part_shown(whole, slot, data):
    """What silo 1 does when it is shown ``data`` in ``slot``; everything else is as it stands.

    It is not shown the outcome with a certificate: of a round that is over it needs none.
    """
    line = whole.line()
    hidden = ("outcome", *slot[1:]) if slot[0] == "certificate" else None
    line.alter = lambda asked, found: data if asked == slot else None if asked == hidden else found
    with whole.silo(1, line=line) as running:
        return Rounds(running.parts, session.current(running.home)).take_part(wait_s=0)


OWN_KINDS = ("manifest", "freeze", "certificate", "outcome")


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_a_silo_takes_no_other_document_and_no_flipped_bit_for_the_aggregators(stalled, kind):
    whole, log = stalled
    slot = (kind, 2, AGGREGATOR)
    own, entries, tried = whole.store.get(*slot), whole.history(1).counter, 0
    for other in (*(data for asked, data in log if asked != slot), *flips(own)):
        tried += 1
        with pytest.raises(REFUSALS):
            take_part_shown(whole, slot, other)
    assert tried > 30
    assert whole.progress(1).round == 1
    assert whole.history(1).counter == entries, "nothing was charged"
    assert Home(whole.root / "silo-1").promised_manifest(3) is None


def test_after_all_the_tampering_the_silo_still_settles_the_round(stalled, tmp_path):
    again = stalled[0].copied(tmp_path / "again")
    settled = take_part_shown(again, ("none", 0, 0), b"")
    assert (settled.round, settled.kind, settled.state.digest) == (2, "result", again.progress(2).state.digest)
    assert len(again.attempts(1, 2)) == 1


def test_a_silo_takes_no_flipped_bit_and_no_replay_in_the_set_up_of_an_epoch(ran):
    """Silo 1 loses its power before it reads the last confirmation; then it is shown other documents, one by one."""
    line = ran.line()

    def cut(slot, data):
        if slot == ("confirmation", 2, 3):
            raise PowerCut
        return data

    line.alter = cut

    def falls():
        with pytest.raises(PowerCut):
            enter_epoch(ran, 1, 2, line=line)

    def hub():
        with ran.coordinator() as coordinator:
            coordinator.new_epoch()

    together(hub, falls, *(functools.partial(enter_epoch, ran, s, 2) for s in (2, 3)))
    slots = [("roster", 2, AGGREGATOR), ("pair-seeds", 2, 2), ("confirmation", 2, 3)]
    replays = [ran.store.get(kind, 1, party) for kind, _, party in slots]
    for slot in slots:
        swaps = [ran.store.get(*other) for other in slots if other != slot]
        for changed in (*flips(ran.store.get(*slot)), *replays, *swaps):
            shown = ran.line()
            shown.alter = lambda asked, found, slot=slot, changed=changed: changed if asked == slot else found
            with pytest.raises(TrustError):
                enter_epoch(ran, 1, 2, line=shown)
        assert session.current(Home(ran.root / "silo-1")).number == 1
    assert enter_epoch(ran, 1, 2).number == 2
    settled, closed = ran.run(2)
    assert {settled[s][-1].state.digest for s in SILOS} == {closed[-1].state}


def test_flipped_calls_contracts_and_countersignatures_are_refused(ran):
    def line_showing(slot, changed):
        line = ran.line()
        line.alter = lambda asked, found: changed if asked == slot else found
        return line

    for changed in flips(ran.store.get("epoch", 1, AGGREGATOR)):
        with pytest.raises(TrustError):
            session.called(line_showing(("epoch", 1, AGGREGATOR), changed), ran.accepted, after=0)
    for changed in flips(ran.store.get("contract", 1, AGGREGATOR)):
        with pytest.raises((TrustError, ConfigError)):  # ConfigError: the changed terms contradict themselves
            membership.open_contract(changed)
    auditor = Home.create(ran.root / "auditor")
    for changed in flips(ran.store.get("countersignature", 1, 2)):
        with pytest.raises(TrustError):
            membership.verify_all_countersigned(line_showing(("countersignature", 1, 2), changed), ran.accepted, home=auditor)


# --- Power ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
def test_a_restart_of_everybody_between_any_two_documents_changes_nothing(whole, tmp_path, before):
    """After (or just before) a document, all four parties lose power and start again from their disks; then after another one."""
    reference = whole.copied(tmp_path / "undisturbed")
    reference.run(2, seeded=True)
    documents, cuts = len(reference.store.log), 0
    head = 5  # checkpoint, three cosignatures, and the head that they make: before the first round, and after each
    assert documents == 11 + head + 2 * (16 + head)
    while True:
        whole = whole.restarted(power=Power(stride(), before=before))
        try:
            whole.run(2, seeded=True)
        except PowerCut:
            cuts += 1
            assert cuts <= documents + 1
        else:
            break
    assert cuts >= (documents - 2) // (1 if "SILOQUY_FULL" in os.environ else MOST_STRIDE)  # the last head waits for the next round
    assert {whole.progress(s).state.digest for s in SILOS} == {reference.progress(1).state.digest}
    for number in (1, 2):
        assert whole.store.parties("upload", number) == SILOS
        assert {1} <= {len(whole.attempts(s, number)) for s in SILOS} <= {1, 2}


def test_an_upload_that_was_persisted_in_a_later_round_is_sent_again_as_it_is(ran):
    """The restart settles round 1 once more, and must not take the files of round 2 for its leftovers."""
    folder, line = ran.root / "silo-1" / "epoch" / "1", ran.line()

    real = line.put

    def put(kind, number, party, data):
        if kind == "upload":
            raise PowerCut
        real(kind, number, party, data)

    line.put = put

    def falls_and_goes_on():
        with ran.silo(1, line=line) as running:
            own = Rounds(running.parts, session.current(running.home))
            own._finished = 1  # its last word on round 1 is said
            with pytest.raises(PowerCut):
                own.take_part(wait_s=PATIENCE_S)
        persisted = Persisted.from_bytes((folder / "attempt").read_bytes())
        assert ran.store.entry("upload", 2, 1) is None
        (folder / ".attempt.0123456789ab").write_bytes(b"what a crash in the middle of a write leaves")
        ran.take_part(1, 2)
        return persisted

    persisted, *_ = together(
        falls_and_goes_on, *(functools.partial(ran.take_part, s, 2) for s in (2, 3)), functools.partial(ran.coordinate, 2)
    )
    assert ran.store.get("upload", 2, 1) == persisted.upload
    assert ran.attempts(1, 2) == [persisted.attempt.hex()], "charged once"
    assert {p.name for p in folder.iterdir()} == {"chain"}, "no secret outlives its round, not even half a file"


# --- Copies ---------------------------------------------------------------------------------------------------------------------


def test_two_silos_from_one_copied_home_are_found_out(ran):
    shutil.copytree(ran.root / "silo-1", ran.root / "clone")
    ends = {}

    def run(folder):
        with ran.silo(1, folder=folder) as running:
            try:
                ends[folder] = list(running.rounds(1))
            except SiloquyError as error:
                ends[folder] = error

    def once_both_computed(silo):
        while any(
            (ran.root / folder / "ledger.jsonl").read_bytes().count(b'"kind":"reserve"') < 2 for folder in ("silo-1", "clone")
        ):
            time.sleep(0.002)
        return ran.take_part(silo, 2)

    together(
        *(functools.partial(run, folder) for folder in ("silo-1", "clone")),
        *(functools.partial(once_both_computed, s) for s in (2, 3)),
        functools.partial(ran.coordinate, 2),
    )
    refused = [end for end in ends.values() if isinstance(end, SiloquyError)]
    assert len(refused) == 1
    assert isinstance(refused[0], TrustError), refused
    assert ran.store.latest("outcome") == 2


def test_a_clone_whose_upload_comes_second_is_an_equivocation(ran):
    shutil.copytree(ran.root / "silo-1", ran.root / "clone")
    line = ran.line()

    def first_goes():
        with pytest.raises(PowerCut):
            ran.take_part(1, 2, line=line)

    line.alter = lambda slot, data: (_ for _ in ()).throw(PowerCut) if slot[0] == "freeze" else data

    def second():
        ran.wait_for("upload", 2, 1)
        with ran.silo(1, folder="clone") as running, pytest.raises(Equivocation):
            list(running.rounds(1))
        ran.clock.skip(100.0)

    *_, closed = together(first_goes, second, functools.partial(ran.coordinate, 2))
    assert closed[-1].kind == "void"
    assert ran.store.parties("upload", 2) == (1,)


def test_one_home_takes_one_process(ran):
    with ran.silo(1):
        with pytest.raises(MachineError) as caught:
            ran.silo(1)
        assert caught.value.exit_code == 7
    home = Home(ran.root / "silo-1")
    with home.locked(), pytest.raises(MachineError, match="another process"), home.locked():
        pass
