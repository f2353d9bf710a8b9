# SPDX-License-Identifier: Apache-2.0
"""The basis round: its terms and its cost, whole federations that begin with one, and what a verifier makes of it."""

from __future__ import annotations

import functools
import shutil
import tomllib

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator import basis_draft, commands, enrolment
from aggregator.draft import Terms, draft, entry
from aggregator.reporting import recheck, report
from privacy import base_model, basis_round, federation, orthonormal, sketch, update_rule
from privacy.basis_round import BasisTerms, terms_of
from privacy.dp import accounting, ring
from privacy.dp.budget import Gate, Limits
from privacy.dp.entries import Commit, Plan, Reserve, Void
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import Unprotected
from privacy.errors import BudgetExhausted, ConfigError, PrivacyRefusal, RoundError, TrustError
from privacy.identity import keys
from privacy.messages import AGGREGATOR, EpochNote, Manifest, Signed, decode, encode
from privacy.spending import Spending, load_of, place_of
from privacy.update_rule import State
from silo import config, fixed_basis, membership, reading, restoring
from silo.home import Home
from silo.learning import evaluation
from silo.learning.staged import Staged
from tests import auditing, tiny_models
from tests.sessions import rows, tiny_model, write_rows
from tests.terms import contract_bytes
from tests.whole import BASIS, SILOS, Power, PowerCut, Whole, contribution, stride, together

pytestmark = pytest.mark.usefixtures("quick_polls")

PRIVATE = {"basis": "private"}
SKETCHED = {"shapes": [[4, 8], [24, 16]], "width": 3, "max_grad_norm": 0.7, "noise_multiplier": 5.0, "lattice_bits": 18}
"""The first module's gradient is sent whole, of the second a sketch."""
OFF = {"off": "no differential privacy", "noise_multiplier": None, "epsilon": None, "delta": None}
LOCAL = {"mode": "local", "steps_per_round": 2}
DELTA = 1e-5


def accepted_of(silos: int = 3, **changes) -> federation.Accepted:
    return federation.parse(contract_bytes(silos, **{"adapter": PRIVATE, "basis": SKETCHED, **changes}))


def raw_terms(**changes):
    """The same without differential privacy."""
    table = {name: value for name, value in SKETCHED.items() if name != "noise_multiplier"}
    return {"adapter": {"basis": "raw"}, "basis": table, "privacy": OFF, "sum": {"blocks": [[1, 2, 3]]}, **changes}


# --- The contract -----------------------------------------------------------------------------------------------------------------


def test_a_basis_round_is_governed_by_its_own_figures_and_every_other_round_by_the_contract():
    accepted = accepted_of()
    terms, at = accepted.terms, accepted.at(b"").terms
    assert isinstance(at, BasisTerms)
    assert (at.privacy.sampling_rate, at.privacy.max_grad_norm, at.privacy.noise_multiplier) == (1.0, 0.7, 5.0)
    assert at.dimension == 4 * 8 + 3 * (24 + 16)
    assert at.trainables == terms.dimension == 2 * 4 + 2 * 8 + 2
    assert federation.ring_plan(at) == ring.plan(
        silos=3, shares=2, dimension=152, sampling_rate=1.0, units=200, noise_multiplier=5.0, lattice_bits=18
    )
    assert (federation.mechanism(at).steps, federation.mechanism(at).sampling_rate) == (2, 1.0)
    assert accepted.at(b"x" * 32) is accepted
    assert accepted.in_round(26) is accepted
    assert accepted.in_round(152) == accepted.at(b"")
    plain = federation.parse(contract_bytes())
    assert plain.at(b"") is plain
    assert federation.whole_plan(plain.terms) == (federation.event(plain.terms),)


def test_in_local_mode_each_silos_noise_is_taken_for_itself_and_the_ring_holds_all_of_them():
    at = accepted_of(training=LOCAL).at(b"").terms
    plan = federation.ring_plan(at)
    assert (at.shares, plan.silos) == (1, 3)
    assert plan.share_variance >= 25 * 4**18, "the whole noise in each silo"
    assert 3 * plan.clamp + plan.headroom <= ring.RING_LIMIT
    assert set(federation.adversaries(at)) == {"outside", "insiders", "sum_broken"}
    assert federation.adversaries(at)["sum_broken"].shares == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"basis": "weights"}}, "with a table"),
        ({"basis": {**SKETCHED, "noise_multiplier": None}}, "basis.noise_multiplier = 0"),
        ({"adapter": {"basis": "raw"}}, "with differential privacy"),
        (raw_terms(adapter=PRIVATE), "without differential privacy"),
        (raw_terms(basis=SKETCHED), "basis.noise_multiplier = 5"),
        ({"basis": {**SKETCHED, "shapes": [[8, 8]]}}, "2 modules"),
        ({"basis": {**SKETCHED, "width": 1}}, "rank 2"),
        ({"basis": {**SKETCHED, "shapes": [[1, 8], [24, 16]]}}, "rank 2"),
        ({"basis": {**SKETCHED, "lattice_bits": 8}}, "lattice_bits = 8"),
        ({"basis": {**SKETCHED, "lattice_bits": 20}, "privacy": {"units": 20000, "delta": 1e-6}}, "may reach"),
        ({"basis": {**SKETCHED, "attempts": 0}}, "attempts"),
        ({"basis": {**SKETCHED, "shapes": [[2, 2], [2, 11]], "width": 2}}, "tells them apart"),
        ({"basis": {**SKETCHED, "rank": 2}}, "unknown field"),
    ],
)  # fmt: skip
def test_terms_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        accepted_of(**changes)


def test_without_the_table_it_is_refused():
    with pytest.raises(ConfigError, match="without a table"):
        federation.parse(contract_bytes(adapter=PRIVATE))


def test_raw_is_for_contracts_without_privacy_and_has_no_noise():
    at = federation.parse(contract_bytes(**raw_terms())).at(b"").terms
    assert federation.ring_plan(at).share_variance == 0
    assert isinstance(federation.event(at), Unprotected)


# --- Two mechanisms in one plan ---------------------------------------------------------------------------------------------------

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PARTS = {"sign": KEY.sign, "verify": lambda data, signature: KEY.public_key().verify(signature, data), "clock": lambda: 0.0}
A = "aa" * 32


def gate_of(ledger, accepted, *, epsilon=50.0):
    return Gate(
        ledger, Limits(epsilon=epsilon, delta=DELTA), plan=federation.event(accepted.terms), contract=A, steps_per_attempt=1,
        before=federation.event(accepted.at(b"").terms),
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", who="silo-1", **PARTS) as made:
        yield made


def test_two_mechanisms_one_bound(ledger):
    accepted = accepted_of()
    before, training = federation.whole_plan(accepted.terms)
    assert (before.steps, training.steps) == (2, 10)
    cost = gate_of(ledger, accepted).declare()
    assert cost == accounting.certify([before, training], DELTA)
    assert cost.epsilon > accounting.certify([training], DELTA).epsilon
    assert ledger.plan(A) == Plan(contract=A, run="", mechanism=training, before=before, epsilon=50.0, delta=DELTA)


def test_never_more_than_declared(ledger):
    gate = gate_of(ledger, accepted_of())
    gate.declare()
    assert gate.attempts_left == 11
    gate.admit(1, b"1" * 16, basis=True)
    gate.settle(1, "void")
    gate.admit(2, b"2" * 16, basis=True)
    with pytest.raises(BudgetExhausted, match="basis attempt 3, the plan has 2"):
        gate.admit(3, b"3" * 16, basis=True)
    for number in range(3, 13):
        gate.admit(number, bytes([number]) * 16)
    with pytest.raises(BudgetExhausted, match="attempt 11, the plan has 10"):
        gate.admit(13, b"x" * 16)
    assert gate.spent() == accounting.certify(federation.whole_plan(accepted_of().terms), DELTA)


def test_over_is_over(ledger):
    gate, accepted = gate_of(ledger, accepted_of()), accepted_of()
    gate.declare()
    gate.admit(1, b"1" * 16, basis=True)
    gate.settle(1, "result")
    assert gate.attempts_left == 10
    with pytest.raises(BudgetExhausted, match="basis attempt"):
        gate.admit(2, b"2" * 16, basis=True)
    before, training = federation.whole_plan(accepted.terms)
    wanted = accounting.certify([before.with_steps(1), training.with_steps(3)], DELTA).epsilon
    assert gate.forecast([3]) == [(3, wanted)]


def test_a_forecast_counts_the_basis_round_while_it_is_missing(ledger):
    gate, (before, training) = gate_of(ledger, accepted_of()), federation.whole_plan(accepted_of().terms)
    wanted = accounting.certify([before.with_steps(1), training.with_steps(2)], DELTA).epsilon
    assert gate.forecast([1, 3]) == [(1, accounting.certify([before.with_steps(1)], DELTA).epsilon), (3, wanted)]


def test_a_limit_below_the_whole_plan_refuses_it_and_writes_nothing(ledger):
    accepted = accepted_of()
    alone = accounting.certify([federation.event(accepted.terms)], DELTA).epsilon
    with pytest.raises(BudgetExhausted):
        gate_of(ledger, accepted, epsilon=alone).declare()
    assert ledger.counter == 1


def test_a_plan_with_another_basis_is_another_plan(ledger):
    gate_of(ledger, accepted_of()).declare()
    with pytest.raises(PrivacyRefusal, match="now its plan is another"):
        gate_of(ledger, accepted_of(basis={**SKETCHED, "noise_multiplier": 6.0})).declare()
    plain = Gate(ledger, Limits(epsilon=50.0, delta=DELTA), plan=federation.event(accepted_of().terms), contract="bb" * 32,
                 steps_per_attempt=1)  # fmt: skip
    plain.declare()
    with pytest.raises(PrivacyRefusal, match="no basis round"):
        plain.admit(1, b"1" * 16, basis=True)


def test_a_plan_without_basis_rounds_is_written_as_it_always_was():
    event = federation.event(federation.parse(contract_bytes()).terms)
    body = Plan(contract=A, run="r", mechanism=event, epsilon=3.0, delta=DELTA)
    assert list(msgspec.json.decode(msgspec.json.encode(body))) == ["contract", "run", "mechanism", "epsilon", "delta"]


# --- The state --------------------------------------------------------------------------------------------------------------------


def released(terms, seed: int = 0):
    """A sum that a basis round may have released."""
    return np.random.default_rng(seed).integers(-(10**6), 10**6, terms_of(terms).dimension)


def test_the_state_after_it_is_the_initial_one_with_the_digest_of_the_factors():
    terms = accepted_of().terms
    total = released(terms)
    after = update_rule.advance(update_rule.initial(terms), total, terms_of(terms))
    layout = sketch.layout(terms.adapter.modules, SKETCHED["shapes"], 3)
    assert after.basis == orthonormal.digest(sketch.factors_of(total.astype(np.float64), layout, 2))
    assert not after.theta.any()
    assert after.theta.size == 26
    assert after.applied == 0
    assert msgspec.structs.replace(after, basis=b"").digest == update_rule.initial(terms).digest
    assert State.from_bytes(after.to_bytes()).basis == after.basis


def test_every_later_state_digest_covers_it():
    terms = accepted_of().terms
    one, other = (update_rule.advance(update_rule.initial(terms), released(terms, seed), terms_of(terms)) for seed in (1, 2))
    step = np.arange(26, dtype=np.int64)
    for _ in range(3):
        one, other = (update_rule.advance(state, step, terms) for state in (one, other))
        assert one.digest != other.digest
        assert np.array_equal(one.theta, other.theta)
    assert one.applied == 3


@pytest.mark.parametrize("data", [b"siloquy state 2\0", b"siloquy state 2\0" + bytes(40), b"siloquy state 3\0" + bytes(64)])
def test_bytes_that_are_no_state_are_refused(data):
    with pytest.raises(TrustError, match="state"):
        State.from_bytes(data)


def test_a_sum_without_enough_directions_fixes_nothing():
    terms = accepted_of().terms
    flat = np.zeros(152, dtype=np.int64)
    with pytest.raises(RoundError) as refused:
        update_rule.advance(update_rule.initial(terms), flat, terms_of(terms))
    assert refused.value.code == "basis-too-flat"


def test_what_notes_compare_before_it_is_the_layout():
    terms = accepted_of().terms
    assert basis_round.pending(terms) == basis_round.pending(accepted_of(privacy={"noise_multiplier": 3.0}).terms)
    for other in ({**SKETCHED, "width": 4}, {**SKETCHED, "shapes": [[4, 8], [16, 24]]}):
        assert basis_round.pending(accepted_of(basis=other).terms) != basis_round.pending(terms)
    assert basis_round.pending(accepted_of(model={"digest": "11" * 32}).terms) != basis_round.pending(terms)


def test_basis_rounds_compose_with_the_training_rounds_of_their_version_as_planned():
    accepted = accepted_of()
    spending = Spending(versions={1: accepted}, first=1)
    load = load_of([place_of(1, basis=True), 1, 1, 1])
    assert load == ((-1, 1), (1, 3))
    before, training = federation.whole_plan(accepted.terms)
    wanted = accounting.certify([before.with_steps(1), training.with_steps(3)], DELTA)
    assert spending.certified(load, "insiders", DELTA) == wanted
    assert spending.steps(load) == 4


# --- Whole federations ------------------------------------------------------------------------------------------------------------

MODES = {
    "joint": (SILOS, {}),
    "local": (SILOS, {"training": LOCAL}),
    "shares": ((1, 2, 3, 4), {"sum": {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}}),
    "slices": ((1, 2, 3, 4), {"sum": {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1, "audit": "slices"}}),
    "raw": (SILOS, raw_terms()),
}


def created(root, mode="joint", **changes) -> Whole:
    silos, table = MODES[mode]
    return Whole.create(root, silos=silos, **{"adapter": PRIVATE, "basis": SKETCHED, **table, **changes})


@pytest.fixture(scope="module", params=sorted(MODES))
def finished(request, tmp_path_factory):
    """A federation of each mode after its basis round and two training rounds; its processes are gone."""
    whole = created(tmp_path_factory.mktemp("basis") / "federation", request.param)
    word = {} if whole.accepted.terms.is_private else {"limits": Limits(epsilon=50.0, delta=DELTA, without_privacy=True)}
    whole.run(3, **word)
    whole.close()
    return whole


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Joint mode, no round yet. Copied by each test."""
    return created(tmp_path_factory.mktemp("begun") / "federation")


@pytest.fixture
def whole(begun, tmp_path):
    whole = begun.copied(tmp_path / "federation")
    yield whole
    whole.close()


def lengths(whole):
    """How many numbers the vectors of each round have."""
    last = whole.store.latest("manifest")
    return [decode(decode(whole.store.get("manifest", n, AGGREGATOR), Signed).body, Manifest).dimension for n in range(1, last + 1)]


def charged(whole, silo=1):
    return whole.history(silo).charged(whole.accepted.digest.hex())


def test_the_first_round_fixes_the_factors_and_the_rounds_after_it_train_with_them(finished):
    whole = finished.restarted()
    assert lengths(whole) == [152, 26, 26]
    terms, states = whole.accepted.terms, [whole.progress(silo).state for silo in whole.silos]
    assert len({state.digest for state in states}) == 1
    assert states[0].applied == 2
    outcome = auditing.outcome_of(whole.home.evidence_folder, auditing.index_of(whole), 1)
    total = ring.lift(np.frombuffer(outcome.total, dtype="<u4"))
    factors = sketch.factors_of(total.astype(np.float64), basis_round.layout_of(terms), 2)
    assert states[0].basis == orthonormal.digest(factors)
    for silo in whole.silos:
        kept = fixed_basis.load(Home(whole.root / f"silo-{silo}"), states[0].basis)
        assert orthonormal.digest(kept) == states[0].basis
        one, steps = federation.event(whole.accepted.at(b"").terms).with_steps(1), terms.training.steps_per_round
        assert charged(whole, silo) == [one, federation.event(terms).with_steps(2 * steps)]
        assert whole.history(silo).plan(whole.accepted.digest.hex()).before == one.with_steps(2)


def test_a_verifier_computes_the_factors_again_and_all_holds(finished):
    found = auditing.verdict(finished.home.evidence_folder, auditing.index_of(finished), log=True,
                             pinned=[finished.accepted.digest.hex()])  # fmt: skip
    assert found.holds, found.failed
    assert not found.open
    assert found.recomputed == (1, 2, 3)
    assert found.state == finished.progress(1).state.digest.hex()
    terms = finished.accepted.terms
    if terms.is_private:
        one = federation.event(finished.accepted.at(b"").terms).with_steps(1)
        for place, each in enumerate(found.spent):
            steps = place * terms.training.steps_per_round
            events = [one, *([federation.event(terms).with_steps(steps)] if steps else [])]
            assert each.insiders == accounting.certify(events, DELTA).epsilon
    else:
        assert {each.insiders for each in found.spent} == {None}


def test_one_flipped_bit_is_named(finished, tmp_path):
    """In any document of the basis round."""
    folder, entries = auditing.evidence_of(finished, tmp_path), auditing.index_of(finished)
    kinds = ("manifest", "upload", "outcome", "freeze")
    mine = [each for each in entries if each.slot.number == 1 and each.slot.kind in kinds]
    for each in auditing.sampled(mine):
        path = folder / each.name
        data = path.read_bytes()
        path.write_bytes(auditing.flipped(data))
        assert each.slot in auditing.named(auditing.verdict(folder, entries))
        path.write_bytes(data)


def test_a_signed_lie_about_what_the_sum_fixes_is_named(finished, tmp_path):
    folder, entries = auditing.evidence_of(finished, tmp_path), auditing.index_of(finished)
    lie = update_rule.initial(finished.accepted.terms).digest
    changed, slot = auditing.resigned(finished, folder, entries, "outcome", 1, auditing.Outcome, next_state=lie)
    found = auditing.verdict(folder, changed)
    assert slot in auditing.named(found)
    assert any(check.slot == slot and check.what == "update rule" for check in found.failed)


def test_charged_before_computed(whole):
    """The ledger holds the whole basis round at the moment at which its first record would be read."""
    seen = []

    def contribute(state):
        seen.append((whole.history(1).entries[-1], state.basis))
        return contribution(1, whole.accepted.terms)(state)

    line = whole.line()
    jobs = [functools.partial(whole.take_part, silo, 1) for silo in (2, 3)]
    together(
        functools.partial(whole.take_part, 1, 1, line=line, contribute=contribute), *jobs, functools.partial(whole.coordinate, 1)
    )
    [(last, basis)] = seen
    assert isinstance(last, Reserve)
    assert (last.round, basis) == (1, b"")
    assert last.mechanism == federation.event(whole.accepted.at(b"").terms).with_steps(1)


def test_a_gate_that_refuses_reads_no_record(whole):
    """No budget is left for a second basis round; the records are not touched."""
    with whole.silo(1) as running:
        for attempt in (b"1" * 16, b"2" * 16):
            running.gate.admit(1, attempt, basis=True)
        with pytest.raises(BudgetExhausted):
            running.gate.admit(2, b"3" * 16, basis=True)


def void_round(whole, number):
    """Silo 3 falls before it sends its vector, and stays away until the deadline is over."""

    def falls():
        with pytest.raises(PowerCut):
            whole.take_part(3, number, line=whole.dying("upload", number))

    def hurry():
        whole.wait_for("upload", number, 1, 2)
        whole.clock.skip(100.0)

    jobs = [falls, *(functools.partial(whole.take_part, silo, number) for silo in (1, 2))]
    *_, closed, _ = together(*jobs, functools.partial(whole.coordinate, number), hurry)
    return closed[-1]


def test_a_void_basis_round_is_repeated_and_charged_again(whole):
    assert void_round(whole, 1).kind == "void"
    whole.run(3)
    assert lengths(whole) == [152, 152, 26]
    one = federation.event(whole.accepted.at(b"").terms).with_steps(1)
    assert [charged(whole, silo)[0] for silo in SILOS] == [one.with_steps(2)] * 3
    assert [type(body) for body in whole.history(1).entries[2:6]] == [Reserve, Void, Reserve, Commit]
    found = auditing.verdict(whole.home.evidence_folder, auditing.index_of(whole))
    assert found.holds
    assert (found.void, found.recomputed) == ((1,), (2, 3))


def test_no_more_basis_rounds_are_opened_than_the_plan_pays_for(tmp_path):
    whole = created(tmp_path / "federation", basis={**SKETCHED, "attempts": 1})
    assert void_round(whole, 1).kind == "void"
    with pytest.raises(RoundError, match="1 basis rounds ended without a result"):
        together(lambda: whole.coordinate(2))


def test_the_contracts_rounds_are_training_rounds(tmp_path):
    whole = created(tmp_path / "federation", training={"rounds": 1})
    whole.run(2)
    with pytest.raises(RoundError, match="the plan of 1 rounds is done"):
        together(lambda: whole.coordinate(3))


def test_a_restart_of_everybody_between_documents_changes_nothing(whole, tmp_path):
    reference = whole.copied(tmp_path / "undisturbed")
    reference.run(2, seeded=True)
    cuts = 0
    while True:
        whole = whole.restarted(power=Power(stride(), before=cuts % 2 == 0))
        try:
            whole.run(2, seeded=True)
        except PowerCut:
            cuts += 1
            assert cuts <= len(reference.store.log)
        else:
            break
    assert {whole.progress(silo).state.digest for silo in SILOS} == {reference.progress(1).state.digest}


def test_a_crash_after_the_file_of_factors_and_before_the_state_is_harmless(whole, monkeypatch):
    kept = Home.save_progress

    def dies(home, progress):
        if progress.state.basis and home.root.name == "silo-2" and not (home.root / "died").exists():
            (home.root / "died").touch()
            raise PowerCut
        kept(home, progress)

    monkeypatch.setattr(Home, "save_progress", dies)

    def stumbles():
        with pytest.raises(PowerCut):
            whole.take_part(2, 1)
        assert whole.progress(2).state.basis == b""
        whole.take_part(2, 1)

    together(stumbles, *(functools.partial(whole.take_part, silo, 1) for silo in (1, 3)), functools.partial(whole.coordinate, 1))
    assert len({whole.progress(silo).state.digest for silo in SILOS}) == 1
    assert whole.progress(2).state.basis


def in_a_new_epoch(whole, last, silos=SILOS):
    def coordinate():
        with whole.coordinator() as coordinator:
            coordinator.new_epoch()
            return coordinator.run_round(last)

    return together(*(functools.partial(whole.take_part, silo, last) for silo in silos), coordinate)[-1]


def test_epoch_notes_compare_the_factors_once_they_are_fixed(whole):
    whole.run(1)
    assert in_a_new_epoch(whole, 2).kind == "result"
    first, second = (
        {decode(decode(whole.store.get("epoch-note", epoch, silo), Signed).body, EpochNote).basis for silo in SILOS}
        for epoch in (1, 2)
    )
    assert first == {BASIS}, "what the silos were given to compare before the round"
    assert second == {whole.progress(1).state.basis}


def test_a_silo_that_missed_the_basis_round_follows_it_and_trains_on_its_factors(tmp_path):
    """Share mode: silo 4 falls in the basis round, whose sum is made without it."""
    whole = created(tmp_path / "federation", "shares")

    def falls():
        with pytest.raises(PowerCut):
            whole.take_part(4, 1, line=whole.dying("upload", 1))
        whole.store.looks.leave()

    closed = whole.run_hurried(1, falls, *(functools.partial(whole.take_part, silo, 1) for silo in (1, 2, 3)))
    assert [c.kind for c in closed] == ["result"]
    assert whole.progress(4).state.basis == b""
    whole.run(2)
    assert len({whole.progress(silo).state.digest for silo in whole.silos}) == 1
    digest = whole.progress(4).state.basis
    assert orthonormal.digest(fixed_basis.load(Home(whole.root / "silo-4"), digest)) == digest


# --- The file of factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["lost", "flipped", "foreign"])
def test_a_lost_or_changed_file_of_factors_is_made_again_from_the_board(whole, damage):
    whole.run(2)
    home, digest, terms = Home(whole.root / "silo-1"), whole.progress(1).state.basis, whole.accepted.terms
    right = home.basis_path.read_bytes()
    if damage == "lost":
        home.basis_path.unlink()
    elif damage == "flipped":
        home.basis_path.write_bytes(auditing.flipped(right))
    else:
        other = basis_round.factors(released(terms), terms)
        home.basis_path.write_bytes(fixed_basis.basis_file.save(other))
    with pytest.raises(TrustError):
        fixed_basis.load(home, digest)
    fixed_basis.ensure(home, whole.line(), terms, digest)
    assert home.basis_path.read_bytes() == right


def test_a_board_that_shows_another_sum_gives_no_factors(whole):
    whole.run(1)
    home, line = Home(whole.root / "silo-1"), whole.line()
    digest = whole.progress(1).state.basis
    home.basis_path.unlink()
    stands = decode(whole.store.get("outcome", 1, AGGREGATOR), Signed)
    outcome = decode(stands.body, auditing.Outcome)
    total = outcome.total[4:] + outcome.total[:4]
    other = encode(msgspec.structs.replace(stands, body=encode(msgspec.structs.replace(outcome, total=total))))
    line.alter = lambda slot, data: other if slot[0] == "outcome" and data is not None else data
    with pytest.raises(RoundError, match="no outcome on the board gives the basis"):
        fixed_basis.ensure(home, line, whole.accepted.terms, digest)
    assert not home.basis_path.exists()


# --- Restoring and old ledgers ----------------------------------------------------------------------------------------------------


def test_a_restored_silo_is_charged_each_round_as_what_it_was(whole):
    root = whole.root / "silo-2"
    with whole.silo(2):
        pass  # its plan is on the ledger
    shutil.copytree(root, whole.root / "backup")
    whole.run(3)
    before = charged(whole, 2)
    shutil.rmtree(root)
    shutil.copytree(whole.root / "backup", root)
    home = Home(root)
    with home.locked():
        restoring.restored(home, whole.line())
    assert charged(whole, 2) == before


def test_rounds_that_nobody_shows_are_charged_as_either_kind(whole):
    """The first is certainly a basis round; what the second was nobody knows."""
    whole.run(1)
    home, line = Home(whole.root / "silo-2"), whole.line()
    line.alter = lambda slot, data: None if slot[0] in ("manifest", "upload", "outcome", "checkpoint") else data
    shutil.rmtree(home.log_folder)
    home.log_folder.mkdir()
    (home.root / "promises" / "manifest-2").write_bytes(b"ab" * 32 + b"\n")
    home.ledger_path.write_bytes(b"".join(home.ledger_path.read_bytes().splitlines(keepends=True)[:2]))
    with home.locked():
        restoring.restored(home, line)
    before, training = (event.with_steps(1) for event in federation.whole_plan(whole.accepted.terms))
    assert charged(whole, 2) == [before.with_steps(2), training]


def test_an_old_ledger_reads(tmp_path):
    """One line of a plan as it was written before plans had two parts."""
    path = tmp_path / "ledger.jsonl"
    event = federation.event(federation.parse(contract_bytes()).terms)
    with Ledger.create(path, who="silo-1", **PARTS) as ledger:
        ledger.declare(contract=A, run="", mechanism=event, epsilon=3.0, delta=DELTA)
    assert b"before" not in path.read_bytes()
    assert History.read(path, verify=PARTS["verify"]).plan(A).before is None


def test_a_later_version_goes_on_without_a_basis_round(whole):
    """Under a version after the one that fixed the factors the plan has training rounds only."""
    whole.run(2)
    home = Home(whole.root / "silo-1")
    later = msgspec.structs.replace(whole.accepted, digest=b"v" * 32)
    assert reading.plan_before(whole.history(1), whole.accepted, home) is not None
    assert reading.plan_before(whole.history(1), later, home) is None
    assert reading.plan(whole.history(1), later, 2).steps == 10
    assert reading.plan(whole.history(1), later, 4).steps == 8


# --- With a real model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learning(tmp_path_factory):
    """A federation over a tiny BERT and the silos' own records, with what each silo computes; a basis and a training round done."""
    root = tmp_path_factory.mktemp("learning")
    model = tiny_model(root / "model")
    modules = tiny_models.MODULES["bert"][:3]
    linear = base_model.describe(model).linear
    whole = Whole.create(
        root / "federation",
        model={"name": str(model), "digest": base_model.digest(model), "hidden_size": 16},
        adapter={"rank": 3, "modules": modules, **PRIVATE},
        basis={"shapes": [list(linear[name]) for name in modules], "width": 4, "max_grad_norm": 1.0, "noise_multiplier": 1.0,
               "lattice_bits": 16},
        privacy={"lattice_bits": 16, "units": 60},
    )  # fmt: skip
    made = {}
    for silo in SILOS:
        folder = whole.root / f"silo-{silo}"
        write_rows(folder / "r.jsonl", rows(60, start_at=60 * silo))
        config.write_commented(
            folder / "silo.toml", name="n", organisation="N", url="https://x", fingerprint="", records="r.jsonl", epsilon=50,
            delta=1e-5, compute=config.Compute(device="cpu", precision="float32"),
        )  # fmt: skip
        home, settings = Home(folder), config.load(folder / "silo.toml")
        made[silo] = Staged(home, settings, whole.accepted.terms, whole.progress(silo).state)
    jobs = [functools.partial(whole.take_part, silo, 2, contribute=made[silo]) for silo in SILOS]
    together(*jobs, functools.partial(whole.coordinate, 2))
    yield whole, made
    whole.close()


def test_silos_make_a_basis_of_their_gradients_and_train_with_it(learning):
    whole, _ = learning
    states = [whole.progress(silo).state for silo in SILOS]
    assert len({state.digest for state in states}) == 1
    assert states[0].applied == 1
    assert states[0].theta[: 3 * 9].any(), "R moved, on the new factors"
    bases = fixed_basis.known(Home(whole.root / "silo-1"), states[0])
    bench = evaluation.open_bench(whole.accepted.terms, compute=config.Compute(device="cpu", precision="float32"), bases=bases)
    assert bench.model.basis_digest == states[0].basis
    assert 0.0 <= evaluation.evaluate(bench, states[0], whole.root / "silo-2" / "r.jsonl") <= 1.0


def test_before_the_round_there_is_no_model_and_the_self_test_takes_the_weights(learning):
    whole, _ = learning
    with pytest.raises(ConfigError, match="basis"):
        evaluation.open_bench(whole.accepted.terms)
    plain = basis_round.without(whole.accepted.terms)
    assert (plain.basis, plain.adapter.basis) == (None, "weights")
    assert fixed_basis.known(Home(whole.root / "silo-1"), update_rule.initial(whole.accepted.terms)) is None


def test_a_restarted_silo_builds_the_part_for_its_next_round(learning):
    whole, made = learning
    state, home = whole.progress(1).state, Home(whole.root / "silo-1")
    again = Staged(home, config.load(home.config_path), whole.accepted.terms, state)
    assert again.basis_digest == made[1].basis_digest == basis_round.pending(whole.accepted.terms)
    assert again(state).shape == (whole.accepted.terms.trainables,)
    assert len(again.unit_ids) == 60


# --- Report and draft -----------------------------------------------------------------------------------------------------------


def test_a_report_counts_the_basis_round_and_verify_makes_it_again(finished):
    terms = finished.accepted.terms
    finished.home.facts_path.write_text('{"lora_width": 1, "simulated": false}')
    facts = commands.build_report(finished.home.root)
    assert [each.basis for each in facts.rounds] == [True, False, False]
    if terms.is_private:
        before, training = (event.with_steps(1) for event in federation.whole_plan(terms))
        events = [before, training.with_steps(2 * terms.training.steps_per_round)]
        assert facts.accounting.spent.epsilon == accounting.certify(events, DELTA).epsilon
        assert [(each.basis, each.rounds) for each in facts.accounting.charged] == [(True, 1), (False, 2)]
        assert [(each.basis, each.rounds) for each in facts.accounting.planned] == [(True, 1), (False, 10)]
        assert any("basis" in line and "released" in line for line in facts.composition)
    record = report.encode(facts)
    found = auditing.verdict(
        finished.home.evidence_folder, auditing.index_of(finished), report=(record, None), again=recheck.recheck
    )
    assert found.holds, [check for check in found.checks if check.status == "failed"]


def test_before_the_basis_round_the_plan_has_every_attempt(begun):
    begun.home.facts_path.write_text('{"lora_width": 1, "simulated": false}')
    facts = commands.build_report(begun.home.root)
    assert [(each.basis, each.rounds) for each in facts.accounting.planned] == [(True, 2), (False, 10)]
    assert facts.accounting.plan.epsilon == accounting.certify(federation.whole_plan(begun.accepted.terms), DELTA).epsilon


def drafted(**changes):
    """A completed draft of three members, and its contract."""
    public = keys.PublicIdentity(name="hub", sign_key=bytes(32), seal_key=bytes(keys.SEAL_KEY_BYTES), ml_dsa_key=bytes(1952))
    terms = Terms(
        name="t", expires="2099-12-31", labels=("a", "b"), model=federation.Model(name="m", digest="00" * 32, hidden_size=8),
        modules=("one", "two"), units=300, rounds=12, **{"basis": "private", "shapes": ((24, 16), (16, 24)), "rank": 2, **changes},
    )  # fmt: skip
    members = [
        federation.Member(id=n, name=f"silo-{n}", organisation="O", sign_key=f"{n:064x}") for n in (1, 2, 3)
    ]  # fmt: skip
    text = enrolment.complete(draft(terms, public) + "".join(entry(member) for member in members))
    return text, federation.parse(text.encode()).terms


def test_a_draft_has_the_table_and_its_noise_is_calibrated_with_it():
    text, terms = drafted()
    assert terms.basis.shapes == ((24, 16), (16, 24))
    assert (terms.basis.width, terms.basis.noise_multiplier, terms.basis.attempts) == (4, 10.0, 2)
    delta = terms.privacy.delta
    assert accounting.certify(federation.whole_plan(terms), delta).epsilon <= 8.0
    less = msgspec.structs.replace(terms.privacy, noise_multiplier=terms.privacy.noise_multiplier - 1e-4)
    assert accounting.certify(federation.whole_plan(msgspec.structs.replace(terms, privacy=less)), delta).epsilon > 8.0
    assert set(tomllib.loads(text)["basis"]) == set(federation.Basis.__struct_fields__)


def test_a_next_version_chooses_the_basis_rounds_lattice_anew():
    text, terms = drafted()
    again = basis_draft.reopened(text)
    assert again.count('lattice_bits = "auto"') == 1
    assert basis_draft.filled(again, terms.basis.lattice_bits) == text
    other = tomllib.loads(basis_draft.filled(again, 1))
    assert (other["basis"]["lattice_bits"], other["privacy"]["lattice_bits"]) == (1, terms.privacy.lattice_bits)
    plain = "[privacy]\nlattice_bits = 20\n\n[sum]\n"
    assert basis_draft.reopened(plain) == plain


def test_a_raw_draft_is_for_those_without_privacy_and_says_it_in_capitals():
    text, terms = drafted(basis="raw", without_privacy=True)
    assert terms.basis.noise_multiplier == 0.0
    assert "RAW: no noise at all" in text
    for basis, without in (("raw", False), ("private", True)):
        with pytest.raises(ConfigError, match=f"the basis {basis} is for contracts"):
            drafted(basis=basis, without_privacy=without)


def test_a_silo_reads_what_the_basis_round_is_before_it_agrees():
    said = "\n".join(membership.terms_in_words(accepted_of()))
    assert "first a basis round, at most 2 times: every unit enters" in said
    assert "it is part of the epsilon above" in said
    loud = "\n".join(membership.terms_in_words(federation.parse(contract_bytes(**raw_terms()))))
    assert "NO NOISE" in loud
    assert "RAW BASIS" in loud
    assert "basis round" not in "\n".join(membership.terms_in_words(federation.parse(contract_bytes())))
