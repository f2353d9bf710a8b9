# SPDX-License-Identifier: Apache-2.0
"""The coordinator: killed anywhere it goes on, closes what cannot be summed, and stops where digests differ."""

from __future__ import annotations

import pytest

from aggregator import rounds, states
from aggregator.coordinator import coordinating
from aggregator.store import Store
from privacy import update_rule
from privacy.errors import ConfigError, MachineError, RoundError, TrustError
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR, Acknowledgement, Confirmation, Release, Signed, Upload, decode
from tests.federation import HUB, Federation, Remembering, Stopped, silo_identity, upload_of


@pytest.fixture
def federation(tmp_path):
    made = Federation(tmp_path)
    yield made
    made.store.close()


def outcome(federation, number):
    opened = rounds.round_in(federation.store, federation.accepted, number)
    return rounds.outcome_in(federation.store, federation.accepted, opened)[1]


def drive(federation, coordinator, last=2):
    coordinator.ensure_countersigned()
    coordinator.ensure_epoch()
    while coordinator.next_round <= last:
        coordinator.run_round(coordinator.next_round)
    return coordinator.run_round(last)


def test_rounds_reach_the_state_that_the_update_rule_gives_everywhere(federation):
    coordinator = federation.coordinator()
    closed = drive(federation, coordinator, 3)
    assert closed.kind == "result"
    assert closed.state == coordinator.state().digest == federation.reached([1, 2, 3]).digest
    assert all(silo.state.digest == closed.state for silo in federation.silos)
    assert coordinator.next_round == 4


def test_progress_counts_the_arrivals_of_every_step(federation):
    drive(federation, federation.coordinator(), 1)
    steps = {event.step: event for event in federation.events}
    assert list(steps) == [
        "countersignature", "epoch-note", "pair-seeds", "confirmation", "cosignature", "upload", "consent", "release", "outcome",
        "acknowledgement",
    ]  # fmt: skip
    assert all(event.arrived == event.expected == 3 for event in steps.values())
    assert all(event.round == (0 if step == "countersignature" else 1) for step, event in steps.items())


class Mortal(Remembering):
    """A store in whose process the power fails just before or just after the n-th new document."""

    def __init__(self, federation, at, *, after):
        super().__init__(federation.home.evidence_folder, federation.home.database_url(federation.home.config()))
        self.left, self.after = at, after

    def put_once(self, kind, number, party, data, *, received_at):
        self.left -= self.entry(kind, number, party) is None
        if self.left == 0 and not self.after:
            raise Stopped
        done = super().put_once(kind, number, party, data, received_at=received_at)
        if self.left == 0:
            raise Stopped
        return done


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 11))  # epoch, roster, and two rounds of manifest, freeze, certificate, outcome
def test_killed_at_any_document_it_goes_on_to_the_same_model(federation, at, after):
    store = Mortal(federation, at, after=after)
    with pytest.raises(Stopped):
        drive(federation, federation.coordinator(store=store))
    store.close()
    closed = drive(federation, federation.coordinator())
    assert closed.state == federation.reached([1, 2]).digest
    assert all(silo.state.digest == closed.state for silo in federation.silos)


@pytest.mark.parametrize("at", range(1, 30, 3))
def test_killed_while_waiting_or_reporting_it_goes_on(federation, at):
    left = [at]

    def dying(call):
        def wrapped(argument):
            left[0] -= 1
            if left[0] == 0:
                raise Stopped
            return call(argument)

        return wrapped

    with pytest.raises(Stopped):
        drive(federation, federation.coordinator(sleep=dying(federation.sleep), progress=dying(federation.events.append)))
    assert drive(federation, federation.coordinator()).state == federation.reached([1, 2]).digest


def test_killed_again_and_again_it_still_arrives(federation):
    for _ in range(10):
        store = Mortal(federation, 1, after=True)
        with pytest.raises(Stopped):
            drive(federation, federation.coordinator(store=store))
        store.close()
    assert drive(federation, federation.coordinator()).state == federation.reached([1, 2]).digest


@pytest.mark.parametrize("kind", ["upload", "consent", "release"])
def test_a_silent_silo_closes_the_round_and_the_next_one_goes_on(federation, kind):
    coordinator = federation.ready()
    federation.silos[1].withhold.add(kind)
    closed = coordinator.run_round(1)
    assert (closed.kind, closed.reason) == ("void", "absent")
    assert closed.seconds >= 10
    assert closed.state == update_rule.initial(federation.accepted.terms).digest
    assert outcome(federation, 1).total == b""
    federation.silos[1].withhold.clear()
    assert coordinator.run_round(2).state == federation.reached([2]).digest


@pytest.mark.parametrize(("allowed", "last"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_as_many_void_rounds_in_a_row_as_the_contract_names_stop_it_for_good(tmp_path, allowed, last):
    federation = Federation(tmp_path, sum={"max_void_rounds": allowed})
    coordinator = federation.ready()
    federation.silos[2].withhold.add("upload")
    for number in range(1, last):
        assert coordinator.run_round(number).kind == "void"
    with pytest.raises(RoundError, match=f"{last} rounds in a row were void .* allows {allowed}") as caught:
        coordinator.run_round(last)
    assert caught.value.exit_code == 6
    federation.silos[2].withhold.clear()
    with pytest.raises(RoundError, match="rounds in a row were void"):
        federation.coordinator().run_round(last + 1)
    assert federation.store.latest("manifest") == last


def test_rejected_rounds_count_like_void_ones_and_stop_it_for_good(tmp_path, monkeypatch):
    federation = Federation(tmp_path, sum={"max_void_rounds": 3})
    coordinator = federation.ready()
    assert coordinator.run_round(1).reason == ""
    federation.silos[2].withhold.add("upload")
    assert coordinator.run_round(2).kind == "void"
    federation.silos[2].withhold.clear()
    monkeypatch.setattr(update_rule, "accepts", lambda total, terms, **_: False)
    rejected = coordinator.run_round(3)
    assert (rejected.kind, rejected.reason) == ("result", "rejected")
    with pytest.raises(RoundError, match=r"3 rounds in a row were void or rejected .*absent, rejected.* allows 3"):
        coordinator.run_round(4)
    assert {silo.settled for silo in federation.silos} == {4}, "every silo has acknowledged it"
    with pytest.raises(RoundError, match="rounds in a row were void or rejected"):
        federation.coordinator().run_round(5)
    assert federation.store.latest("manifest") == 4


def test_a_result_between_void_rounds_starts_the_count_again(tmp_path):
    federation = Federation(tmp_path, sum={"max_void_rounds": 2})
    coordinator = federation.ready()
    for number in range(1, 6):
        federation.silos[2].withhold = {"upload"} if number % 2 else set()
        assert coordinator.run_round(number).kind == ("void" if number % 2 else "result")


def test_missing_members_are_named_at_the_deadline(federation):
    federation.silos[0].withhold.add("countersignature")
    with pytest.raises(RoundError, match=r"countersignature 1 from silos \[1\]"):
        federation.coordinator().ensure_countersigned()
    federation.silos[0].withhold = {"confirmation"}
    with pytest.raises(RoundError, match=r"confirmation 1 from silos \[1\]") as caught:
        federation.coordinator().ensure_epoch()
    assert caught.value.facts["missing"] == [1]
    federation.silos[0].withhold.clear()
    assert federation.coordinator().ensure_epoch().number == 1  # the same epoch goes on


def test_an_epoch_that_broke_is_followed_by_a_new_one(federation):
    silo = federation.silos[1]

    def wrong(data):
        stated = decode(decode(data, Signed).body, Confirmation)
        if stated.epoch > 1:
            return data
        tags = tuple((peer, bytes(32)) for peer, _ in stated.tags)
        return silo.sign("confirmation", decode(data, Signed).context, Confirmation(epoch=1, silo=2, tags=tags))

    silo.alter["confirmation"] = wrong
    with pytest.raises(TrustError, match=r"confirmation of silo 2|different pair secrets"):
        federation.ready()
    coordinator = federation.coordinator()
    assert coordinator.ensure_epoch().number == 2
    assert coordinator.run_round(1).state == federation.reached([1]).digest


def test_a_new_epoch_between_rounds_and_never_during_one(federation):
    coordinator = federation.ready()
    coordinator.run_round(1)
    assert coordinator.new_epoch().number == 2
    assert coordinator.run_round(2).state == federation.reached([1, 2]).digest
    federation.stall(3, "upload", 2)
    with pytest.raises(RoundError, match="round 3 is open"):
        federation.coordinator().new_epoch()


def test_a_faulty_upload_voids_the_round_before_anyone_consents_and_names_the_silo(federation):
    coordinator = federation.ready()
    silo = federation.silos[1]

    def broken(data):
        upload = upload_of(data)
        garbage = Upload(header=upload.header, sealed=upload.sealed[:-1] + bytes([upload.sealed[-1] ^ 1]))
        return silo.sign("upload", silo.chain.context, garbage)  # by its own hand: nobody else could

    silo.alter["upload"] = broken
    with pytest.raises(TrustError, match="the masked vector of silo 2 does not open"):
        coordinator.run_round(1)
    assert outcome(federation, 1).kind == "void"
    assert outcome(federation, 1).reason.startswith("refused: ")
    assert federation.store.entry("freeze", 1, AGGREGATOR) is None
    silo.alter.clear()
    assert federation.coordinator().run_round(2).state == federation.reached([2]).digest


def test_a_faulty_release_voids_the_round(federation):
    coordinator = federation.ready()
    federation.stall(1, "release", 2)
    silo = federation.silos[1]
    body = decode(decode(silo.held["release", 1], Signed).body, Release)
    forged = Release(round_ctx=body.round_ctx, silo=2, frozen=body.frozen, sealed=bytes(len(body.sealed)))
    silo.held["release", 1] = silo.sign("release", silo.chain.context, forged)
    with pytest.raises(TrustError, match="the released seed of silo 2 does not open"):
        coordinator.run_round(1)
    assert outcome(federation, 1).kind == "void"


def test_differing_model_digests_stop_everything_and_name_the_silo(federation):
    coordinator = federation.ready()
    silo = federation.silos[2]

    def other_state(data):
        stated = decode(decode(data, Signed).body, Acknowledgement)
        lie = Acknowledgement(round_ctx=stated.round_ctx, silo=3, outcome=stated.outcome, state=bytes(32))
        return silo.sign("acknowledgement", silo.chain.context, lie)

    silo.alter["acknowledgement"] = other_state
    for again in (coordinator, federation.coordinator()):
        with pytest.raises(RoundError, match="model digests differ") as caught:
            again.run_round(1)
        assert caught.value.facts["silos"] == [3]
    with pytest.raises(RoundError, match="model digests differ"):
        federation.coordinator().run_round(2)
    assert federation.store.latest("manifest") == 1


def test_the_next_round_waits_for_all_acknowledgements_of_the_last(federation):
    federation.ready()
    federation.stall(1, "acknowledgement", 2)
    federation.silos[1].withhold.add("acknowledgement")
    with pytest.raises(RoundError, match=r"acknowledgement 1 from silos \[2\]"):
        federation.coordinator().run_round(2)
    assert federation.store.latest("manifest") == 1


def test_rounds_are_in_order_within_the_plan_and_before_expiry(tmp_path):
    federation = Federation(tmp_path, training={"rounds": 1})
    coordinator = federation.ready()
    with pytest.raises(RoundError, match="out of order"):
        coordinator.run_round(2)
    federation.clock.now = 4_200_000_000.0
    with pytest.raises(ConfigError, match="expired on 2099-12-31"):
        coordinator.run_round(1)
    federation.clock.now = 1_800_000_000.0
    coordinator.run_round(1)
    with pytest.raises(RoundError, match="plan of 1 rounds is done"):
        coordinator.run_round(2)


def test_the_cached_state_is_believed_only_with_the_outcomes_digest(federation):
    federation.ready().run_round(1)
    path = federation.home.state_folder / "1.safetensors"
    wanted = federation.reached([1]).digest
    states.save(federation.home.state_folder, 1, federation.reached([1, 2]))
    assert federation.coordinator().state().digest == wanted
    for damaged in (b"", b"\xff" * 64, path.read_bytes()[:-8]):
        path.write_bytes(damaged)
        assert federation.coordinator().state().digest == wanted
    assert states.load(federation.home.state_folder, 1, wanted).digest == wanted


def test_old_states_are_let_go(federation):
    drive(federation, federation.coordinator(), 4)
    assert sorted(path.name for path in federation.home.state_folder.iterdir()) == ["3.safetensors", "4.safetensors"]


def test_damaged_evidence_stops_it_without_closing_the_round(federation):
    federation.ready()
    federation.stall(1, "consent", 2)
    digest = federation.store.entry("upload", 1, 3).digest.hex()
    path = federation.home.evidence_folder / digest
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TrustError, match="evidence is damaged"):
        federation.coordinator().run_round(1)
    assert federation.store.entry("outcome", 1, AGGREGATOR) is None
    path.write_bytes(whole)
    assert federation.coordinator().run_round(1).kind == "result"


def test_one_coordinator_per_home_and_only_the_contracts_own(federation):
    parts = {"store": federation.store, "clock": federation.clock, "sleep": federation.sleep, "progress": federation.events.append}
    with coordinating(federation.home, identity=HUB, **parts) as coordinator:
        assert coordinator.next_round == 1
        with pytest.raises(MachineError, match="another process"), coordinating(federation.home, identity=HUB, **parts):
            pass
    for wrong in (silo_identity(1), Identity(name="hub", sign_seed=bytes(32), receive_seed=bytes(32))):
        with pytest.raises(ConfigError), coordinating(federation.home, identity=wrong, **parts):
            pass


def test_without_a_contract_there_is_nothing_to_coordinate(tmp_path, federation):
    empty = Store(tmp_path / "other", f"sqlite:///{tmp_path / 'other.sqlite'}")
    parts = {"clock": federation.clock, "sleep": federation.sleep, "progress": federation.events.append}
    with pytest.raises(ConfigError, match="no contract"), coordinating(federation.home, store=empty, identity=HUB, **parts):
        pass
